"""The adapter for lm-evaluation-harness, with a stand-in for its two classes that are used."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from coconut_ds import CoconutForCausalLM
from coconut_ds.evaluation.lm_harness import generate_until, harness_model
from tests.run_folders import make_run

QUESTIONS = ["3+4+2+7=?", "9=?", "1+1+1+1=?", "5+5=?", "8+3=?"]


@pytest.fixture(scope="module")
def run(tiny_experiment, tmp_path_factory):
    return make_run(tiny_experiment, tmp_path_factory.mktemp("harness"), name="run", max_new_tokens=9)


@pytest.fixture(scope="module")
def model(run):
    return CoconutForCausalLM.from_pretrained(run)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_answers_are_those_of_evaluation_in_the_order_of_the_requests(model, batch_size):
    arguments = {"until": [], "do_sample": False, "temperature": 0.0}
    requests = [
        (question, arguments | {"max_gen_toks": 3 + index % 2}) for index, question in enumerate(QUESTIONS)
    ]
    expected = [
        model.answer_questions(question, max_new_tokens=3 + index % 2)
        for index, question in enumerate(QUESTIONS)
    ]
    assert generate_until(model, requests, batch_size) == expected
    assert len(set(expected)) > 1


def test_an_answer_ends_before_the_first_stop_string(model):
    complete = model.answer_questions(QUESTIONS[0])
    assert len(complete) > 3
    for until in (complete[3], [complete[3:], complete[1:3], "no such text"]):
        first = min(complete.index(stop) for stop in until if stop in complete)
        assert generate_until(model, [(QUESTIONS[0] + "\n", {"until": until})]) == [complete[:first]]


def test_num_latents_and_sampling_reach_the_model(model, monkeypatch):
    calls = []
    generate = CoconutForCausalLM.generate

    def recorded(self, *args, **kwargs):
        calls.append({name: kwargs.get(name) for name in ("num_latents", "temperature", "do_sample")})
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(CoconutForCausalLM, "generate", recorded)
    generate_until(model, [("9=?", {"do_sample": True, "temperature": 0.5})], num_latents=1)
    generate_until(model, [("9=?", {"do_sample": False, "temperature": 0.5})])
    assert calls == [
        {"num_latents": 1, "temperature": 0.5, "do_sample": True},
        {"num_latents": None, "temperature": None, "do_sample": False},
    ]


def test_the_class_is_registered_and_loads_a_run(run, model, monkeypatch):
    registered = {}

    class LM:
        def __init__(self):
            self.cache_hook = SimpleNamespace(add_partial=lambda *args: None)

    def register_model(name):
        return lambda cls: registered.setdefault(name, cls)

    for name, content in {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {"register_model": register_model},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    harness_model()
    lm = registered["coconut"](pretrained=str(run), batch_size="auto", device="cuda:0")
    requests = [SimpleNamespace(args=(question, {"until": ["\n\n\n\n"]})) for question in QUESTIONS]
    assert lm.generate_until(requests) == model.answer_questions(QUESTIONS)
    with pytest.raises(NotImplementedError, match="generate_until"):
        lm.loglikelihood([])
