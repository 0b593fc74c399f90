"""Inspections as one self-contained HTML page with embedded figures, and as text for a terminal."""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coconut_ds.evaluation.inspection.frontier import Frontier
from coconut_ds.evaluation.inspection.latents import Guess, Inspection
from coconut_ds.evaluation.inspection.step_match import StepMatch

PLAIN_TEXT = rc_context({"text.parse_math": False})  # a `$` in a token does not start a formula
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { margin-top: 2.5rem; border-top: 1px solid #d8dde3; padding-top: 1rem }
table { border-collapse: collapse; margin: .6rem 0 1rem } th, td { padding: .25rem .7rem; text-align: left }
th { border-bottom: 2px solid #8a94a0; font-weight: 600 } td { border-bottom: 1px solid #e4e8ec }
code { background: #f0f3f6; border-radius: 3px; padding: 0 .25rem; white-space: pre-wrap }
img { max-width: 100% } .note { color: #57606a } .p { color: #57606a; font-size: .85em }
"""
DARK, GRAY, RIGHT = "#1f5fa8", "#9aa4af", "#c8452e"
MAX_NODES = 12  # bars in the figure of a frontier


@PLAIN_TEXT
def page(title: str, inspections: Sequence[Inspection], match: StepMatch | None) -> str:
    """The complete HTML page."""
    body = [f"<h1>{escape(title)}</h1>"]
    if match is not None:
        body += _match_section(match)
    for number, inspection in enumerate(inspections, 1):
        body += _problem_section(number, inspection)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _match_section(match: StepMatch) -> Iterator[str]:
    yield f"<h2>Do latents decode to the results of the steps? ({match.num_problems} problems)</h2>"
    yield (
        f"<p>Share of problems where the result of a step is among the {match.top} most likely tokens of "
        "the LM head after 0, 1, ... latents. Right: with the steps of another problem.</p>"
    )
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(match.rates)), layout="constrained")
    for ax, rates, title in zip(
        figure.subplots(1, 2), (match.rates, match.by_chance), ("own steps", "by chance"), strict=True
    ):
        states = [f"{k} latents" for k in range(len(rates))]
        _heat(ax, rates, states, [f"step {j + 1}" for j in range(len(rates[0]))], top=1.0, numbers=True)
        ax.set_title(title)
    yield _picture(figure)
    yield "<p>Share of correct remaining steps when continued in words after 0, 1, ... latents:</p>"
    head = "".join(f"<th>{k} latents</th>" for k in range(len(match.continued)))
    cells = "".join(f"<td>{100 * share:.0f} %</td>" for share in match.continued)
    yield f"<table><tr>{head}</tr><tr>{cells}</tr></table>"


def _problem_section(number: int, inspection: Inspection) -> Iterator[str]:
    problem = inspection.problem
    yield f"<h2>{number}. {escape(_shortened(problem.question, 160))}</h2>"
    if len(problem.question) > 160:
        yield f"<p>{escape(problem.question)}</p>"
    expected = f"; expected <code>{escape(problem.answer)}</code>" if problem.answer else ""
    yield f"<p>The model answers <code>{escape(inspection.completion)}</code>{expected}</p>"
    yield "<h3>What each latent decodes to</h3>"
    heads = ("latent", "before the thought", "after it", "norm", "nearest token")
    yield "<table><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"
    for view in inspection.latents:
        yield (
            f"<tr><td>{view.slot}</td><td>{_guesses(view.before)}</td><td>{_guesses(view.after)}</td>"
            f"<td>{view.norm:.2f}</td>"
            f"<td><code>{escape(view.nearest_token)}</code> {view.cosine:.2f}</td></tr>"
        )
    yield f"<tr><td>output</td><td>{_guesses(inspection.output)}</td><td></td><td></td><td></td></tr></table>"
    low, middle, high = inspection.embedding_norms
    yield (
        f"<p class='note'>Norms of token embeddings: {low:.2f} to {high:.2f} (5 % and 95 %), median "
        f"{middle:.2f}. Before: LM head on the hidden state before the thought. Output: LM head on the "
        "hidden state of the last slot.</p>"
    )
    if inspection.window_weights:
        weights = ", ".join(f"{weight:.3f}" for weight in inspection.window_weights)
        yield f"<p>Window weights, newest state first: {weights}</p>"
    yield "<h3>In words after 0, 1, ... latents</h3><table>"
    for k, text in enumerate(inspection.in_words):
        yield f"<tr><td>{k}</td><td><code>{escape(text)}</code></td></tr>"
    yield "</table>"
    yield "<h3>Attention, mean over layers and heads</h3>"
    yield _picture(_attention_figure(inspection))
    if inspection.frontiers:
        yield "<h3>Frontier of the graph</h3>"
        yield "<p>Probability of each node after &quot;Every&quot;. Red: leads to the answer.</p>"
        yield _picture(_frontier_figure(inspection.frontiers))
        yield _frontier_table(inspection.frontiers)


def _guesses(guesses: Sequence[Guess]) -> str:
    return " ".join(
        f"<code>{escape(_visible(guess.token))}</code><span class='p'>{guess.probability:.2f}</span>"
        for guess in guesses
    )


def _frontier_table(frontiers: Sequence[Frontier]) -> str:
    rows = "".join(
        f"<tr><td>{f.num_latents}</td><td>{f.distance}</td><td>{f.size}</td><td>{f.mass:.3f}</td>"
        f"<td>{f.mass_of_answer:.3f}</td></tr>"
        for f in frontiers
    )
    return (
        "<table><tr><th>latents</th><th>distance</th><th>nodes</th><th>probability</th>"
        f"<th>probability on a path to the answer</th></tr>{rows}</table>"
    )


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
    if numbers:
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                ax.text(
                    x,
                    y,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value > 0.6 * top else "black",
                )


def _picture(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _visible(token: str) -> str:
    shown = token.replace("\n", "\u21b5")
    return shown if token.strip() else shown.replace(" ", "\u2423")


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def terminal(inspection: Inspection) -> str:
    """An inspection as text, the most important first."""
    problem = inspection.problem
    lines = [
        _shortened(problem.question, 300),
        f"  answers {inspection.completion!r}" + (f", expected {problem.answer!r}" if problem.answer else ""),
    ]
    low, middle, high = inspection.embedding_norms
    lines.append(f"  latent  norm (tokens: {low:.2f} to {high:.2f})   decodes to, before the thought")
    for view in inspection.latents:
        after = (
            "" if _spoken(view.after) == _spoken(view.before) else f"   after it: {_spoken(view.after[:3])}"
        )
        lines.append(f"  {view.slot:>6}  {view.norm:<27.2f} {_spoken(view.before)}{after}")
    lines.append(f"  output  {'':<27} {_spoken(inspection.output)}")
    if inspection.window_weights:
        lines.append(
            "  window weights, newest first: " + ", ".join(f"{w:.3f}" for w in inspection.window_weights)
        )
    lines.append("  in words after 0, 1, ... latents")
    lines += [f"  {k:>6}  {text!r}" for k, text in enumerate(inspection.in_words)]
    lines.append("  highest attention (mean over layers and heads)")
    for reader, row in zip(inspection.readers, inspection.attention, strict=True):
        highest = sorted(zip(row, inspection.spans, strict=True), reverse=True)[:4]
        spoken = ", ".join(f"{_shortened(name, 30)!r} {weight:.2f}" for weight, name in highest)
        lines.append(f"  {_visible(reader):>14}  {spoken}")
    for frontier in inspection.frontiers:
        best = ", ".join(f"{c.node} {c.probability:.3f}" for c in frontier.candidates[:4])
        lines.append(
            f"  {frontier.num_latents} latents: {frontier.size} nodes at distance {frontier.distance} have "
            f"{frontier.mass:.3f}, on a path to the answer {frontier.mass_of_answer:.3f}; most likely: {best}"
        )
    return "\n".join(lines)


def terminal_match(match: StepMatch) -> str:
    """The table of `match` as text."""
    steps = range(len(match.rates[0]))
    lines = [
        f"Result of a step among the {match.top} most likely tokens after 0, 1, ... latents, in % "
        f"of {match.num_problems} problems (by chance), and correct remaining steps in words",
        "  latents  " + "".join(f"step {j + 1:<12}" for j in steps) + "in words",
    ]
    for k, (row, chance) in enumerate(zip(match.rates, match.by_chance, strict=True)):
        cells = "".join(
            f"{100 * own:5.1f} ({100 * other:4.1f})    " for own, other in zip(row, chance, strict=True)
        )
        lines.append(f"  {k:>7}  {cells} {100 * match.continued[k]:.1f}")
    return "\n".join(lines)


def _spoken(guesses: Sequence[Guess]) -> str:
    return "  ".join(f"{_visible(guess.token)!r} {guess.probability:.2f}" for guess in guesses)
