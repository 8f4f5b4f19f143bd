"""What the whole code never does, read from the code itself; hostile files are tried where they are read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "fracture").rglob("*.py"), *(ROOT / "job").rglob("*.py")])
MODULES = {path: ast.parse(path.read_text()) for path in FILES}
CODE_LOADERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy", "torch"}
ARCHIVES = {"zipfile", "tarfile", "gzip", "bz2", "lzma", "zlib"}
LOOKED_INTO = {"spreadsheet.py": {"zipfile"}}  # the sizes that a workbook claims, before openpyxl reads it


def imported(module: ast.Module) -> set[str]:
    names = {alias.name for node in ast.walk(module) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(module) if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


def calls(module: ast.Module) -> Iterator[tuple[str, dict[str, str]]]:
    """(what is called, its keywords) of every call."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg or "": ast.unparse(word.value) for word in node.keywords}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
class TestEveryFile:
    def test_imports_nothing_that_loads_code_or_unpacks(self, file: Path):
        assert imported(MODULES[file]) & CODE_LOADERS == set()
        assert imported(MODULES[file]) & ARCHIVES - LOOKED_INTO.get(file.name, set()) == set()

    def test_calls_nothing_that_runs_what_a_file_says(self, file: Path):
        called = {name for name, _ in calls(MODULES[file])}
        assert called & {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"} == set()
        endings = ("saved_model.load", "load_model", "model_from_json", "unpack_archive", "extract", "extractall")
        assert [name for name in called if name.endswith(endings)] == []

    def test_loads_arrays_without_pickle(self, file: Path):
        loads = [words for name, words in calls(MODULES[file]) if name in ("np.load", "np.lib.format.read_array")]
        assert all(words.get("allow_pickle") == "False" for words in loads)

    def test_fills_pages_from_templates_that_escape(self, file: Path):
        made = [words for name, words in calls(MODULES[file]) if name.endswith("Environment")]
        assert all(words.get("autoescape") == "True" for words in made)
        assert not any(name.endswith("Markup") for name, _ in calls(MODULES[file]))


def test_no_template_switches_escaping_off():
    templates = sorted((ROOT / "fracture/templates").glob("*.html"))
    assert templates
    assert [
        t.name for t in templates if "|safe" in t.read_text().replace(" ", "") or "autoescape" in t.read_text()
    ] == []


def test_every_file_is_looked_at():
    assert ROOT / "fracture/arrays.py" in FILES
    assert len(FILES) > 40
