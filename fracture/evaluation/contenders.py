"""Which models a comparison has: a file of titles, and the settings that each has of its own."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fracture.config import flatten, read_yaml
from fracture.errors import UsageError


@dataclass(frozen=True)
class ContenderSettings:
    settings: dict[str, Any]  # that it has of its own: "model.name" -> value
    against: str | None  # title of another that it is compared with, beside the first


def read_contenders(file: Path) -> dict[str, ContenderSettings]:
    """The contenders of a YAML file by their titles, in its order.

    Raises:
        UsageError: there are none, or one cannot be compared with the others.
    """
    contenders: dict[str, ContenderSettings] = {}
    tree = read_yaml(file, "--models")
    titles = list(map(str, tree))
    for title, delta in zip(titles, tree.values(), strict=True):
        if not isinstance(delta, dict):
            raise UsageError(
                f"--models {file}: contender {title!r} must hold settings such as {{model: {{name: cnn}}}}, or {{}} "
                f"for none; it holds {delta!r}"
            )
        against = delta.pop("against", None)
        others = [other for other in titles[1:] if other != title]
        if against is not None and (against not in others or title == titles[0]):
            raise UsageError(
                f"--models {file}: contender {title!r} has against: {against!r}. All but the first are compared with "
                f"the first, and may name another, too: {_quoted(others)}."
            )
        settings = dict(flatten(delta))
        contenders[title] = ContenderSettings(settings, against)
        for key in settings:
            if key.split(".")[0] == "data":
                raise UsageError(
                    f"--models {file}: contender {title!r} sets {key} = {settings[key]!r}, and all are compared on the "
                    f"same shards. Set it for all of them: --set {key}={settings[key]}"
                )
    if not contenders:
        raise UsageError(f"--models {file} names no contender; the line 'cnn: {{}}' would name one")
    _check_folders(file, contenders)
    return contenders


def _check_folders(file: Path, titles: Sequence[str]) -> None:
    owners: dict[str, str] = {}
    for title in titles:
        name = folder_of(title)
        if not name:
            raise UsageError(f"--models {file}: the title {title!r} has no letter a-z and no digit. Give it some.")
        if re.fullmatch(r"fold-\d+", name):
            raise UsageError(f"--models {file}: the title {title!r} would have the folder {name!r}, as a fold has.")
        if not title.isprintable() or "$" in title or title.startswith("_"):  # which break tables and legends
            raise UsageError(
                f"--models {file}: the title {title!r} has a line break or a $, or begins with _. Leave it out."
            )
        if name in owners:
            raise UsageError(
                f"--models {file}: the titles {owners[name]!r} and {title!r} would both have the folder {name!r}. "
                "Change a word of one."
            )
        owners[name] = title


def choose(contenders: dict[str, ContenderSettings], only: Sequence[str] | None) -> dict[str, ContenderSettings]:
    """Those that are named; None: all.

    Raises:
        UsageError: one that is named is not there.
    """
    for title in only or ():
        if title not in contenders:
            raise UsageError(f"--only {title!r}: there is no such contender. There are: {_quoted(contenders)}.")
    return {title: entry for title, entry in contenders.items() if only is None or title in only}


def _quoted(titles: Iterable[str]) -> str:
    """Some of them have commas."""
    return ", ".join(map(repr, titles))


def folder_of(title: str) -> str:
    """A title as the name of a folder, or of a part of a bucket."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
