"""Make the quickstart task: chains of sums and products modulo a number, and a small model for them.

    {"question": "3+5*2+4=?", "steps": ["<<3+5=1>>", "<<1*2=2>>", "<<2+4=6>>"], "answer": "6"}

A chain is computed from left to right, and each step needs the one before. (A sum has no such order.)

    python preprocessing/arithmetic.py                                     the three data files and their card
    python preprocessing/arithmetic.py --model-dir data/arithmetic_gpt2    also a tokenizer and a random GPT-2

The same arguments give the same bytes.  No question is in two of the files.  Needs no network.
Knows: the problem format.  Does not know: training.
"""

import os
import sys

if not __package__:  # run as a file
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import operator
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coconut_ds.data.problems import Card
from coconut_ds.errors import DataError
from preprocessing.writing import run_script, write_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"
OPERATORS = {"+": operator.add, "*": operator.mul}
SYMBOLS = ["=", "?", "<<", ">>", "###"]
TOKENS_PER_STEP = 8  # << 3 + 5 = 8 >> \n


def chain(first: int, terms: Sequence[tuple[str, int]], modulus: int) -> dict[str, object]:
    """The problem that applies `terms` (operator, number) to `first` from left to right, modulo `modulus`."""
    value, steps = first, []
    for sign, number in terms:
        result = OPERATORS[sign](value, number) % modulus
        steps.append(f"<<{value}{sign}{number}={result}>>")
        value = result
    question = str(first) + "".join(f"{sign}{number}" for sign, number in terms)
    return {"question": f"{question}=?", "steps": steps, "answer": str(value)}


def make_splits(
    sizes: dict[str, int], numbers: int, modulus: int, operators: str, seed: int
) -> dict[str, list[dict[str, object]]]:
    """Random chains of `numbers` without repetition, dealt out to the splits.

    No factor is 0, which would erase the value before it.

    Raises DataError when there are fewer different chains than the splits need.
    """
    terms = [(sign, number) for sign in operators for number in range(sign == "*", modulus)]
    needed, available = sum(sizes.values()), modulus * len(terms) ** (numbers - 1)
    if needed > available:
        raise DataError(
            f"{numbers} numbers below {modulus} make {available} different questions; "
            f"{needed} were asked for. Raise --terms or --modulus, or lower --train, --valid, --test."
        )
    drawn = iter(random.Random(seed).sample(range(available), needed))

    def problem(code: int) -> dict[str, object]:
        code, first = divmod(code, modulus)
        chosen = [terms[code // len(terms) ** place % len(terms)] for place in range(numbers - 1)]
        return chain(first, chosen, modulus)

    return {split: [problem(next(drawn)) for _ in range(size)] for split, size in sizes.items()}


def make_tokenizer(modulus: int, operators: str) -> "PreTrainedTokenizerFast":
    """One token per number and symbol; blanks are not tokens.  Decoding returns the text as it was."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [EOS, PAD, UNKNOWN, "\n", *operators, *SYMBOLS, *map(str, range(modulus))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split(Regex(r"[0-9]+|<<|>>|###|[\n+*=?]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("###", "### "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def write_model(
    folder: Path, *, terms: int, modulus: int, operators: str, layers: int, width: int, heads: int, seed: int
) -> None:
    """Write a Hugging Face folder: the tokenizer and a GPT-2 with random weights drawn from `seed`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer(modulus, operators)
    longest = 2 * (2 * terms + 2 + TOKENS_PER_STEP * terms)  # twice the longest text: room for latents
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=1 << (longest - 1).bit_length(),
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        initializer_range=0.8
        * width**-0.5,  # GPT-2's 0.02 suits width 768; here thoughts would drown the rest
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        fresh = Path(scratch) / "fresh"
        tokenizer.save_pretrained(fresh)
        model.save_pretrained(fresh)
        if folder.exists():
            folder.rename(Path(scratch) / "replaced")
        fresh.rename(folder)
    folder.chmod(0o755)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make chains of sums and products modulo a number, for the quickstart.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    def number(flag: str, default: int, least: int, text: str) -> None:
        def checked(value: str) -> int:
            if int(value) < least:
                raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
            return int(value)

        checked.__name__ = "whole number"
        parser.add_argument(flag, type=checked, default=default, metavar="N", help=text)

    parser.register("type", Path, lambda text: Path(text).expanduser())
    parser.add_argument(
        "--output-dir", type=Path, default=Path("data"), metavar="DIR", help="where the files go"
    )
    number("--seed", 0, 0, "draws the questions, their split and the model's weights")
    number("--terms", 4, 2, "numbers in a chain; one step fewer")
    number("--modulus", 7, 2, "results are taken modulo this")
    parser.add_argument("--operators", choices=("+*", "+"), default="+*", help="operators of a chain")
    number("--train", 8000, 1, "problems in arithmetic_train.json")
    number("--valid", 500, 1, "problems in arithmetic_valid.json")
    number("--test", 500, 1, "problems in arithmetic_test.json")
    parser.add_argument(
        "--model-dir", type=Path, metavar="DIR", help="also write a tokenizer and a model here"
    )
    number("--layers", 2, 1, "layers of the model")
    number("--width", 64, 1, "hidden size of the model")
    number("--heads", 4, 1, "attention heads of the model")
    options = parser.parse_args(arguments)
    folder = options.model_dir
    if options.width % options.heads:
        parser.error(f"--width {options.width} is not a multiple of --heads {options.heads}")
    if folder and folder.exists() and not folder.is_dir():
        parser.error(f"--model-dir {folder} is a file")
    if folder and folder.exists() and any(folder.iterdir()) and not (folder / "tokenizer.json").is_file():
        parser.error(f"--model-dir {folder} holds something that is not a model; it is not replaced")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    sizes = {"train": options.train, "valid": options.valid, "test": options.test}
    splits = make_splits(sizes, options.terms, options.modulus, options.operators, options.seed)
    card = Card(
        name="arithmetic",
        max_new_tokens=TOKENS_PER_STEP * (options.terms - 1) + 4,
        source="made by preprocessing/arithmetic.py",
        licence="MIT",
        split_rule=f"random with seed {options.seed}, without a question in two files",
        notes=f"chains of {options.terms} numbers joined by {options.operators}, modulo {options.modulus}",
    )
    write_dataset(options.output_dir, card, splits)
    if options.model_dir:
        write_model(
            options.model_dir,
            terms=options.terms,
            modulus=options.modulus,
            operators=options.operators,
            layers=options.layers,
            width=options.width,
            heads=options.heads,
            seed=options.seed,
        )
        print(f"{options.model_dir}: GPT-2, {options.layers} layers, width {options.width}, random weights")


if __name__ == "__main__":
    run_script(main)
