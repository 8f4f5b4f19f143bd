"""The order of the rooms, who knows Ray and TensorFlow, private interfaces, and words, all read from the code."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "fracture").rglob("*.py"), *(ROOT / "job").glob("*.py")])
# From the top; a room imports only rooms below it. Every other file beside these is one of the single files.
ROOMS = (
    *("job", "cli", "workflows", "tuning", "training", "registry", "inference", "evaluation", "preparation"),
    *("models", "dataset", "runtime", "progress", "single files"),
)
ROOM_OF = {"fracture/__main__.py": "cli"}

# Rooms, or single files of a room, that may import the library; `fracture doctor` looks whether it works.
KNOWS_RAY = {
    *("fracture/runtime", "fracture/tuning", "fracture/training"),
    "fracture/preparation/parallel.py",
    *("fracture/inference/batch_prediction.py", "fracture/inference/scoring.py"),
    "fracture/workflows/doctor.py",
}
KNOWS_TENSORFLOW = {
    *("fracture/dataset/pipeline.py", "fracture/dataset/augment.py"),
    *("fracture/models", "fracture/training", "fracture/tuning", "fracture/inference"),
    *("fracture/evaluation/devices.py", "fracture/evaluation/scores.py", "fracture/evaluation/gradcam.py"),
    "fracture/workflows/doctor.py",
}
RAY_PRIVATE = re.compile(r"ray\.(_|.*\._)")
TENSORFLOW_PRIVATE = re.compile(r"(tensorflow|keras)\.(.*\.)?python\b|(tensorflow|keras)\.(_|.*\._)|keras\.src")
RAY_INTERNALS = "fracture/runtime/ray_internals.py"
TENSORFLOW_INTERNALS = "fracture/models/tensorflow_internals.py"

# The last column of the table "Words": parts of names that stand nowhere, ...
WORDS = {
    *("film", "films", "lane", "lanes", "draws", "tell", "told", "teller", "messages", "knowing", "learns"),
    *("arrivals", "asked", "beaten", "entry", "place"),
}
PAIRS = {"by_features", "going_on", "sits_out"}
# ... and those that no class and no event is called.
EVENT_WORDS = {"left", "broke", "placed", "halted"}
# (file, word): why it may stand there.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("fracture/progress/time_left.py", "left"): "a time that is left is plain English, and no event",
    ("fracture/preparation/decoding/decode.py", "place"): "Pillow calls it in_place when an image is changed itself",
}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def module_of(file: Path) -> str:
    return name_of(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(file): file for file in FILES}


def room_of(file: Path) -> str:
    name = name_of(file)
    folder, *rest = name.split("/")
    if name in ROOM_OF:
        return ROOM_OF[name]
    if folder == "job":
        return "job"
    room = rest[0].removesuffix(".py")
    return room if room in ROOMS else "single files"


def imports(file: Path) -> Iterator[str]:
    """Yield every module that the file imports, anywhere in it, and each name that it imports from one."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = [*module_of(file).split("."), *["__init__"] * (file.name == "__init__.py")][: -node.level]
                module = ".".join([*package, *module.split(".")]).rstrip(".")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def files_imported(file: Path) -> set[Path]:
    """Return the files of this project that the file imports; a package counts where no module of it is named."""
    found = set()
    for name in imports(file):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name and name != "fracture":
            found.add(MODULES[name])
    for name in {n.partition(".")[0] for n in imports(file)} if file.parent.name == "job" else set():
        if (file.parent / f"{name}.py").is_file():  # a script's own folder is on the path
            found.add(file.parent / f"{name}.py")
    return found - {file}


def test_a_room_imports_only_rooms_below_it():
    upward = [
        f"{name_of(file)} ({room_of(file)}) imports {name_of(other)} ({room_of(other)})"
        for file in FILES
        for other in sorted(files_imported(file))
        if ROOMS.index(room_of(other)) < ROOMS.index(room_of(file))
    ]
    assert upward == []


def test_no_file_imports_itself_by_way_of_others():
    graph = {file: files_imported(file) for file in FILES}
    while leaves := [file for file, others in graph.items() if not others & graph.keys()]:
        for file in leaves:
            del graph[file]
    roots = True
    while roots:  # files that only lead to a circle are in none
        roots = [file for file in graph if not any(file in others for others in graph.values())]
        for file in roots:
            del graph[file]
    assert sorted(map(name_of, graph)) == []


def names_for_annotations(file: Path) -> Iterator[tuple[str, str]]:
    """Yield module and name of each import that only type checkers run."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            imported = (child for child in node.body if isinstance(child, ast.ImportFrom))
            yield from ((child.module, alias.name) for child in imported for alias in child.names)


@pytest.mark.parametrize("file", [file for file in FILES if any(names_for_annotations(file))], ids=name_of)
def test_a_name_that_only_annotations_use_is_there(file: Path):
    found = [*names_for_annotations(file)]
    assert [f"{module}.{name}" for module, name in found if not hasattr(import_module(module), name)] == []


def library_users(libraries: set[str]) -> set[str]:
    return {name_of(file) for file in FILES if {name.partition(".")[0] for name in imports(file)} & libraries}


def strangers(libraries: set[str], known: set[str]) -> list[str]:
    return sorted(
        name for name in library_users(libraries) if name not in known and not known & {*map(str, Path(name).parents)}
    )


def test_only_some_rooms_know_ray():
    assert strangers({"ray"}, KNOWS_RAY) == []


def test_only_some_rooms_know_tensorflow():
    assert strangers({"tensorflow", "keras"}, KNOWS_TENSORFLOW) == []


@pytest.mark.parametrize(
    ("private", "allowed"),
    [(RAY_PRIVATE, RAY_INTERNALS), (TENSORFLOW_PRIVATE, TENSORFLOW_INTERNALS)],
    ids=["ray", "tensorflow"],
)
def test_private_interfaces_are_imported_in_one_file(private: re.Pattern[str], allowed: str):
    found = [f"{name_of(file)}: {name}" for file in FILES for name in imports(file) if private.match(name)]
    assert [line for line in found if line.partition(":")[0] != allowed] == []


def private_names(file: Path) -> Iterator[tuple[str, bool]]:
    """Yield each name with one underscore before it, and whether the file gives it or uses it."""
    for node in ast.walk(tree(file)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                given = True
            case ast.Attribute(attr=name, value=ast.Name(id=owner)) if isinstance(node.ctx, ast.Store):
                given = owner == "self"
            case ast.Name(id=name):
                given = isinstance(node.ctx, ast.Store)
            case ast.Attribute(attr=name) | ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(name), *_]):
                given = False
            case _:
                continue
        if re.match("_[^_]", name):
            yield name, given


def test_no_private_attribute_of_ray_or_tensorflow_is_used():
    ours = {name for file in FILES for name, given in private_names(file) if given}
    users = [ROOT / name for name in library_users({"ray", "tensorflow", "keras"})]
    found = {(name_of(file), name) for file in users for name, _ in private_names(file) if name not in ours}
    assert found == set()


def names(file: Path) -> Iterator[tuple[str, bool]]:
    """Yield each name that the file gives or uses, and whether it is the name of a class or an event."""
    for node in ast.walk(tree(file)):
        match node:
            case ast.ClassDef():
                yield node.name, True
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.name, False
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.alias(name=name):
                yield name, False
            case ast.keyword(arg=str(name)):
                yield name, False
                if name == "event" and isinstance(node.value, ast.Constant):
                    yield str(node.value.value), True
            case ast.Dict():
                keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
                yield from ((key, False) for key in keys if isinstance(key, str))
                for key, value in zip(keys, node.values, strict=True):
                    if key == "event" and isinstance(value, ast.Constant):
                        yield str(value.value), True
            case ast.Subscript(slice=ast.Constant(value=str(name))):  # a column, or a key of JSON
                yield name, False
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if ast.unparse(node.func).endswith("field"):
                yield name, False


def words_of(name: str) -> list[str]:
    """Return the parts of `snake_case`, `CamelCase` and `dotted.names`, in lower case."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)]


def forbidden_words(name: str, of_class_or_event: bool) -> set[str]:
    words = words_of(name)
    pairs = {f"{first}_{second}" for first, second in pairwise(words)}
    return {*words} & (WORDS | (EVENT_WORDS if of_class_or_event else set())) | pairs & PAIRS


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_name_is_a_word_that_was_given_up(file: Path):
    found = {(name, word) for name, special in names(file) for word in forbidden_words(name, special)}
    assert sorted(f"{name} ({w})" for name, w in found if (name_of(file), w) not in EXCEPTIONS) == []


def test_every_exception_is_needed():
    for file, word in EXCEPTIONS:
        assert any(word in forbidden_words(name, special) for name, special in names(ROOT / file)), (file, word)


def test_a_name_is_cut_into_its_words():
    assert words_of("EventChannel.send_all") == ["event", "channel", "send", "all"]
    assert words_of("HTTPServer2") == ["http", "server", "2"]
    assert forbidden_words("_film_ids", False) == {"film"}
    assert forbidden_words("on_by_features", False) == {"by_features"}
    assert forbidden_words("draw_transforms", False) == set()
    assert forbidden_words("left_out", False) == set()
    assert forbidden_words("WorkerLeft", True) == {"left"}


def test_every_room_is_there():
    assert {room_of(file) for file in FILES} >= {*ROOMS} - {"cli", "workflows"}
