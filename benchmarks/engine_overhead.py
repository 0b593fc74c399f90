"""An optimizer step through the engine against a bare torch loop: same model, same batches, one process.

    python -m benchmarks.engine_overhead            the quickstart's size, and a wider one

The bare loop is `loss.backward(); clip_grad_norm_; AdamW.step(); zero_grad`, around the same Coconut module.
Steps of both alternate, so that a slow minute of the machine hits both alike.

Knows: the engine, torch's AdamW.  Does not know: data, stages.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.synthetic import coconut_around, engine_around, experiment_like, vocabulary_of
from benchmarks.train_step import Shape, make_batch
from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.data.batching import Batch
from coconut_ds.engine.engine import finish_distributed

# name: layers, width, heads, vocabulary, rows and tokens of the batch
CASES: dict[str, tuple[int, int, int, int, Shape]] = {
    "quickstart": (2, 64, 4, 30, Shape(rows=64, question=10, latents=3, answer=4)),
    "4 layers, width 256": (4, 256, 4, 8000, Shape(rows=16, question=64, latents=6, answer=16)),
}
WARM_UP = 3


def bare_loop(module: torch.nn.Module, batch: Batch) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.01)

    def step() -> None:
        module(batch).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(case: str, ds_config: str, steps: int) -> dict[str, Any]:
    """Median milliseconds of both."""
    layers, width, heads, vocabulary, shape = CASES[case]
    config = AutoConfig.for_model(
        "gpt2",
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
    )
    base = AutoModelForCausalLM.from_config(config)
    experiment = experiment_like("gsm", batch_size_training=shape.rows)
    batch = make_batch(shape, vocabulary)
    markers = vocabulary_of(vocabulary).special_token_ids
    bare = bare_loop(coconut_around(copy.deepcopy(base), experiment, LatentMemory(), markers), batch)
    engine = engine_around(base, experiment, ds_config)

    def ours() -> None:
        engine.backward(engine.loss(batch))
        engine.step()

    times: dict[str, list[float]] = {"bare": [], "engine": []}
    for number in range(steps + WARM_UP):
        for name, call in (("bare", bare), ("engine", ours)):
            started = time.perf_counter()
            call()
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - started)
    milliseconds = {name: 1000 * statistics.median(values) for name, values in times.items()}
    return {
        "case": case,
        "ds_config": ds_config,
        "parameters": sum(p.numel() for p in base.parameters()),
        "tokens": shape.tokens,
        "bare_ms": round(milliseconds["bare"], 2),
        "engine_ms": round(milliseconds["engine"], 2),
        "engine_over_bare": round(milliseconds["engine"] / milliseconds["bare"], 3),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ds_configs", nargs="+", default=["zero2", "zero2_offload"])
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for case in args.cases:
        for ds_config in args.ds_configs:
            print(json.dumps(measure(case, ds_config, args.steps)), flush=True)
    finish_distributed()


if __name__ == "__main__":
    main()
