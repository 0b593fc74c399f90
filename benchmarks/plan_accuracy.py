"""How far the planned activation peak is from the measured one: every case in one process, on the CPU.

    python -m benchmarks.plan_accuracy [--llama] [--tuning lora]      one JSON line a case, then a table

Measured are the CPU allocator's own events (torch.profiler), so memory that an operator takes and gives
back inside counts too; planned is the trace of the same model without storage.  Gradients are dropped on
arrival in both.

Knows: phantoms and real models of random weights.  Does not know: ZeRO.
"""

import argparse
import copy
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PretrainedConfig

from coconut_ds.batching import Batch
from coconut_ds.config import Experiment, validate_experiment
from coconut_ds.ds_config import LatentMemory
from coconut_ds.lora import add_adapters
from coconut_ds.memory.phantom import build_phantom, with_layers
from coconut_ds.memory.trace import record
from coconut_ds.memory.worst import StageOfRun, TextShape, stages_of, worst_batch
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.loading import load_config
from coconut_ds.thoughts import ThoughtSettings, build_thought
from coconut_ds.tokens import Vocabulary

SHAPES = Path(__file__).with_name("shapes")
TEXT = TextShape(question=64, steps=3, step=8, answer=6)
MB = 1e6


@dataclass(frozen=True)
class Case:
    """One cell of the table."""

    model: str
    method: str  # "cot", "coconut stage 1", "coconut last stage"
    recompute: str
    thought: str
    tuning: str
    rows: int

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.tuning}, {self.method}, {self.thought}, recompute {self.recompute}, "
            f"{self.rows} rows"
        )


@dataclass(frozen=True)
class Comparison:
    """Bytes of one case."""

    case: Case
    planned: int
    measured: int

    @property
    def error(self) -> float:
        return self.planned / self.measured - 1


METHODS = ("cot", "coconut stage 1", "coconut last stage")


def cases(model: str, rows: tuple[int, ...]) -> Iterator[Case]:
    choices = itertools.product(
        ("full", "lora"), ("last_hidden", "learnable_window"), ("none", "layers"), METHODS, rows
    )
    for tuning, thought, recompute, method, count in choices:
        if method == "cot" and thought != "last_hidden":
            continue  # no latents, so no thought
        yield Case(model, method, recompute, thought, tuning, count)


def experiment_of(case: Case) -> Experiment:
    values: dict[str, Any] = {
        "project": "plan", "name": "accuracy", "save_path": "runs", "model_id": case.model,
        "train_path": "none.json", "val_path": "none.json", "lr": 1e-4, "num_epochs": 4, "c_thought": 2,
        "epochs_per_stage": 1, "max_latent_stage": 3, "batch_size_training": case.rows, "tuning": case.tuning,
        "method": case.method.split()[0],
    }  # fmt: skip
    if case.method != "cot":
        values["thought"] = case.thought
    return validate_experiment(values, "plan_accuracy")


def stage_of(case: Case, experiment: Experiment) -> StageOfRun:
    stages = stages_of(experiment)
    return stages[{"cot": 0, "coconut stage 1": 1, "coconut last stage": -1}[case.method]]


def compare(case: Case, config: PretrainedConfig) -> Comparison:
    """Plan and measure one case."""
    experiment = experiment_of(case)
    size = config.vocab_size
    no_tokenizer: Any = None
    vocabulary = Vocabulary(no_tokenizer, size, size + 1, size + 2, eos_id=0, pad_id=0)
    batch = worst_batch([TEXT.problem()], stage_of(case, experiment), experiment, vocabulary, case.rows)
    batch = with_padding(batch)
    settings = LatentMemory(recompute=case.recompute)
    phantom = build_phantom(experiment, config, size + 3, vocabulary.marker_ids, settings, "fp32", "cpu")
    planned = record(phantom, batch).peak
    model = real_model(experiment, config, size + 3, vocabulary, settings)
    return Comparison(case, planned, measured_peak(model, batch))


def with_padding(batch: Batch) -> Batch:
    """The same batch with one column of padding in its second row, as nearly every real batch has."""
    mask = batch.attention_mask_BT.clone()
    mask[1:, 0] = 0
    return replace(batch, attention_mask_BT=mask)


def real_model(
    experiment: Experiment,
    config: PretrainedConfig,
    size: int,
    vocabulary: Vocabulary,
    settings: LatentMemory,
) -> Coconut:
    """The same model with random weights."""
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    base.resize_token_embeddings(size, mean_resizing=False)
    thought = build_thought(experiment.thought, base.config.hidden_size, ThoughtSettings.of(experiment))
    if not experiment.method.has_latents:
        thought.requires_grad_(False)
    if experiment.tuning == "lora":
        base = add_adapters(base, experiment, vocabulary.marker_ids)
    return Coconut(base, thought, settings).train()


def measured_peak(model: Coconut, batch: Batch) -> int:
    """Most bytes the allocator gave out in one forward and backward, gradients dropped on arrival."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
    model(batch).backward()  # caches of the first call stay out of the measurement
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(batch).backward()
    for handle in handles:
        handle.remove()
    return peak_of_events(profiler)


def peak_of_events(profiler: Any) -> int:
    results = profiler.profiler.kineto_results
    sizes = sorted(
        (event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"
    )
    total = highest = 0
    for _, size in sizes:
        total += size
        highest = max(highest, total)
    return highest


def table(rows: list[Comparison]) -> str:
    lines = ["| case | planned MB | measured MB | error |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row.case} | {row.planned / MB:.1f} | {row.measured / MB:.1f} | {100 * row.error:+.1f} % |"
        for row in rows
    ]
    worst = max(rows, key=lambda row: abs(row.error))
    return "\n".join([*lines, "", f"Largest error: {100 * worst.error:+.1f} % ({worst.case})"])


def model_configs(llama: bool) -> list[tuple[str, PretrainedConfig, tuple[int, ...]]]:
    """GPT-2 124M, and a Llama of four layers."""
    if not llama:
        return [("gpt2", load_config(str(SHAPES / "gpt2")), (2, 4))]
    config = with_layers(load_config(str(SHAPES / "llama-3.2-1b")), 4)
    # A quarter of the width and a small vocabulary: the layers are the subject, not their time.
    config.vocab_size, config.hidden_size, config.intermediate_size = 8000, 512, 2048
    config.num_attention_heads, config.num_key_value_heads = 8, 2
    return [("4-layer Llama", config, (2, 4))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--llama", action="store_true", help="the 4-layer Llama instead of GPT-2 124M")
    parser.add_argument("--tuning", choices=("full", "lora"), help="these cases alone")
    parser.add_argument("--rows", type=int, nargs="+", help="these batch sizes instead of 2 and 4")
    args = parser.parse_args()
    rows = []
    for name, config, counts in model_configs(args.llama):
        for case in cases(name, tuple(args.rows or counts)):
            if args.tuning not in (None, case.tuning):
                continue
            started = time.perf_counter()
            row = compare(case, config)
            rows.append(row)
            numbers = {"planned_bytes": row.planned, "measured_bytes": row.measured, "error": row.error}
            took = round(time.perf_counter() - started, 1)
            print(json.dumps({**asdict(case), **numbers, "took_seconds": took}), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
