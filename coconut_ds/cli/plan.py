"""Predict the memory of a run per component and compare it with the budget.

    python -m coconut_ds plan CONFIG --deepspeed_config JSON [JSON ...]
    python -m coconut_ds plan --model gpt2-xl --data prosqa --gpu "RTX 3060"
    python -m coconut_ds plan --model gpt2 Llama-3.2-1B --tuning full lora --deepspeed_config JSON JSON

Without CONFIG the settings of configs/full/DATA_coconut.yaml are planned; well-known models and data sets
need neither network nor files.  Several models or tunings make a table: what fits the GPU and the host, the
largest micro-batch, the peak.  Needs no GPU and no weights: the model's code runs on tensors without storage.
Exit code 0: every plan fits; 3: at least one does not.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from coconut_ds.config.deepspeed import add_ds_config_argument
from coconut_ds.config.experiment import add_experiment_arguments
from coconut_ds.errors import BudgetError
from coconut_ds.files import json_text
from coconut_ds.memory.known import CUSTOM, TUNINGS, known


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment_arguments(parser, optional=True)
    add_ds_config_argument(parser, several=True)
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        help="Hugging Face ids, folders, config.json files, built-in shapes",
    )
    parser.add_argument("--tuning", nargs="+", choices=tuple(TUNINGS), help="instead of the YAML's")
    add_planning_arguments(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--markdown", action="store_true", help="print one Markdown table row per plan")
    parser.add_argument(
        "--no-changes", action="store_true", help="do not search for settings that need less memory"
    )


def run(args: argparse.Namespace) -> int:
    from coconut_ds.memory.cases import noted, read_cases, read_machine, read_planner  # these import torch
    from coconut_ds.memory.fit import cheapest_changes, max_rows
    from coconut_ds.memory.plan_table import full_text, markdown, matrix, side_by_side

    experiments = list(read_cases(args))
    is_matrix = bool(args.model) and len(experiments) * len(args.deepspeed_config) > 1
    plans, rows = [], []
    with progress(len(experiments) * len(args.deepspeed_config)) as report:
        for experiment in experiments:
            planner = read_planner(args, experiment)
            for path in args.deepspeed_config:
                ds_config = read_machine(args, path, experiment)
                report(f"{experiment.name} with {ds_config.path}")
                plan = planner.plan(experiment, ds_config, args.ranks)
                if is_matrix:
                    rows.append(max_rows(planner, experiment, ds_config, args.ranks, plan.peak_stage.epoch))
                elif not args.no_changes and (len(args.deepspeed_config) == 1 or args.json):
                    plan = replace(plan, changes=cheapest_changes(planner, experiment, ds_config, plan))
                plans.append(noted(plan, args.gpu, ds_config))
    if args.json:
        print(json_text([plan.to_json() for plan in plans], indent=2))
    elif args.markdown:
        print(markdown([(plan.experiment, plan) for plan in plans]))
    elif is_matrix:
        print(matrix(plans, rows))
    elif len(plans) == 1:
        print(full_text(plans[0]))
    else:
        print(side_by_side(plans))
        for plan in plans:
            print(f"\n{plan.ds_config}: {plan.verdict()}")
    return 0 if all(plan.fits for plan in plans) else BudgetError.exit_code


@contextmanager
def progress(count: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that shows what is planned: in place on a terminal, else a line for each."""
    from rich.console import Console

    console, number = Console(stderr=True), 0

    def report(what: str) -> None:
        nonlocal number
        number += 1
        text = f"planning {what} ({number} of {count})"
        if console.is_terminal:
            status.update(text)
        elif count > 1:
            console.print(text, highlight=False, soft_wrap=True)

    with console.status("planning") as status:
        yield report


def add_planning_arguments(parser: argparse.ArgumentParser) -> None:
    """--ranks, --device and the shape options."""
    parser.add_argument(
        "--ranks", "--num-gpus", type=int, metavar="N", help="number of GPUs (default: memory_budget.gpus)"
    )
    parser.add_argument(
        "--exact", action="store_true", help="run every layer of the model; slower, for unusual models"
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="device whose kernels are planned for (default: cuda)",
    )
    parser.add_argument("--gpu", metavar="NAME|MIB", help='budget of a GPU: "RTX 2080 Ti", 12282')
    parser.add_argument(
        "--host-memory-gib", type=float, metavar="GIB", help="with --gpu, default: of this machine"
    )
    parser.add_argument("--data", choices=tuple(known()["texts"]), help="built-in text lengths of a data set")
    own = parser.add_argument_group("a model of your own, with Llama's architecture")
    for name in CUSTOM:
        own.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    shape = parser.add_argument_group(
        "text lengths to use instead of reading data and tokenizer (of the longest problem)"
    )
    shape.add_argument("--question-tokens", type=int, metavar="N", help="tokens of the question")
    shape.add_argument("--num-steps", type=int, metavar="N", help="reasoning steps (default: 6)")
    shape.add_argument("--step-tokens", type=int, metavar="N", help="tokens per step (default: 15)")
    shape.add_argument("--answer-tokens", type=int, metavar="N", help="tokens of the answer (default: 12)")
