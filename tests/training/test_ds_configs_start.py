"""DeepSpeed JSONs of other projects that `validate` accepts also train on the CPU."""

import json

import pytest

from tests.launched.start import start

ADAMW = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "betas": [0.9, 0.999]}}
BUCKET = {"reduce_bucket_size": 50_000_000}
FILES = {
    "no torch_adam": {"optimizer": ADAMW, "zero_optimization": {"stage": 2, **BUCKET}},
    "trainer": {
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": "auto",
            "contiguous_gradients": True,
        },
    },
    "trainer, stage 3": {
        "optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    },
    "stage 0": {"zero_optimization": {"stage": 0}},
    "old": {
        "zero_optimization": {"stage": 1, "cpu_offload": False, "elastic_checkpoint": True, **BUCKET},
        "optimizer": {"type": "AdamW", "params": {"bias_correction": True}},
        "zero_allow_untested_optimizer": True,
        "gradient_predivide_factor": 2.0,
        "sparse_gradients": False,
    },
}


@pytest.fixture(scope="module")
def losses(tiny_experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    cases = []
    for name, values in FILES.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(values))
        cases.append({"name": name, "experiment": tiny_experiment, "ds_config": str(path), "steps": 2})
    (folder / "cases.json").write_text(json.dumps(cases))
    process = start("tests.launched.losses", folder / "cases.json", folder / "losses.json", ranks=1)
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stderr.count("note: ") >= 5
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_trains(losses, name):
    assert len(losses[name]) == 2 and losses[name] == pytest.approx(losses["no torch_adam"], rel=1e-4)
