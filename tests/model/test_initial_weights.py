"""Weights before the first step: special-token rows for every kind of tokenizer; NaN named with its file."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.problems import Problem
from coconut_ds.data.tokenizer import load_vocabulary, tokenize
from coconut_ds.errors import CheckpointError, DataError
from coconut_ds.model.loading import build_module, new_base, write_model
from coconut_ds.runs.weights import load_foreign_weights

SYMBOLS = ["<eos>", "<pad>", "\n", " ", "#", "+", "=", "?", *map(str, range(10))]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# (model, pre-tokenizer, other options, the source rows): None is the mean of all rows
KINDS = {
    "characters, unknown ones vanish": (lambda: models.BPE(ids(SYMBOLS), []), None, {}, None),
    "words, unknown ones raise": (lambda: models.WordLevel(ids(SYMBOLS)), "words", {}, None),
    "words with an unknown token": (
        lambda: models.WordLevel(ids([*SYMBOLS, "<unk>"]), unk_token="<unk>"),
        "words",
        {"unk_token": "<unk>"},
        None,
    ),
    "pieces with an unknown token": (
        lambda: models.Unigram([(word, -1.0) for word in [*SYMBOLS, "<unk>"]], unk_id=len(SYMBOLS)),
        None,
        {"unk_token": "<unk>"},
        None,
    ),
    "words that know it": (lambda: models.WordLevel(ids([*SYMBOLS, "<<"])), "words", {}, ["<<"]),
    "characters that know it": (lambda: models.BPE(ids([*SYMBOLS, "<", ">"]), []), None, {}, ["<"]),
    "bytes": (lambda: models.BPE(ids(["<eos>", "<pad>", *BYTES]), []), "bytes", {}, ["<"]),
}  # fmt: skip


def ids(words):
    return {word: number for number, word in enumerate(words)}


def make_tokenizer(folder, kind):
    model, splitter, options, _ = KINDS[kind]
    tokenizer = Tokenizer(model())
    if splitter:
        splitters = {"words": pre_tokenizers.WhitespaceSplit(), "bytes": pre_tokenizers.ByteLevel(False)}
        tokenizer.pre_tokenizer = splitters[splitter]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", **options
    )
    fast.save_pretrained(folder)
    return load_vocabulary(str(folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding, tied", [(0, True), (9, False)], ids=["tied", "untied with spare rows"])
def test_special_token_rows_come_from_existing_rows(tmp_path, kind, padding, tied):
    vocabulary = make_tokenizer(tmp_path, kind)
    rows = vocabulary.start_id
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=rows + padding, n_positions=32, tie_word_embeddings=tied
    )
    base = new_base(config, vocabulary)
    source = KINDS[kind][3]
    expected = list(range(rows)) if source is None else vocabulary.tokenizer.convert_tokens_to_ids(source)
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        weight_VD = module.weight.detach()
        for token_id in vocabulary.special_token_ids:
            torch.testing.assert_close(weight_VD[token_id], weight_VD[expected].mean(dim=0))


def test_text_that_a_tokenizer_cannot_encode_is_named(tmp_path):
    vocabulary = make_tokenizer(tmp_path, "words, unknown ones raise")
    problems = [Problem("1 + 2 = ?", ("1 + 2 = 3",), "3"), Problem("1 + two = ?", (), "3")]
    with pytest.raises(DataError, match=r"cannot encode '1 \+ two = \?'.*unknown token"):
        tokenize(problems, vocabulary)


def spoil(file, name, value):
    weights = load_file(file)
    weights[name] = weights[name].clone()
    weights[name].view(-1)[3] = value
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def build(tiny_experiment):
    def build(**changes):
        values = validate_experiment(tiny_experiment | changes, "test")
        return build_module(values, load_vocabulary(values.model_id), LatentMemory())

    return build


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_model_with_bad_weights_is_refused_by_name(build, arithmetic, tmp_path, value):
    model = shutil.copytree(arithmetic / "gpt2", tmp_path / "gpt2")
    spoil(model / "model.safetensors", "transformer.h.1.mlp.c_fc.weight", value)
    with pytest.raises(CheckpointError, match=r"gpt2/model\.safetensors holds NaN.*h\.1\.mlp\.c_fc\.weight"):
        build(model_id=str(model))


@pytest.mark.parametrize(
    "thought, tuning, file, name",
    [
        ("last_hidden", "full", "model.safetensors", "transformer.ln_f.weight"),
        ("learnable_window", "full", "thought.safetensors", "logits_W"),
        ("mlp_projection", "lora", "thought.safetensors", "inner.weight"),
        (
            "last_hidden",
            "lora",
            "adapter_model.safetensors",
            "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight",
        ),
    ],
)
def test_a_start_with_bad_weights_is_refused_by_name(
    build, arithmetic, tmp_path, thought, tuning, file, name
):
    module = build(thought=thought, tuning=tuning, latent_window_size=4)
    write_model(module, load_vocabulary(str(arithmetic / "gpt2")), tmp_path)
    spoil(tmp_path / file, name, float("nan"))
    with pytest.raises(CheckpointError) as caught:
        build(thought=thought, tuning=tuning, latent_window_size=4, load_model_path=str(tmp_path))
    assert f"{file} holds NaN" in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_state_dict_with_bad_weights_is_refused_in_every_dtype(tmp_path, dtype):
    good = {"a": torch.ones(3, dtype=dtype), "n": torch.ones(2, dtype=torch.long), "e": torch.ones(0)}
    torch.save(good, tmp_path / "good")
    torch.save(good | {"b": torch.tensor([1.0, float("nan")], dtype=dtype)}, tmp_path / "bad")
    assert len(load_foreign_weights(tmp_path / "good")) == 3
    with pytest.raises(CheckpointError, match=r"bad holds NaN or infinite weights: b,"):
        load_foreign_weights(tmp_path / "bad")
