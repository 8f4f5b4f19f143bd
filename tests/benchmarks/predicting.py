"""Benchmark of batch prediction against Keras alone on the same cores, for shards and for files.

make bench ONLY=predicting              generated radiographs of a scanner's size, 1,500 to 2,500 pixels a side
make bench ONLY=predicting DATA=DIR     also the radiographs in DIR

The network is the default one at 224×224 with random weights. Ours is the pipeline of the job, on a Ray that is already
running. "Whole" includes the start of its processes. "Steady" is the difference of two runs of different length, which
excludes start and end.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fracture.config import DataConfig
from fracture.dataset.format import Dataset, Shard, images_of, read_dataset
from fracture.storage import storage_path
from tests.benchmarks.measure import Figures, Part, child, ratio, spread, take_turns
from tests.benchmarks.preparation import write_large_radiographs
from tests.conftest import quick_bundle, write_shards

ROWS, RADIOGRAPHS, PART, ROUNDS = 1024, 512, 256, 3
STEADY, WHOLE = OURS = ("ours, steady", "ours, whole")
PREDICT, ONE, MANY = "model.predict(images)", "loop: open, decode, predict one", "loop: decode 32, predict them"
WANTED = {PREDICT: "1.0", ONE: "1.5", MANY: "1.5"}


def run(data: str | None) -> Part:
    lines: list[str] = []
    figures: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as scratch:
        bundle, shards, radiographs = str(quick_bundle(Path(scratch))), f"{scratch}/shards", f"{scratch}/radiographs"
        write_shards(
            storage_path(shards), {"train": 1, "val": 1, "test": ROWS}, DataConfig().image_size, rows_per_shard=PART
        )
        write_large_radiographs(Path(radiographs), RADIOGRAPHS // 2)
        shutil.copytree(radiographs, f"{radiographs}/again")  # generating them takes longer than the measurement
        parts = {"shards": (shards, (PREDICT,)), "generated radiographs": (radiographs, (ONE, MANY))}
        parts |= {Path(data).name: (data, (ONE, MANY))} if data else {}
        for name, (folder, peers) in parts.items():
            figures[name] = _measure(bundle, folder, peers)
            lines += _lines(name, figures[name], peers)
    return Part(lines, figures)


def _measure(bundle: str, folder: str, peers: tuple[str, ...]) -> Figures:
    whole: list[float] = []

    def measure_ours() -> float:
        steady, of_all = _child(STEADY, bundle, folder)
        whole.append(of_all)
        return steady

    contestants = {STEADY: measure_ours} | {peer: partial(_child, peer, bundle, folder) for peer in peers}
    return take_turns(contestants, ROUNDS) | {WHOLE: whole}


def _lines(name: str, figures: dict[str, list[float]], peers: tuple[str, ...]) -> list[str]:
    rows = [f"| {who} | {spread(values)} |" for who, values in figures.items()]
    pairs = [(ours, peer) for peer in peers for ours in OURS]
    ratios = [f"| {a} / {b} | {ratio(figures[a], figures[b])} | {WANTED[b]} |" for a, b in pairs]
    lines = [f"### {name}", "", "| who, 2 cores | images/s |", "|---|---|", *rows, ""]
    return [*lines, "| ratio | measured | wanted |", "|---|---|---|", *ratios, ""]


def _child(what: str, bundle: str, folder: str) -> Any:
    command = ["taskset", "-c", "0,1", sys.executable, "-m", "tests.benchmarks.predicting", what, bundle, folder]
    # Ray starts its processes with niceness 15; on a machine with other work that would slow them down.
    return child(command, TF_CPP_MIN_LOG_LEVEL="3", RAY_worker_niceness="0")


def ours(bundle: str, folder: str) -> tuple[float, float]:
    """Return images per second, steady and whole."""
    from fracture.inference.batch_prediction import find_inputs, predict
    from fracture.inference.bundle import read_bundle
    from fracture.runtime.cluster import start_ray

    read = read_bundle(storage_path(bundle))
    start_ray(verbose=False)
    [whole] = find_inputs([storage_path(folder)], read.image_size)
    if whole.dataset:
        shards = whole.dataset.manifest.shards["test"]
        whole, part = (replace(whole, dataset=_select_shards(whole.dataset, some)) for some in (shards, shards[:1]))
    else:
        part = replace(whole, files=dict(islice(whole.files.items(), PART)))
    spans = []
    for each in (part, whole):
        ends: list[float] = []
        started = time.monotonic()
        predict(read, [each], lambda name, done, total: ends.append(time.monotonic()))  # noqa: B023
        spans.append((len(each), ends[-1] - started))
    (fewer, short), (images, long) = spans
    return (images - fewer) / (long - short), images / long


def _select_shards(dataset: Dataset, shards: list[Shard]) -> Dataset:
    return replace(dataset, manifest=dataset.manifest.model_copy(update={"shards": {"test": shards}}))


def keras_alone(bundle: str, folder: str) -> float:
    model, dataset = _load_model(bundle), read_dataset(storage_path(folder))
    rows = dataset.rows("test") // 2  # half the rows give the same speed
    images = images_of(dataset.read("test", 0, rows), dataset.image_size)
    model.predict(images[:64], verbose=0)  # traces the model
    started = time.monotonic()
    model.predict(images, verbose=0)
    return rows / (time.monotonic() - started)


def loop(bundle: str, folder: str, batch_size: int) -> float:
    """Predict with the loop that a person would write without this project."""
    from PIL import Image

    model = _load_model(bundle)
    side = model.input_shape[1]
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())[: 128 if batch_size > 1 else 64]
    model.predict(np.zeros((batch_size, side, side, 1), np.uint8), verbose=0)  # traces the model
    started = time.monotonic()
    images = []
    for number, file in enumerate(files, start=1):
        try:
            with Image.open(file) as image:
                images.append(np.asarray(image.convert("L").resize((side, side), Image.Resampling.BILINEAR)))
        except OSError:  # truncated
            pass
        if images and (len(images) == batch_size or number == len(files)):
            model.predict(np.stack(images)[..., None], verbose=0)
            images = []
    return len(files) / (time.monotonic() - started)


def _load_model(bundle: str) -> Any:
    from fracture.inference.bundle import read_bundle

    return read_bundle(storage_path(bundle)).build_model()


if __name__ == "__main__":
    measurements = {
        STEADY: ours,
        PREDICT: keras_alone,
        ONE: partial(loop, batch_size=1),
        MANY: partial(loop, batch_size=32),
    }
    os.chdir(Path(__file__).parents[2])
    print(json.dumps(measurements[sys.argv[1]](*sys.argv[2:])))
