"""How a training step grows: with rows, latents, length of the question, and size of the model.

    python -m benchmarks.scaling      GPT-2 124M around 4 rows x 64 question tokens, 6 latents, 16 labels

One JSON line per point and variant: seconds and peak bytes, as benchmarks/train_step.py measures them.

Knows: train_step's measuring.  Does not know: pictures (render.py).
"""

import argparse
import json
from dataclasses import replace

import torch

from benchmarks.train_step import SIZES, Shape, allocate_gradients, lines, make_batch, make_model, measure

BASE = Shape(rows=4, question=64, latents=6, answer=16)
POINTS: dict[str, tuple[int, ...]] = {
    "latents": (0, 2, 4, 8, 16),
    "rows": (1, 2, 4, 8),
    "question": (32, 64, 128, 256),
}
VARIANTS = ["single_pass", "textbook", "coconut_ds", "coconut_ds+checkpointing"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=SIZES, default="gpt2", help="model of the first three axes")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["gpt2-tiny", "gpt2", "gpt2-medium"])
    parser.add_argument("--axes", nargs="*", choices=POINTS, default=list(POINTS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    shapes = [(args.size, axis, replace(BASE, **{axis: v})) for axis in args.axes for v in POINTS[axis]]
    shapes += [(size, "size", BASE) for size in args.sizes]
    loaded, base = "", None
    for size, axis, shape in shapes:
        if size != loaded:
            base = None  # the old one goes before the new one comes
            base = make_model(size, torch.float32, 0.0)
            allocate_gradients(base)
            loaded = size
        batch = make_batch(shape, base.config.vocab_size)
        results = measure(VARIANTS, base, batch, args.repeats)
        parameters = sum(p.numel() for p in base.parameters())
        for record in lines(results, shape, axis=axis, size=size, parameters=parameters):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
