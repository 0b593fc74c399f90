"""Checkpoints of the learnable-window forks: refused with the lines to write; equal once they are written.

The other side of the comparison is written flat here: every latent is filled by running the model over all
columns again, and the window holds one state from the second latent on.

Shapes: B rows, T columns, D hidden size, V vocabulary, W window.
"""

import re

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from coconut_ds.__main__ import main
from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import load_experiment
from coconut_ds.data.batching import Batch
from coconut_ds.data.tokenizer import load_vocabulary
from coconut_ds.errors import CheckpointError
from coconut_ds.model import lora
from coconut_ds.model.loading import build_module, write_model
from tests.model.lora_cases import coconut, logits, new_base

WINDOW = (-0.7, 0.2, 0.9)  # oldest state first, as in their files
LATENTS = 3


@pytest.fixture(scope="module")
def vocabulary(arithmetic):
    return load_vocabulary(str(arithmetic / "gpt2"))


@pytest.fixture(scope="module", params=["gpt2", "llama, head of its own"])
def source(request, arithmetic, vocabulary, tmp_path_factory):
    """The folder of a base model."""
    if request.param == "gpt2":
        return arithmetic / "gpt2"
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(
        vocab_size=vocabulary.start_id, max_position_embeddings=64, tie_word_embeddings=False, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_vocabulary(str(arithmetic / "gpt2")).tokenizer.save_pretrained(folder)
    return folder


def grown(source, vocabulary):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.resize_token_embeddings(len(vocabulary.tokenizer), mean_resizing=False)
    return model.eval()


def published_full(model, path, window=WINDOW):
    state = {f"base_causallm.{name}": value for name, value in model.state_dict().items()}
    state["embedding.weight"] = model.get_input_embeddings().weight.detach()
    if window is not None:
        state["latent_weights"] = torch.tensor(window)
    torch.save(state, path)
    return model


def published_lora(model, path, window=WINDOW):
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = (
        ["c_attn", "c_proj"] if "c_attn" in names else ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    )
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, lora_dropout=0.05))
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    adapted.save_pretrained(str(path / "peft"), save_embedding_layers=True)
    if window is not None:
        torch.save({"latent_weights": torch.tensor(window)}, path / "latent.pt")
    return adapted.eval()


LAYOUTS = {"full": published_full, "lora": published_lora}


@torch.no_grad()
def fork_logits(causal_lm, ids_T, latent_id, mix):
    """Logits of every column; `mix` weighs the states of a window, oldest first."""
    embeds_TD = causal_lm.get_input_embeddings()(ids_T)
    first = True
    for column in (ids_T == latent_id).nonzero().flatten().tolist():
        made = causal_lm(inputs_embeds=embeds_TD[None, :column], output_hidden_states=True)
        hidden_TD = made.hidden_states[-1][0]
        window_WD = hidden_TD[-3:] if first else hidden_TD[-1:]
        embeds_TD = embeds_TD.clone()
        embeds_TD[column] = mix(len(window_WD)) @ window_WD
        first = False
    return causal_lm(inputs_embeds=embeds_TD[None]).logits[0]


def learned(count):
    return torch.softmax(torch.tensor(WINDOW)[-count:], dim=0)


def fixed(count):
    weights = torch.tensor([0.6, 0.3, 0.1])[-count:]
    return weights / weights.sum()


@pytest.fixture
def config(tiny_experiment, source, tmp_path):
    """Write an experiment YAML of the fork's keys; returns its path."""

    def config(load_model_path, *lines, **changes):
        values = tiny_experiment | {
            "model_id": str(source), "load_model_path": str(load_model_path), "only_eval": True, "resume": 3,
            "max_new_tokens": 4, "batch_size_eval": 24, "save_path": str(tmp_path / "runs"),
        }  # fmt: skip
        for line in lines:
            changes |= yaml.safe_load(line)
        path = tmp_path / "eval.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return config


def build(path, vocabulary):
    return build_module(load_experiment(path), vocabulary, LatentMemory()).eval()


@torch.no_grad()
def our_logits(module, ids_T, latent_id):
    ids = ids_T[None]
    mask = torch.ones_like(ids)
    batch = Batch.from_padded(ids, mask, mask.cumsum(1) - 1, torch.full_like(ids, -100), latent_id)
    return module.head(module.hidden_states(batch))[0]


def prompt(vocabulary):
    latents = [vocabulary.latent_id] * LATENTS
    return torch.tensor(
        [3, 4, 5, 6, vocabulary.start_id, *latents, vocabulary.end_id, 7, 8, vocabulary.eos_id]
    )


def lines_to_write(error):
    return re.findall(r"`([a-z_]+: [^`]+)`", str(error).rpartition("set ")[2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", ["as the fork's YAML", "another thought", "another width"])
def test_after_the_printed_lines_logits_are_equal(vocabulary, source, config, tmp_path, layout, settings):
    path = tmp_path / "weights"
    if layout == "lora":
        path.mkdir()
    theirs = LAYOUTS[layout](grown(source, vocabulary), path)
    start = {
        "as the fork's YAML": {"thought": "learnable_window"},
        "another thought": {"thought": "last_hidden"},
        "another width": {"thought": "learnable_window", "latent_window_size": 4},
    }[settings] | {"tuning": layout}
    with pytest.raises(
        CheckpointError, match=r"this checkpoint has window weights \(`latent_weights`\)"
    ) as caught:
        build(config(path, **start), vocabulary)
    expected = ["latent_window_scope: pass"]
    expected = ["thought: learnable_window", *expected] if settings == "another thought" else expected
    expected = [*expected, "latent_window_size: 3"] if settings == "another width" else expected
    assert lines_to_write(caught.value) == expected
    with pytest.warns(UserWarning, match="newest state first here: 0.9, 0.2, -0.7"):
        ours = build(config(path, *expected, **start), vocabulary)
    ids = prompt(vocabulary)
    theirs_TV = fork_logits(theirs, ids, vocabulary.latent_id, learned)
    assert (our_logits(ours, ids, vocabulary.latent_id) - theirs_TV).abs().max() < 1e-5
    wrong_TV = fork_logits(theirs, ids, vocabulary.latent_id, lambda count: learned(count).flip(0))
    assert (wrong_TV - theirs_TV).abs().max() > 1e-3  # the order does matter


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eval_works_with_the_printed_lines(vocabulary, source, config, tmp_path, capsys, layout):
    path = tmp_path / "weights"
    if layout == "lora":
        path.mkdir()
    LAYOUTS[layout](grown(source, vocabulary), path)
    variant = {"full": "learnable_weights", "lora": "learnable_weights_lora"}[layout]
    assert main(["eval", str(config(path, latent_variant=variant))]) == 2
    message = capsys.readouterr().err
    lines = lines_to_write(message.partition("\n")[0])
    assert lines == ["latent_window_scope: pass"] and "Traceback" not in message
    assert main(["eval", str(config(path, *lines, latent_variant=variant))]) == 0


def test_a_fixed_window_of_the_fork(vocabulary, source, config, tmp_path):
    theirs = published_full(grown(source, vocabulary), tmp_path / "weights", window=None)
    with pytest.raises(CheckpointError, match="contextual|published code") as caught:
        build(config(tmp_path / "weights", latent_variant="fixed_window"), vocabulary)
    lines = lines_to_write(caught.value)
    assert lines == ["latent_window_scope: pass", "latent_window_weights: [0.1, 0.3, 0.6]"]
    ours = build(config(tmp_path / "weights", *lines, latent_variant="fixed_window"), vocabulary)
    ids = prompt(vocabulary)
    theirs_TV = fork_logits(theirs, ids, vocabulary.latent_id, fixed)
    assert (our_logits(ours, ids, vocabulary.latent_id) - theirs_TV).abs().max() < 1e-5


def test_training_from_a_published_model_is_told_of_the_fixed_window(vocabulary, source, config, tmp_path):
    published_full(grown(source, vocabulary), tmp_path / "weights", window=None)
    path = config(tmp_path / "weights", thought="fixed_window", only_eval=False)
    with pytest.warns(UserWarning, match=r"set `latent_window_scope: pass`"):
        build(path, vocabulary)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_method_without_latents_has_no_use_for_the_window(vocabulary, source, config, tmp_path, layout):
    path = tmp_path / "weights"
    if layout == "lora":
        path.mkdir()
    theirs = LAYOUTS[layout](grown(source, vocabulary), path)
    ours = build(config(path, method="cot", tuning=layout), vocabulary)
    ids = prompt(vocabulary)
    torch.testing.assert_close(
        ours.causal_lm(ids[None]).logits, theirs(ids[None]).logits, rtol=1e-5, atol=1e-5
    )


def test_what_is_saved_here_comes_back(vocabulary, source, config, tmp_path):
    """The special-token rows of the fork's adapter become trainable rows here, and survive saving."""
    published_lora(grown(source, vocabulary), tmp_path)
    settings = {"latent_variant": "learnable_weights_lora", "latent_window_scope": "pass"}
    ours = build(config(tmp_path, **settings), vocabulary)
    write_model(ours, vocabulary, tmp_path / "ours")
    again = build(config(tmp_path / "ours", **settings), vocabulary)
    ids = prompt(vocabulary)
    answers = [our_logits(module, ids, vocabulary.latent_id) for module in (ours, again)]
    # A head of its own keeps frozen rows for special tokens, which no label ever is.
    columns = slice(0, vocabulary.start_id)
    torch.testing.assert_close(answers[0][:, columns], answers[1][:, columns], rtol=0, atol=1e-6)


def test_an_adapter_with_the_embedding_of_another_model_is_refused(vocabulary, source, config, tmp_path):
    model = grown(source, vocabulary)
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 3] += 0.1
    published_lora(model, tmp_path)
    settings = {"latent_variant": "learnable_weights_lora", "latent_window_scope": "pass"}
    with pytest.raises(CheckpointError, match=r"1 rows of its frozen embedding.*set model_id to the model"):
        build(config(tmp_path, **settings), vocabulary)


def test_peft_writes_such_an_adapter_by_itself(arithmetic, vocabulary, tmp_path):
    """As the fork saves it: without being told to, PEFT adds embedding and head where the vocabulary grew."""
    adapted = get_peft_model(
        grown(arithmetic / "gpt2", vocabulary),
        LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    )
    adapted.save_pretrained(str(tmp_path))
    saved = {name for name in load_file(tmp_path / "adapter_model.safetensors") if "lora_" not in name}
    assert saved == {"base_model.model.transformer.wte.weight", "base_model.model.lm_head.weight"}


@pytest.mark.parametrize("window", [torch.tensor(0.5), torch.zeros(0), torch.zeros(3, 1)])
def test_a_window_of_another_shape_is_refused(arithmetic, vocabulary, config, tmp_path, window):
    state = grown(arithmetic / "gpt2", vocabulary).state_dict()
    torch.save(
        {f"base_causallm.{n}": v for n, v in state.items()} | {"latent_weights": window}, tmp_path / "w"
    )
    with pytest.raises(CheckpointError, match="one number per state"):
        build(config(tmp_path / "w", thought="learnable_window", latent_window_scope="pass"), vocabulary)


def published_folder(tmp_path, weights=(-0.5, 0.1, 0.7)):
    """What the learnable-window LoRA code writes: PEFT without special-token rows, and a plain state dict."""
    theirs = get_peft_model(
        new_base(),
        LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj"], lora_dropout=0.05,
                   bias="none", task_type="CAUSAL_LM", fan_in_fan_out=True),
    )  # fmt: skip
    torch.manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "peft")
    torch.save({"latent_weights": torch.tensor(weights)}, tmp_path / "latent.pt")
    return theirs.eval()


def test_published_folder_loads(tmp_path):
    theirs = published_folder(tmp_path)
    model = coconut(thought="learnable_window")
    lora.load_adapter(model, tmp_path)
    assert lora.read_origin(tmp_path) is None
    torch.testing.assert_close(logits(model.base), logits(theirs), rtol=1e-5, atol=1e-5)
    assert model.thought.logits_W.tolist() == pytest.approx([0.7, 0.1, -0.5])  # theirs: oldest first


def test_published_folder_without_window_weights_loads(tmp_path):
    theirs = published_folder(tmp_path)
    (tmp_path / "latent.pt").unlink()
    model = coconut()
    lora.load_published_lora(model, tmp_path)
    torch.testing.assert_close(logits(model.base), logits(theirs), rtol=1e-5, atol=1e-5)


def test_published_window_of_another_thought_or_size_is_refused(tmp_path):
    published_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"has window weights .*set `thought: learnable_window`"):
        lora.load_published_lora(coconut(), tmp_path)
    torch.save({"latent_weights": torch.zeros(4)}, tmp_path / "latent.pt")
    with pytest.raises(CheckpointError, match=r"logits_W is \(4,\) there and \(3,\) here"):
        lora.load_published_lora(coconut(thought="learnable_window"), tmp_path)


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    published_folder(tmp_path)

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"latent_weights": Payload()}, tmp_path / "latent.pt")
    with pytest.raises(CheckpointError, match=r"latent\.pt"):
        lora.load_published_lora(coconut(thought="learnable_window"), tmp_path)
    assert not (tmp_path / "ran").exists()
