"""Predict the memory of a run per component and compare it with the budget.

    python -m coconut_ds plan CONFIG --deepspeed_config JSON [JSON ...]

Several DeepSpeed configs are shown side by side.  Needs no GPU and no weights: the model's code runs on
tensors without storage.  Exit code 0: every plan fits; 3: at least one does not.
"""

import argparse
from dataclasses import replace

from coconut_ds.config.deepspeed import add_ds_config_argument
from coconut_ds.config.experiment import add_experiment_arguments, read_experiment
from coconut_ds.errors import BudgetError, ConfigError
from coconut_ds.files import json_text
from coconut_ds.memory.budget import read_ds_config
from coconut_ds.memory.fit import cheapest_changes
from coconut_ds.memory.plan_table import full_text, markdown, side_by_side
from coconut_ds.memory.planner import Planner, TextShape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment_arguments(parser)
    add_ds_config_argument(parser, several=True)
    add_planning_arguments(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--markdown", action="store_true", help="print one Markdown table row per plan")
    parser.add_argument(
        "--no-changes", action="store_true", help="do not search for settings that need less memory"
    )


def run(args: argparse.Namespace) -> int:
    experiment = read_experiment(args)
    ds_configs = [read_ds_config(path, experiment, args.ds_overrides) for path in args.deepspeed_config]
    planner = Planner.of(experiment, text_shape(args), args.device, args.exact)
    plans = []
    for ds_config in ds_configs:
        plan = planner.plan(experiment, ds_config, args.ranks)
        if not args.no_changes and (len(ds_configs) == 1 or args.json):
            plan = replace(plan, changes=cheapest_changes(planner, experiment, ds_config, plan))
        plans.append(plan)
    if args.json:
        print(json_text([plan.to_json() for plan in plans], indent=2))
    elif args.markdown:
        print(markdown([(experiment.name, plan) for plan in plans]))
    elif len(plans) == 1:
        print(full_text(plans[0]))
    else:
        print(side_by_side(plans))
        for plan in plans:
            print(f"\n{plan.ds_config}: {plan.verdict()}")
    return 0 if all(plan.fits for plan in plans) else BudgetError.exit_code


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
    shape = parser.add_argument_group(
        "text lengths to use instead of reading data and tokenizer (of the longest problem)"
    )
    shape.add_argument("--question-tokens", type=int, metavar="N", help="tokens of the question")
    shape.add_argument("--num-steps", type=int, metavar="N", help="reasoning steps (default: 6)")
    shape.add_argument("--step-tokens", type=int, metavar="N", help="tokens per step (default: 15)")
    shape.add_argument("--answer-tokens", type=int, metavar="N", help="tokens of the answer (default: 12)")


def text_shape(args: argparse.Namespace) -> TextShape | None:
    """The token counts of the shape options, or None if none is given.  Raises ConfigError."""
    given = (args.question_tokens, args.num_steps, args.step_tokens, args.answer_tokens)
    if given == (None, None, None, None):
        return None
    if args.question_tokens is None:
        raise ConfigError("the shape options need --question-tokens N")
    defaults = (0, 6, 15, 12)
    values = [default if value is None else value for value, default in zip(given, defaults, strict=True)]
    shape = TextShape(*values)
    if min(values) < 1:
        raise ConfigError(f"the shape options must be at least 1, got {vars(shape)}")
    return shape
