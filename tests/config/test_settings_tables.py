"""The tables in the READMEs are those of the schemas."""

from pathlib import Path

import pytest

from coconut_ds.config.schema import load_schema, settings_with
from coconut_ds.config.settings_tables import READMES, settings_table, with_tables

ROOT = Path(__file__).parent.parent.parent


def test_a_table_has_a_row_for_every_accepted_key():
    table = settings_table("ds_config.zero_optimization.offload_optimizer")
    assert "| `pin_memory` | true or false | `true` |" in table
    assert "| `device` | `none`, `cpu`, `nvme` | `none` |" in table
    assert "cpu_offload" not in settings_table("ds_config.zero_optimization")


def test_every_setting_of_an_experiment_says_what_it_affects():
    kinds = ("learning", "shapes", "accuracy", "running")
    rules = load_schema("experiment")["properties"]
    assert {key for key, rule in rules.items() if rule.get("affects") not in kinds} == set()
    assert settings_with("affects", "shapes") == (
        "method", "coconut", "cot", "no_thoughts", "no_cot", "latent_variant", "thought", "tuning",
        "lora_r", "lora_target_modules", "lora_use_dora", "model_id",
    )  # fmt: skip
    paths = settings_with("path_to", "data", "weights", "runs")
    assert set(paths) == {key for key in rules if key.endswith(("_path", "_id"))}
    assert "| `lr` | a number of more than 0 | `0.0001` | learning |" in settings_table("experiment")


@pytest.mark.parametrize("readme", READMES)
def test_settings_tables_are_made_from_the_schema(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert "<!-- settings: " in text
    assert with_tables(text) == text, "run: python -m coconut_ds.config.settings_tables"
