r"""Take a MATH solution apart: the boxed answer, and the steps that lead to it.

    "Let $a=2$. Then $a^2=\boxed{4}$."  ->  answer "4", steps ["Let $a=2$.", "Then $a^2$"]

Knows: LaTeX as it occurs in MATH solutions.  Does not know: files and splits.
"""

import re

_BOX = re.compile(r"\\f?boxed\s*|\\fbox\s*")
_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_PROTECTED = re.compile(  # no step ends inside one of these; the display forms may end a step
    r"(?P<display>\\begin\{(?P<name>\w+\*?)\}.*?\\end\{(?P=name)\}|\$\$.*?\$\$|\\\[.*?\\\])"
    r"|(?P<inline>\\\(.*?\\\)|\$(?:\\.|[^$\\])*\$)|\\.",
    re.DOTALL,
)
_INLINE, _DISPLAY, _DISPLAY_STOP = "\x01", "\x02", "\x03"
_STEP_END = re.compile(
    rf"(?<=[.!?{_DISPLAY_STOP}])[)\"']*\s+(?=[A-Z({_INLINE}{_DISPLAY}])"  # a sentence
    rf"|(?<={_DISPLAY_STOP})\s*(?=\w)|(?<={_DISPLAY})\s*(?=[A-Z])"  # a displayed formula closes one
    r"|(?<=[.:!?])\s*\n\s*|\s*\n\s*\n\s*"  # a line after a stop, a paragraph
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:i\.e|e\.g|etc|vs|cf|[Ff]ig|[Ee]q|resp|Prop|Thm|[Nn]o|St|Mrs?|Ms|Dr)|\b[A-Z])\.$"
)
_RELATION = re.compile(r"(?:\s|&|~|=|:|\\(?:approx|equiv|implies|Rightarrow|boxed|[,;! ]|\\))+$")
_PAIRS = {r"\[": r"\]", r"\(": r"\)", "$$": "$$", "$": "$"}


def boxed_answer(solution: str, first: bool = False) -> str:
    r"""What the last \boxed{} (or \fbox{}) holds, braces balanced; the first one's on request.

    The last is what MATH's own grading reads; the fork's data has the first.  Raises ValueError without one.
    """
    boxes = _boxes(solution)
    if not boxes:
        raise ValueError(r"no \boxed{...} with balanced braces")
    start, inner, inner_end, _ = boxes[0 if first else -1]
    return " ".join(solution[inner:inner_end].split())


def _boxes(text: str) -> list[tuple[int, int, int, int]]:
    r"""(start, start of the content, its end, end) of every outermost \boxed{...} or \boxed x."""
    found = []
    position = 0
    while match := _BOX.search(text, position):
        position = match.end()
        if text[position : position + 1] == "{":
            end = _closing_brace(text, position)
            if end is None:
                continue
            found.append((match.start(), position + 1, end, end + 1))
            position = end + 1
        elif token := re.match(r"\\[A-Za-z]+|[^\s\\$]", text[position:]):
            found.append((match.start(), position, position + token.end(), position + token.end()))
    return found


def _closing_brace(text: str, opening: int) -> int | None:
    depth, position = 0, opening
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def steps_by_sentence(solution: str) -> list[str]:
    r"""The solution up to its last box, one sentence a step.

    Drawings are left out, other boxes opened.  The step that leads to the answer stops before the box, so
    that the answer is not read off the step: "$a^2=\boxed{4}$" leaves "$a^2$".
    """
    text = _DRAWING.sub(" ", solution)
    boxes = _boxes(text)
    if boxes:
        text = text[: boxes[-1][0]]
        for start, inner, inner_end, end in reversed(boxes[:-1]):
            text = text[:start] + text[inner:inner_end] + text[end:]
    sentences = _sentences(_close(text) if boxes else text)
    if boxes and len(sentences) > 1 and not re.search(r"[\d\\$]", sentences[-1]):
        sentences.pop()  # "The answer is": nothing but words is left before the box
    return sentences


def steps_by_line(solution: str) -> list[str]:
    """Every line that is not blank, the fork's steps: half of MATH has one, and the box stays in the last."""
    return [line.strip() for line in solution.splitlines() if line.strip()]


def _close(text: str) -> str:
    """The text without a relation sign at its end, with every open formula and environment closed."""
    while True:
        opened, math_at = _open_groups(text)
        shorter = _RELATION.sub("", text)
        if math_at is not None and shorter[math_at:].strip() in (*_PAIRS, "") and opened:
            shorter = shorter[:math_at]  # the box was all that the formula held
        elif opened and re.fullmatch(r"\\begin\{\w+\*?\}", shorter[math_at:] if math_at is not None else ""):
            shorter = shorter[:math_at]
        if shorter == text:
            break
        text = shorter
    return text.rstrip() + "".join(reversed(opened))


def _open_groups(text: str) -> tuple[list[str], int | None]:
    """What would close the formulas, environments and braces open at the end; where the outermost begins."""
    waiting: list[str] = []
    outermost = None
    for match in re.finditer(r"\\begin\{(\w+\*?)\}|\\end\{\w+\*?\}|\\left\b|\\right\b|\\.|\$\$|[${}]", text):
        token = match.group()
        if token == r"\left":
            waiting.append(r"\right.")
        elif waiting and (token == waiting[-1] or (token == r"\right" and waiting[-1] == r"\right.")):
            waiting.pop()
        elif match.group(1):
            waiting.append(rf"\end{{{match.group(1)}}}")
        elif token in _PAIRS:
            waiting.append(_PAIRS[token])
        elif token == "{":
            waiting.append("}")
        else:
            continue
        if len(waiting) == 1 and outermost is None:
            outermost = match.start()
        elif not waiting:
            outermost = None
    return waiting, outermost


def _sentences(text: str) -> list[str]:
    masked = _PROTECTED.sub(_mask, text)
    pieces, start = [], 0
    for end in _STEP_END.finditer(masked):
        if not _ABBREVIATION.search(masked[start : end.start()]):
            pieces.append(text[start : end.start()])
            start = end.start()
    pieces.append(text[start:])
    steps: list[str] = []
    for piece in pieces:
        step = " ".join(piece.split())
        if steps and not re.search(r"\w", step):
            steps[-1] += step  # a stray full stop
        elif re.search(r"\w", step):
            steps.append(step)
    return steps


def _mask(match: re.Match[str]) -> str:
    """As many characters, without one that could end a step, and a last one that says what stood there."""
    text = match.group()
    if not match["display"] and not match["inline"]:
        return "x" * len(text)
    stops = re.sub(r"(?:\\[\])]|\$+|\\end\{\w+\*?\}|\s|\\ )+$", "", text)[-1:] in (".", "!", "?")
    if match["inline"]:
        return _INLINE + "x" * (len(text) - 2) + ("." if stops else "x")
    return _DISPLAY + "x" * (len(text) - 2) + (_DISPLAY_STOP if stops else _DISPLAY)
