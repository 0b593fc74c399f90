"""Inspect the latents of a trained model: decoded tokens, norms and attention.

    python -m coconut_ds inspect RUN --question "3+4+2+7=?"
    python -m coconut_ds inspect RUN --file data/arithmetic_test.json --limit 100 --html page.html

For each latent, prints the LM head's top tokens before and after the thought, its norm relative to token
embeddings, its attention to the parts of the question, and the text the model generates when its latents are
cut off after 0, 1, ...  For ProsQA questions, also the probability of the frontier of the graph.
For a file, also how often the latents decode to the results of the steps they replaced.

RUN is a run folder, a checkpoint folder, a folder written by `export`, or an experiment YAML.
"""

import argparse
from dataclasses import asdict

from coconut_ds.cli import add_model_arguments
from coconut_ds.data.problems import Problem, read_problems
from coconut_ds.errors import ConfigError
from coconut_ds.files import json_text, open_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--question", "--prompt", metavar="TEXT", help="question to inspect")
    source.add_argument(
        "--file", metavar="JSON", help="problems to inspect; the latents are compared with their steps"
    )
    parser.add_argument(
        "--limit", type=int, default=20, metavar="N", help="problems to read from the file (default: 20)"
    )
    parser.add_argument(
        "--show", type=int, default=3, metavar="N", help="problems to show in full (default: 3)"
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="tokens per latent (default: 5)")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page with figures")
    parser.add_argument("--json", metavar="FILE", help="write all numbers of all problems to FILE")


def run(args: argparse.Namespace) -> int:
    if args.top < 1 or args.show < 0:
        raise ConfigError("--top must be at least 1, and --show at least 0")
    from coconut_ds.evaluation.inspection import first_tokens, inspect, match_steps  # these import torch
    from coconut_ds.evaluation.pretrained import CoconutForCausalLM
    from coconut_ds.evaluation.saved_models import find_one
    from coconut_ds.reports.inspection_page import page, terminal, terminal_match

    problems = [Problem(args.question, (), "")] if args.question else read_problems(args.file, args.limit)
    trained = find_one(args.target, args.checkpoint, args.overrides, args.latents, args.allow)
    model = CoconutForCausalLM.of(trained)
    inspections = [inspect(model, problem, args.top) for problem in problems]
    latents_per_step = trained.experiment.c_thought
    match = match_steps(inspections, lambda text: first_tokens(model, text), latents_per_step, args.top)
    for inspection in inspections[: args.show]:
        print(terminal(inspection), end="\n\n")
    if match is not None:
        print(terminal_match(match))
    if args.json:
        numbers = {
            "model": trained.name,
            "step_match": match and asdict(match),
            "problems": [asdict(inspection) for inspection in inspections],
        }
        with open_output(args.json, "--json") as writer:
            writer.write(json_text(numbers, indent=1) + "\n")
    if args.html:
        title = f"{trained.experiment.name}, {trained.name}"
        with open_output(args.html, "--html") as writer:
            writer.write(page(title, inspections[: args.show], match))
    return 0
