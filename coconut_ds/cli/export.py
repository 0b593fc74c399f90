"""Write a trained model as a folder for other programs: Hugging Face, PEFT; or explain the ZeRO shards.

    python -m coconut_ds export RUN --to hf --output exported              AutoModelForCausalLM loads it
    python -m coconut_ds export RUN --to hf --output exported --merge      LoRA adapters put into the weights
    python -m coconut_ds export RUN --to zero --output state_dict          how to use zero_to_fp32

A LoRA run without --merge gives a PEFT folder.  Each folder has a model card (README.md) and a coconut.json,
so that coconut_ds.CoconutForCausalLM.from_pretrained(FOLDER).generate(...) answers with latents.
The folder is read back before it gets its name: its logits must be the model's.
Nothing leaves this machine unless --push names a repository of the Hugging Face hub.
"""

import argparse

from coconut_ds.config.arguments import add_allow_stage, add_overrides
from coconut_ds.errors import ConfigError
from coconut_ds.evaluation.export import DTYPES, export_hf, upload, zero_to_fp32_explained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN", help="run folder or checkpoint folder")
    parser.add_argument("--to", choices=("hf", "zero"), default="hf", help="form of the folder (default: hf)")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--checkpoint", metavar="NAME", help="a name, latest (default), best, best_stage_N")
    parser.add_argument("--merge", action="store_true", help="put LoRA adapters into the weights")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights (default: fp32)"
    )
    add_allow_stage(parser)
    add_overrides(parser, "of the run")
    parser.add_argument("--push", metavar="USER/NAME", help="also upload to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="with --push: a private repository")


def run(args: argparse.Namespace) -> int:
    if args.private and not args.push:
        raise ConfigError("--private: only with --push")
    if args.to == "zero":
        if args.merge or args.push:
            raise ConfigError("--to zero only explains; --merge and --push belong to --to hf")
        print(zero_to_fp32_explained(args.target, args.checkpoint, args.output))
        return 0
    exported = export_hf(
        args.target, args.output, args.checkpoint, args.merge, args.dtype, args.overrides, args.allow
    )
    form = "LoRA adapters in PEFT form" if exported.is_adapter else "a Hugging Face model"
    print(f"{exported.folder}: {form}; read back, logits differ by {exported.largest_difference:.2g} at most")
    if args.push:
        print(upload(exported.folder, args.push, args.private))
    return 0
