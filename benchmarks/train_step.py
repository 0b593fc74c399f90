"""Seconds and peak bytes of one training step (forward and backward), technique by technique.

    python -m benchmarks.train_step                              the table, GPT-2 124M
    python -m benchmarks.train_step --sweep latents --picture docs/latents.png

One JSON line per variant: seconds (median, least, most), least CPU seconds, peak bytes above weights and
gradients, tokens.  With --threads 1 the CPU seconds hold on a busy machine too.
  single_pass           the same tokens in one ordinary pass, no recurrence
  textbook              a plain faithful loop: benchmarks/textbook.py
  coconut_ds            all techniques but activation checkpointing;  coconut_ds+checkpointing: all of them
  coconut_ds-NAME       one technique switched off

Knows: models, the loop, the techniques' switches.  Does not know: data, optimizers, DeepSpeed.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.textbook import textbook_loss
from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.data.batching import Batch
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.techniques.fused_activations import fuse_activations
from coconut_ds.model.techniques.passes import Context
from coconut_ds.thoughts import ThoughtSettings, build_thought

VOCABULARY = {"gpt2": 50260, "llama": 128259, "qwen2": 151668}
SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2-tiny": ("gpt2", {"n_layer": 2, "n_embd": 128, "n_head": 4}),
    "gpt2": ("gpt2", {}),
    "gpt2-medium": ("gpt2", {"n_layer": 24, "n_embd": 1024, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_layer": 36, "n_embd": 1280, "n_head": 20}),
    "llama-1b": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-0.5b": (
        "qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
}
SWITCHES: dict[str, dict[str, Any]] = {
    "supervised_logits_only": {"supervised_logits_only": False},
    "segmented_cache": {"segmented_cache": False},
    "deferred_weight_gradients": {"deferred_weight_gradients": False},
    "fused_activations": {"fused_activations": False},
    "recorded_passes": {"recorded_passes": False},
}
# (question, answer) of short batches after which passes of all columns run from their recordings.
WARM_UP = tuple((4 + step, 3 + 2 * step) for step in range(8))

POINTS: dict[str, list[int]] = {"latents": [0, 1, 2, 4, 8, 12, 16], "rows": [1, 2, 4, 8, 16, 32]}


@dataclass(frozen=True)
class Shape:
    rows: int
    question: int
    latents: int
    answer: int

    @property
    def tokens(self) -> int:
        return self.rows * (self.question + self.latents + self.answer)


@dataclass(frozen=True)
class Measurement:
    seconds: list[float]
    cpu_seconds: list[float]
    peak_bytes: int


def make_model(size: str, dtype: torch.dtype, dropout: float) -> PreTrainedModel:
    """Random weights, gradients allocated."""
    architecture, settings = SIZES[size]
    extra: dict[str, Any] = {"vocab_size": VOCABULARY[architecture], **settings}
    if architecture == "gpt2":
        extra.update(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **extra), dtype=dtype)
    return model.train()


def make_batch(shape: Shape, vocabulary: int) -> Batch:
    """Random tokens; the last id is the latent's. Every answer token is a label."""
    generator = torch.Generator().manual_seed(0)
    columns = shape.question + shape.latents + shape.answer
    ids = torch.randint(0, vocabulary - 1, (shape.rows, columns), generator=generator)
    ids[:, shape.question : shape.question + shape.latents] = vocabulary - 1
    labels = ids.clone()
    labels[:, : shape.question + shape.latents] = -100
    positions = torch.arange(columns).expand(shape.rows, -1)
    return Batch.from_padded(ids, torch.ones_like(ids), positions, labels, vocabulary - 1)


def single_pass_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The same tokens, latents as ordinary tokens, logits of supervised positions only."""
    hidden_BTD = model.get_decoder()(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        position_ids=batch.position_ids_BT,
        use_cache=False,
    ).last_hidden_state
    hidden_ND = hidden_BTD.flatten(0, 1)[batch.target_positions_N]
    logits_NV = model.get_output_embeddings()(hidden_ND).float()
    return F.cross_entropy(logits_NV, batch.target_ids_N, reduction="sum") / batch.loss_denominator


def variant(name: str, base: PreTrainedModel) -> Callable[[Batch], Tensor]:
    """A variant's loss; its modules are its own, its weights and gradients are those of `base`."""
    shared = {id(parameter): parameter for parameter in base.parameters()}
    model = copy.deepcopy(base, shared)
    if name == "textbook":
        return lambda batch: textbook_loss(model, batch)
    if name == "single_pass":
        fuse_activations(model, Context())
        return lambda batch: single_pass_loss(model, batch)
    settings = LatentMemory()
    if name.endswith("+checkpointing"):
        settings = replace(settings, activation_checkpointing="layers")
    elif name != "coconut_ds":
        settings = replace(settings, **SWITCHES[name.removeprefix("coconut_ds-")])
    thought = build_thought("last_hidden", model.config.hidden_size, ThoughtSettings())
    return Coconut(model, thought, settings).train()


VARIANTS = (
    "single_pass",
    "textbook",
    "coconut_ds",
    "coconut_ds+checkpointing",
    *(f"coconut_ds-{name}" for name in SWITCHES),
)


def step(loss_of: Callable[[Batch], Tensor], batch: Batch) -> float:
    loss = loss_of(batch)
    loss.backward()
    return loss.item()


def warm_up(loss_of: Callable[[Batch], Tensor], rows: int, vocabulary: int, device: str) -> None:
    """Let the later passes be recorded, one per step."""
    for question, answer in WARM_UP:
        step(loss_of, make_batch(Shape(rows, question, 2, answer), vocabulary).to(device))


def peak_bytes(loss_of: Callable[[Batch], Tensor], batch: Batch) -> int:
    """The allocator's peak above what was allocated before the step."""
    gc.collect()
    if batch.input_ids_BT.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss_of, batch)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(loss_of, batch)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def seconds(loss_of: Callable[[Batch], Tensor], batch: Batch) -> tuple[float, float]:
    """Wall and CPU seconds of one step."""
    start, cpu_start = time.perf_counter(), time.process_time()
    step(loss_of, batch)
    return time.perf_counter() - start, time.process_time() - cpu_start


def measure(names: list[str], base: PreTrainedModel, batch: Batch, repeats: int) -> dict[str, Measurement]:
    """All variants in turn, `repeats` times over, so that a slow minute of the machine hits all alike."""
    losses = {name: variant(name, base) for name in names}
    for loss_of in losses.values():
        warm_up(loss_of, batch.shape[0], base.config.vocab_size, str(batch.input_ids_BT.device))
    peaks = {name: peak_bytes(loss_of, batch) for name, loss_of in losses.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, loss_of in losses.items():
            times[name].append(seconds(loss_of, batch))
    return {
        name: Measurement([wall for wall, _ in times[name]], [cpu for _, cpu in times[name]], peaks[name])
        for name in names
    }


def allocate_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def lines(results: dict[str, Measurement], shape: Shape, **context: Any) -> Iterator[dict[str, Any]]:
    """One record per variant, with its ratios to single_pass and textbook where these were measured."""
    for name, result in results.items():
        record: dict[str, Any] = {
            "variant": name,
            **context,
            **vars(shape),
            "tokens": shape.tokens,
            "seconds": round(statistics.median(result.seconds), 4),
            "seconds_min": round(min(result.seconds), 4),
            "seconds_max": round(max(result.seconds), 4),
            "cpu_seconds": round(min(result.cpu_seconds), 4),
            "peak_bytes": result.peak_bytes,
        }
        for other in ("single_pass", "textbook"):
            if other in results:
                own, theirs = statistics.median(result.seconds), statistics.median(results[other].seconds)
                record[f"time_over_{other}"] = round(own / theirs, 3)
                own, theirs = min(result.cpu_seconds), min(results[other].cpu_seconds)
                record[f"cpu_over_{other}"] = round(own / theirs, 3)
                record[f"peak_over_{other}"] = round(result.peak_bytes / results[other].peak_bytes, 3)
        yield record


def draw(records: list[dict[str, Any]], axis: str, path: str) -> None:
    """Peak and seconds of every variant over the swept axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    time_key = "cpu_seconds" if records[0]["device"] == "cpu" else "seconds"
    figure, (memory, clock) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name in dict.fromkeys(record["variant"] for record in records):
        own = [record for record in records if record["variant"] == name]
        x = [record[axis] for record in own]
        memory.plot(x, [record["peak_bytes"] / 2**20 for record in own], marker="o", label=name)
        clock.plot(x, [record[time_key] for record in own], marker="o", label=name)
    memory.set(xlabel=axis, ylabel="peak above weights and gradients, MiB", ylim=(0, None))
    clock.set(xlabel=axis, ylabel=f"{time_key.replace('_', ' ')}, forward and backward", ylim=(0, None))
    memory.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--question", type=int, default=64)
    parser.add_argument("--latents", type=int, default=6)
    parser.add_argument("--answer", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--sweep", choices=POINTS, help="measure over 0..16 latents or 1..32 rows")
    parser.add_argument("--picture", help="PNG of the sweep")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    base = make_model(options.size, getattr(torch, options.dtype), options.dropout).to(options.device)
    allocate_gradients(base)
    shape = Shape(options.rows, options.question, options.latents, options.answer)
    records = []
    for point in POINTS[options.sweep] if options.sweep else [None]:
        swept = shape if point is None else replace(shape, **{options.sweep: point})
        batch = make_batch(swept, base.config.vocab_size).to(options.device)
        results = measure(options.variants, base, batch, options.repeats)
        for record in lines(results, swept, size=options.size, dtype=options.dtype, device=options.device):
            print(json.dumps(record), flush=True)
            records.append(record)
    if options.picture:
        draw(records, options.sweep, options.picture)


if __name__ == "__main__":
    main()
