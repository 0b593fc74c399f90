"""Inspections as one self-contained HTML page with embedded figures, and as text for a terminal."""

import base64
import io
import textwrap
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coconut_ds.evaluation.frontier import Frontier
from coconut_ds.evaluation.inspection import Guess, Inspection, StepMatch
from coconut_ds.tables import Table
from coconut_ds.templates import render

PLAIN_TEXT = rc_context({"text.parse_math": False})  # a `$` in a token does not start a formula
DARK, GRAY, RIGHT = "#1f5fa8", "#9aa4af", "#c8452e"
MAX_NODES = 12  # bars in the figure of a frontier


@PLAIN_TEXT
def page(title: str, inspections: Sequence[Inspection], match: StepMatch | None) -> str:
    """The complete HTML page."""
    return render(
        "inspection.html",
        title=title,
        match=match,
        match_picture=match and _picture(_match_figure(match)),
        problems=[
            (
                inspection,
                _picture(_attention_figure(inspection)),
                _picture(_frontier_figure(inspection.frontiers)) if inspection.frontiers else None,
            )
            for inspection in inspections
        ],
        shortened=_shortened,
        visible=_visible,
    )


def _match_figure(match: StepMatch) -> Figure:
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(match.rates)), layout="constrained")
    states = [f"{k} latents" for k in range(len(match.rates))]
    steps = [f"step {j + 1}" for j in range(len(match.rates[0]))]
    for ax, rates, title in zip(
        figure.subplots(1, 2), (match.rates, match.by_chance), ("own steps", "by chance"), strict=True
    ):
        _heat(ax, rates, states, steps, top=1.0, numbers=True)
        ax.set_title(title)
    return figure


def _attention_figure(inspection: Inspection) -> Figure:
    width = min(1.5 + 0.45 * len(inspection.spans), 12)
    figure = Figure(figsize=(width, 1.6 + 0.3 * len(inspection.readers)), layout="constrained")
    ax = figure.subplots()
    top = max(max(row) for row in inspection.attention)
    readers = [_visible(name) for name in inspection.readers]
    spans = [_shortened(_visible(name), 28) for name in inspection.spans]
    _heat(ax, inspection.attention, readers, spans, top, numbers=len(spans) <= 24)
    ax.set_ylabel("query")
    return figure


def _frontier_figure(frontiers: Sequence[Frontier]) -> Figure:
    figure = Figure(figsize=(min(3.2 * len(frontiers), 13), 3.6), layout="constrained")
    axes = figure.subplots(1, len(frontiers), squeeze=False)
    for ax, frontier in zip(axes[0], frontiers, strict=True):
        shown = frontier.candidates[:MAX_NODES][::-1]
        colors = [
            (RIGHT if c.leads_to_answer else DARK) if c.distance == frontier.distance else GRAY for c in shown
        ]
        ax.barh([_shortened(c.node, 14) for c in shown], [c.probability for c in shown], color=colors)
        ax.set_title(f"{frontier.num_latents} latents: distance {frontier.distance}", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    figure.supxlabel("probability (gray: nodes at another distance)", fontsize=9)
    return figure


def _heat(
    ax: Axes,
    table: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    top: float,
    numbers: bool,
) -> None:
    ax.imshow(table, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    for y, row in enumerate(table if numbers else ()):
        for x, value in enumerate(row):
            color = "white" if value > 0.6 * top else "black"
            ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)


def _picture(figure: Figure) -> str:
    """The address of a figure for an <img>."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _visible(token: str) -> str:
    shown = token.replace("\n", "\u21b5")
    return shown if token.strip() else shown.replace(" ", "\u2423")


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def terminal(inspection: Inspection) -> str:
    """An inspection as text, the most important first."""
    problem = inspection.problem
    low, _, high = inspection.embedding_norms
    states = [
        [str(view.slot), f"{view.norm:.2f}", _spoken(view.before), _after_thought(view.before, view.after)]
        for view in inspection.latents
    ]
    states.append(["output", "", _spoken(inspection.output), ""])
    head = ["latent", f"norm (tokens: {low:.2f} to {high:.2f})", "decodes to, before the thought", ""]
    lines = [
        f"answers {inspection.completion!r}" + (f", expected {problem.answer!r}" if problem.answer else ""),
        Table(head, states, align="rl").text(),
    ]
    if inspection.window_weights:
        weights = ", ".join(f"{weight:.3f}" for weight in inspection.window_weights)
        lines.append(f"window weights, newest first: {weights}")
    words = [[str(k), repr(text)] for k, text in enumerate(inspection.in_words)]
    lines.append(Table(["", ""], words, align="l", title="in words after 0, 1, ... latents").text())
    attention = [
        [_visible(reader), _most_attended(row, inspection.spans)]
        for reader, row in zip(inspection.readers, inspection.attention, strict=True)
    ]
    title = "highest attention (mean over layers and heads)"
    lines.append(Table(["", ""], attention, align="rl", title=title).text())
    for frontier in inspection.frontiers:
        best = ", ".join(f"{c.node} {c.probability:.3f}" for c in frontier.candidates[:4])
        lines.append(
            f"{frontier.num_latents} latents: {frontier.size} nodes at distance {frontier.distance} have "
            f"{frontier.mass:.3f}, on a path to the answer {frontier.mass_of_answer:.3f}; most likely: {best}"
        )
    return _shortened(problem.question, 300) + "\n" + textwrap.indent("\n".join(lines), "  ")


def terminal_match(match: StepMatch) -> str:
    """The table of `match` as text."""
    rows = [
        [
            str(k),
            *(f"{100 * own:.1f} ({100 * other:4.1f})" for own, other in zip(rates, by_chance, strict=True)),
            "-" if continued is None else f"{100 * continued:.1f}",
        ]
        for k, (rates, by_chance, continued) in enumerate(
            zip(match.rates, match.by_chance, match.continued, strict=True)
        )
    ]
    title = (
        f"Result of a step among the {match.top} most likely tokens after 0, 1, ... latents, in % "
        f"of {match.num_problems} problems (by chance), and correct remaining steps in words"
    )
    head = ["latents", *(f"step {j + 1}" for j in range(len(match.rates[0]))), "in words"]
    return Table(head, rows, align="r", title=title).text()


def _spoken(guesses: Sequence[Guess]) -> str:
    return "  ".join(f"{_visible(guess.token)!r} {guess.probability:.2f}" for guess in guesses)


def _after_thought(before: Sequence[Guess], after: Sequence[Guess]) -> str:
    return "" if _spoken(after) == _spoken(before) else f"after it: {_spoken(after[:3])}"


def _most_attended(row: Sequence[float], spans: Sequence[str]) -> str:
    highest = sorted(zip(row, spans, strict=True), reverse=True)[:4]
    return ", ".join(f"{_shortened(name, 30)!r} {weight:.2f}" for weight, name in highest)
