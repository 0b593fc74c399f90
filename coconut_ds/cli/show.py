"""Show what an experiment will do: settings, stages, batch sizes, one example per stage.

    python -m coconut_ds show CONFIG [--deepspeed_config JSON]

Needs no GPU and loads no model.  Examples need the training data and the tokenizer; a message says what is
missing.
"""

import argparse
import textwrap
from collections.abc import Iterable, Iterator

from coconut_ds.config.deepspeed import DeepSpeedConfig, add_ds_config_argument
from coconut_ds.config.experiment import (
    Experiment,
    add_experiment_arguments,
    experiment_to_yaml,
    read_experiment,
)
from coconut_ds.config.methods import has_published_keys
from coconut_ds.config.schema import read_yaml
from coconut_ds.data.curriculum import (
    final_stage,
    render,
    stage_at,
    stage_number,
    stage_spans,
    stops_early,
)
from coconut_ds.data.problems import Problem, read_problems
from coconut_ds.data.tokenizer import load_vocabulary, tokenize
from coconut_ds.errors import ConfigError, UserError
from coconut_ds.files import counted
from coconut_ds.tables import Table

PUBLISHED_GPUS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment_arguments(parser)
    add_ds_config_argument(parser, needed=False)
    parser.add_argument(
        "--gpus",
        "--num-gpus",
        type=int,
        metavar="N",
        help="number of GPUs (default: the memory budget's, or 2)",
    )
    parser.add_argument(
        "--item", type=int, default=0, metavar="N", help="index of the problem to show (default: 0)"
    )


def run(args: argparse.Namespace) -> int:
    from coconut_ds.data.batching import BatchConfig  # these import torch, which --help does not need
    from coconut_ds.memory.budget import read_ds_config

    experiment = read_experiment(args)
    ds_config = (
        read_ds_config(args.deepspeed_config, experiment, args.ds_overrides)
        if args.deepspeed_config
        else None
    )
    _print_section("Settings", [experiment_to_yaml(experiment)])
    if ds_config is not None:
        _print_section("Memory", _memory_lines(ds_config))
    try:
        path = experiment.val_path if experiment.only_eval else experiment.train_path
        problems = read_problems(path, None, experiment.fields, {})
    except UserError as error:
        problems = []
        _print_section("Data", [str(error)])
    lines = [*_batch_lines(experiment, ds_config, args.gpus, len(problems))]
    if has_published_keys(read_yaml(args.config)):
        rows = BatchConfig.of(experiment, PUBLISHED_GPUS, rank=0).rows_per_step
        lines.append(
            f"the published code uses {PUBLISHED_GPUS} GPUs, an effective batch of {rows}; "
            "with fewer GPUs, raise gradient_accumulation_steps to keep it"
        )
    _print_section("Batches", lines)
    _print_section("Stages", _stage_lines(experiment))
    if problems:
        if not 0 <= args.item < len(problems):
            raise ConfigError(f"--item {args.item}: {path} has 0 to {len(problems) - 1}")
        chosen = problems[args.item]
        _print_section("Samples", _sample_lines(experiment, chosen))
    return 0


def _print_section(title: str, lines: Iterable[str]) -> None:
    print(title + "\n" + textwrap.indent("\n".join(lines).rstrip(), "  ") + "\n")


def _memory_lines(ds_config: DeepSpeedConfig) -> Iterator[str]:
    offload = ", optimizer on the CPU" if ds_config.offload_optimizer else ""
    yield f"{ds_config.path}: ZeRO stage {ds_config.zero_stage}, {ds_config.precision}{offload}"
    yield f"latent memory: {ds_config.latent_memory}"
    if budget := ds_config.memory_budget:
        yield (
            f"budget: {budget.gpus} x {budget.device}, {budget.gpu_memory_mib} MiB each, "
            f"{budget.reserved_mib} MiB of it reserved"
        )


def _batch_lines(
    experiment: Experiment, ds_config: DeepSpeedConfig | None, gpus: int | None, num_problems: int
) -> Iterator[str]:
    from coconut_ds.data.batching import BatchConfig

    budget = ds_config.memory_budget if ds_config else None
    world_size = gpus or (budget.gpus if budget else 2)
    if ds_config is not None:
        ds_config.resolve(experiment, world_size)  # raises if the two files disagree
    layout = BatchConfig.of(experiment, world_size, rank=0)
    yield (
        f"{layout.rows} rows per GPU x {layout.accumulation} micro-batches x {world_size} GPUs "
        f"= {layout.rows_per_step} rows per optimizer step, the effective batch"
    )
    if num_problems and not experiment.only_eval:
        steps = layout.num_steps(num_problems)
        epochs = experiment.num_epochs - experiment.resume
        yield (
            f"{counted(num_problems, 'problem')} -> {counted(steps, 'step')} per epoch, "
            f"{counted(steps * epochs, 'step')} in {counted(epochs, 'epoch')}"
        )


def _stage_lines(experiment: Experiment) -> Iterator[str]:
    rows = []
    for first, last in stage_spans(experiment):
        epochs = f"{first + 1}-{last + 1}" if last > first else f"{first + 1}"
        rows.append((epochs, f"{stage_number(first, experiment)}: {stage_at(first, experiment)}"))
    yield Table(["epochs", "stage"], rows, align="rl").text()
    yield f"test stage: {final_stage(experiment)}"
    if early := stops_early(experiment):
        yield early
    if experiment.uniform_prob and experiment.method.has_stages:
        yield f"each example is trained at a random stage with probability {experiment.uniform_prob}"


def _sample_lines(experiment: Experiment, problem: Problem) -> Iterator[str]:
    try:
        vocabulary = load_vocabulary(experiment.model_id, experiment.chat_template)
    except UserError as error:
        yield str(error)
        return
    (tokenized,) = tokenize([problem], vocabulary)
    for first, _ in stage_spans(experiment):
        sample = render(tokenized, stage_at(first, experiment), experiment, vocabulary)
        prompt = vocabulary.spell(sample.tokens[: sample.num_prompt])
        labels = vocabulary.spell(sample.tokens[sample.num_prompt :])
        num_labels = len(sample.tokens) - sample.num_prompt
        yield f"epoch {first + 1}: {sample.num_prompt} prompt tokens, {num_labels} with a label"
        yield f"  prompt   {prompt!r}"
        yield f"  labels   {labels!r}"
