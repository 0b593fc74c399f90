"""Look into the latents of a trained model: what they decode to, their norms, what they attend to.

    python -m coconut_ds inspect RUN --question "3+4+2+7=?"
    python -m coconut_ds inspect RUN --file data/arithmetic_test.json --limit 100 --html page.html

For every latent: the likeliest tokens of the head before and after the thought, its norm against those of
token embeddings, attention to the parts of the question, and what the model says when it is made to go on in
words after 0, 1, ... latents.  For questions in ProsQA's words also the probability of its graph's frontier.
Over the problems of a file: how often the latents decode to the results of the steps they replaced.

RUN is a run folder, a checkpoint folder, a folder that `export` wrote, or an experiment YAML.
"""

import argparse
from dataclasses import asdict

from coconut_ds.config.arguments import add_allow_stage, add_overrides
from coconut_ds.data.problems import Problem, read_problems
from coconut_ds.errors import ConfigError
from coconut_ds.evaluation.inspection.latents import first_tokens, inspect
from coconut_ds.evaluation.inspection.page import page, terminal, terminal_match
from coconut_ds.evaluation.inspection.step_match import match_steps
from coconut_ds.evaluation.pretrained import CoconutForCausalLM
from coconut_ds.evaluation.saved_models import find_one
from coconut_ds.files import json_text, open_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN|CONFIG", help="run folder, exported folder or experiment YAML")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--question", metavar="TEXT", help="one question")
    source.add_argument("--file", metavar="JSON", help="problems; their steps are looked for in the latents")
    parser.add_argument(
        "--limit", type=int, default=20, metavar="N", help="problems of the file (default: 20)"
    )
    parser.add_argument(
        "--show", type=int, default=3, metavar="N", help="problems shown one by one (default: 3)"
    )
    parser.add_argument("--checkpoint", metavar="NAME", help="a name, latest (default), best, best_stage_N")
    parser.add_argument("--latents", type=int, metavar="N", help="latent slots (default: as trained)")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="tokens per latent (default: 5)")
    parser.add_argument(
        "--html", metavar="FILE", help="write one page with pictures, nothing outside it needed"
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers of all problems")
    add_allow_stage(parser)
    add_overrides(parser, "of the run")


def run(args: argparse.Namespace) -> int:
    if args.top < 1 or args.show < 0:
        raise ConfigError("--top must be 1 or more, --show 0 or more")
    problems = [Problem(args.question, (), "")] if args.question else read_problems(args.file, args.limit)
    trained = find_one(args.target, args.checkpoint, args.overrides, args.latents, args.allow)
    asked = CoconutForCausalLM.of(trained)
    inspections = [inspect(asked, problem, args.top) for problem in problems]
    latents_per_step = trained.experiment.c_thought
    match = match_steps(inspections, lambda text: first_tokens(asked, text), latents_per_step, args.top)
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
        _write("--json", args.json, json_text(numbers, indent=1) + "\n")
    if args.html:
        title = f"{trained.experiment.name}, {trained.name}"
        _write("--html", args.html, page(title, inspections[: args.show], match))
    return 0


def _write(option: str, name: str, text: str) -> None:
    with open_output(name, option) as writer:
        writer.write(text)
