from pathlib import Path

import pytest

from fracture.config import Config
from fracture.config_docs import configuration_page

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


def test_the_page_is_that_of_the_settings():
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), (
        "fracture/config.py has changed: python -m fracture.config_docs > docs/configuration.md"
    )


@pytest.mark.parametrize(("name", "section"), list(Config()))
def test_every_setting_is_described_in_whole_phrases(name: str, section):
    assert type(section).__doc__.endswith(".")
    for key, field in type(section).model_fields.items():
        assert field.description, f"{name}.{key}"
        assert field.description.endswith("."), f"{name}.{key}"
        assert field.description[0].isupper() or field.description[0] == "`", f"{name}.{key}"


def test_the_page_names_every_setting_with_its_default_and_limits():
    page = configuration_page()
    assert "| `learning_rate` | number | `0.001` | above 0 | Highest learning rate of Adam. |" in page
    assert "| `min_workers` | integer or null | `null` | at least 1 |" in page
    assert all(f"| `{key}` |" in page for _, section in Config() for key in type(section).model_fields)
