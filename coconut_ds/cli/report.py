"""Tables and pictures from run folders: accuracy by stage, runs side by side, memory against its budget.

    python -m coconut_ds report RUN                    its summary, and the page RUN/memory/report.html
    python -m coconut_ds report RUN RUN ...            one table, runs that differ in the seed alone together
    python -m coconut_ds report RUN ... --latex        for a paper; also --markdown, --json
    python -m coconut_ds report --compare RUN RUN      a page with two runs' memory and learning side by side

Intervals are 95 %: of one run over its items (Wilson), of several seeds over the seeds (Student's t).
Two methods are tested against each other on the same items (McNemar, exact) where `eval` has written the
predictions of both.  Pages are single files without scripts or links; their pictures lie beside them as PNG.
"""

import argparse
import warnings
from dataclasses import asdict
from pathlib import Path

from coconut_ds.errors import ConfigError
from coconut_ds.files import json_text
from coconut_ds.reports.comparison import (
    Group,
    best_table,
    group_numbers,
    group_runs,
    paired_tests,
    stage_table,
    summary_table,
)
from coconut_ds.reports.run_records import RunRecord, read_run
from coconut_ds.reports.tables import Table
from coconut_ds.reports.verdict import all_verdicts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders")
    parser.add_argument("--compare", nargs=2, metavar="RUN", help="write a page with two runs side by side")
    parser.add_argument("--html", metavar="FILE", help="write the page here (also for several runs)")
    parser.add_argument("--no-page", action="store_true", help="print only")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--latex", action="store_true", help="the tables in LaTeX (booktabs), no more")
    form.add_argument("--markdown", action="store_true", help="the tables in Markdown, and nothing else")
    form.add_argument("--json", action="store_true", help="all numbers as JSON, and nothing else")


def run(args: argparse.Namespace) -> int:
    folders = [*args.runs, *(args.compare or ())]
    if not folders:
        raise ConfigError("report: name at least one run folder")
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    groups = group_runs(runs)
    tables = [stage_table(groups), summary_table(groups), best_table(runs)]
    if args.json:
        print(json_text(_plain(groups), indent=1))
        return 0
    if args.latex or args.markdown:
        print("\n\n".join(table.latex() if args.latex else table.markdown() for table in tables[:2]))
        return 0
    print(text(runs, groups, tables))
    page = None if args.no_page else _page_path(args, runs)
    if page is not None:
        from coconut_ds.reports.run_page import write_page  # matplotlib takes a second

        try:
            for path in write_page(page, runs, groups, tables):
                print(path)
        except OSError as error:
            if args.html:
                raise ConfigError(f"--html {page}: cannot be written ({error.strerror})") from error
            warnings.warn(
                f"{page}: the page was not written ({error.strerror}); --html FILE writes it elsewhere",
                stacklevel=1,
            )
    return 0


def text(runs: list[RunRecord], groups: list[Group], tables: list[Table]) -> str:
    """What the terminal shows."""
    parts = [table.text() for table in tables if table.rows]
    tests = paired_tests(groups)
    if tests:
        parts.append("\n".join(["paired tests (McNemar, exact)", *(f"  {test}" for test in tests)]))
    elif len(groups) > 1:
        commands = " and ".join(f"`eval {group.first.folder} --split test`" for group in groups[:2])
        parts.append(f"no paired test: {commands} write the predictions that it needs")
    parts.append("run folders: " + ", ".join(str(run.folder) for run in runs))
    if warnings := all_verdicts(runs, groups):
        parts.append("\n".join(warnings))
    return "\n\n".join(parts)


def _page_path(args: argparse.Namespace, runs: list[RunRecord]) -> Path | None:
    """Where a page goes: several runs get one where it is asked for."""
    if args.html:
        return Path(args.html)
    if args.compare:
        return runs[0].folder / "memory" / f"compare_{runs[-1].folder.resolve().name}.html"
    return runs[0].folder / "memory" / "report.html" if len(runs) == 1 else None


def _plain(groups: list[Group]) -> dict[str, object]:
    return {
        "groups": [group_numbers(group) for group in groups],
        "paired_tests": [asdict(test) for test in paired_tests(groups)],
    }
