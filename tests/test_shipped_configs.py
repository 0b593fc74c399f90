"""Every settings file that is shipped loads, and says what its name and the paper say."""

import json
from pathlib import Path

import pytest

from coconut_ds.config import Experiment, Method, load_experiment, load_with_notes
from coconut_ds.curriculum import final_stage
from coconut_ds.ds_config import load_ds_config

ROOT = Path(__file__).parent.parent
YAMLS = sorted((ROOT / "configs").glob("**/*.yaml"))
JSONS = sorted((ROOT / "ds_configs").glob("*.json"))
PAPER_DATA = ("gsm", "prontoqa", "prosqa")
TABLE_1 = (
    "cot",
    "no_cot",
    "icot",
    "pause",
    "coconut",
    "without_curriculum",
    "without_thought",
    "pause_as_thought",
)
TRAINED = [path for folder in ("full", "lora") for path in YAMLS if path.parent.name == folder]


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def split_name(path: Path) -> tuple[str, str, bool]:
    """('gsm', 'coconut', True) from gsm_coconut_eval.yaml."""
    data, _, kind = path.stem.partition("_")
    return data, kind.removesuffix("_eval"), kind.endswith("_eval")


@pytest.mark.parametrize("path", YAMLS, ids=short)
def test_every_experiment_loads_and_says_nothing_in_vain(path):
    experiment, notes = load_with_notes(path)
    assert isinstance(experiment, Experiment) and notes == []


@pytest.mark.parametrize("path", JSONS, ids=short)
def test_every_deepspeed_file_takes_every_experiment(path):
    config = load_ds_config(path)
    for experiment in map(load_experiment, YAMLS):
        resolved = config.resolve(experiment, world_size=2)
        rows = experiment.batch_size_training * experiment.gradient_accumulation_steps * 2
        assert resolved["train_batch_size"] == rows


@pytest.mark.parametrize("data", PAPER_DATA)
@pytest.mark.parametrize("method", TABLE_1)
def test_table_1_is_complete(data, method):
    assert ROOT / f"configs/full/{data}_{method}.yaml" in YAMLS


@pytest.mark.parametrize("folder", ["full", "lora"])
@pytest.mark.parametrize("data", [*PAPER_DATA, "math"])
def test_coconut_and_its_evaluation_exist_for_every_data_set(folder, data):
    for name in (f"{data}_coconut", f"{data}_coconut_eval", f"{data}_cot"):
        assert ROOT / f"configs/{folder}/{name}.yaml" in YAMLS


@pytest.mark.parametrize("path", TRAINED, ids=short)
def test_file_says_what_its_name_says(path):
    data, kind, evaluates = split_name(path)
    experiment = load_experiment(path)
    assert experiment.tuning == path.parent.name
    assert experiment.only_eval == evaluates
    assert experiment.train_path == f"data/{data}_train.json"
    assert experiment.val_path == f"data/{data}_{'test' if evaluates else 'valid'}.json"
    if kind in TABLE_1:
        assert experiment.method == {"without_thought": "no_thoughts"}.get(kind, kind)
    else:
        assert (experiment.method, experiment.thought) == (Method.COCONUT, kind)
    if evaluates:
        trained = load_experiment(path.with_name(path.name.replace("_eval", "")))
        assert experiment.load_model_path == f"{trained.save_path}/{trained.name}/best"
        assert final_stage(experiment) == final_stage(trained)  # of which `best` is


@pytest.mark.parametrize("path", TRAINED, ids=short)
def test_paper_settings(path):
    data, kind, _ = split_name(path)
    experiment = load_experiment(path)
    assert experiment.batch_size_training * experiment.gradient_accumulation_steps * 2 == 128
    assert (experiment.lr, experiment.weight_decay, experiment.gradient_clipping) == (1e-4, 0.01, 0.0)
    assert experiment.reset_optimizer == "stage_switch" and experiment.pad_latent_to_max
    assert experiment.model_id == "openai-community/gpt2"
    if kind in ("cot", "no_cot"):
        return
    gsm_like = data in ("gsm", "math")
    if experiment.method.has_stages:
        assert experiment.epochs_per_stage == ((6, 3) if gsm_like else 5)
    assert experiment.max_latent_stage == (3 if gsm_like else 6)
    assert experiment.num_epochs == 50
    if experiment.method.has_latents:
        assert experiment.c_thought * experiment.max_latent_stage == 6


def test_run_names_do_not_collide():
    names = [load_experiment(path).name for path in TRAINED]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", JSONS, ids=short)
def test_deepspeed_file_is_sized_for_two_11_gb_cards(path):
    config = load_ds_config(path)
    budget = config.memory_budget
    assert budget is not None
    assert (budget.gpus, budget.gpu_memory_mib) == (2, 11264)
    assert set(budget.components_mib) == {
        "parameters", "gradients", "optimizer", "activations", "loss", "communication",
    }  # fmt: skip
    zero = config.stock["zero_optimization"]
    assert 2e7 <= zero["reduce_bucket_size"] <= 1e8
    bucket_mib = zero["reduce_bucket_size"] * (4 if config.precision == "fp32" else 2) / 2**20
    assert 2 * bucket_mib <= budget.components_mib["communication"], "bucket and its flattened copy"
    assert ("fp16" if "2080" in budget.device else "fp32") == config.precision or "Ampere" in budget.device
    assert config.offload_optimizer or config.stock["optimizer"]["params"]["torch_adam"]


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
