"""List run folders: epochs, stage, accuracy, and whether they are running, finished or stopped.

    python -m coconut_ds runs [FOLDER ...]             default: runs/

A stopped run resumes with the command that started it.
"""

import argparse
from pathlib import Path

from coconut_ds.errors import ConfigError, UserError
from coconut_ds.files import json_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="*",
        default=["runs"],
        metavar="FOLDER",
        help="folders that hold runs (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    from coconut_ds.reports.run_records import run_folders  # imports torch
    from coconut_ds.tables import Table

    folders = [folder for path in args.folders for folder in run_folders(path)]
    if not folders:
        raise ConfigError(
            f"{', '.join(args.folders)}: no run folder here; `train` makes them in save_path/name"
        )
    rows = [_row(folder) for folder in folders]
    if args.json:
        print(json_text(rows, indent=1))
        return 0
    head = list(rows[0])
    print(Table(head, [[_cell(row[name]) for name in head] for row in rows]).text())
    return 0


def _row(folder: Path) -> dict[str, object]:
    from coconut_ds.reports.run_records import read_run
    from coconut_ds.runs.checkpoint_folders import CheckpointFolders
    from coconut_ds.runs.run_folder import is_running

    row: dict[str, object] = dict.fromkeys(("run", "state", "method", "epochs", "stage", "valid", "test"))
    row["run"] = str(folder)
    try:
        record = read_run(folder)
    except UserError:
        return row | {"state": "unreadable: `report` says why"}
    valid, test = record.measured("valid"), record.measured("test")
    epochs, planned = int(valid[-1]["epoch"]) + 1 if valid else 0, record.experiment.num_epochs
    is_profile = record.profile is not None and not record.of("train")
    is_finished = max(epochs, CheckpointFolders(folder).finished_epochs()) >= planned
    state = "profile" if is_profile else "finished" if is_finished else "stopped"
    return row | {
        "state": "running" if is_running(folder) else state,
        "method": str(record.experiment.method),
        "epochs": f"{epochs} of {planned}",
        "stage": str(record.stage_of(valid[-1])) if valid else None,
        "valid": valid[-1]["accuracy"] if valid else None,
        "test": test[-1]["accuracy"] if test else None,
    }


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{100 * value:.1f} %"
    return "-" if value is None else str(value)
