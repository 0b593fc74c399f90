"""CoconutForCausalLM as a transformers model: generate, forward, save, load, pipeline, AutoModel.

Shapes: B rows, T columns, V vocabulary.
"""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LogitsProcessor,
    Qwen2Config,
    StaticCache,
    pipeline,
)

from coconut_ds import CoconutForCausalLM
from coconut_ds.__main__ import main
from coconut_ds.data.batching import collate
from coconut_ds.data.tokenizer import END, LATENT, START, load_vocabulary
from coconut_ds.errors import CheckpointError, ConfigError, DataError
from coconut_ds.evaluation.pretrained import CoconutConfig
from tests.run_folders import make_run

QUESTIONS = ["3+4+2+7=?", "1+1+1+1=?", "9=?", "5+5=?"]
KINDS = {
    "full": {},
    "window": {"thought": "fixed_window"},
    "mlp": {"thought": "mlp_projection"},
    "normalized": {"thought": "normalized_hidden"},
    "lora": {"tuning": "lora", "thought": "learnable_window"},
    "no_cot": {"method": "no_cot"},
}


@pytest.fixture(scope="module")
def runs(tiny_experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    return {
        kind: make_run(tiny_experiment, folder, name=kind, max_new_tokens=9, **keys)
        for kind, keys in KINDS.items()
    }


@pytest.fixture(scope="module")
def model(runs):
    return CoconutForCausalLM.from_pretrained(runs["full"])


def prompts(model, questions=QUESTIONS):
    return model.tokenizer([q + "\n" for q in questions], padding=True, return_tensors="pt")


def answers_of(model, ids, columns):
    """The answer of each row of ids, as evaluation returns it: cut before eos."""
    rows = ids[:, columns:].tolist()
    eos = model.vocabulary.eos_id
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def evaluated(model, questions=QUESTIONS, num_latents=None, limit=9):
    samples = model.samples(questions, num_latents)
    return model.model.generate(collate(samples, model.vocabulary.pad_id), limit, model.vocabulary.eos_id)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_latents", [None, 0, 5])
def test_greedy_tokens_equal_those_of_the_runs_evaluation(runs, kind, num_latents):
    if kind == "no_cot" and num_latents == 5:
        return
    model = CoconutForCausalLM.from_pretrained(runs[kind])
    inputs = prompts(model)
    ids = model.generate(**inputs, num_latents=num_latents)
    columns = inputs.input_ids.shape[1]
    assert torch.equal(ids[:, :columns], inputs.input_ids)
    answers = answers_of(model, ids, columns)
    assert answers == evaluated(model, num_latents=num_latents)
    assert len({tuple(answer) for answer in answers}) > 1


def test_without_a_cache_and_with_beams_and_one_by_one(model):
    inputs = prompts(model)
    greedy = model.generate(**inputs)
    assert torch.equal(model.generate(**inputs, use_cache=False), greedy)
    for row, question in enumerate(QUESTIONS):
        alone = prompts(model, [question]).input_ids
        ids = model.generate(alone)
        assert answers_of(model, ids, alone.shape[1]) == answers_of(
            model, greedy[row : row + 1], inputs.input_ids.shape[1]
        )
    beams = model.generate(**inputs, num_beams=3, num_return_sequences=2, max_new_tokens=4)
    assert beams.shape[0] == 2 * len(QUESTIONS)


def test_rows_end_where_their_positions_do(model):
    """Prompts of 119, 123 and 127 of 128 positions in one batch."""
    questions = ["1+" * n + "1=?" for n in (55, 57, 59)]
    inputs = prompts(model, questions)
    ids = model.generate(**inputs, max_new_tokens=20)
    expected = evaluated(model, questions, limit=20)
    assert [len(answer) for answer in expected][1:] == [6, 2]
    for answer, row in zip(expected, ids[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
        assert row[: len(answer)] == answer
        assert {*row[len(answer) :]} <= {model.vocabulary.pad_id, model.vocabulary.eos_id}
    with pytest.raises(DataError, match="prompt 1 has .* positions: shorten it"):
        model.generate(**prompts(model, ["1+" * 80 + "1=?"]))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.5}])
def test_sampled_tokens_have_the_models_distribution(model, options):
    inputs = prompts(model, QUESTIONS[:2])
    ids, mask = model.add_latents(**inputs)
    with torch.no_grad():
        logits_BV = model(ids, mask).logits[:, -1] / options.get("temperature", 1.0)
    if k := options.get("top_k"):
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(k).values[:, -1:], -torch.inf)
    expected_BV = logits_BV.softmax(-1)
    if p := options.get("top_p"):
        values, order = expected_BV.sort(descending=True)
        dropped = values.cumsum(-1) - values >= p
        kept_BV = torch.zeros_like(expected_BV).scatter(1, order, values.masked_fill(dropped, 0))
        expected_BV = kept_BV / kept_BV.sum(-1, keepdim=True)
    options = {"top_k": 0, "do_sample": True, "max_new_tokens": 1, "num_return_sequences": 4000, **options}
    torch.manual_seed(0)
    drawn = model.generate(**inputs, **options)[:, -1].view(2, 4000)
    for row in range(2):
        share_V = torch.bincount(drawn[row], minlength=expected_BV.shape[1]) / 4000
        assert not share_V[expected_BV[row] == 0].any()
        assert 0.5 * (share_V - expected_BV[row]).abs().sum() < 0.05


def test_samples_repeat_with_the_seed(model):
    def drawn(seed):
        torch.manual_seed(seed)
        return model.generate(**prompts(model), do_sample=True, temperature=2.0, num_return_sequences=3)

    ids = drawn(1)
    assert ids.shape[0] == 3 * len(QUESTIONS)
    assert torch.equal(ids, drawn(1)) and not torch.equal(ids, drawn(2))
    # Row r of the result continues prompt r // 3.
    assert torch.equal(ids[::3, : prompts(model).input_ids.shape[1]], prompts(model).input_ids)


def test_generation_settings_come_from_the_run_and_can_be_overridden(model):
    config = model.generation_config
    assert (config.max_new_tokens, config.eos_token_id) == (9, model.vocabulary.eos_id)
    inputs = prompts(model)
    columns = inputs.input_ids.shape[1]
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == columns + 2
    assert model.generate(**inputs, max_length=columns + 3).shape[1] == columns + 3
    least = model.generate(**inputs, min_length=columns + 9)[:, columns:]
    assert not (least == config.eos_token_id).any()
    as_record = model.generate(**inputs, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(as_record.sequences, model.generate(**inputs))
    eos = int(model.generate(**inputs)[0, columns])
    assert model.generate(inputs.input_ids[:1], attention_mask=inputs.attention_mask[:1],
                          eos_token_id=eos).shape[1] == columns + 1  # fmt: skip

    class Always(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.nn.functional.one_hot(torch.tensor([7] * len(scores)), scores.shape[1]).float()

    assert (model.generate(**inputs, logits_processor=[Always()])[:, columns:] == 7).all()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_forward_has_the_loss_and_gradients_of_training(runs, kind):
    model = CoconutForCausalLM.from_pretrained(runs[kind])
    samples = model.samples(QUESTIONS)
    samples = [
        type(s)(s.index, (*s.tokens, 5, 6, 7), s.num_prompt, s.num_latents, s.first_latent) for s in samples
    ]
    batch = collate(samples, model.vocabulary.pad_id, loss_denominator=3 * len(samples))
    output = model(batch.input_ids_BT, batch.attention_mask_BT, labels=batch.labels_BT)
    assert output.logits.shape == (*batch.shape, len(model.tokenizer))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = model.model(batch)
    loss.backward()
    torch.testing.assert_close(output.loss, loss)
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


def test_without_latents_it_is_the_language_model(model):
    inputs = prompts(model)
    labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
    positions = (inputs.attention_mask.cumsum(1) - 1).clamp(min=0)
    expected = model.model.causal_lm(**inputs, position_ids=positions, labels=labels)
    output = model(**inputs, labels=labels)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_round_trip(runs, kind, tmp_path):
    model = CoconutForCausalLM.from_pretrained(runs[kind])
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.suffix not in {".json", ".txt"}) == [
        ".safetensors"
    ]
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, CoconutConfig) and config.stage == {
        "hidden_steps": model.trained.stage.hidden_steps,
        "num_latents": model.trained.stage.num_latents,
        "hidden_tokens": 0,
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab()
    ids, mask = model.add_latents(**prompts(model))
    expected = model.eval()(ids, mask).logits
    for read in (AutoModelForCausalLM.from_pretrained, CoconutForCausalLM.from_pretrained):
        loaded = read(tmp_path)
        assert type(loaded) is CoconutForCausalLM and not loaded.training
        torch.testing.assert_close(loaded(ids, mask).logits, expected, rtol=1e-5, atol=1e-5)
        assert loaded.generation_config.max_new_tokens == 9
        assert torch.equal(loaded.generate(**prompts(loaded)), model.generate(**prompts(model)))
        assert loaded.answer_questions(QUESTIONS) == model.answer_questions(QUESTIONS)
        assert loaded.trained.stage == model.trained.stage
    loaded.save_pretrained(tmp_path / "again")
    again = CoconutForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert json.loads((tmp_path / "again/config.json").read_text())["experiment"] == config.experiment


def test_the_folder_of_export_loads(runs, tmp_path):
    assert main(["export", str(runs["full"]), "--output", str(tmp_path / "out")]) == 0
    model = CoconutForCausalLM.from_pretrained(runs["full"])
    loaded = CoconutForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.generate(**prompts(loaded)), model.generate(**prompts(model)))
    # For transformers alone it is the language model without latents.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(plain(**prompts(model)).logits, model.model.causal_lm(**prompts(model)).logits)


@pytest.mark.parametrize("name", ["", "best", "checkpoint_1"])
def test_checkpoints_of_a_run_load(runs, name):
    model = CoconutForCausalLM.from_pretrained(runs["full"] / name)
    assert model.trained.name == (name if name == "checkpoint_1" else "checkpoint_4")
    assert model.device.type == "cpu" and model.dtype == torch.float32
    assert CoconutForCausalLM.from_pretrained(runs["full"] / name, dtype=torch.float64).dtype == torch.float64


def test_the_pipeline_answers(model, caplog):
    logging.getLogger("transformers").propagate = True
    answer = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    texts = [q + "\n" for q in QUESTIONS]
    for options in ({}, {"batch_size": 3}):
        results = answer(texts, do_sample=False, max_new_tokens=9, return_full_text=False, **options)
        generated = [result[0]["generated_text"] for result in results]
        assert generated == model.answer_questions(QUESTIONS)
    assert "not supported" not in caplog.text


def test_a_model_from_a_configuration_alone(tiny_experiment):
    config = CoconutConfig(
        text_config=GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=1, n_positions=32),
        experiment=tiny_experiment | {"thought": "fixed_window"},
        stage={"hidden_steps": 1, "num_latents": 2},
        start_token_id=27,
        end_token_id=28,
        latent_token_id=29,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids, mask = model.add_latents(torch.tensor([[1, 2, 3]]))
    assert ids.tolist() == [[1, 2, 3, 27, 29, 29, 28]] and mask.all()
    assert model(ids, labels=ids).loss.isfinite()
    assert model.model.thought.window_weights() == pytest.approx([0.6, 0.3, 0.1])


@pytest.mark.parametrize("config_class, tied", [(LlamaConfig, False), (Qwen2Config, True)])
def test_other_architectures(tiny_experiment, tmp_path, config_class, tied):
    vocabulary = load_vocabulary(tiny_experiment["model_id"])
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = CoconutConfig(
        text_config=config_class(
            vocab_size=len(vocabulary.tokenizer), num_key_value_heads=1, initializer_range=1.0,
            max_position_embeddings=64, tie_word_embeddings=tied, **sizes,
        ),
        experiment=tiny_experiment | {"thought": "learnable_window"},
        stage={"hidden_steps": 2, "num_latents": 2},
        start_token_id=vocabulary.start_id,
        end_token_id=vocabulary.end_id,
        latent_token_id=vocabulary.latent_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    inputs = prompts(model)
    ends = {"max_new_tokens": 6, "eos_token_id": vocabulary.eos_id, "pad_token_id": vocabulary.pad_id}
    ids = model.generate(**inputs, **ends)
    assert answers_of(model, ids, inputs.input_ids.shape[1]) == evaluated(model, limit=6)
    model.save_pretrained(tmp_path)
    loaded = CoconutForCausalLM.from_pretrained(tmp_path)
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) is tied
    assert torch.equal(
        loaded(*model.add_latents(**inputs)).logits, model(*model.add_latents(**inputs)).logits
    )


def test_wrong_use(model, runs, tmp_path):
    right = prompts(model)
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(right.input_ids.flip(1), attention_mask=right.attention_mask.flip(1))
    with pytest.raises(ValueError, match="pass the tokenizer's attention_mask"):
        model.generate(right.input_ids)
    with pytest.raises(ValueError, match="needs input_ids"):
        model.generate()
    start, latent = model.vocabulary.start_id, model.vocabulary.latent_id
    with pytest.raises(ValueError, match="must begin in one column"):
        model(torch.tensor([[1, start, latent, 2], [1, 2, start, latent]]))
    with pytest.raises(ConfigError, match="'quantization_config' is not an option"):
        CoconutForCausalLM.from_pretrained(runs["full"], quantization_config=None)
    with pytest.raises(ConfigError, match="cannot load a configuration"):
        CoconutForCausalLM.from_pretrained("missing")
    with pytest.raises(ConfigError, match="holds a gpt2 model without a thought"):
        CoconutForCausalLM.from_pretrained(runs["full"] / "checkpoint_4" / "model")


@pytest.mark.parametrize("split", [3, -3, -2])
def test_latents_behind_a_cache_are_refused(model, split):
    ids, mask = model.add_latents(**prompts(model))
    cache = DynamicCache()
    model.model.causal_lm(ids[:, :split], attention_mask=mask[:, :split], past_key_values=cache)
    with pytest.raises(ValueError, match="latent tokens behind .* cached columns.*in one call"):
        model(ids[:, split:], mask, past_key_values=cache)


def test_a_prompt_in_two_parts_behind_its_latents_has_the_same_logits(model):
    ids, mask = model.add_latents(**prompts(model))
    expected = model(ids, mask).logits[:, -1]
    cache = DynamicCache()
    model(ids[:, :-1], mask[:, :-1], past_key_values=cache)
    torch.testing.assert_close(model(ids[:, -1:], mask, past_key_values=cache).logits[:, -1], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
        {"cache_implementation": "paged"},
        {"assistant_model": torch.nn.Identity()},
        {"generation_config": GenerationConfig(prefill_chunk_size=4)},
    ],
)
def test_options_that_would_misread_latents_are_refused(model, options):
    name = next(iter(options)).replace("generation_config", "prefill_chunk_size")
    with pytest.raises(ValueError, match=f"{name}.* not work with latents; leave it out"):
        model.generate(**prompts(model), **options)


@pytest.mark.parametrize("question", QUESTIONS)
def test_prompt_lookup_gives_the_same_tokens(model, question):
    inputs = prompts(model, [question])
    greedy = model.generate(**inputs, max_new_tokens=20)
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, prompt_lookup_num_tokens=2), greedy)


def test_caches_of_the_caller(model):
    inputs = prompts(model)
    expected = model.generate(**inputs)
    cache = DynamicCache()
    assert torch.equal(model.generate(**inputs, past_key_values=cache), expected)
    with pytest.raises(ValueError, match="needs an empty DynamicCache"):
        model.generate(**inputs, past_key_values=cache)
    static = StaticCache(config=model.model.causal_lm.config, max_cache_len=64)
    with pytest.raises(ValueError, match="cache that grows"):
        model(*model.add_latents(**inputs), past_key_values=static)


def test_chunks_without_latents_give_the_same_tokens(runs):
    model = CoconutForCausalLM.from_pretrained(runs["no_cot"])
    inputs = prompts(model)
    assert torch.equal(model.generate(**inputs, prefill_chunk_size=4), model.generate(**inputs))


def test_generated_latent_tokens_are_text(model):
    class Latents(LogitsProcessor):
        def __call__(self, input_ids, scores):
            latent = torch.tensor([model.vocabulary.latent_id] * len(scores))
            return torch.nn.functional.one_hot(latent, scores.shape[1]).float()

    inputs = prompts(model)
    ids = model.generate(**inputs, logits_processor=[Latents()], max_new_tokens=3)
    assert (ids[:, inputs.input_ids.shape[1] :] == model.vocabulary.latent_id).all()


@pytest.mark.parametrize("text", [START, LATENT, END])
def test_a_special_token_in_a_question_is_text(model, text):
    questions = [QUESTIONS[0], f"1+{text}1=?", QUESTIONS[2]]
    inputs = prompts(model, questions)
    for row, sample in zip(inputs.input_ids, model.samples(questions), strict=True):
        question = sample.tokens[: sample.first_latent - 1]
        assert row.tolist()[-len(question) :] == list(question)
    ids = model.generate(**inputs)
    assert answers_of(model, ids, inputs.input_ids.shape[1]) == evaluated(model, questions)


def test_only_some_rows_with_a_start_token_are_refused(model):
    ids = torch.tensor([[1, 2, 3], [1, model.vocabulary.start_id, 3]])
    with pytest.raises(ValueError, match=r"row 1 has the token <\|start-latent\|> and row 0 has not"):
        model.generate(ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("latents", [True, False])
def test_columns_beyond_the_positions_are_refused(model, latents):
    ids = torch.ones(1, 120, dtype=torch.long)
    ids, mask = model.add_latents(ids) if latents else (ids, torch.ones_like(ids))
    room = 128 - ids.shape[1]
    fits = torch.nn.functional.pad(ids, (0, room), value=1)
    assert model(fits).logits.shape[1] == 128
    with pytest.raises(ValueError, match="positions 0 to 128, and the model has positions 0 to 127"):
        model(torch.nn.functional.pad(fits, (0, 1), value=1))
    padded = torch.nn.functional.pad(fits, (50, 0), value=1)
    attention = torch.nn.functional.pad(torch.ones_like(fits), (50, 0))
    torch.testing.assert_close(model(padded, attention).logits[:, -1], model(fits).logits[:, -1])


@pytest.mark.parametrize("latents", [0, None])
def test_position_ids_are_used(model, latents):
    ids, mask = model.add_latents(**prompts(model, QUESTIONS[:1]), num_latents=latents)
    positions = mask.cumsum(1) - 1
    plain, moved = model(ids, position_ids=positions).logits, model(ids, position_ids=positions + 5).logits
    assert torch.equal(plain, model(ids).logits)
    padded = torch.nn.functional.pad(ids, (5, 0))
    attended = model(padded, torch.nn.functional.pad(mask, (5, 0)),
                     position_ids=torch.arange(padded.shape[1])[None])  # fmt: skip
    torch.testing.assert_close(attended.logits[:, 5:], moved)
    assert not torch.allclose(plain, moved, atol=1e-3)
    for wrong, message in (
        (positions + 120, "the model has positions"),
        (positions - 1, "the model has positions"),
        (positions[:, 1:], "one position per token"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, position_ids=wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cards_usage_runs(runs, kind, tmp_path, capsys):
    assert main(["export", str(runs[kind]), "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    card = (tmp_path / "out/README.md").read_text()
    (usage,) = re.findall(r"```python\n(import coconut_ds\n.*?)```", card, re.S)
    exec(usage.replace("THIS_FOLDER", str(tmp_path / "out")), {})
    question = re.search(r"answer_questions\('(.*?)'", usage)[1]
    expected = CoconutForCausalLM.from_pretrained(runs[kind]).answer_questions(question)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("change", ["coconut", "adapter"])
def test_folders_that_hold_two_models_are_refused(model, tmp_path, change):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if change == "coconut":
        config["text_config"]["model_type"] = "coconut"
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    message = {"coconut": "text_config.model_type: 'coconut' must be", "adapter": "delete adapter_config"}
    with pytest.raises(ConfigError, match=message[change]):
        CoconutForCausalLM.from_pretrained(tmp_path)
    if change == "coconut":
        with pytest.raises(ConfigError, match=message[change]):
            AutoModelForCausalLM.from_pretrained(tmp_path)


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "[x\\](javascript:alert(1))",
    "<javascript:alert(1)>",
    "![x](http://example.com/x.png)",
    "&#91;x](javascript:alert(1))",
    "`<b>`",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_a_data_card_are_no_html_and_no_links(tiny_experiment, tmp_path, text):
    markdown = pytest.importorskip("markdown_it")
    fields = ("name", "source", "licence", "split_rule", "notes")
    (tmp_path / "d.card.json").write_text(json.dumps({field: f"a {text} b" for field in fields}))
    (tmp_path / "d_train.json").write_text(Path(tiny_experiment["train_path"]).read_text())
    run = make_run(tiny_experiment, tmp_path, train_path=str(tmp_path / "d_train.json"))
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text().split("---\n", 2)[2]
    parser = markdown.MarkdownIt("commonmark").enable("table")
    parser.validateLink = lambda url: True  # by default javascript: is no link
    tokens = parser.parse(card)
    inline = [child for token in tokens for child in token.children or ()]
    kinds = {token.type for token in [*tokens, *inline]}
    assert not kinds & {"html_block", "html_inline", "link_open", "image"}
    shown = "".join(child.content for child in inline)
    assert shown.count(f"a {text} b".replace("`", "'")) >= 4  # in the name, which is code, `<` is `&lt;`


@pytest.mark.parametrize("kind, number", [("full", -1), ("no_cot", 2)])
def test_messages_of_calls_name_the_argument(runs, kind, number):
    model = CoconutForCausalLM.from_pretrained(runs[kind])
    for call in (
        lambda: model.generate(**prompts(model), num_latents=number),
        lambda: model.answer_questions(QUESTIONS, num_latents=number),
    ):
        with pytest.raises(ConfigError, match=f"^num_latents {number}: "):
            call()


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_received_folders_run_no_code(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    code = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"
    (tmp_path / "saved/evil.py").write_text(code)
    (tmp_path / "saved/custom_generate").mkdir()
    (tmp_path / "saved/custom_generate/generate.py").write_text(code)
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    changes = [
        {"text_config": config["text_config"] | {"attn_implementation": "evil/kernel"}},
        {"auto_map": auto, "text_config": config["text_config"] | {"auto_map": auto}},
        {"experiment": config["experiment"] | {"allow_pickle": True, "load_model_path": "x.bin"}},
    ]
    for change in changes:
        (tmp_path / "saved/config.json").write_text(json.dumps(config | change))
        CoconutForCausalLM.from_pretrained(tmp_path / "saved").generate(**prompts(model))
    refused = [
        {"text_config": config["text_config"] | {"n_layer": 10**9}},
        {"attn_implementation": "evil/kernel"},
        {"experiment": {"method": 3}},
        {"stage": {"hidden_steps": 0, "num_latents": -1}},
        {"stage": {"hidden_steps": 0, "num_latents": 10**12}},
    ]
    for change in refused:
        (tmp_path / "saved/config.json").write_text(json.dumps(config | change))
        with pytest.raises((ConfigError, CheckpointError)):
            CoconutForCausalLM.from_pretrained(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    (tmp_path / "saved/model.safetensors").unlink()
    torch.save({"x": Payload(tmp_path / "ran")}, tmp_path / "saved/pytorch_model.bin")
    with pytest.raises((OSError, ConfigError, CheckpointError)):
        CoconutForCausalLM.from_pretrained(tmp_path / "saved")
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_refused(model, tmp_path):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "ln_f" in name)
    save_file(
        {n: v for n, v in weights.items() if n != name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="weights are missing or unexpected: .*ln_f"):
        CoconutForCausalLM.from_pretrained(tmp_path)
    save_file(weights | {name: weights[name] * torch.nan}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN"):
        CoconutForCausalLM.from_pretrained(tmp_path)


def test_importing_the_package_imports_no_torch():
    code = "import sys, coconut_ds; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
