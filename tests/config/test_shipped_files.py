"""Every settings file that is shipped loads, and says what its name and the paper say."""

import json
import re
from pathlib import Path

import pytest

from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.config.experiment import (
    Experiment,
    Method,
    load_experiment,
    load_with_notes,
    validate_experiment,
)
from coconut_ds.config.methods import METHOD_BOOLEANS
from coconut_ds.config.schema import read_yaml
from coconut_ds.data.curriculum import final_stage
from coconut_ds.errors import ConfigError
from coconut_ds.memory.cases import built_in_config
from coconut_ds.memory.known import find_gpu, precision_note
from coconut_ds.memory.planner import Planner, TextShape

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "configs"
JSONS = sorted((ROOT / "ds_configs").glob("*.json"))
PUBLISHED = sorted(CONFIGS.glob("published/*.yaml"))
OURS = [path for path in sorted(CONFIGS.glob("**/*.yaml")) if path not in PUBLISHED]
TRAINED = [path for path in OURS if path.parent.name in ("full", "lora")]
DATA_SETS = ("gsm", "prontoqa", "prosqa", "math")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", OURS, ids=short)
def test_every_experiment_loads_and_says_nothing_in_vain(path):
    experiment, notes = load_with_notes(path)
    assert isinstance(experiment, Experiment) and notes == []


@pytest.mark.parametrize("path", JSONS, ids=short)
def test_every_deepspeed_file_takes_every_experiment(path):
    config = load_ds_config(path)
    for experiment in map(load_experiment, [*OURS, *PUBLISHED]):
        if experiment.quantization != "none" and config.zero_stage == 3:
            continue
        resolved = config.resolve(experiment, world_size=2)
        rows = experiment.batch_size_training * experiment.gradient_accumulation_steps * 2
        assert resolved["train_batch_size"] == rows


@pytest.mark.parametrize("path", OURS, ids=short)
def test_every_key_of_a_file_changes_the_experiment(path):
    values = read_yaml(path)
    assert not {*METHOD_BOOLEANS, "latent_variant"} & set(values), "the spelling of the published code"
    for key in values:
        without = {name: value for name, value in values.items() if name != key}
        try:
            assert validate_experiment(without, "test") != load_experiment(path), f"{key} is the default"
        except ConfigError:
            continue  # a key that must be there


@pytest.mark.parametrize("path", OURS, ids=short)
def test_every_file_is_tested_at_the_end_of_its_training(path):
    experiment = load_experiment(path)
    assert not experiment.only_eval
    assert experiment.test_path == experiment.val_path.replace("valid", "test") != experiment.val_path


@pytest.mark.parametrize("folder", ["full", "lora"])
@pytest.mark.parametrize("data", DATA_SETS)
def test_coconut_exists_for_every_data_set(folder, data):
    assert CONFIGS / folder / f"{data}_coconut.yaml" in TRAINED


@pytest.mark.parametrize("path", TRAINED, ids=short)
def test_file_says_what_its_name_says(path):
    data, _, kind = path.stem.partition("_")
    experiment = load_experiment(path)
    lora = "-lora" if path.parent.name == "lora" else ""
    assert kind.startswith("coconut") and experiment.name == path.stem.replace("_", "-") + lora
    assert (experiment.method, experiment.thought) == (Method.COCONUT, "last_hidden")
    assert experiment.tuning == path.parent.name
    assert experiment.train_path == f"data/{data}_train.json"
    assert experiment.val_path == f"data/{data}_valid.json"
    assert experiment.batch_size_training * experiment.gradient_accumulation_steps * 2 == 128


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in TRAINED if path.stem.partition("_coconut")[2]], ids=short)
def test_recipe_for_a_larger_model_fits_as_its_comment_says(path):
    """By the quick plan of its first stage, which has the most text; a full plan takes a minute."""
    pattern = r"with (ds_configs/\w+\.json): (\d+\.\d) of the 10\.[02] GiB"
    comment = re.search(pattern, path.read_text("utf-8"))
    assert comment is not None
    experiment = load_experiment(path)
    assert experiment.lr == {"full": 1e-5, "lora": 1e-4}[experiment.tuning]
    shape = TextShape(question=256, steps=8, step=16, answer=12)
    planner = Planner.of(experiment, shape, config=built_in_config(experiment.model_id))
    plan = planner.plan(experiment, load_ds_config(comment[1]), only_epoch=0)
    assert plan.fits and plan.gpu_bytes / 2**30 == pytest.approx(float(comment[2]), rel=0.05)


# The published files: what they share, and what each says besides.
PUBLISHED_KEYS = [
    "project", "save_path", "name", "only_eval", "coconut", "cot", "no_thoughts", "no_cot",
    "c_thought", "epochs_per_stage", "max_latent_stage", "pad_latent_to_max", "save_only_improve",
    "uniform_prob", "model_id", "load_model_path", "seed", "resume", "bf16", "train_path",
    "val_path", "reset_optimizer", "batch_size_training", "debug", "gradient_accumulation_steps",
    "num_epochs", "lr", "weight_decay",
]  # fmt: skip
LATER = {"c_thought": 1, "epochs_per_stage": 5, "max_latent_stage": 6, "num_epochs": 50}
GSM = {"c_thought": 2, "epochs_per_stage": 3, "max_latent_stage": 3, "num_epochs": 25}
GSM_COT = {
    "method": "cot", "c_thought": 0, "epochs_per_stage": 1, "max_latent_stage": 0, "num_epochs": 25,
    "reset_optimizer": "never", "save_only_improve": True,
}  # fmt: skip
PUBLISHED_VALUES = {
    "gsm_cot": {"name": "gsm-cot", **GSM_COT},
    "gsm_coconut": {"name": "gsm-coconut", "resume": 3, **GSM},
    "gsm_coconut_eval": {"name": "gsm-coconut-eval", "resume": 15, **GSM},
    "prontoqa_coconut": {"name": "prontoqa-coconut", **LATER},
    "prontoqa_coconut_eval": {"name": "prontoqa-coconut", "resume": 40, **LATER},
    "prosqa_coconut": {"name": "prosqa-coconut", **LATER},
    "prosqa_coconut_eval": {"name": "prosqa-coconut", "resume": 40, **LATER},
}


@pytest.mark.parametrize("path", PUBLISHED, ids=short)
def test_published_file_has_the_published_keys_and_values(path):
    assert list(read_yaml(path)) == PUBLISHED_KEYS
    data, evaluates = path.stem.partition("_")[0], path.stem.endswith("_eval")
    expected = {
        "method": "coconut", "tuning": "full", "thought": "last_hidden", "only_eval": evaluates, "resume": 0,
        "train_path": f"data/{data}_train.json",
        "val_path": f"data/{data}_{'test' if evaluates else 'valid'}.json",
        "batch_size_training": 32, "gradient_accumulation_steps": 1, "lr": 1e-4, "weight_decay": 0.01,
        "seed": 0, "gradient_clipping": 0.0,
        "reset_optimizer": "stage_switch", "save_only_improve": False, "bf16": False, "uniform_prob": 0.0,
        "pad_latent_to_max": True, "debug": False, "model_id": "openai-community/gpt2",
    } | PUBLISHED_VALUES[path.stem]  # fmt: skip
    experiment = load_experiment(path)
    assert {key: getattr(experiment, key) for key in expected} == expected
    if evaluates:
        trained = load_experiment(path.with_name(path.name.replace("_eval", "")))
        assert experiment.load_model_path == f"{trained.save_path}/{trained.name}/best"
        assert final_stage(experiment) == final_stage(trained)  # of which `best` is
    else:
        start = "runs/published/gsm-cot/best" if path.stem == "gsm_coconut" else None
        assert experiment.load_model_path == start


def test_every_published_file_is_there():
    assert [path.stem for path in PUBLISHED] == sorted(PUBLISHED_VALUES)


@pytest.mark.parametrize("path", JSONS, ids=short)
def test_deepspeed_file_is_sized_for_its_gpus_as_torch_reports_them(path):
    config = load_ds_config(path)
    budget = config.memory_budget
    assert budget is not None
    gpus = 1 if "qlora" in path.name else 2  # each rank loads the model into host memory
    assert (budget.gpus, budget.gpu_memory_mib) == (gpus, find_gpu(budget.device)["mib"])
    assert precision_note(budget.device, config.precision) is None
    assert set(budget.components_mib) == {
        "parameters", "gradients", "optimizer", "activations", "loss", "communication",
    }  # fmt: skip
    zero = config.stock["zero_optimization"]
    assert 2e7 <= zero["reduce_bucket_size"] <= 1e8
    bucket_mib = zero["reduce_bucket_size"] * (4 if config.precision == "fp32" else 2) / 2**20
    assert 2 * bucket_mib <= budget.components_mib["communication"], "bucket and its flattened copy"
    by_device = {"GTX 1080 Ti": "fp32", "RTX 2080 Ti": "fp16", "RTX 3060": "bf16"}
    assert config.precision == by_device[budget.device]
    on_gpu = config.eight_bit_moments or config.stock["optimizer"]["params"].get("torch_adam")
    assert config.offload_optimizer or on_gpu


def test_the_named_files_exist_and_are_in_the_table():
    names = {path.stem for path in JSONS}
    assert names >= {
        "zero1",
        "zero2",
        "zero2_offload",
        "zero2_offload_fp16",
        "zero2_offload_bf16",
        "zero3_offload",
    }
    table = (ROOT / "ds_configs/README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.json`" in table for name in names)


@pytest.mark.parametrize("path", JSONS, ids=short)
def test_learning_numbers_belong_to_the_yaml(path):
    values = json.loads(path.read_text())
    params = values["optimizer"]["params"]
    assert params["lr"] == params["weight_decay"] == values["gradient_clipping"] == "auto"
    assert values["train_batch_size"] == values["gradient_accumulation_steps"] == "auto"
    assert (path.parent / values["$schema"]).is_file()
