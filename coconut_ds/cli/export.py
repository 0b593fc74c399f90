"""Export a model for Hugging Face or PEFT, or show how to convert its ZeRO shards.

    python -m coconut_ds export RUN --to hf --output exported          for AutoModelForCausalLM; LoRA: PEFT
    python -m coconut_ds export RUN --to hf --output exported --merge  LoRA merged, for AutoModelForCausalLM
    python -m coconut_ds export RUN --to zero --output state_dict      prints how to use zero_to_fp32

Every exported folder has a model card (README.md) with the lines that load it, and a coconut.json;
coconut_ds.CoconutForCausalLM.from_pretrained(FOLDER) loads it with latents.
The export is loaded again and its logits are compared with the model's before the folder gets its final name.
Nothing is uploaded unless --push names a repository on the Hugging Face Hub.
"""

import argparse

from coconut_ds.cli import add_model_arguments
from coconut_ds.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, latents=False)
    parser.add_argument("--to", choices=("hf", "zero"), default="hf", help="export format (default: hf)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--merge", action="store_true", help="merge LoRA adapters into the weights")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="dtype of the weights (default: fp32)",
    )
    parser.add_argument("--push", metavar="USER/NAME", help="also upload to this Hub repository")
    parser.add_argument("--private", action="store_true", help="with --push: make the repository private")


def run(args: argparse.Namespace) -> int:
    from coconut_ds.evaluation.export import export_hf, upload, zero_to_fp32_explained  # imports torch

    if args.private and not args.push:
        raise ConfigError("--private needs --push USER/NAME")
    if args.to == "zero":
        if args.merge or args.push:
            raise ConfigError("--to zero only prints instructions; use --merge and --push with --to hf")
        print(zero_to_fp32_explained(args.target, args.checkpoint, args.output))
        return 0
    exported = export_hf(
        args.target, args.output, args.checkpoint, args.merge, args.dtype, args.overrides, args.allow
    )
    form = "LoRA adapters in PEFT form" if exported.is_adapter else "a Hugging Face model"
    print(
        f"{exported.folder}: {form}; loaded again, logits differ by at most {exported.largest_difference:.2g}"
    )
    if args.push:
        print(upload(exported.folder, args.push, args.private))
    return 0
