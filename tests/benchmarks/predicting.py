"""Batch prediction against Keras alone on the same cores: of shards, and of files with their decoding.

make bench ONLY=predicting              generated films as scanners give them, 1,500 to 2,500 pixels a side
make bench ONLY=predicting DATA=DIR     also the radiographs in DIR

The default network at 224×224, its weights drawn. Ours is the job's pipeline on a Ray that has started; steady is what
it does after a quarter of the images, when all its processes have begun; whole is all of it, with their start.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fracture.config import DataConfig
from fracture.storage import place
from tests.benchmarks.measure import Part, child, ratio, spread, take_turns
from tests.benchmarks.preparation import write_large_films
from tests.conftest import quick_bundle, write_shards

ROWS, FILMS, ROUNDS = 1536, 512, 3
STEADY, WHOLE = "ours, steady", "ours, whole"
PREDICT, ONE, MANY = "model.predict(images)", "loop: open, decode, predict one", "loop: decode 32, predict them"
WANTED = {PREDICT: "1.0", ONE: "1.5", MANY: "1.5"}


def run(data: str | None) -> Part:
    lines: list[str] = []
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        bundle, shards, films = str(quick_bundle(Path(scratch))), f"{scratch}/shards", f"{scratch}/films"
        write_shards(place(shards), {"train": 1, "val": 1, "test": ROWS}, DataConfig().image_size, rows_per_shard=512)
        write_large_films(Path(films), FILMS)
        parts = {"shards": (shards, (PREDICT,)), "generated films": (films, (ONE, MANY))}
        parts |= {Path(data).name: (data, (ONE, MANY))} if data else {}
        for name, (folder, peers) in parts.items():
            figures[name] = _measured(bundle, folder, peers)
            lines += _lines(name, figures[name], peers)
    return Part(lines, figures)


def _measured(bundle: str, folder: str, peers: tuple[str, ...]) -> dict[str, list[float]]:
    whole: list[float] = []

    def ours() -> float:
        steady, all_of_it = _child("ours", bundle, folder)
        whole.append(all_of_it)
        return steady

    contestants: dict[str, Callable[[], float]] = {STEADY: ours}
    contestants |= {name: partial(_child, name, bundle, folder) for name in peers}
    return take_turns(contestants, ROUNDS) | {WHOLE: whole}


def _lines(name: str, figures: dict[str, list[float]], peers: tuple[str, ...]) -> list[str]:
    rows = [f"| {who} | {spread(values)} |" for who, values in figures.items()]
    ratios = [
        f"| {ours} / {peer} | {ratio(figures[ours], figures[peer])} | {WANTED[peer]} |"
        for ours in (STEADY, WHOLE)
        for peer in peers
    ]
    lines = [f"### {name}", "", "| who, 2 cores | images/s |", "|---|---|", *rows, ""]
    return [*lines, "| ratio | measured | wanted |", "|---|---|---|", *ratios, ""]


def _child(what: str, bundle: str, folder: str) -> Any:
    command = ["taskset", "-c", "0,1", sys.executable, "-m", "tests.benchmarks.predicting", what, bundle, folder]
    # Ray's processes are nice to others, at 15; on a machine with other work that would be measured, and not ours.
    return child(command, TF_CPP_MIN_LOG_LEVEL="3", TF_USE_LEGACY_KERAS="1", RAY_worker_niceness="0")


def ours(bundle: str, folder: str) -> tuple[float, float]:
    """Images a second: (steady, whole)."""
    from fracture.release.bundle import read_bundle
    from fracture.release.predict import find_inputs, predict
    from fracture.training.driver import start_ray

    read = read_bundle(place(bundle))
    start_ray(verbose=False)
    came: list[tuple[float, int]] = []
    started = time.monotonic()
    inputs = find_inputs([place(folder)], read.image_size)
    predict(read, inputs, lambda what, done, total: came.append((time.monotonic(), done)))
    last, total = came[-1]
    first, early = next(event for event in came if event[1] >= total / 4)
    return (total - early) / (last - first), total / (last - started)


def keras_alone(bundle: str, folder: str) -> float:
    from fracture.input.shards import images_of, read_manifest, read_rows

    model, manifest = _model(bundle), read_manifest(place(folder))
    rows = manifest.rows("test") // 2  # as steady in half the time
    images = images_of(read_rows(place(folder), manifest, "test", 0, rows), manifest.image_size)
    model.predict(images[:64], verbose=0)  # traced
    started = time.monotonic()
    model.predict(images, verbose=0)
    return rows / (time.monotonic() - started)


def loop(bundle: str, folder: str, at_once: int) -> float:
    """As a person writes it."""
    from PIL import Image

    model = _model(bundle)
    side = model.input_shape[1]
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())[: 256 if at_once > 1 else 128]
    model.predict(np.zeros((at_once, side, side, 1), np.uint8), verbose=0)  # traced
    started = time.monotonic()
    images = []
    for number, file in enumerate(files, start=1):
        try:
            with Image.open(file) as image:
                images.append(np.asarray(image.convert("L").resize((side, side), Image.Resampling.BILINEAR)))
        except OSError:  # truncated
            pass
        if images and (len(images) == at_once or number == len(files)):
            model.predict(np.stack(images)[..., None], verbose=0)
            images = []
    return len(files) / (time.monotonic() - started)


def _model(bundle: str) -> Any:
    from fracture.release.bundle import read_bundle

    return read_bundle(place(bundle)).model()


if __name__ == "__main__":
    asked = {"ours": ours, PREDICT: keras_alone, ONE: partial(loop, at_once=1), MANY: partial(loop, at_once=32)}
    os.chdir(Path(__file__).parents[2])
    print(json.dumps(asked[sys.argv[1]](*sys.argv[2:])))
