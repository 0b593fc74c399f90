"""Adapters on tiny models: what trains, what is saved, what loads, and what the merged model computes."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.data.batching import Batch
from coconut_ds.errors import CheckpointError, ConfigError
from coconut_ds.model import lora
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.loading import save_thought, trainable_parameters
from coconut_ds.thoughts import ThoughtSettings, build_thought
from tests.model.lora_cases import (
    EOS,
    FAMILIES,
    LATENT,
    MARKERS,
    D,
    V,
    batch,
    coconut,
    experiment,
    logits,
    new_base,
    train,
)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_what_trains_is_adapters_special_token_rows_and_the_thought():
    model = coconut(thought="learnable_window")
    trainable = trainable_parameters(model)
    kinds = {
        "adapter": {name for name in trainable if ".lora_A." in name or ".lora_B." in name},
        "special_token_rows": {name for name in trainable if "trainable_tokens_delta" in name},
        "thought": {name for name in trainable if name.startswith("thought.")},
    }
    assert set(trainable) == set().union(*kinds.values())
    assert len(kinds["adapter"]) == 2 * 2 * 3  # A and B, two layers, three adapted places each
    assert [trainable[name] for name in kinds["special_token_rows"]] == [3 * D]
    assert kinds["thought"] == {"thought.logits_W"}


def test_special_token_rows_change_and_no_other_weight_of_the_base(family):
    model = coconut(family)
    base = model.base.get_base_model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    train(model)
    for name, value in base.state_dict().items():
        if "lora_" not in name and "trainable_tokens_delta" not in name:
            assert torch.equal(value, before[name]), name
    merged_VD = lora.merge(model).get_input_embeddings().weight
    changed = (merged_VD != new_base(family).get_input_embeddings().weight).any(dim=1).nonzero().flatten()
    assert changed.tolist() == sorted(MARKERS)


def test_an_untouched_adapter_computes_what_the_base_computes(family):
    model = coconut(family)
    assert torch.equal(logits(model.base), logits(new_base(family)))


def test_training_lowers_the_loss(family):
    losses = train(coconut(family), steps=12)
    assert losses[-1] < losses[0] - 0.03


def test_special_token_rows_equal_the_slow_way_of_peft(family):
    """Same model with PEFT's own layer, which builds the complete matrix: loss and every gradient agree."""
    fast = coconut(family)
    train(fast, steps=2)
    slow = copy.deepcopy(fast)
    for module in slow.modules():
        if type(module) is lora.SpecialTokenRows:
            module.__class__ = TrainableTokensLayer
    losses = [model(batch()) for model in (fast, slow)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    slow_gradients = {name: p.grad for name, p in slow.named_parameters() if p.requires_grad}
    for name, parameter in fast.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, slow_gradients[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("thought", ["learnable_window", "mlp_projection"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_checkpointing": "layers"},
        {"loss_chunk_tokens": 3},
        {"segmented_cache": False, "activation_checkpointing": "layers"},
    ],
)
def test_memory_levers_change_no_gradient_of_an_adapter(family, thought, changes):
    plain = LatentMemory(False, 1024, False, False, "none", False)
    gradients, losses = [], []
    for memory in (plain, LatentMemory(**changes)):
        model = coconut(family, thought, latent_memory=memory)
        model.thought.load_state_dict({n: v + 0.1 for n, v in model.thought.state_dict().items()})
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.02)
        loss = model(batch())
        loss.backward()
        losses.append(loss)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_head_makes_no_gradient_of_the_embeddings_size():
    model = coconut()
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            # A transposed view of the frozen weight is free; anything else of its size is a copy.
            if (
                isinstance(result, torch.Tensor)
                and result.shape in {(V, D), (D, V)}
                and not result._is_view()
            ):
                seen.append(str(func))
            return result

    with Watch():
        model(batch()).backward()
    assert [name for name in seen if "detach" not in name and "aten.t." not in name] == []


def assert_tied(causal_lm):
    """Embedding and head share one tensor and its special-token rows, if the configuration ties them."""
    if not causal_lm.config.tie_word_embeddings:
        return
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    adapters = [getattr(module, "token_adapter", None) for module in (embedding, head)]
    if adapters[0] is None:
        assert embedding.weight is head.weight
    else:
        assert adapters[0].base_layer.weight is adapters[1].base_layer.weight
        assert adapters[1].tied_adapter is adapters[0]


def test_tied_embeddings_stay_tied(family, tmp_path):
    model = coconut(family)
    train(model, steps=1)
    assert_tied(model.causal_lm)
    assert_tied(lora.merge(model))
    lora.save_adapter(model, tmp_path)
    lora.load_adapter(model, tmp_path)
    assert_tied(model.causal_lm)


def test_merged_model_is_plain_and_computes_the_same(family):
    model = coconut(family)
    train(model)
    before = logits(model.base)
    merged = lora.merge(model)
    assert not any("lora" in name or "token_adapter" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model.base), before)
    assert lora.merge(Coconut(merged, model.thought, LatentMemory())) is merged


@pytest.mark.parametrize("options", [{}, {"lora_use_rslora": True}, {"lora_use_dora": True}])
def test_saved_adapter_loads_into_ours_and_into_stock_peft(tmp_path, family, options):
    model = coconut(family, "mlp_projection", **options)
    train(model)
    lora.save_adapter(model, tmp_path)
    expected = logits(model.base)

    fresh = coconut(family, "mlp_projection", **options)
    fresh_thought = build_thought("mlp_projection", D, ThoughtSettings())
    fresh.thought.load_state_dict(fresh_thought.state_dict())
    lora.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh.base), expected)
    assert all(torch.equal(v, fresh.thought.state_dict()[n]) for n, v in model.thought.state_dict().items())
    assert torch.equal(fresh(batch()), model(batch()))

    stock = PeftModel.from_pretrained(new_base(family), tmp_path)
    torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)


def test_saved_adapter_holds_what_trains_and_nothing_else(tmp_path):
    model = coconut(thought="learnable_window")
    lora.save_adapter(model, tmp_path)
    files = {name: load_file(tmp_path / name) for name in ("adapter_model.safetensors", lora.THOUGHT_FILE)}
    saved = sum(value.numel() for tensors in files.values() for value in tensors.values())
    assert saved == sum(trainable_parameters(model).values())
    assert not list(tmp_path.glob("*.bin"))


def test_given_weights_are_saved_instead_of_the_models_own(tmp_path):
    """What a checkpoint does: fp32 or gathered values of what trains, by their full names."""
    model = coconut(thought="learnable_window")
    weights = {name: torch.full_like(p, 0.5) for name, p in model.named_parameters() if p.requires_grad}
    lora.save_adapter(model, tmp_path, weights)
    lora.load_adapter(model, tmp_path)
    assert all((p == 0.5).all() for p in model.parameters() if p.requires_grad)


def test_adapters_can_start_from_other_base_weights():
    """LoRA from a CoT checkpoint: the weights that the base has when the adapters come are the start."""
    trained = new_base(seed=7)
    base = new_base()
    base.load_state_dict(trained.state_dict())
    adapted = lora.add_adapters(base, experiment(), MARKERS)
    assert torch.equal(logits(adapted), logits(trained))


def test_an_adapter_of_other_base_weights_is_refused(tmp_path):
    """Shapes cannot tell a CoT checkpoint from the model it was made of; the fingerprint can."""
    lora.save_adapter(coconut(load_model_path="runs/cot/best", seed=7), tmp_path)
    assert lora.read_origin(tmp_path).weights == "runs/cot/best"
    with pytest.raises(CheckpointError, match=r"trained on the weights of runs/cot/best"):
        lora.load_adapter(coconut(seed=0), tmp_path)


def test_a_loaded_adapter_keeps_its_origin(tmp_path):
    lora.save_adapter(coconut(load_model_path="runs/cot/best"), tmp_path / "first")
    loaded = coconut(load_model_path=str(tmp_path / "first"))
    lora.load_adapter(loaded, tmp_path / "first")
    lora.save_adapter(loaded, tmp_path / "second")
    assert lora.read_origin(tmp_path / "second").weights == "runs/cot/best"


def test_a_window_can_start_from_a_run_that_had_none(tmp_path):
    plain = coconut()
    train(plain)
    lora.save_adapter(plain, tmp_path)
    windowed = coconut(thought="learnable_window")
    before = windowed.thought.logits_W.tolist()
    lora.load_adapter(windowed, tmp_path)
    assert windowed.thought.logits_W.tolist() == before
    assert torch.equal(logits(windowed.base), logits(plain.base))


def test_an_unreadable_origin_is_refused(tmp_path):
    lora.save_adapter(coconut(), tmp_path)
    (tmp_path / "base.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not describe an adapter's base"):
        lora.load_adapter(coconut(), tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_alpha": 32}, "lora_alpha is 16 there and 32 here"),
        ({"lora_r": 4}, "r is 8 there and 4 here"),
        ({"lora_use_rslora": True}, "use_rslora is False there and True here"),
        ({"lora_target_modules": ["c_attn"]}, "unexpected .*c_proj"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path, changes, message):
    lora.save_adapter(coconut(), tmp_path)
    with pytest.raises(CheckpointError, match=message):
        lora.load_adapter(coconut(**changes), tmp_path)


def test_a_damaged_or_absent_adapter_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="base.json does not exist"):
        lora.load_adapter(coconut(), tmp_path)
    lora.save_adapter(coconut(), tmp_path)
    with pytest.raises(CheckpointError, match="set 'tuning: lora'"):
        lora.load_adapter(Coconut(new_base(), coconut().thought, LatentMemory()), tmp_path)
    save_thought({"logits_W": torch.zeros(4)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"logits_W is \(4,\) there and \(3,\) here"):
        lora.load_adapter(coconut(thought="learnable_window"), tmp_path)
    (tmp_path / lora.THOUGHT_FILE).unlink()
    with pytest.raises(CheckpointError, match="thought.safetensors does not exist"):
        lora.load_adapter(coconut(), tmp_path)


def test_target_modules_follow_the_architecture(tmp_path):
    assert lora.default_target_modules(new_base("gpt2")) == ("c_attn", "c_proj")
    assert lora.default_target_modules(new_base("llama_tied"))[:2] == ("q_proj", "k_proj")
    named = coconut(lora_target_modules=["c_fc"])
    assert {
        n.split(".lora_")[0].rpartition(".")[2] for n in trainable_parameters(named) if ".lora_" in n
    } == {"c_fc"}
    everything = coconut(lora_target_modules=["all-linear"])
    lora.save_adapter(everything, tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert {name.rpartition(".")[2] for name in targets} == {"c_attn", "c_proj", "c_fc"}


def test_a_target_that_no_layer_has_is_named():
    with pytest.raises(ConfigError, match="lora_target_modules.*q_proj"):
        coconut(lora_target_modules=["q_proj"])


def test_greedy_generation_uses_the_trained_rows():
    model = coconut().eval()
    train(model, steps=3)
    prompts = Batch.from_padded(*(value[:, :7] for value in (batch().input_ids_BT, batch().attention_mask_BT,
                                batch().position_ids_BT, torch.full((2, 10), -100))), LATENT)  # fmt: skip
    merged = Coconut(lora.merge(model), model.thought, LatentMemory()).eval()
    assert model.generate(prompts, 6, EOS) == merged.generate(prompts, 6, EOS)
