"""How long the trainer pauses between the last step of one stage and the first of the next.

    python -m benchmarks.stage_switch     500 problems (GSM8K's validation set), 385,620 (its training set)

A switch is: forget the optimizer's moments, draw the new epoch's order, lay out its first step.  Samples are
laid out step by step, so nothing is tokenised, rebuilt or sent to other ranks.  `whole_epoch` lays out every
step of the new stage, which training spreads over the epoch; validation and checkpoint are not part of it.

Knows: the engine, batching.  Does not know: files.
"""

import argparse
import json
import time
from collections.abc import Sequence

import torch

from benchmarks.synthetic import (
    GSM_TRAIN,
    GSM_VALID,
    engine_around,
    experiment_like,
    layout_alone,
    problems_like,
    vocabulary_of,
)
from benchmarks.train_step import make_model
from coconut_ds.data.batching import training_steps
from coconut_ds.data.tokenizer import TokenizedProblem
from coconut_ds.engine.engine import Engine, finish_distributed

DISTINCT = 5_000  # problems drawn; longer lists repeat them
STEPS_BEFORE = 2


def measure(engine: Engine, problems: Sequence[TokenizedProblem], rows: int) -> dict[str, float]:
    """Seconds of the switch from stage 1 to stage 2, and of laying out all of stage 2."""
    experiment = experiment_like("gsm", batch_size_training=rows)
    vocabulary = vocabulary_of(engine.module.causal_lm.config.vocab_size)
    layout = layout_alone(experiment)
    steps = training_steps(problems, 1, experiment, vocabulary, layout)
    for _ in range(STEPS_BEFORE):
        for batch in next(steps):
            engine.backward(engine.loss(batch.to(engine.device)))
        engine.step()
    started = time.perf_counter()
    engine.reset_optimizer()
    steps = training_steps(problems, 2, experiment, vocabulary, layout)
    next(steps)
    switched = time.perf_counter()
    count = 1 + sum(1 for _ in steps)
    ended = time.perf_counter()
    return {
        "switch_seconds": round(switched - started, 4),
        "whole_epoch_seconds": round(ended - started, 2),
        "steps": count,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--items", type=int, nargs="+", default=[GSM_VALID, GSM_TRAIN])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--size", default="gpt2-tiny")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    base = make_model(args.size, torch.float32, 0.0)
    engine = engine_around(base, experiment_like("gsm", batch_size_training=args.rows))
    distinct = problems_like("gsm", min(DISTINCT, max(args.items)), base.config.vocab_size)
    for items in args.items:
        problems = (distinct * -(-items // len(distinct)))[:items]
        print(json.dumps({"items": items, **measure(engine, problems, args.rows)}), flush=True)
    finish_distributed()


if __name__ == "__main__":
    main()
