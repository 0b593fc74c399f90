"""The tables in the READMEs are those of the schemas."""

from pathlib import Path

import pytest

from coconut_ds.config.schemas.markdown import READMES, settings_table, with_tables

ROOT = Path(__file__).parent.parent.parent.parent


def test_a_table_has_a_row_for_every_accepted_key():
    table = settings_table("ds_config.zero_optimization.offload_optimizer")
    assert "| `pin_memory` | true or false | `true` |" in table
    assert "| `device` | `none`, `cpu`, `nvme` | `none` |" in table
    assert "cpu_offload" not in settings_table("ds_config.zero_optimization")


@pytest.mark.parametrize("readme", READMES)
def test_settings_tables_are_made_from_the_schema(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert "<!-- settings: " in text
    assert with_tables(text) == text, "run: python -m coconut_ds.config.schemas.markdown"
