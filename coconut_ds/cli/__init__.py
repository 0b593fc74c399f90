"""The commands of `python -m coconut_ds`, one module each: `add_arguments(parser)`, `run(args) -> exit code`.

The folder is the registry; the first line of a module's docstring is its summary in `--help`.
"""

import argparse

from coconut_ds.config.experiment import add_allow_stage, add_overrides


def add_model_arguments(parser: argparse.ArgumentParser, latents: bool = True) -> None:
    """The arguments of commands that take one trained model (saved_models.find_one)."""
    parser.add_argument("target", metavar="RUN|CONFIG", help="run folder, exported folder or experiment YAML")
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="checkpoint name, latest (default), best or best_stage_N"
    )
    if latents:
        parser.add_argument(
            "--latents", type=int, metavar="N", help="number of latents (default: as trained)"
        )
    add_allow_stage(parser)
    add_overrides(parser, "of the run")
