"""List, show or copy the experiment YAMLs, DeepSpeed JSONs and data scripts that come with coconut_ds.

coconut-ds configs list
coconut-ds configs show ds_configs/zero2_offload.json
coconut-ds configs copy configs/quickstart ds_configs/zero2_offload.json    into this folder
coconut-ds configs copy --to FOLDER                                         all of them
"""

import argparse
import shutil
from pathlib import Path

from coconut_ds.errors import UserError

SHIPPED = Path(__file__).parents[1] / "shipped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # One parser an action: argparse cannot read `copy --to FOLDER NAME` with both as positionals of one.
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|show|copy")
    for action, text in (("list", "print the names"), ("show", "print files"), ("copy", "copy files")):
        chosen = actions.add_parser(
            action, help=text, description=f"{text} (default: all)", allow_abbrev=False
        )
        chosen.add_argument("names", nargs="*", metavar="NAME", help="files or folders (default: all)")
    chosen.add_argument(
        "--to", type=Path, default=Path(), metavar="FOLDER", help="target of copy (default: .)"
    )
    chosen.add_argument("--force", action="store_true", help="overwrite files that differ")


def run(args: argparse.Namespace) -> int:
    files = _chosen(args.names)
    if args.action == "list":
        print("\n".join(files))
    elif args.action == "show":
        for name in files:
            print((SHIPPED / name).read_text(encoding="utf-8"), end="")
    else:
        _copy(files, args.to, args.force)
    return 0


def _chosen(names: list[str]) -> list[str]:
    """All shipped files, or those named or inside a named folder.  Raises UserError for unknown names."""
    known = sorted(
        path.relative_to(SHIPPED).as_posix()
        for folder in SHIPPED.iterdir()
        for path in folder.rglob("*")
        if path.suffix in (".yaml", ".json", ".py", ".bash")
    )
    wanted = [name.removesuffix("/") for name in names]
    for name in wanted:
        if not any(file == name or file.startswith(f"{name}/") for file in known):
            near = [file for file in known if Path(file).stem == Path(name).stem]
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(
                f"no shipped file is named {name}{hint}; `coconut-ds configs list` prints all names"
            )
    return [
        file
        for file in known
        if not wanted or any(file == name or file.startswith(f"{name}/") for name in wanted)
    ]


def _copy(files: list[str], target: Path, force: bool) -> None:
    """Copy files below `target`.  Raises UserError, before anything is written, if one exists and differs."""
    differing = [
        str(target / name)
        for name in files
        if (target / name).exists() and (target / name).read_bytes() != (SHIPPED / name).read_bytes()
    ]
    if differing and not force:
        raise UserError(f"{', '.join(differing)}: exists and differs; add --force to overwrite")
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SHIPPED / name, target / name)
        print(target / name)
