"""The report: one HTML file with embedded figures, no scripts or links, and the figures as PNG beside it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from coconut_ds.config.experiment import experiment_to_yaml
from coconut_ds.files import make_folder, replace_text, run_folder_of
from coconut_ds.reports import figures as learning
from coconut_ds.reports import memory_figures as memory
from coconut_ds.reports.comparison import all_tables, all_verdicts, group_runs
from coconut_ds.reports.memory_tables import peak_contents, profile_text
from coconut_ds.reports.pairing import pair
from coconut_ds.reports.run_records import RunRecord, read_run
from coconut_ds.tables import Table
from coconut_ds.templates import render


def write_page(page: Path, runs: Sequence[RunRecord]) -> list[Path]:
    """Write the page and its figures; returns their paths, the page first."""
    if run_folder_of(page) or not page.parent.exists():
        make_folder(page.parent)
    prefix = "" if page.stem == "report" else f"{page.stem}_"
    written: list[Path] = []

    def write(name: str, figure: Figure) -> str:
        path, address = learning.save(figure, page.parent, prefix + name)
        written.append(path)
        return address

    replace_text(page, page_text(runs, write, f"Report of {time.strftime('%Y-%m-%d %H:%M')}"))
    return [page, *written]


def page_text(
    runs: Sequence[RunRecord], show: Callable[[str, Figure], str], subtitle: str, refresh: int | None = None
) -> str:
    """The page as HTML.  `show`: address of a figure by its name.  `refresh`: load again after seconds."""
    groups = group_runs(runs)

    def pictures(*named: tuple[str, Figure | None, str]) -> list[tuple[str, str]]:
        """(caption, address) of each figure that there is."""
        return [(caption, show(name, figure)) for name, figure, caption in named if figure is not None]

    windows = [
        (
            "window" if len(runs) == 1 else f"window_{run.experiment.name}",
            learning.window_picture(run),
            f"{run.experiment.name}: weight of each earlier hidden state in a thought.",
        )
        for run in runs
    ]
    return render(
        "run.html",
        title=" and ".join(run.experiment.name for run in runs),
        subtitle=subtitle,
        refresh=refresh,
        runs=runs,
        warnings=all_verdicts(runs, groups),
        tables=all_tables(runs, groups),
        tests=pair(groups).lines(),
        learning=pictures(
            ("accuracy", learning.accuracy_picture(groups), "Validation accuracy after every epoch."),
            ("stages", learning.stage_picture(groups), "Accuracy where each stage ends."),
            ("loss", learning.loss_picture(groups), "Token loss: training (smoothed) and validation."),
            ("steps", learning.steps_picture(groups), "Optimizer steps, smoothed; tokens without padding."),
            *windows,
        ),
        memory=pictures(
            ("timeline", memory.timeline_picture(runs),
             "Live tensors through two optimizer steps on the largest batch; phases have equal width, "
             "numbers are the peak of each phase in MiB."),
            ("components", memory.components_picture(runs),
             "States after the first step plus the largest phase; hatched: the plan."),
            ("ranks", memory.ranks_picture(runs), "Peaks of every rank."),
            ("peaks", memory.stages_picture(runs), "Peak memory in every epoch of training."),
        ),
        profiles=[
            (profile_text(run.profile, run.plan), _at_peak(run)) for run in runs if run.profile
        ],
        experiment_to_yaml=experiment_to_yaml,
    )  # fmt: skip


def report_of(folder: Path) -> Path:
    """Write the report of a run folder; returns its path.  Raises ConfigError if it is no run folder."""
    return write_page(folder / "memory" / "report.html", [read_run(folder)])[0]


def _at_peak(run: RunRecord) -> Table:
    assert run.profile is not None
    rows = [[name, f"{size:,.1f}"] for name, size in peak_contents(run.profile) if size >= 0.05]
    return Table(["alive at the peak, allocated in", "MiB"], rows)
