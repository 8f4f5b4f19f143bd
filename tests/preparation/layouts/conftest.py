from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fracture.config import load_config
from fracture.preparation.labels.class_words import ClassWords
from fracture.storage import StoragePath, storage_path


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., tuple[StoragePath, list[str]]]:
    """Writes files, empty ones by their paths and others by their text; returns the folder and all its paths."""

    def write(*paths: str, texts: Mapping[str, str | bytes] | None = None) -> tuple[StoragePath, list[str]]:
        for path, text in (dict.fromkeys(paths, "") | dict(texts or {})).items():
            file = tmp_path / "data" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
        root = storage_path(tmp_path / "data")
        return root, [info.path[len(root.path) + 1 :] for info in root.files()]

    return write


@pytest.fixture
def words() -> Callable[..., ClassWords]:
    """The known words and those of settings, as they are typed after --set."""
    return lambda *assignments: ClassWords(load_config(None, assignments).data)
