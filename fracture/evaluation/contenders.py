"""The file that names the contenders of a comparison, and the settings of each."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fracture.config import flatten, read_yaml
from fracture.errors import UsageError


@dataclass(frozen=True)
class ContenderSettings:
    """One contender as its file describes it."""

    settings: dict[str, Any]  # those that this contender alone sets: "model.name" -> value
    against: str | None  # title of a contender to compare with, in addition to the baseline


def read_contenders(file: Path) -> dict[str, ContenderSettings]:
    """Read the contenders of a YAML file, by title, in the order of the file.

    Raises:
        UsageError: the file names no contender, or one that cannot be compared with the others.
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
                f"--models {file}: contender {title!r} has against: {against!r}. All contenders are compared with "
                f"the first; all but the first may also name one of these: {_quote(others)}."
            )
        settings = dict(flatten(delta))
        contenders[title] = ContenderSettings(settings, against)
        for key in settings:
            if key.split(".")[0] == "data":
                raise UsageError(
                    f"--models {file}: contender {title!r} sets {key} = {settings[key]!r}, but all contenders are "
                    f"compared on the same shards. Set it for all of them: --set {key}={settings[key]}"
                )
    if not contenders:
        raise UsageError(f"--models {file} names no contender. Add one, such as the line 'cnn: {{}}'.")
    _check_folders(file, contenders)
    return contenders


def _check_folders(file: Path, titles: Sequence[str]) -> None:
    owners: dict[str, str] = {}
    for title in titles:
        name = folder_name(title)
        if not name:
            raise UsageError(f"--models {file}: the title {title!r} has no letter a-z and no digit. Add one.")
        if re.fullmatch(r"fold-\d+", name):
            raise UsageError(
                f"--models {file}: the title {title!r} would get the folder name {name!r}, which "
                "a fold has. Choose another title."
            )
        if not title.isprintable() or "$" in title or title.startswith("_"):  # these break tables and legends
            raise UsageError(
                f"--models {file}: the title {title!r} has a line break or a $, or begins with _. Remove it."
            )
        if name in owners:
            raise UsageError(
                f"--models {file}: the titles {owners[name]!r} and {title!r} would both get the folder name {name!r}. "
                "Change a word of one."
            )
        owners[name] = title


def select_contenders(
    contenders: dict[str, ContenderSettings], only: Sequence[str] | None
) -> dict[str, ContenderSettings]:
    """Return the contenders whose titles are in `only`; all of them if it is None.

    Raises:
        UsageError: a title names no contender.
    """
    for title in only or ():
        if title not in contenders:
            raise UsageError(f"--only {title!r}: there is no such contender. There are: {_quote(contenders)}.")
    return {title: contender for title, contender in contenders.items() if only is None or title in only}


def _quote(titles: Iterable[str]) -> str:
    # Titles may contain commas.
    return ", ".join(map(repr, titles))


def folder_name(title: str) -> str:
    """Return the folder name for a title; it is also valid in a bucket."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
