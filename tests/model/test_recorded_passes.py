"""Passes that run from a recording give what the modules give, to the last digit."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.textbook import textbook_loss
from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.data.batching import Batch
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.techniques.recorder import Recorder
from coconut_ds.model.techniques.recordings import LayerRecording
from coconut_ds.thoughts import ThoughtSettings, build_thought
from tests.model import lora_cases
from tests.model.cases import (
    EQUAL_ROWS,
    HIDDEN,
    SIZES,
    assert_same_gradients,
    gradients,
    loss_and_gradients,
    make_batch,
    make_coconut,
    make_model,
)

# (question, latents, answer): the start, width and length of the passes change.
LENGTHS = ((9, 4, 3), (10, 4, 3), (12, 4, 4), (11, 4, 5), (8, 3, 3), (14, 4, 4), (9, 4, 6), (12, 4, 3))
BATCHES = [make_batch((rows, (4, 1, 5), (6, 2, 4)), seed) for seed, rows in enumerate(LENGTHS)]


def train(coconut, recorded, batches=BATCHES):
    """Losses and gradients of a few steps."""
    assert (coconut.techniques.recorded is not None) == recorded
    results = []
    torch.manual_seed(3)
    optimizer = torch.optim.SGD([p for p in coconut.parameters() if p.requires_grad], lr=1e-3)
    for batch in batches:
        coconut.zero_grad()
        loss = coconut(batch)
        loss.backward()
        optimizer.step()
        results.append({"loss": loss.detach(), **gradients(coconut)})
    return results


def assert_identical(ours, theirs):
    for step, expected in zip(ours, theirs, strict=True):
        assert step.keys() == expected.keys()
        assert all(torch.equal(x, expected[name]) for name, x in step.items())


def kinds(coconut):
    """What is known of passes of one column, and of wide ones."""
    return list(coconut.techniques.recorded.kinds.values())


def layer_kinds(coconut):
    """What is known of the first passes of each layer."""
    return [list(kinds.values()) for _, kinds in coconut.techniques.recorded.layers.values()]


@pytest.mark.parametrize(
    "architecture, checkpointing, dropout",
    [
        ("gpt2", "none", 0.2),
        ("gpt2", "layers", 0.0),
        ("gpt2", "layers", 0.2),
        ("llama", "none", 0.0),
        ("llama", "layers", 0.0),
        ("qwen2", "none", 0.2),
        ("mixed_windows", "none", 0.0),
    ],
)
def test_no_digit_changes(architecture, checkpointing, dropout):
    settings = LatentMemory(activation_checkpointing=checkpointing)
    coconut = make_coconut(architecture, settings, dropout)
    ours = train(coconut, recorded=True)
    usual = make_coconut(architecture, replace(settings, recorded_passes=False), dropout)
    assert_identical(ours, train(usual, recorded=False))
    short, wide = kinds(coconut)
    assert short.programs.keys() == {1}
    # A recording does not know the random state that checkpointed layers go back to.
    is_random = checkpointing == "layers" and dropout > 0
    assert wide.is_refused if is_random else 0 in wide.programs
    layers = layer_kinds(coconut)
    # All but the last without checkpointing.
    assert len(layers) == coconut.causal_lm.config.num_hidden_layers - (checkpointing == "none")
    assert all(kind.is_refused if is_random else 0 in kind.programs for (kind,) in layers)


@pytest.mark.parametrize("model_type", ["phi3", "granite", "smollm3", "glm"])
def test_copies_of_llamas_layers(model_type):
    """Architectures whose norm and MLP are Llama's under another name have the same operators."""
    config = AutoConfig.for_model(
        model_type,
        **(SIZES | {"num_hidden_layers": 2, "head_dim": 8, "max_position_embeddings": 64}),
        num_key_value_heads=2,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    textbook = copy.deepcopy(model)

    def coconut(**settings):
        thought = build_thought("last_hidden", HIDDEN, ThoughtSettings())
        return Coconut(copy.deepcopy(model), thought, LatentMemory(**settings)).train()

    ours = coconut()
    norms = {type(module).__name__ for module in ours.modules() if "norm" in type(module).__name__.lower()}
    assert norms == {"FusedRmsNorm"}
    steps = train(ours, recorded=True)
    assert_identical(steps, train(coconut(recorded_passes=False), recorded=False))
    assert kinds(ours)[0].programs.keys() == {1}
    loss = textbook_loss(textbook, BATCHES[0])
    loss.backward()
    assert steps[0].pop("loss").item() == pytest.approx(loss.item(), rel=1e-5)
    expected = {f"base.{name}": gradient for name, gradient in gradients(textbook).items()}
    assert_same_gradients(steps[0], expected)


@pytest.mark.parametrize("checkpointing", ["none", "layers"])
def test_single_passes_and_accumulated_gradients(checkpointing):
    """Hooks of weights see one complete gradient each, layer by layer, as ZeRO needs it."""
    settings = LatentMemory(activation_checkpointing=checkpointing)
    batches = [make_batch(((rows, 0, 3 + rows % 3), (4, 0, 3))) for rows in (9, 10, 12, 11, 8)]
    coconut, usual = (
        make_coconut("gpt2", settings),
        make_coconut("gpt2", replace(settings, recorded_passes=False)),
    )
    assert_identical(train(coconut, True, batches + BATCHES), train(usual, False, batches + BATCHES))
    assert layer_kinds(coconut)
    assert all(
        len(kinds) == 2 and all(0 in kind.programs for kind in kinds) for kinds in layer_kinds(coconut)
    )
    orders = []
    for model in (coconut, usual):
        orders.append([])
        for name, weight in model.causal_lm.named_parameters():
            weight.register_post_accumulate_grad_hook(lambda _, own=orders[-1], name=name: own.append(name))
        model.zero_grad()
        losses = [model(batch) for batch in (batches[0], BATCHES[0], BATCHES[1])]  # all before a backward
        for loss in losses:
            loss.backward()
    ours, theirs = (sorted(order) for order in orders)
    assert ours == theirs
    layers = [name.split(".")[2] for name in orders[0] if ".h." in name and "ln" not in name]
    third = len(layers) // 3
    assert layers[:third] == sorted(layers[:third], reverse=True)
    assert_identical([gradients(coconut)], [gradients(usual)])


@pytest.mark.parametrize("architecture, heads", [("gpt2", 4), ("llama", 4), ("llama", 2), ("qwen3", 2)])
def test_one_row_with_as_many_columns_as_heads(architecture, heads):
    """Transposed columns and heads of equal number have the shape that they had."""
    batches = [make_batch(((question, 2, heads),), seed) for seed, question in enumerate([heads] * 3 + [9])]
    coconut = make_coconut(architecture, LatentMemory())
    usual = make_coconut(architecture, LatentMemory(recorded_passes=False))
    assert_identical(train(coconut, True, batches), train(usual, False, batches))
    assert all(kind.recordings for kind in kinds(coconut))


def lora_batch(question, latents, answer, seed):
    ids = torch.randint(
        1, 35, (2, question + latents + answer), generator=torch.Generator().manual_seed(seed)
    )
    ids[:, question : question + latents] = lora_cases.LATENT
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, :2] = 0
    labels[:, : question + latents] = -100
    return Batch.from_padded(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), labels, lora_cases.LATENT)


@pytest.mark.parametrize(
    "family, dropout, checkpointing",
    [("gpt2", 0.1, "none"), ("gpt2", 0.0, "layers"), ("llama_untied", 0.0, "layers")],
)
def test_no_digit_of_lora_changes(family, dropout, checkpointing):
    batches = [lora_batch(*lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    memory = LatentMemory(activation_checkpointing=checkpointing)
    coconut, usual = (
        lora_cases.coconut(family, latent_memory=memory, lora_dropout=dropout).train() for _ in range(2)
    )
    usual.techniques.recorded = None
    assert_identical(train(coconut, True, batches), train(usual, False, batches))
    short, wide = kinds(coconut)
    assert 1 in short.programs and 0 in wide.programs
    assert layer_kinds(coconut)
    assert all(0 in kind.programs for (kind,) in layer_kinds(coconut))


def trained():
    coconut = make_coconut("gpt2", LatentMemory())
    train(coconut, recorded=True)
    assert all(kind.programs for kind in kinds(coconut))
    return coconut


def test_two_backwards_of_one_graph():
    coconut, batch = trained(), BATCHES[0]
    once = loss_and_gradients(coconut, batch)[1]
    coconut.zero_grad()
    loss = coconut(batch)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, gradient in gradients(coconut.causal_lm).items():
        torch.testing.assert_close(gradient, 2 * once[name])
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


@pytest.mark.parametrize("change", ["hook", "global hook", "frozen", "replaced", "eval"])
def test_a_changed_model_runs_as_changed(change):
    """A recording does not outlive what it was made of."""
    coconut, batch = trained(), BATCHES[0]
    block, seen = coconut.causal_lm.transformer.h[1], []
    handle = None
    if change == "hook":
        block.register_forward_hook(lambda *args: seen.append(1))
    elif change == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(1))
    elif change == "replaced":
        block.mlp.c_fc.weight = nn.Parameter(2 * block.mlp.c_fc.weight.detach())
    elif change == "frozen":
        block.ln_1.weight.requires_grad_(False)
    else:
        block.eval()
    loss, ours = loss_and_gradients(coconut, batch)
    coconut.techniques.recorded = None
    seen_before = len(seen)
    expected, theirs = loss_and_gradients(coconut, batch)
    if handle is not None:
        handle.remove()
    assert loss == expected and ours.keys() == theirs.keys()
    assert all(torch.equal(d, theirs[name]) for name, d in ours.items())
    assert seen_before == len(seen) - seen_before


def test_a_copied_model_makes_its_own_recordings():
    coconut, batch = trained(), BATCHES[0]
    copied = copy.deepcopy(coconut)
    assert not kinds(copied)
    loss, ours = loss_and_gradients(copied, batch)
    expected, theirs = loss_and_gradients(coconut, batch)
    assert loss == expected
    assert all(torch.equal(d, theirs[name]) for name, d in ours.items())


def test_weights_that_need_their_gradient_in_every_pass_are_refused():
    """OPT looks its positions up in a module of its own."""
    coconut = make_coconut("opt", LatentMemory())
    batches = [make_batch(EQUAL_ROWS)] * 3
    usual = make_coconut("opt", LatentMemory(recorded_passes=False))
    assert_identical(train(coconut, True, batches), train(usual, False, batches))
    assert all(kind.is_refused for kind in kinds(coconut))


def divided_wrong(recording, hidden_size):
    return "a test"


def given_wrong(recorder, values):
    recorder.reason = "a test"


@pytest.mark.parametrize(
    "kind, name, function", [(LayerRecording, "_divide", divided_wrong), (Recorder, "give", given_wrong)]
)
def test_a_layer_that_cannot_be_recorded_runs_as_usual(monkeypatch, kind, name, function):
    monkeypatch.setattr(kind, name, function)
    coconut, usual = make_coconut("gpt2", LatentMemory()), make_coconut("gpt2", LatentMemory())
    usual.techniques.recorded = None
    assert_identical(train(coconut, True), train(usual, False))
    assert all(kind.is_refused for (kind,) in layer_kinds(coconut))


class Wrapped(nn.Module):
    """A module in whose place a function of it runs."""

    def __init__(self, inner, function):
        super().__init__()
        self.inner, self.function = inner, function
        self.register_buffer("scale", torch.ones(HIDDEN))

    def forward(self, x):
        return self.function(self, x)


def twice(own, x):
    return own.inner(own.inner(x))


def by_its_numbers(own, x):
    """As eager experts and dynamic rotary positions do."""
    y = own.inner(x)
    return 2 * y if y.detach().mean() > 0 else y


def chosen_by_a_mask(own, x):
    y = own.inner(x)
    return y + y.detach()[y.detach() > 0].sum()


def with_a_state(own, x):
    own.scale.mul_(1.01)
    return own.inner(x) * own.scale.clone()


def transposed(own, x):
    y = own.inner(x)
    return y.view(*y.shape[:2], 4, 4, -1).transpose(2, 3).reshape(y.shape)


def wrapped(name, function):
    model = make_model("llama")
    layer = model.model.layers[0]
    layer.set_submodule(name, Wrapped(layer.get_submodule(name), function))
    return Coconut(model, build_thought("last_hidden", HIDDEN, ThoughtSettings()), LatentMemory()).train()


@pytest.mark.parametrize(
    "name, function, refused",
    [
        ("self_attn.o_proj", by_its_numbers, "all"),
        ("self_attn.o_proj", chosen_by_a_mask, "all"),
        ("self_attn.o_proj", with_a_state, "all"),
        ("self_attn.o_proj", twice, "short"),
        ("input_layernorm", twice, "all"),
    ],
)
def test_layers_that_a_recording_could_not_repeat_are_refused(name, function, refused):
    coconut, usual = (wrapped(name, function) for _ in range(2))
    usual.techniques.recorded = None
    assert_identical(train(coconut, True), train(usual, False))
    short, wide = kinds(coconut)
    assert short.is_refused and (refused == "short" or wide.is_refused)
    assert all(kind.is_refused for kind in layer_kinds(coconut)[0])


def test_transposed_dimensions_of_equal_size():
    coconut, usual = (wrapped("self_attn.o_proj", transposed) for _ in range(2))
    usual.techniques.recorded = None
    assert_identical(train(coconut, True), train(usual, False))
    assert all(kind.programs for kind in kinds(coconut))


class Products(TorchDispatchMode):
    """Writes down the products whose shape is that of a weight."""

    def __init__(self, shapes, events):
        super().__init__()
        self.shapes, self.events = shapes, events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape in self.shapes:
            self.events.append(f"gradient of {self.shapes[result.shape]}")
        return result


@pytest.mark.parametrize("checkpointing", ["none", "layers"])
def test_hooks_of_a_weight_run_before_the_next_gradient_is_computed(checkpointing):
    """As with modules, so that ZeRO can release one gradient before it needs memory for another."""
    coconut = make_coconut("gpt2", LatentMemory(activation_checkpointing=checkpointing))
    train(coconut, recorded=True)
    layers, events = coconut.causal_lm.transformer.h, []
    shapes = {getattr(layers[0].mlp, name).weight.shape: name for name in ("c_proj", "c_fc")}
    for layer in layers:
        for name in shapes.values():
            weight = getattr(layer.mlp, name).weight
            weight.register_post_accumulate_grad_hook(lambda own, name=name: events.append(f"hook of {name}"))
    with Products(shapes, events):
        coconut(BATCHES[0]).backward()
    one = ["gradient of c_proj", "hook of c_proj", "gradient of c_fc", "hook of c_fc"]
    assert events == one * len(layers)
