"""Answer questions with a trained model: one question, a file, standard input, or interactively.

    python -m coconut_ds generate RUN --prompt "3+4+2+7=?"
    python -m coconut_ds generate RUN --file data/gsm_test.json --output answers.jsonl
    python -m coconut_ds generate RUN                          interactive; an empty line ends it
    echo "3+4+2+7=?" | python -m coconut_ds generate RUN       one question per line

RUN is a run folder, a checkpoint folder, a folder written by `export`, or an experiment YAML whose
`load_model_path` names the weights.  A .json file is a list of problems, of which only the questions are
used; any other file has one question per line.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from coconut_ds.cli import add_model_arguments
from coconut_ds.data.problems import read_problems
from coconut_ds.errors import ConfigError, DataError
from coconut_ds.files import counted, json_text, open_output

if TYPE_CHECKING:
    from coconut_ds.evaluation.pretrained import CoconutForCausalLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", "--question", action="append", metavar="TEXT", help="a question; can be repeated"
    )
    source.add_argument("--file", metavar="FILE", help="questions: .json problems, or one per line")
    parser.add_argument(
        "--max_new_tokens", type=int, metavar="N", help="maximum answer length (default: as in evaluation)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, metavar="N", help="questions per batch (default: 32)"
    )
    parser.add_argument("--output", metavar="FILE", help="write questions and answers to FILE as JSON lines")


def run(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise ConfigError(f"--batch_size {args.batch_size}: must be at least 1")
    questions = _questions(args)
    from coconut_ds.evaluation.pretrained import CoconutForCausalLM  # these import torch
    from coconut_ds.evaluation.saved_models import find_one

    trained = find_one(args.target, args.checkpoint, args.overrides, args.latents, args.allow)
    model = CoconutForCausalLM.of(trained)
    if questions is None:
        _converse(model, args.max_new_tokens)
    elif args.output or len(questions) > 1:
        _answer_all(model, questions, args)
    else:
        _show(model.stream_answer(questions[0], None, args.max_new_tokens))
    return 0


def _questions(args: argparse.Namespace) -> list[str] | None:
    """The questions of the command line; None to read them interactively."""
    if args.prompt:
        questions = list(args.prompt)
    elif args.file and args.file.endswith(".json"):
        questions = [problem.question for problem in read_problems(args.file)]
    elif args.file:
        try:
            lines = Path(args.file).read_text(encoding="utf-8").splitlines()
            questions = [line for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--file {args.file}: cannot be read ({error})") from error
    elif sys.stdin.isatty():
        return None
    else:
        questions = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not any(question.strip() for question in questions):
        raise DataError(f"{args.file or 'the question'}: no question; give at least one that is not empty")
    return questions


def _answer_all(model: "CoconutForCausalLM", questions: Sequence[str], args: argparse.Namespace) -> None:
    model.samples(questions)  # raises for a question that is too long before the first answer
    with open_output(args.output, "--output") if args.output else nullcontext() as writer:
        for start in range(0, len(questions), args.batch_size):
            batch = questions[start : start + args.batch_size]
            answers = model.answer_questions(batch, None, args.max_new_tokens)
            for question, answer in zip(batch, answers, strict=True):
                if writer is None:
                    print(f"{question}\n{answer}\n", flush=True)
                else:
                    record = {"question": question, "answer": answer}
                    writer.write(json_text(record, ensure_ascii=False) + "\n")


def _converse(model: "CoconutForCausalLM", max_new_tokens: int | None) -> None:
    num_latents = model.trained.stage.num_latents
    print(
        f"{model.trained.name}, {counted(num_latents, 'latent')}. Type a question; an empty line ends.",
        flush=True,
    )
    while True:
        try:
            question = input("> ")
        except EOFError:
            return
        if not question.strip():
            return
        try:
            _show(model.stream_answer(question, None, max_new_tokens))
        except DataError as error:
            print(error)


def _show(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
