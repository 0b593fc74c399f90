"""Generate the settings tables of the READMEs from the schemas.

    python -m coconut_ds.config.settings_tables          rewrites the tables in configs/ and ds_configs/

A table is placed between `<!-- settings: NAME -->` and `<!-- end -->`; a test checks that it is up to date.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coconut_ds.config.schema import expectation, load_schema, shown

READMES = ("configs/README.md", "ds_configs/README.md")
MARKED = re.compile(r"(<!-- settings: ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def settings_table(name: str) -> str:
    """Markdown table of a schema (`experiment`) or of a block (`ds_config.latent_memory`)."""
    schema_name, *path = name.split(".")
    schema: Mapping[str, Any] = load_schema(schema_name)
    for key in path:
        schema = schema["properties"][key]
        if "$ref" in schema:
            schema = load_schema(schema_name)["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    columns = ["key", "value", "default", *(["affects"] if name == "experiment" else []), "meaning"]
    lines: list[str] = []
    group = ""
    for key, rule in schema["properties"].items():
        if "not" in rule:
            continue
        if not lines or rule.get("group", "") != group:
            group = rule.get("group", "")
            lines += ([f"\n**{group}**\n"] if group else []) + [
                "| " + " | ".join(columns) + " |",
                "|---" * len(columns) + "|",
            ]
        cells = [f"`{key}`", _values(rule), _default(key, rule, schema), rule.get("affects")]
        cells = [cell for cell in cells if cell is not None] + [rule.get("description", "")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).strip("\n") + "\n"


def with_tables(text: str) -> str:
    """`text` with every marked table regenerated."""
    return MARKED.sub(lambda match: f"{match[1]}{settings_table(match[2])}{match[3]}", text)


def _values(rule: Mapping[str, Any]) -> str:
    if "enum" in rule:
        return ", ".join(f"`{shown(value).strip(chr(39))}`" for value in rule["enum"])
    return expectation(rule)


def _default(key: str, rule: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if "default" in rule:
        default = f"`{shown(rule['default']).strip(chr(39))}`"
        if "published_default" in rule:
            default += f"; published files `{shown(rule['published_default']).strip(chr(39))}`"
        return default
    return "required" if key in schema.get("required", ()) else ""


if __name__ == "__main__":
    for readme in READMES:
        path = Path(readme)
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
