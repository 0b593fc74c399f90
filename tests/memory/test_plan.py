"""Plans of a small model: what they count, that they move the right way, and that `fit` agrees with them."""

import json
import random
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from coconut_ds.__main__ import main
from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.config.experiment import load_experiment, validate_experiment
from coconut_ds.data.batching import BatchConfig, training_steps
from coconut_ds.data.problems import Problem
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary
from coconut_ds.errors import BudgetError, ConfigError
from coconut_ds.memory.fit import cheapest_changes, fit, with_rows
from coconut_ds.memory.phases import (
    BatchShape,
    PlannedRun,
    largest_batch,
    longest,
    shape_of,
    stages_of,
)
from coconut_ds.memory.plan_table import full_text, markdown, side_by_side
from coconut_ds.memory.planner import MIB, Planner, TextShape, read_lengths
from coconut_ds.model.loading import load_config

ROOT = Path(__file__).resolve().parents[2]
TEXT = TextShape(question=60, steps=3, step=8, answer=5)
VOCABULARY = Vocabulary(None, 1000, 1001, 1002, eos_id=0, pad_id=0)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A GPT-2 of five layers as a folder with a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("model")
    values = json.loads((ROOT / "benchmarks/shapes/gpt2/config.json").read_text())
    values |= {"n_layer": 5, "n_embd": 64, "n_head": 4, "vocab_size": 1000}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def experiment_of(model, **changes):
    values = {
        "project": "p", "name": "n", "save_path": "runs", "method": "coconut", "model_id": str(model),
        "train_path": "none.json", "val_path": "none.json", "c_thought": 1, "epochs_per_stage": 1,
        "max_latent_stage": 1, "num_epochs": 2, "batch_size_training": 4, "gradient_accumulation_steps": 3,
        "batch_size_eval": 1, "lr": 1e-4,
    }  # fmt: skip
    return validate_experiment(values | changes, "test")


@pytest.fixture(scope="module")
def planner(tiny_model):
    return Planner.of(experiment_of(tiny_model), TEXT)


@pytest.fixture(scope="module")
def ds_config():
    config = load_ds_config(ROOT / "ds_configs/zero2.json")
    config.stock["zero_optimization"]["reduce_bucket_size"] = 10_000
    return config


@pytest.fixture(scope="module")
def plan(planner, tiny_model, ds_config):
    return planner.plan(experiment_of(tiny_model), ds_config)


def budget_of(ds_config, mib):
    budget = replace(ds_config.memory_budget, gpu_memory_mib=mib, reserved_mib=0, components_mib={})
    return replace(ds_config, memory_budget=budget)


def test_items_add_up_to_the_total(plan):
    assert sum(item.size for item in plan.items) == plan.gpu_bytes
    assert plan.peak_stage.gpu_bytes == plan.states_bytes + plan.phases[0].size
    assert all(item.formula for item in [*plan.items, *plan.host])


def test_workspaces_of_cublas_belong_to_the_states_of_a_gpu(planner, tiny_model, ds_config, plan):
    experiment = experiment_of(tiny_model)
    assert plan.components()["workspaces"] == 2 * 8_519_680  # of the forward and of the backward's thread
    hopper = replace(
        ds_config, memory_budget=replace(ds_config.memory_budget, device="NVIDIA H100 80GB HBM3")
    )
    larger = planner.plan(experiment, hopper)
    assert larger.gpu_bytes - plan.gpu_bytes == 2 * (33_554_432 - 8_519_680)
    cpu = Planner.of(experiment, TEXT, "cpu").plan(experiment, ds_config)
    assert cpu.components()["workspaces"] == 0


@pytest.mark.parametrize("head_dim", [8, 32])
def test_the_attention_workspace_has_the_width_of_all_heads(planner, tiny_model, head_dim):
    """In Qwen3 it is not the hidden size."""
    experiment = experiment_of(tiny_model, bf16=True)
    ds_config = load_ds_config(ROOT / "ds_configs/zero2_offload_bf16.json")
    config = AutoConfig.for_model("qwen3", num_attention_heads=4, hidden_size=32, head_dim=head_dim)
    run = PlannedRun(replace(planner, config=config), experiment, ds_config, 1)
    shape = BatchShape(rows=3, columns=20, prompt=10, num_latents=2, labels=5)
    assert run.attention_workspace(shape) == 4 * 3 * 10 * 4 * head_dim


def test_every_stage_is_planned(plan):
    assert [stage.name for stage in plan.stages][:2] == [
        "0 steps hidden, 0 latents",
        "1 step hidden, 1 latent",
    ]


@pytest.mark.parametrize(
    "shape, checkpointing, tuning, precision",
    [
        ("gpt2", "none", "full", "fp16"),
        pytest.param("gpt2", "layers", "lora", "fp32", marks=pytest.mark.slow),
        ("llama-3.2-1b", "layers", "full", "fp32"),
        pytest.param("llama-3.2-1b", "none", "lora", "fp16", marks=pytest.mark.slow),
    ],
)
def test_shallow_copies_plan_what_the_full_model_does(shape, checkpointing, tuning, precision, ds_config):
    """States, every stage and evaluation, to the byte."""
    config = load_config(str(ROOT / "benchmarks/shapes" / shape))
    config.num_hidden_layers, config.hidden_size, config.vocab_size = 5, 128, 1000
    config.num_attention_heads = 4
    if shape != "gpt2":
        config.head_dim, config.num_key_value_heads, config.intermediate_size = 32, 2, 200
    stock = {**ds_config.stock, "fp16": {"enabled": precision == "fp16"}}
    latent = replace(ds_config.latent_memory, activation_checkpointing=checkpointing)
    changed = replace(ds_config, stock=stock, latent_memory=latent)
    experiment = experiment_of("a model", tuning=tuning, max_latent_stage=2, num_epochs=3)
    problems = [TEXT.problem()]
    quick, exact = (
        replace(Planner.from_run_data(experiment, problems, problems, None, "cuda", config), exact=exact)
        for exact in (False, True)
    )
    assert quick.depths == (2, 3) and exact.depths == (5,)
    plan = quick.plan(experiment, changed)
    assert plan == exact.plan(experiment, changed)
    assert not any(key[-1] == 5 for key in quick.fake_models)  # the full model never ran


def test_more_rows_take_more(planner, tiny_model, ds_config, plan):
    assert (
        planner.plan(experiment_of(tiny_model, batch_size_training=5), ds_config).gpu_bytes > plan.gpu_bytes
    )


def test_recomputation_takes_less(planner, tiny_model, ds_config, plan):
    recomputing = replace(
        ds_config, latent_memory=replace(ds_config.latent_memory, activation_checkpointing="layers")
    )
    assert planner.plan(experiment_of(tiny_model), recomputing).gpu_bytes < plan.gpu_bytes


def test_lora_takes_less_for_states(planner, tiny_model, ds_config, plan):
    lora = planner.plan(experiment_of(tiny_model, tuning="lora"), ds_config)
    assert lora.components()["optimizer"] < plan.components()["optimizer"] / 4


def test_half_precision_takes_less(planner, tiny_model, ds_config, plan):
    half = replace(ds_config, stock={**ds_config.stock, "bf16": {"enabled": True}})
    assert (
        planner.plan(experiment_of(tiny_model), half).components()["parameters"]
        < plan.components()["parameters"]
    )


def test_changes_help_and_say_how(planner, tiny_model, ds_config, plan):
    changes = cheapest_changes(planner, experiment_of(tiny_model), ds_config, plan)
    assert len(changes) == 3
    assert all(change.gpu_bytes < plan.gpu_bytes and change.setting for change in changes)


def test_changes_that_make_it_fit_come_first(planner, tiny_model, ds_config, plan):
    tight = budget_of(ds_config, int(plan.gpu_bytes / 2**20))
    over = planner.plan(experiment_of(tiny_model), tight)
    assert not over.fits
    changes = cheapest_changes(planner, experiment_of(tiny_model), tight, over)
    assert changes[0].fits


def test_changes_for_the_host_are_of_the_host():
    """A host that is short gets options that save host memory, each with its exact line."""
    stock = load_ds_config(ROOT / "ds_configs/zero2_offload_fp16.json")
    experiment = experiment_of(ROOT / "benchmarks/shapes/gpt2", num_epochs=1)
    planner = replace(Planner.of(experiment, TEXT), valid=[])
    fitting = planner.plan(experiment, stock)
    assert fitting.gpu_fits and fitting.host_fits

    def short_of(saved):
        budget = replace(stock.memory_budget, host_memory_gib=(fitting.host_bytes - saved) / 2**30)
        return replace(stock, memory_budget=budget)

    by = {
        option.text.split(" (")[0]: fitting.host_bytes - option.host_bytes
        for option in cheapest_changes(
            planner, experiment, short_of(1), planner.plan(experiment, short_of(1)), limit=9
        )
    }
    assert list(by)[:2] == [
        "pinned blocks in their own size",
        "16-bit master weights and gradients on the host",
    ]
    assert all(saved > 0 for saved in by.values())
    tight = short_of(max(by.values()) + 1)
    over = planner.plan(experiment, tight)
    assert over.gpu_fits and not over.host_fits
    first, *_ = cheapest_changes(planner, experiment, tight, over)
    assert first.fits and " + " in first.text and first.target == "host"
    assert first.setting.startswith("PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:1")
    assert "CHANGES FOR THE HOST" in full_text(replace(over, changes=(first,)))


def test_a_plan_over_gpu_and_host_gets_a_combination_that_fits_both():
    """Changes for one alone may need more of the other."""
    stock = load_ds_config(ROOT / "ds_configs/zero2_offload_fp16.json")
    experiment = experiment_of(ROOT / "benchmarks/shapes/gpt2", num_epochs=1)
    planner = replace(Planner.of(experiment, TEXT), valid=[])
    fitting = planner.plan(experiment, stock)

    def short_of(gpu_share, host_share):
        budget = stock.memory_budget
        memory = int(gpu_share * fitting.gpu_bytes / 2**20) + budget.reserved_mib
        host = host_share * fitting.host_bytes / 2**30
        tight = replace(
            stock,
            memory_budget=replace(budget, gpu_memory_mib=memory, host_memory_gib=host, components_mib={}),
        )
        over = planner.plan(experiment, tight)
        assert not over.gpu_fits and not over.host_fits
        return replace(over, changes=cheapest_changes(planner, experiment, tight, over))

    over = short_of(0.95, 0.95)
    both = over.changes[0]
    changed = replace(planner, rounds_up_to=MIB if not both.rounds_pinned else planner.rounds_up_to).plan(
        both.experiment, both.ds_config, both.ranks
    )
    assert changed.fits and (changed.gpu_bytes, changed.host_bytes) == (both.gpu_bytes, both.host_bytes)
    text = full_text(over)
    assert "CHANGES FOR THE GPU AND HOST" in text and "No combination" not in text
    assert "No combination of the changes below fits both" in full_text(short_of(0.95, 0.001))


def test_fit_is_the_largest_that_fits(planner, tiny_model, ds_config):
    experiment = experiment_of(tiny_model, batch_size_training=4, gradient_accumulation_steps=6)
    wanted = planner.plan(with_rows(experiment, 5), ds_config).gpu_bytes
    tight = budget_of(ds_config, wanted // 2**20 + 1)
    found = fit(planner, experiment, tight)
    assert found.plan.fits and found.memory_options == ()
    assert planner.plan(with_rows(experiment, found.max_rows), tight).fits
    assert not planner.plan(with_rows(experiment, found.max_rows + 1), tight).fits
    rows, steps = found.experiment.batch_size_training, found.experiment.gradient_accumulation_steps
    assert rows * steps == 24 and rows <= found.max_rows < 24


def test_fit_adds_memory_options_where_one_row_is_too_much(planner, tiny_model, ds_config):
    experiment = experiment_of(tiny_model)
    one = planner.plan(with_rows(experiment, 1), ds_config).gpu_bytes
    found = fit(planner, experiment, budget_of(ds_config, one // 2**20))
    assert found.memory_options[0] == "activation_checkpointing: layers" and found.plan.fits


def test_fit_says_when_nothing_fits(planner, tiny_model, ds_config):
    with pytest.raises(BudgetError, match="not even one row fits"):
        fit(planner, experiment_of(tiny_model), budget_of(ds_config, 1))


def test_texts_show_what_there_is(plan):
    text = full_text(plan)
    for word in ("Adam moments", "8 P/N", "VERDICT  GPU: fits", "STAGES", "HOST"):
        assert word in text
    assert side_by_side([plan, plan]).count("zero2") == 2
    assert markdown([("tiny", plan)]).count("\n") == 2


def problem(question, steps, answer=2):
    return TokenizedProblem((0,) * question, tuple((0,) * n for n in steps), (0,) * answer)


def test_the_worst_batch_has_the_longest_question_and_the_longest_rest(tiny_model):
    experiment = experiment_of(tiny_model)
    problems = [problem(9, [1]), problem(3, [8, 8]), problem(4, [2, 2, 2])]
    first, second, *_ = stages_of(experiment)
    shape = shape_of(largest_batch(problems, first, experiment, VOCABULARY, 2))
    assert shape.columns == 3 + 2 + 16 + 2, "no latents to align: the longest row"
    shape = shape_of(largest_batch(problems, second, experiment, VOCABULARY, 2))
    assert (shape.prompt, shape.num_latents, shape.columns) == (10, 1, 10 + 1 + 1 + 8 + 2)
    assert shape_of(largest_batch(problems, first, experiment, VOCABULARY, 1)).columns == 3 + 2 + 16 + 2


@pytest.mark.parametrize("changes", [{}, {"uniform_prob": 0.5}, {"pad_latent_to_max": False}], ids=str)
@pytest.mark.parametrize("method", ["coconut", "cot", "no_thoughts"])
def test_no_micro_batch_is_wider_than_the_largest(tiny_model, changes, method):
    draw = random.Random(0)
    words = lambda high: draw.randint(1, high)  # noqa: E731
    problems = [problem(words(20), [words(9) for _ in range(words(4) - 1)], words(5)) for _ in range(40)]
    more = {"max_latent_stage": 2, "num_epochs": 4, "c_thought": 2, "batch_size_training": 3} | changes
    experiment = experiment_of(tiny_model, method=method, **more)
    layout = BatchConfig.of(experiment, 2, 1)
    for at in stages_of(experiment):
        limit = shape_of(largest_batch(problems, at, experiment, VOCABULARY, 3))
        steps = training_steps(problems, at.epoch, experiment, VOCABULARY, layout)
        shapes = [shape_of(batch) for step in steps for batch in step]
        assert max(shape.columns for shape in shapes) <= limit.columns
        assert max(shape.num_latents for shape in shapes) <= limit.num_latents


def test_mixed_stages_count_the_longest_text_and_the_most_latents(tiny_model):
    mixed = experiment_of(tiny_model, uniform_prob=0.5, max_latent_stage=2, num_epochs=3)
    last = stages_of(mixed)[-1]
    shape = shape_of(largest_batch([problem(5, [8, 8, 8])], last, mixed, VOCABULARY, 2))
    assert shape.labels == 2 * (24 + 2)
    assert shape.num_latents == 2


def test_of_a_large_file_the_longest_are_kept():
    problems = [Problem("q" * (i % 700), ("s" * (i % 310),), "a") for i in range(3000)]
    kept = longest(problems, limit=40)
    assert len(kept) <= 40
    assert max(len(p.question) for p in kept) == 699 and max(len(p.steps[0]) for p in kept) == 309


def test_without_data_the_shape_options_are_named(tiny_model):
    with pytest.raises(ConfigError, match="--question-tokens"):
        read_lengths(experiment_of(tiny_model))


def write(tmp_path, model, **changes):
    values = {
        "project": "p", "name": "n", "save_path": "runs", "method": "coconut", "model_id": str(model),
        "train_path": "none.json", "val_path": "none.json", "c_thought": 1, "epochs_per_stage": 1,
        "max_latent_stage": 1, "num_epochs": 2, "batch_size_training": 2, "lr": 1e-4,
        "gradient_accumulation_steps": 2, "batch_size_eval": 1,
    }  # fmt: skip
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def test_the_command_says_with_its_exit_code_whether_it_fits(tiny_model, tmp_path, capsys):
    config = write(tmp_path, tiny_model)
    values = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    values["memory_budget"] |= {"gpu_memory_mib": 801, "components_mib": {}}
    tight = tmp_path / "tight.json"
    tight.write_text(json.dumps(values))
    shape = ["--question-tokens", "30", "--json", "--no-changes"]
    assert main(["plan", str(config), "--deepspeed_config", "ds_configs/zero2.json", *shape]) == 0
    assert json.loads(capsys.readouterr().out)[0]["fits"] is True
    assert main(["plan", str(config), "--deepspeed_config", "ds_configs/zero2.json", str(tight), *shape]) == 3
    assert [plan["fits"] for plan in json.loads(capsys.readouterr().out)] == [True, False]


def test_the_fit_command_writes_a_file_that_fits(tiny_model, tmp_path, capsys):
    config = write(tmp_path, tiny_model)
    out = tmp_path / "new.yaml"
    shape = ["--question-tokens", "30"]
    command = [
        "fit",
        str(config),
        "--deepspeed_config",
        "ds_configs/zero2.json",
        "--output",
        str(out),
        *shape,
    ]
    assert main(command) == 0
    assert load_experiment(out).batch_size_training == 4
    assert "up to 4 rows would fit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2-xl", "llama-3.2-1b"])
def test_large_shapes_need_neither_weights_nor_much_memory(model, tmp_path, capsys):
    config = write(tmp_path, ROOT / "benchmarks/shapes" / model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    shape = ["--question-tokens", "100", "--no-changes"]
    assert main(["plan", str(config), "--deepspeed_config", "ds_configs/zero2.json", *shape]) == 3
    seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    assert "does not fit" in capsys.readouterr().out
    assert seconds < 60  # of one busy core; about 10 s on a free one
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 2**20
