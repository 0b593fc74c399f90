"""What inspect shows, against slow ways: one token at a time, the loop's own states, hand-made results."""

import base64
import json
import re
from dataclasses import replace

import pytest
import torch

from coconut_ds.__main__ import main
from coconut_ds.data.batching import collate
from coconut_ds.data.problems import Problem, read_problems
from coconut_ds.evaluation.ablation import record_latents
from coconut_ds.evaluation.frontier import Graph, frontiers, read_graph
from coconut_ds.evaluation.inspection import first_tokens, inspect, match_steps, prompts_by_latents
from coconut_ds.evaluation.pretrained import CoconutForCausalLM
from coconut_ds.evaluation.saved_models import find_one
from coconut_ds.objectives.step_result import result_of
from coconut_ds.reports.inspection_page import page, terminal, terminal_match
from tests.run_folders import make_run

QUESTION = (
    "Every shumpus is a rempus. Tom is a terpus. Every terpus is a brimpus. Every brimpus is a lempus. "
    "Alex is a rempus. Every terpus is a gerpus. Is Tom a lempus or rempus?"
)


class Digits(Graph):
    """A graph of numbers: the words that the tiny vocabulary knows."""

    @property
    def nodes(self):
        return ("12", "34", "9", "5", "8")


DIGITS = Digits("7", ("9", "8"), (("7", "12"), ("12", "9"), ("12", "34"), ("5", "8")))


@pytest.fixture(scope="module")
def run(tiny_experiment, tmp_path_factory):
    keys = {"thought": "fixed_window", "max_new_tokens": 12}
    return make_run(tiny_experiment, tmp_path_factory.mktemp("inspect"), **keys)


@pytest.fixture(scope="module")
def asked(run):
    return CoconutForCausalLM.from_pretrained(run)


@pytest.fixture(scope="module")
def problems(tiny_experiment):
    return read_problems(tiny_experiment["val_path"], 6)


def test_decoded_states_are_those_of_the_latent_loop(asked, problems):
    model, shown = asked.model, inspect(asked, problems[0], top=3)
    batch = asked.prompts([problems[0].question])
    with torch.no_grad():
        hidden_TD = model.hidden_states(batch)[0]
        latents_KD = record_latents(model, batch)[0]
    first = batch.first_latent
    for k, state in enumerate(shown.states()):
        expected = model.head(hidden_TD[first - 1 + k]).softmax(-1).topk(3)
        assert [guess.token_id for guess in state] == expected.indices.tolist()
        assert [guess.probability for guess in state] == pytest.approx(expected.values.tolist(), abs=1e-5)
    for view, latent_D in zip(shown.latents, latents_KD, strict=True):
        assert view.norm == pytest.approx(float(latent_D.norm()), rel=1e-5)
        assert [guess.token_id for guess in view.after] == model.head(latent_D).topk(3).indices.tolist()
    assert any(view.before != view.after for view in shown.latents)  # a window mixes states
    assert shown.window_weights == pytest.approx((0.6, 0.3, 0.1))


def test_attention_is_a_share_and_never_looks_ahead(asked, problems):
    shown = inspect(asked, problems[0])
    assert shown.spans[-3:] == ("latent 1", "latent 2", "latent 3")
    assert shown.readers[:4] == ("latent 1", "latent 2", "latent 3", "<|end-latent|>")
    for k in range(3):
        assert sum(shown.attention[k]) == pytest.approx(1.0, abs=1e-4)
        assert all(weight == 0 for weight in shown.attention[k][len(shown.spans) - 2 + k :])
    for reader, row in enumerate(shown.attention):
        layers = [layer[reader] for layer in shown.attention_by_layer]
        assert row == pytest.approx(
            [sum(column) / len(layers) for column in zip(*layers, strict=True)], abs=1e-6
        )


def test_in_words_is_what_the_model_says_with_fewer_latents(asked, problems):
    shown = inspect(asked, problems[0])
    assert list(shown.in_words) == [asked.answer_questions(problems[0].question, k) for k in range(4)]
    assert shown.completion == shown.in_words[-1]


def test_a_question_that_fills_the_model_is_inspected(asked):
    """Its answer has one token, and nothing reads that token: it would have no position."""
    overhead = len(asked.samples(["1"])[0].tokens) - 1
    question = "1" + "+" * (asked.model.num_positions - overhead - 1)
    assert len(asked.samples([question])[0].tokens) == asked.model.num_positions
    shown = inspect(asked, Problem(question, (), ""))
    assert list(shown.in_words) == [asked.answer_questions(question, k) for k in range(4)]


def test_attention_is_left_as_it_was(asked, problems):
    before = asked.model.causal_lm.config._attn_implementation
    inspect(asked, problems[0])
    assert asked.model.causal_lm.config._attn_implementation == before != "eager"


def test_without_latents_the_state_behind_the_question_is_seen(run, problems):
    shown = inspect(CoconutForCausalLM.of(find_one(str(run), "checkpoint_1")), problems[0])
    assert shown.latents == () and len(shown.states()) == len(shown.in_words) == 1
    assert shown.readers[0] == "<|start-latent|>" == shown.spans[-1]
    assert "output" in terminal(shown) and "In words" in page("cot", [shown], None)


def test_without_markers_the_last_token_of_the_question_is_the_state(tiny_experiment, problems, tmp_path):
    asked = CoconutForCausalLM.from_pretrained(make_run(tiny_experiment, tmp_path, method="no_cot"))
    shown = inspect(asked, problems[0])
    assert shown.readers[0] == "\n" and shown.spans[-1] == "\u21b5"
    assert sum(shown.attention[0]) == pytest.approx(1)


def test_a_long_question_is_shown_by_sentence(asked):
    shown = inspect(asked, Problem("1+2. " * 20 + "3+4=?", (), ""))
    assert len(shown.spans) < 35
    assert sum(shown.attention[0]) == pytest.approx(1.0, abs=1e-4)


def test_graph_of_prosqa_words():
    graph = read_graph(QUESTION)
    assert graph is not None and graph.root == "Tom" and graph.choices == ("lempus", "rempus")
    assert len(graph.edges) == 6 and "Tom" not in graph.nodes
    assert graph.distances("Tom") == {"Tom": 0, "terpus": 1, "brimpus": 2, "gerpus": 2, "lempus": 3}
    assert read_graph("3+4=?") is None
    assert read_graph("Every one is here. Is it a or b?") is None


def test_frontier_against_one_token_at_a_time(asked):
    """Node names of several tokens: digits, which the tiny vocabulary knows."""
    prompts = prompts_by_latents(asked, Problem("1+2=?", (), ""))
    found = frontiers(asked.model, asked.vocabulary, DIGITS, "It is 9.", prompts, latents_per_step=1)
    assert [(f.num_latents, f.distance) for f in found] == [(1, 1), (2, 2), (3, 3)]
    assert [f.size for f in found] == [1, 2, 0]
    encode = asked.vocabulary.tokenizer
    beginning = encode("Every", add_special_tokens=False)["input_ids"]
    for frontier, prompt in zip(found, prompts[1:], strict=True):
        for candidate in frontier.candidates:
            name = encode(f"Every {candidate.node}", add_special_tokens=False)["input_ids"][len(beginning) :]
            tokens, probability = [*prompt.tokens, *beginning], 1.0
            for token in name:
                batch = collate([replace(prompt, tokens=tuple(tokens), num_prompt=len(tokens))], 0)
                with torch.no_grad():
                    hidden_D = asked.model.hidden_states(batch)[0, -1]
                probability *= asked.model.head(hidden_D).softmax(-1)[token].item()
                tokens.append(token)
            assert candidate.probability == pytest.approx(probability, rel=1e-4)
    two = {c.node: c for c in found[1].candidates}
    assert two["9"].leads_to_answer and two["12"].leads_to_answer and not two["34"].leads_to_answer
    assert two["5"].distance is None
    assert found[1].mass == pytest.approx(two["9"].probability + two["34"].probability)
    assert found[1].mass_of_answer == pytest.approx(two["9"].probability)


def test_results_of_steps():
    assert result_of("<<3+4=7>>") == "7"
    assert result_of("Every terpus is a brimpus.") == "brimpus"


def test_step_match_finds_what_is_there_and_chance_does_not(asked, problems):
    """States that decode to the first step's result, by construction."""
    shown = inspect(asked, problems[0])

    def decoding_to(problem):
        (wanted,) = first_tokens(asked, result_of(problem.steps[0]))
        state = (replace(shown.output[0], token_id=wanted),)
        views = tuple(replace(view, before=state) for view in shown.latents)
        words = tuple("\n".join([*problem.steps[k:], "### 1"]) for k in range(4))
        return replace(shown, problem=problem, latents=views, output=state, in_words=(*words[:3], "<<1"))

    chosen = [Problem(f"{n}", (f"<<0+{n}={n}>>", f"<<9+{n}=9>>"), "1") for n in range(5)]
    match = match_steps([decoding_to(p) for p in chosen], lambda text: first_tokens(asked, text), 1, top=1)
    assert match is not None and match.num_problems == 5
    assert [row[0] for row in match.rates] == [1.0] * 4
    assert [row[0] for row in match.by_chance] == [0.0] * 4
    assert match.continued == (1.0, 1.0, None, None)  # no step remains after two latents
    assert match_steps([shown], lambda text: set(), 1, top=1) is None
    assert "100.0 ( 0.0)" in terminal_match(match)


def test_page_is_self_contained_and_escapes(asked, problems):
    problem = replace(problems[0], answer="<script>alert(1)</script> $x$")
    shown = inspect(asked, problem)
    prompts = prompts_by_latents(asked, problem)
    found = frontiers(asked.model, asked.vocabulary, DIGITS, "9", prompts, latents_per_step=1)
    graph = replace(shown, frontiers=tuple(found))
    html = page("<b>run</b>", [shown, graph], None)
    assert "<script>" not in html and "<b>run" not in html
    assert not re.search(r"(src|href)=['\"](?!data:)", html)
    pictures = re.findall(r"base64,([^']+)'", html)
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert "distance" in terminal(graph) and "latent 1" in terminal(shown)


def test_the_command(run, tiny_experiment, tmp_path, capsys):
    page_file, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    arguments = ["inspect", str(run), "--file", tiny_experiment["val_path"], "--limit", "3", "--show", "1"]
    assert main([*arguments, "--html", str(page_file), "--json", str(numbers)]) == 0
    output = capsys.readouterr().out
    assert output.count("in words after 0, 1, ... latents") == 1 and "of 3 problems" in output
    assert page_file.read_text().startswith("<!doctype html>")
    assert len(json.loads(numbers.read_text())["problems"]) == 3
    assert main(["inspect", str(run), "--question", "1+2+3+4=?", "--latents", "0"]) == 0
    assert "output" in capsys.readouterr().out
    assert main(["inspect", str(run), "--question", "1", "--html", "/proc/none/x.html"]) == 2
    assert "cannot be written" in capsys.readouterr().err
