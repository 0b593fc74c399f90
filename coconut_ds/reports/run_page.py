"""The report: one HTML file with embedded figures, no scripts or links, and the figures as PNG beside it."""

import html
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from coconut_ds.config.experiment import experiment_to_yaml
from coconut_ds.files import make_folder, replace_text, run_folder_of
from coconut_ds.reports import figures as learning
from coconut_ds.reports import memory_figures as memory
from coconut_ds.reports.comparison import (
    Group,
    all_verdicts,
    best_table,
    group_runs,
    stage_table,
    summary_table,
)
from coconut_ds.reports.memory_tables import profile_text
from coconut_ds.reports.pairing import pair
from coconut_ds.reports.run_records import RunRecord, read_run
from coconut_ds.tables import Table

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1080px;
       margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem;
     border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
p.sub { color: #555; margin: 0 0 1rem; } img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
figcaption { color: #555; font-size: .9rem; } table { border-collapse: collapse; font-size: .88rem; }
.wide { overflow-x: auto; } th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #eee; }
th { border-bottom: 2px solid #bbb; } .n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem; line-height: 1.35; }
.verdict { padding: .6rem .9rem; border-left: 4px solid #009E73; background: #f0f8f5; }
.verdict.over { border-color: #B00020; background: #fbeeee; }
@media print { body { max-width: none; } h2, figure { break-inside: avoid; } }
"""


def write_page(
    page: Path, runs: Sequence[RunRecord], groups: Sequence[Group], tables: Sequence[Table]
) -> list[Path]:
    """Write the page and its figures; returns their paths, the page first."""
    if run_folder_of(page) or not page.parent.exists():
        make_folder(page.parent)
    prefix = "" if page.stem == "report" else f"{page.stem}_"
    written: list[Path] = []

    def picture(name: str, figure: Figure | None, caption: str) -> str:
        if figure is None:
            return ""
        path, address = learning.save(figure, page.parent, prefix + name)
        written.append(path)
        alt = html.escape(caption)
        return f'<figure><img alt="{alt}" src="{address}"><figcaption>{alt}</figcaption></figure>'

    warnings = [f'<p class="verdict over">{html.escape(line)}</p>' for line in all_verdicts(runs, groups)]
    parts = [*_head(runs), "<h2>Results</h2>", *warnings, *map(as_html, (t for t in tables if t.rows))]
    if tests := pair(groups).lines():
        parts.append("<p>Paired tests (McNemar, exact):</p><ul>")
        parts += [f"<li>{html.escape(test)}</li>" for test in tests] + ["</ul>"]
    pictures = [
        picture("accuracy", learning.accuracy_picture(groups), "Validation accuracy after every epoch."),
        picture("stages", learning.stage_picture(groups), "Accuracy where each stage ends."),
        picture("loss", learning.loss_picture(groups), "Token loss: training (smoothed) and validation."),
    ]
    for run in runs:
        name = "window" if len(runs) == 1 else f"window_{run.experiment.name}"
        caption = f"{run.experiment.name}: weight of each earlier hidden state in a thought."
        pictures.append(picture(name, learning.window_picture(run), caption))
    if any(pictures):
        parts += ["<h2>Learning</h2>", *pictures]
    parts += _memory(runs, picture)
    parts += ["<h2>Settings</h2>", *map(_settings, runs)]
    title = html.escape(" and ".join(run.experiment.name for run in runs))
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{CSS}</style></head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    replace_text(page, text)
    return [page, *written]


def report_of(folder: Path) -> Path:
    """Write the report of a run folder; returns its path.  Raises ConfigError if it is no run folder."""
    run = read_run(folder)
    groups = group_runs([run])
    return write_page(
        folder / "memory" / "report.html",
        [run],
        groups,
        [stage_table(groups), summary_table(groups), best_table([run])],
    )[0]


def _head(runs: Sequence[RunRecord]) -> list[str]:
    names = " and ".join(run.experiment.name for run in runs)
    made = time.strftime("%Y-%m-%d %H:%M")
    parts = [f"<h1>{html.escape(names)}</h1>", f'<p class="sub">Report of {made}</p>']
    for run in runs:
        if run.plan:
            over = "" if run.plan["fits"] else " over"
            verdict = f"<b>{html.escape(run.experiment.name)}</b>, plan: {html.escape(run.plan['verdict'])}"
            parts.append(f'<p class="verdict{over}">{verdict}</p>')
    return parts


def _memory(runs: Sequence[RunRecord], picture: Callable[[str, Figure | None, str], str]) -> list[str]:
    profiled = [run for run in runs if run.profile]
    parts = ["<h2>Memory</h2>"]
    parts.append(
        picture(
            "timeline", memory.timeline_picture(runs),
            "Live tensors through two optimizer steps on the largest batch; phases have equal width, "
            "numbers are the peak of each phase in MiB.",
        )
    )  # fmt: skip
    parts.append(
        picture(
            "components", memory.components_picture(runs),
            "States after the first step plus the largest phase; hatched: the plan.",
        )
    )  # fmt: skip
    parts.append(picture("ranks", memory.ranks_picture(runs), "Peaks of every rank."))
    parts.append(picture("peaks", memory.stages_picture(runs), "Peak memory in every epoch of training."))
    for run in profiled:
        assert run.profile is not None
        parts.append(f"<pre>{html.escape(profile_text(run.profile, run.plan))}</pre>")
        rows = [[name, f"{size:,.1f}"] for name, size in memory.peak_contents(run.profile) if size >= 0.05]
        parts.append(as_html(Table(["alive at the peak, allocated in", "MiB"], rows)))
    if not profiled:
        parts.append("<p>For memory by phase, run <code>profile</code> with the same settings.</p>")
    return parts


def _settings(run: RunRecord) -> str:
    environment = run.environment
    lines = [
        f"{key}: {environment[key]}" for key in ("started", "command", "host", "code") if key in environment
    ]
    lines += [f"{name} {version}" for name, version in environment.get("libraries", {}).items()]
    text = "\n".join([*lines, "", experiment_to_yaml(run.experiment)])
    title = html.escape(f"{run.experiment.name}: {run.folder}")
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"


def as_html(table: Table) -> str:
    """A table as HTML."""

    def row(cells: Sequence[str], tag: str) -> str:
        classes = [' class="n"' if table.is_right(column) else "" for column in range(len(cells))]
        inside = [f"<{tag}{c}>{html.escape(cell)}</{tag}>" for cell, c in zip(cells, classes, strict=True)]
        return f"<tr>{''.join(inside)}</tr>"

    rows = "".join(row(cells, "td") for cells in table.rows)
    inside = f"<thead>{row(table.head, 'th')}</thead><tbody>{rows}</tbody>"
    return f'<div class="wide"><table>{inside}</table></div><p></p>'
