"""A profile and a plan as `profile` writes them, small enough to be checked by eye."""

STEP_PHASES = (
    "embed",
    "pass 0",
    "pass 1",
    "pass 2",
    "pass 3",
    "loss",
    "backward",
    "reduce",
    "optimizer step",
)
PEAKS = (10, 40, 50, 55, 60, 70, 90, 100, 30)


def reading(**more):
    names = (
        "pinned",
        "allocated",
        "allocated_peak",
        "reserved",
        "reserved_peak",
        "device_used",
        "device_total",
    )
    return {"rss": 600.0, "retries": 0, **dict.fromkeys(names, 0.0), **more}


def rank(device="cpu", more=0.0):
    """States of 20 MiB, a peak of 100 + `more` in the second reduce."""
    names = ["initialise", *(f"step {step}: {name}" for step in (1, 2) for name in STEP_PHASES)]
    peaks = [15, *PEAKS, *PEAKS]
    phases = [
        {
            "name": name,
            "start_seconds": float(place),
            "seconds": 1.0,
            "peak_mib": peak + more,
            "end_mib": 20.0,
            "reading": reading(reserved_peak=120.0, device_used=500.0) if device != "cpu" else reading(),
        }
        for place, (name, peak) in enumerate(
            zip([*names, "evaluation", "checkpoint"], [*peaks, 45, 21], strict=True)
        )
    ]
    states = {"parameters": 8.0, "optimizer": 10.0, "gradients": 1.5, "other": 0.5}
    return {
        "device": device,
        "phases": phases,
        "states_mib": {"step 2": {device.split(":")[0]: states}},
        "peak_mib": 100.0 + more,
        "at_peak": {
            "phase": "step 2: reduce",
            "mib": 100.0 + more,
            "made_in_mib": {"step 2: pass 0": 60.0, "initialise": 20.0, "step 2: reduce": 20.0 + more},
        },
        "timeline": [(place + 0.5, float(peak)) for place, peak in enumerate([*peaks, 45, 21])],
    }


def budget(gpu=11264):
    return {
        "device": "card", "gpus": 2, "gpu_memory_mib": gpu, "reserved_mib": 800, "host_memory_gib": 32,
        "components_mib": {}, "on_exceed": "error",
    }  # fmt: skip


def profile(device="cpu", gpu=11264):
    return {
        "experiment": "made",
        "ds_config": "ds_configs/zero2.json",
        "budget": budget(gpu),
        "batch": "4 rows",
        "stage": "all steps hidden, 3 latents",
        "ranks": [rank(device), rank(device.replace(":0", ":1"), more=2.0)],
    }


def item(component, mib):
    return {"component": component, "name": component, "mib": mib, "formula": ""}


def plan(gpu=11264):
    return {
        "experiment": "made",
        "budget": budget(gpu),
        "verdict": "fits <well>",
        "fits": True,
        "gpu_mib": 98.0,
        "states": [item("parameters", 8.0), item("optimizer", 6.0)],
        "phases": [
            {"name": "forward and backward", "mib": 84.0, "items": []},
            {"name": "optimizer step", "mib": 10.0, "items": []},
            {"name": "evaluation", "mib": 26.0, "items": []},
        ],
        "stages": [
            {"first_epoch": 0, "stage": "0 steps hidden, 0 latents", "gpu_mib": 70.0},
            {"first_epoch": 1, "stage": "1 step hidden, 1 latent", "gpu_mib": 98.0},
        ],
        "host_per_rank": [item("process", 800.0), item("optimizer", 4.0), item("gradients", 2.0)],
    }
