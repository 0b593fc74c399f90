"""The tracker against sums done by hand, and meta tensors against real ones."""

import pytest
import torch
from torch import nn
from transformers import BloomConfig, GPT2Config, LlamaConfig

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.memory import fake_run
from coconut_ds.memory.fake_run import LiveBytes, build_fake_model, record, record_evaluation
from coconut_ds.memory.phases import largest_batch, stages_of
from coconut_ds.memory.planner import TextShape
from tests.memory.test_plan import VOCABULARY, experiment_of


def test_counts_new_storages_once():
    before = torch.zeros(1000)
    with LiveBytes() as live:
        x = torch.zeros(100)
        view, same = x.view(10, 10), x.add_(1)
        old = before.view(10, 100)
        assert live.current == 400
        y = x + 1
        assert live.current == 800
        del y
        assert live.current == 400
        del x, view
        assert live.current == 400
        del same, old
        assert live.current == 0
    assert live.peak == 800


def step(width: int) -> int:
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    with LiveBytes() as live:
        model(torch.ones(16, width)).sum().backward()
    return live.peak


def test_meta_tensors_take_the_same_bytes():
    real = step(32)
    with torch.device("meta"):
        assert step(32) == real


CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=1003),
    "grouped queries": LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=48, vocab_size=1003,
    ),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_results_from_the_cache_are_those_of_the_operators(name, device, monkeypatch):
    """Every allocation and release in order, forward, backward and evaluation."""
    experiment = experiment_of("a model", tuning="lora" if name == "gpt2" else "full")
    text = TextShape(question=9, steps=2, step=3, answer=2).problem()
    batch = largest_batch([text], stages_of(experiment)[-1], experiment, VOCABULARY, 2)
    model = build_fake_model(
        experiment, CONFIGS[name], 1003, (1000, 1001, 1002), LatentMemory(), "bf16", device
    )

    def events():
        return record(model, batch).events, record_evaluation(model, batch, 3).events

    fake_run._results.clear()
    first, again = events(), events()
    monkeypatch.setattr(fake_run, "run_operator", plain)
    assert first == again == events()


def plain(func, args, kwargs):
    return False if func is torch.ops.aten._local_scalar_dense.default else func(*args, **kwargs)


@pytest.mark.parametrize("device, multiple", [("cuda", 32), ("cpu", 1)])
def test_the_planned_buffer_has_the_columns_of_the_device(device, multiple):
    experiment = experiment_of("a model")
    text = TextShape(question=9, steps=2, step=3, answer=2).problem()
    batch = largest_batch([text], stages_of(experiment)[-1], experiment, VOCABULARY, 2)
    config = CONFIGS["grouped queries"]
    model = build_fake_model(experiment, config, 1003, (1000, 1001, 1002), LatentMemory(), "bf16", device)
    sizes = {event[0] for event in record(model, batch).events if isinstance(event, tuple)}
    rows, columns = batch.shape
    layers, heads, head_dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    rounded = -(-columns // multiple) * multiple
    assert columns % 32 and 2 * layers * 2 * rows * heads * rounded * head_dim in sizes


def test_a_model_without_a_limit_of_positions_is_planned():
    """BLOOM, which also makes a tensor without dimensions."""
    experiment = experiment_of("a model")
    text = TextShape(question=9, steps=2, step=3, answer=2).problem()
    batch = largest_batch([text], stages_of(experiment)[-1], experiment, VOCABULARY, 2)
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=1003)
    settings = LatentMemory(segmented_cache=False)
    model = build_fake_model(experiment, config, 1003, (1000, 1001, 1002), settings, device="cpu")
    assert record(model, batch).peak > 0
