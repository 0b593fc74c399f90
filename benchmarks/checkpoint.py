"""Seconds to save and to load a whole checkpoint, beside writing the same bytes with torch.save.

    python -m benchmarks.checkpoint         GPT-2 124M under ZeRO-2 with offload, one process

A checkpoint of ours holds weights for other programs, the shards of weights and optimizer, and a manifest
with the sha256 of every file; every file has reached the disk before the folder gets its name.  `torch_save`
writes weights and optimizer state into one file and waits for the disk too.  `load`
verifies every hash first.

Knows: the engine, the checkpoint protocol.  Does not know: the training loop.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.synthetic import engine_around, experiment_like, problems_like, vocabulary_of
from benchmarks.train_step import SIZES, make_model
from coconut_ds.data.batching import BatchConfig, training_steps
from coconut_ds.engine.engine import Engine, finish_distributed
from coconut_ds.runs.checkpoint_folders import TrainState
from coconut_ds.runs.checkpoints import Checkpoints


def one_step(engine: Engine) -> None:
    """After a step the optimizer has its moments, and a checkpoint its full size."""
    experiment = experiment_like("gsm", batch_size_training=1)
    size = engine.module.causal_lm.config.vocab_size
    problems = problems_like("gsm", 1, size)
    for batch in next(training_steps(problems, 1, experiment, vocabulary_of(size), BatchConfig(1, 1, 1, 0))):
        engine.backward(engine.loss(batch))
    engine.step()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def torch_save(engine: Engine, path: Path) -> float:
    """Seconds to write weights and optimizer tensors into one file on the disk."""
    started = time.perf_counter()
    state = {"model": engine.module.state_dict(), "optimizer": list(engine.optimizer_tensors())}
    with open(path, "wb") as writer:
        torch.save(state, writer)
        writer.flush()
        os.fsync(writer.fileno())
    return time.perf_counter() - started


def measure(engine: Engine, folder: Path) -> dict[str, Any]:
    """One save, one load, one torch.save."""
    checkpoints = Checkpoints(folder, engine, {}, log=lambda _: None)
    state = TrainState(epoch=1, step_in_epoch=0)
    started = time.perf_counter()
    name = checkpoints.save(state, engine.module.causal_lm.save_pretrained)
    saved = time.perf_counter()
    checkpoints.load()
    loaded = time.perf_counter()
    plain = folder / "plain.pt"
    plain_seconds = torch_save(engine, plain)
    written, plain_bytes = size_of(folder / name), plain.stat().st_size
    return {
        "bytes": written,
        "save_seconds": round(saved - started, 2),
        "load_seconds": round(loaded - saved, 2),
        "torch_save_bytes": plain_bytes,
        "torch_save_seconds": round(plain_seconds, 2),
        "save_over_torch_save_per_byte": round(
            (saved - started) / written / (plain_seconds / plain_bytes), 2
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--ds_config", default="zero2_offload")
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    args = parser.parse_args(arguments)
    base = make_model(args.size, torch.float32, 0.0)
    parameters = sum(p.numel() for p in base.parameters())
    engine = engine_around(base, experiment_like("gsm", batch_size_training=1), args.ds_config)
    one_step(engine)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        result = measure(engine, Path(name))
    print(json.dumps({"size": args.size, "parameters": parameters, "ds_config": args.ds_config, **result}))
    finish_distributed()


if __name__ == "__main__":
    main()
