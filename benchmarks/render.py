"""Make docs/benchmarks.md, its pictures and README's results from benchmarks/results/*.json.

    python -m benchmarks.render             write them
    python -m benchmarks.render --check     exit code 1 where the text in the tree is another

A result that is not there is shown as "not measured", with the command that measures it.

Knows: files and their markers.  Does not know: what the sections say (sections.py), how to
draw (pictures.py).
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.pictures import draw_all
from benchmarks.record import RESULTS, ROOT
from benchmarks.sections import SECTIONS, readme_block

PAGE, README = Path("docs/benchmarks.md"), Path("README.md")
PICTURES = Path("docs/pictures")
BLOCK = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
HEAD = """# Benchmarks

Made by `python -m benchmarks.render` from the JSON in benchmarks/results/; do not edit it. `bash
benchmarks/run_all.sh` measures everything that needs no GPU, `--quick` a small version of it. Ratios on a CPU
come from one process or from alternating runs; nothing here about a GPU is an estimate.
"""


def read_results(folder: Path = RESULTS) -> dict[str, Any]:
    """Every result by its name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def page(results: Mapping[str, Any]) -> str:
    """The text of docs/benchmarks.md."""
    parts = [HEAD]
    for section in SECTIONS:
        result = results.get(section.name)
        body = section.text(result) if result else "Not measured."
        said = result["command"] if result else section.command
        parts.append(f"## {section.title}\n\n{section.about}\n\n`{said}`\n\n{body}\n")
        if result:
            parts.append(f"{provenance(result)}\n")
    return "\n".join(parts)


def provenance(result: Mapping[str, Any]) -> str:
    """Machine, versions, date and commit in a line."""
    machine, versions = result["machine"], result["versions"]
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    commit = f", commit {result['commit']}" if result["commit"] else ""
    return (
        f"<sub>{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {libraries}; "
        f"{result['date']}{commit}</sub>"
    )


def rendered_readme(text: str, results: Mapping[str, Any]) -> str:
    """README with the block between its markers made anew."""
    if not BLOCK.search(text):
        raise SystemExit("README.md has no <!-- results --> ... <!-- /results -->")
    return BLOCK.sub(lambda match: match[1] + readme_block(results) + match[2], text)


def rendered(results: Mapping[str, Any], root: Path = ROOT) -> dict[Path, str]:
    """Both files' texts as the results have them."""
    readme = (root / README).read_text(encoding="utf-8")
    return {PAGE: page(results), README: rendered_readme(readme, results)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    results = read_results()
    texts = rendered(results)
    if args.check:
        stale = [path for path, text in texts.items() if (ROOT / path).read_text(encoding="utf-8") != text]
        sys.exit(f"{', '.join(map(str, stale))}: run python -m benchmarks.render" if stale else 0)
    for path, text in texts.items():
        (ROOT / path).write_text(text, encoding="utf-8")
    draw_all(results, ROOT / PICTURES)


if __name__ == "__main__":
    main()
