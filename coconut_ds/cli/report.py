"""Print tables and write pages about runs: accuracy by stage, comparisons, memory against the budget.

    python -m coconut_ds report RUN                    its summary, and the page RUN/memory/report.html
    python -m coconut_ds report RUN RUN ...            one table; runs that differ only in seed are grouped
    python -m coconut_ds report RUN ... --latex        tables for a paper; also --markdown, --json
    python -m coconut_ds report --compare RUN RUN      a page with memory and learning curves of two runs

Intervals are 95 %: Wilson's over the problems for one run, Student's t over the seeds for several.
Two methods are compared on the same problems (exact McNemar test) if `eval` has written predictions for both.
Pages are single files without scripts or links; their figures are also written as PNG files beside them.
"""

import argparse
import warnings
from dataclasses import asdict
from pathlib import Path

from coconut_ds.errors import ConfigError
from coconut_ds.files import json_text
from coconut_ds.reports.comparison import Group, all_tables, all_verdicts, group_numbers, group_runs
from coconut_ds.reports.conclusions import conclusions
from coconut_ds.reports.pairing import pair
from coconut_ds.reports.run_records import RunRecord, read_run, run_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, or folders that hold runs")
    parser.add_argument("--compare", nargs=2, metavar="RUN", help="write a page that compares two runs")
    parser.add_argument("--html", metavar="FILE", help="write the page to FILE (also for several runs)")
    parser.add_argument("--no-page", action="store_true", help="print the tables and write no page")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--latex", action="store_true", help="print only the tables, as LaTeX (booktabs)")
    form.add_argument("--markdown", action="store_true", help="print only the tables, as Markdown")
    form.add_argument("--json", action="store_true", help="print only the numbers, as JSON")


def run(args: argparse.Namespace) -> int:
    if not args.runs and not args.compare:
        raise ConfigError("report: name at least one run folder")
    named = [folder for path in args.runs for folder in run_folders(path) or [path]]
    runs = [read_run(folder) for folder in dict.fromkeys(map(Path, [*named, *(args.compare or ())]))]
    groups = group_runs(runs)
    if args.json:
        pairing = pair(groups)
        numbers = {
            "groups": [group_numbers(group) for group in groups],
            "paired_tests": [asdict(test) for test in pairing.tests],
            "not_paired": list(pairing.left_out),
        }
        print(json_text(numbers, indent=1))
        return 0
    if args.latex or args.markdown:
        tables = all_tables(runs, groups)[:2]
        print("\n\n".join(table.latex() if args.latex else table.markdown() for table in tables))
        return 0
    page = None if args.no_page else _page_path(args, runs)
    paths: list[Path] = []
    if page is not None:  # before the text, which may be piped into `head`
        from coconut_ds.reports.run_page import write_page  # importing matplotlib takes a second

        try:
            paths = write_page(page, runs)
        except OSError as error:
            if args.html:
                raise ConfigError(f"--html {page}: cannot be written ({error.strerror})") from error
            warnings.warn(
                f"{page}: the page was not written ({error.strerror}); --html FILE writes it elsewhere",
                stacklevel=1,
            )
    print(text(runs, groups))
    for path in paths:
        print(path)
    return 0


def text(runs: list[RunRecord], groups: list[Group]) -> str:
    """The text for the terminal."""
    tables = all_tables(runs, groups)
    parts = [table.text() for table in tables if table.rows]
    if lines := pair(groups).lines():
        parts.append("\n".join(["paired tests (McNemar, exact)", *(f"  {line}" for line in lines)]))
    elif len(groups) > 1:
        firsts = [group.first for group in groups[:2]]
        split = "test" if all(run.experiment.test_path for run in firsts) else "valid"
        commands = " and ".join(f"`eval {run.folder} --split {split}`" for run in firsts)
        parts.append(f"no paired test: {commands} write the predictions it needs")
    parts.append("run folders: " + ", ".join(str(run.folder) for run in runs))
    if lines := conclusions(groups):
        parts.append("\n".join(lines))
    if warnings := all_verdicts(runs, groups):
        parts.append("\n".join(warnings))
    return "\n\n".join(parts)


def _page_path(args: argparse.Namespace, runs: list[RunRecord]) -> Path | None:
    """Path of the page; None for several runs without --html or --compare."""
    if args.html:
        return Path(args.html)
    if args.compare:
        return runs[0].folder / "memory" / f"compare_{runs[-1].folder.resolve().name}.html"
    return runs[0].folder / "memory" / "report.html" if len(runs) == 1 else None
