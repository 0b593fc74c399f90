"""Every command on every kind of folder, in this process."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from coconut_ds.__main__ import main
from tests.received.kinds import WEIGHTS
from tests.run_folders import ROOT

SPLITS = ("train", "valid", "test")
ZERO = str(ROOT / "ds_configs/zero1.json")


@dataclass(frozen=True)
class Ended:
    code: int
    output: str


def call(*arguments: str) -> Ended:
    """One command; what it raises is raised."""
    output = io.StringIO()
    old = sys.stdin
    sys.stdin = io.StringIO("")
    try:
        with redirect_stdout(output), redirect_stderr(output):
            code = main(list(arguments))
    finally:
        sys.stdin = old
    return Ended(code, output.getvalue())


PAGE = ("report", "run")
CHEAP = [
    ("report", "run", "lora"),
    ("report", "run", "--json"),
    ("report", "run", "--latex"),
    ("show", "run/experiment.yaml", "--deepspeed_config", "run/ds_config.json", "--gpus", "1"),
    ("validate", "run/experiment.yaml", "run/ds_config.json", *(f"data/arithmetic_{s}.json" for s in SPLITS)),
    ("validate", "data/arithmetic.card.json", "data/arithmetic_train.json", "--model", "./model"),
    ("sweep", "run/experiment.yaml", "--deepspeed_config", ZERO, "--grid", "seed=0", "--dry-run"),
]
PLANS = [
    ("plan", "run/experiment.yaml", "--deepspeed_config", ZERO, "--no-changes"),
    ("fit", "run/experiment.yaml", "--deepspeed_config", ZERO),
]
TARGETS = ("run", "lora", "full", "peft", "run/checkpoint_4")
READING = [
    *(("generate", target, "--prompt", "1+1=?") for target in TARGETS),
    *(("inspect", target, "--question", "1+1=?", "--html", f"{target}/page.html") for target in TARGETS),
    *(("eval", target, "--limit", "2", "--json", f"{target}/all.json") for target in TARGETS),
    *(("generate", f"{name}.yaml", "--prompt", "1+1=?") for name in WEIGHTS),
    *(("export", target, "--output", f"{target}_exported") for target in ("run", "lora", "full", "peft")),
    ("export", "run", "--to", "zero", "--output", "state_dict"),
]
