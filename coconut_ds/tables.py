"""A table of cells as plain text, Markdown or LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass

from coconut_ds.files import printable

LATEX = {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "$": r"\$"}
LATEX |= {"{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$"}
NEVER_WRAPPED = 1_000_000  # characters per line; a pipe or a log has no width


@dataclass(frozen=True)
class Table:
    """`rows` with as many cells as `head`.

    align: l (left) or r (right) for each column; the last letter also holds for the columns after it.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str = "lr"
    title: str = ""

    def is_right(self, column: int) -> bool:
        """Whether a column is right-aligned, as numbers are."""
        return self.align[min(column, len(self.align) - 1)] == "r"

    def text(self) -> str:
        """Aligned columns without colors or borders; a head of empty names is left out."""
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=any(self.head))
        for column, name in enumerate(self.head):
            grid.add_column(
                Text(printable(name)), justify="right" if self.is_right(column) else "left", no_wrap=True
            )
        for row in self.rows:
            grid.add_row(*(Text(printable(cell)) for cell in row))
        console = Console(width=NEVER_WRAPPED, color_system=None)
        with console.capture() as capture:
            console.print(grid)
        lines = [line.rstrip() for line in capture.get().splitlines()]
        return "\n".join([*([self.title] if self.title else []), *lines])

    def markdown(self) -> str:
        """A GitHub table."""
        marks = ["---:" if self.is_right(column) else "---" for column in range(len(self.head))]
        escaped = [[cell.replace("|", r"\|") for cell in line] for line in (self.head, *self.rows)]
        lines = ["| " + " | ".join(line) + " |" for line in escaped]
        lines.insert(1, "|" + "|".join(marks) + "|")
        return "\n".join([*([f"**{self.title}**", ""] if self.title else []), *lines])

    def latex(self) -> str:
        """A LaTeX tabular with booktabs rules."""
        columns = "".join("r" if self.is_right(column) else "l" for column in range(len(self.head)))
        head, *rows = [" & ".join(map(latex_escaped, line)) + r" \\" for line in (self.head, *self.rows)]
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule"]
        return "\n".join([*([f"% {self.title}"] if self.title else []), *lines, r"\end{tabular}"])


def latex_escaped(text: str) -> str:
    """`text` with LaTeX's special characters escaped."""
    return "".join(LATEX.get(letter, letter) for letter in text)
