"""Compare planned and measured activation peaks: every case in one process, on the CPU.

    python -m benchmarks.plan_accuracy [--tuning lora] [--rows 2]      one JSON line per case, then a table

GPT-2 124M in every combination, and three small models with what GPT-2 does not have: widths that are not
multiples of 64, grouped queries, an untied head, OPT's learned positions.

Measured: the CPU allocator's own events (torch.profiler), including temporary memory inside operators.
Planned: the trace of the same model without storage.  Both drop each gradient when it is complete.
ZeRO is not part of this.
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
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import Experiment, validate_experiment
from coconut_ds.config.methods import Method, registered
from coconut_ds.data.batching import Batch
from coconut_ds.data.tokenizer import Vocabulary
from coconut_ds.memory.fake_run import build_fake_model, record
from coconut_ds.memory.phases import StageOfRun, largest_batch, stages_of
from coconut_ds.memory.planner import TextShape
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.loading import DTYPES, load_config
from coconut_ds.model.lora import add_adapters
from coconut_ds.tables import Table
from coconut_ds.thoughts import ThoughtSettings, build_thought

SHAPES = Path(__file__).with_name("shapes")
TEXT = TextShape(question=64, steps=3, step=8, answer=6)
MB = 1e6


@dataclass(frozen=True)
class Case:
    """One cell of the table."""

    model: str
    method: str  # a method, and for coconut its stage: "coconut stage 1", "coconut last stage"
    activation_checkpointing: str
    thought: str
    tuning: str  # "full", "lora", "dora"
    rows: int
    precision: str = "fp32"
    question: int = TEXT.question  # tokens
    latent_supervision: str | None = None

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.tuning}, {self.method}, {self.thought}, "
            f"checkpointing {self.activation_checkpointing}, {self.rows} rows, "
            f"{self.question} tokens, {self.precision}"
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
    for tuning, thought, checkpointing, method, count in choices:
        if method == "cot" and thought != "last_hidden":
            continue  # no latents, so no thought
        yield Case(model, method, checkpointing, thought, tuning, count)


def variations(model: str) -> Iterator[Case]:
    """One choice at a time for a small model: tunings and precisions, methods, thoughts, long questions."""
    plain = Case(model, "coconut last stage", "none", "last_hidden", "full", 2)
    choices = itertools.product(("full", "lora", "dora"), ("none", "layers"), ("fp32", "bf16"))
    for tuning, checkpointing, precision in choices:
        yield replace(plain, tuning=tuning, activation_checkpointing=checkpointing, precision=precision)
    for method in Method:
        if method != Method.COCONUT:
            thought = "pause" if method.is_pause else "last_hidden"
            yield replace(plain, method=str(method), thought=thought)
    for thought, checkpointing in itertools.product(registered("thoughts"), ("none", "layers")):
        if thought not in ("last_hidden", "pause"):
            yield replace(plain, thought=thought, activation_checkpointing=checkpointing)
    for question, tuning, checkpointing in itertools.product(
        (512, 768), ("full", "lora"), ("none", "layers")
    ):
        yield replace(
            plain, question=question, tuning=tuning, activation_checkpointing=checkpointing, rows=12
        )


def experiment_of(case: Case) -> Experiment:
    values: dict[str, Any] = {
        "project": "plan", "name": "accuracy", "save_path": "runs", "model_id": case.model,
        "train_path": "none.json", "val_path": "none.json", "lr": 1e-4, "num_epochs": 4, "c_thought": 2,
        "epochs_per_stage": 1, "max_latent_stage": 3, "batch_size_training": case.rows,
        "method": case.method.split()[0],
        "tuning": "full" if case.tuning == "full" else "lora", "lora_use_dora": case.tuning == "dora",
    }  # fmt: skip
    if case.method.startswith("coconut"):
        values["thought"] = case.thought
        values["latent_supervision"] = case.latent_supervision
    return validate_experiment(values, "plan_accuracy")


def stage_of(case: Case, experiment: Experiment) -> StageOfRun:
    stages = stages_of(experiment)
    return stages[1 if case.method == "coconut stage 1" else -1]


def compare(case: Case, config: PretrainedConfig) -> Comparison:
    """Plan and measure one case."""
    experiment = experiment_of(case)
    size = config.vocab_size
    no_tokenizer: Any = None
    vocabulary = Vocabulary(no_tokenizer, size, size + 1, size + 2, eos_id=0, pad_id=0)
    text = replace(TEXT, question=case.question)
    batch = largest_batch([text.problem()], stage_of(case, experiment), experiment, vocabulary, case.rows)
    batch = with_padding(batch)
    settings = LatentMemory(activation_checkpointing=case.activation_checkpointing)
    fake_model = build_fake_model(
        experiment, config, size + 3, vocabulary.special_token_ids, settings, case.precision, "cpu"
    )
    planned = record(fake_model, batch).peak
    model = real_model(experiment, config, size + 3, vocabulary, settings).to(DTYPES[case.precision])
    return Comparison(case, planned, measured_peak(model, batch))


def with_padding(batch: Batch) -> Batch:
    """The same batch with one column of padding after the first row, as nearly every real batch has."""
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
        base = add_adapters(base, experiment, vocabulary.special_token_ids)
    return Coconut(base, thought, settings).train()


def measured_peak(model: Coconut, batch: Batch) -> int:
    """Peak bytes of the allocator in three steps: run by modules, recorded, and run from recordings.

    Gradients are dropped when complete.
    """

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
    recorded, model.techniques.recorded = model.techniques.recorded, None
    model(batch).backward()  # caches of the first call stay out of the measurement
    model.techniques.recorded = recorded
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(3):
            model(batch).backward()
    for handle in handles:
        handle.remove()
    return peak_of_events(profiler)


def peak_of_events(profiler: Any, since_ns: int = 0) -> int:
    """The highest sum of the events so far, from `since_ns` (of time.time_ns) on."""
    results = profiler.profiler.kineto_results
    sizes = sorted(
        (event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"
    )
    total = highest = 0
    for at, size in sizes:
        if at >= since_ns:
            highest = max(highest, total, total + size)
        total += size
    return highest


def table(rows: list[Comparison]) -> str:
    cells = [
        (str(r.case), f"{r.planned / MB:.1f}", f"{r.measured / MB:.1f}", f"{100 * r.error:+.1f} %")
        for r in rows
    ]
    worst = max(rows, key=lambda row: abs(row.error))
    text = Table(("case", "planned MB", "measured MB", "error"), cells).markdown()
    return f"{text}\n\nLargest error: {100 * worst.error:+.1f} % ({worst.case})"


def small_configs() -> dict[str, PretrainedConfig]:
    """Models of three layers whose shapes differ from GPT-2's in what a plan may get wrong."""
    common: dict[str, Any] = {"vocab_size": 8000, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return {
        "3-layer GPT-2, width 300": GPT2Config(n_embd=300, n_head=5, n_layer=3, **common),
        "3-layer Llama, width 360, own head": LlamaConfig(
            hidden_size=360, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3,
            intermediate_size=1000, tie_word_embeddings=False, **common,
        ),
        "3-layer OPT, width 200": OPTConfig(
            hidden_size=200, word_embed_proj_dim=200, num_attention_heads=5, num_hidden_layers=3, ffn_dim=800,
            max_position_embeddings=1024, **common,
        ),
    }  # fmt: skip


def every_case(rows: tuple[int, ...] = (2, 4)) -> Iterator[tuple[Case, PretrainedConfig]]:
    """Every case with its model; `rows`: batch sizes of GPT-2 124M."""
    config = load_config(str(SHAPES / "gpt2"))
    yield from ((case, config) for case in cases("gpt2", rows))
    for name, config in small_configs().items():
        yield from ((case, config) for case in variations(name))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tuning", choices=("full", "lora", "dora"), help="these cases alone")
    parser.add_argument("--model", help="the cases of models whose name contains this")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4], help="batch sizes of GPT-2 124M")
    args = parser.parse_args()
    rows = []
    for case, config in every_case(tuple(args.rows)):
        if args.tuning not in (None, case.tuning) or (args.model or "") not in case.model:
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
