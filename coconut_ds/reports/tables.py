"""A table of cells as plain text, Markdown or LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass

LATEX = {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "$": r"\$"}
LATEX |= {"{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$"}


@dataclass(frozen=True)
class Table:
    """`rows` with as many cells as `head`; the first `num_words` columns are text, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_words: int = 1
    title: str = ""

    def text(self) -> str:
        """Aligned columns for a terminal; numbers are right-aligned."""
        lines = [self.head, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.head))]
        printed = []
        for line in lines:
            cells = [
                cell.ljust(width) if column < self.num_words else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            printed.append("  ".join(cells).rstrip())
        return "\n".join([*([self.title] if self.title else []), *printed])

    def markdown(self) -> str:
        """A GitHub table."""
        marks = ["---" if column < self.num_words else "---:" for column in range(len(self.head))]
        escaped = [[cell.replace("|", r"\|") for cell in line] for line in self._lines()]
        lines = ["| " + " | ".join(line) + " |" for line in escaped]
        lines.insert(1, "|" + "|".join(marks) + "|")
        return "\n".join([*([f"**{self.title}**", ""] if self.title else []), *lines])

    def latex(self) -> str:
        """A LaTeX tabular with booktabs rules."""
        columns = "l" * self.num_words + "r" * (len(self.head) - self.num_words)
        head, *rows = [" & ".join(map(latex_escaped, line)) + r" \\" for line in self._lines()]
        return "\n".join(
            [
                *([f"% {self.title}"] if self.title else []),
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                head,
                r"\midrule",
                *rows,
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )

    def _lines(self) -> list[Sequence[str]]:
        return [self.head, *self.rows]


def latex_escaped(text: str) -> str:
    """`text` with LaTeX's special characters escaped."""
    return "".join(LATEX.get(letter, letter) for letter in text)
