"""Print `docs/configuration.md`, which is made of `fracture/config.py`: python -m fracture.config_docs > FILE."""

import json
from typing import Any

from fracture.config import Config, Section

_HEAD = """\
# Configuration

After this page you can find any setting, its default and what it may be.

Change a setting with `--set SECTION.KEY=VALUE`, which may be given many times, or in a YAML file with
`--config FILE.yaml` that holds only what differs from the defaults:

```yaml
training:
  epochs: 20
  batch_size: 16
data:
  normal_labels: [no, "1"]
```

Only `true` and `false` are booleans, and `1e-3` is a number. A setting that is text takes what is written, so that a
folder may be called `no` or `1`. An unknown key or an impossible value ends the command, which names the key, the value
and what is allowed. `--set` goes over the file, and a later `--set` over an earlier one.

A section that **changes the recipe** makes another model: a run that is resumed must have the same values in it. The
others may change while a run goes on.

The recipes in `fracture/configs` are found by name: `--config quick`. This page is made of `fracture/config.py` by
`python -m fracture.config_docs > docs/configuration.md`; a test keeps the two equal.
"""
_LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minLength": "at least {} character",
    "minItems": "at least {} item",
    "maxItems": "at most {} items",
}


def configuration_page() -> str:
    """Return the page, Markdown."""
    sections = [_section(name, section) for name, section in Config()]
    return "\n".join([_HEAD, *sections])


def _section(name: str, section: Section) -> str:
    recipe = "Changes the recipe." if section.changes_recipe else "Does not change the recipe."
    lines = [f"## {name}", "", f"{type(section).__doc__} {recipe}", ""]
    lines += ["| key | type | default | limits | description |", "|---|---|---|---|---|"]
    properties = type(section).model_json_schema()["properties"]
    for key, default in section.model_dump(mode="json").items():
        schema = properties[key]
        cells = [f"`{key}`", _type(schema), _code(default), _limits(schema), schema["description"]]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(kind) for kind in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        return f"list of {_type(schema['items'])}" if schema["items"] else "list"
    if schema["type"] == "object":
        return "mapping"
    return {"string": "text"}.get(schema["type"], schema["type"])


def _limits(schema: dict[str, Any]) -> str:
    own = [text.format(f"{schema[name]:,}") for name, text in _LIMITS.items() if name in schema]
    parts = [*schema.get("anyOf", []), *([schema["items"]] if schema.get("items") else [])]
    of_parts = [_limits(part) for part in parts]
    if schema.get("type") == "array":
        of_parts = [f"each {limit}" for limit in of_parts if limit]
    return ", ".join([*own, *filter(None, of_parts)])


def _code(value: Any) -> str:
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


if __name__ == "__main__":
    print(configuration_page(), end="")
