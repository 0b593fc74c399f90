"""Command-line arguments shared by the commands that plan memory."""

import argparse

from coconut_ds.errors import ConfigError
from coconut_ds.memory.largest_batches import TextShape


def add_planning_arguments(parser: argparse.ArgumentParser) -> None:
    """--ranks, --device and the shape options."""
    parser.add_argument("--ranks", type=int, metavar="N", help="number of GPUs (default: memory_budget.gpus)")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="device whose kernels are planned for (default: cuda)",
    )
    shape = parser.add_argument_group(
        "text lengths to use instead of reading data and tokenizer (of the longest problem)"
    )
    shape.add_argument("--question-tokens", type=int, metavar="N", help="tokens of the question")
    shape.add_argument("--num-steps", type=int, metavar="N", help="reasoning steps (default: 6)")
    shape.add_argument("--step-tokens", type=int, metavar="N", help="tokens per step (default: 15)")
    shape.add_argument("--answer-tokens", type=int, metavar="N", help="tokens of the answer (default: 12)")


def text_shape(args: argparse.Namespace) -> TextShape | None:
    """The token counts of the shape options, or None if none is given.  Raises ConfigError."""
    given = {
        "question": args.question_tokens,
        "steps": args.num_steps,
        "step": args.step_tokens,
        "answer": args.answer_tokens,
    }
    if all(value is None for value in given.values()):
        return None
    if given["question"] is None:
        raise ConfigError("the shape options need --question-tokens N")
    defaults = {"steps": 6, "step": 15, "answer": 12}
    shape = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    if any(value < 1 for value in shape.values()):
        raise ConfigError(f"the shape options must be at least 1, got {shape}")
    return TextShape(**shape)
