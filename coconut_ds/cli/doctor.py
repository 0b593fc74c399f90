"""Check this machine (GPUs, torch, compilers, versions, memory, disk) and suggest fixes.

    python -m coconut_ds doctor

Exit code 0: ready; 1: at least one check failed.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from coconut_ds.files import json_text
from coconut_ds.reports.doctor import PROBLEM, as_text, examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save-path",
        default="runs",
        metavar="DIR",
        help="folder that runs will be written to (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    findings = examine(Path(args.save_path))
    print(json_text([asdict(f) for f in findings], indent=1) if args.json else as_text(findings))
    return int(any(finding.state == PROBLEM for finding in findings))
