"""Print the quickstart's table: accuracy of every stage, Coconut beside no CoT.

    python launch/quickstart_table.py COCONUT_RUN NO_COT_RUN

Knows: metrics.jsonl of a run folder.  Does not know: models, data.
"""

import json
import sys
from pathlib import Path

TEST = "test"


def accuracies(run: Path) -> dict[int | str, float]:
    """Accuracy on the validation set at the end of every stage, and on the test set under TEST."""
    found: dict[int | str, float] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "valid":
            found[int(record["stage"])] = record["accuracy"]
        elif record["kind"] == TEST:
            found[TEST] = record["accuracy"]
    return found


def table(coconut: Path, no_cot: Path) -> str:
    """The two runs side by side, in percent; the stages of training first, the test last."""
    ours, theirs = accuracies(coconut), accuracies(no_cot)
    stages = sorted(stage for stage in ours if isinstance(stage, int))

    def row(title: str, *cells: str) -> str:
        return title.ljust(48) + "".join(cell.rjust(10) for cell in cells)

    def percent(accuracy: float | None) -> str:
        return "" if accuracy is None else f"{100 * accuracy:.1f} %"

    def hidden(steps: int) -> str:
        return {0: "all steps as text", 1: "1 step in a latent"}.get(steps, f"{steps} steps in latents")

    lines = [row("accuracy", "Coconut", "no CoT")]
    for stage in stages:
        lines.append(row(f"validation, stage {stage}: {hidden(stage)}", percent(ours[stage])))
    lines.append(row(f"test: {hidden(max(stages))}", percent(ours.get(TEST)), percent(theirs.get(TEST))))
    return "\n".join([*lines, f"run folders: {coconut}, {no_cot}"])


if __name__ == "__main__":
    print(table(Path(sys.argv[1]), Path(sys.argv[2])))
