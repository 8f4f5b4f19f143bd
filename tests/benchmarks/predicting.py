"""Batch prediction against Keras alone on the same cores: of shards, and of files with their decoding.

make bench ONLY=predicting              generated radiographs as scanners give them, 1,500 to 2,500 pixels a side
make bench ONLY=predicting DATA=DIR     also the radiographs in DIR

The default network at 224×224, its weights drawn. Ours is the job's pipeline on a Ray that has started: whole is all of
it, with the start of its processes; steady is from the difference of the whole and a part of it, without start and end.
So are the seconds of a core, of all processes together, which can be compared also where others use the machine.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fracture.config import DataConfig
from fracture.storage import storage_path
from tests.benchmarks.measure import Figures, Part, child, ratio, spread, take_turns
from tests.benchmarks.preparation import write_large_radiographs
from tests.conftest import quick_bundle, write_shards

ROWS, RADIOGRAPHS, PART, ROUNDS = 1024, 512, 256, 3
STEADY, WHOLE, OF_CORES = OURS = ("ours, steady", "ours, whole", "ours, for each second of a core")
PREDICT, ONE, MANY = "model.predict(images)", "loop: open, decode, predict one", "loop: decode 32, predict them"
WANTED = {PREDICT: "1.0", ONE: "1.5", MANY: "1.5"}


def run(data: str | None) -> Part:
    lines: list[str] = []
    figures: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as scratch:
        bundle, shards, radiograph_ids = str(quick_bundle(Path(scratch))), f"{scratch}/shards", f"{scratch}/radiographs"
        write_shards(
            storage_path(shards), {"train": 1, "val": 1, "test": ROWS}, DataConfig().image_size, rows_per_shard=PART
        )
        write_large_radiographs(Path(radiograph_ids), RADIOGRAPHS // 2)
        shutil.copytree(radiograph_ids, f"{radiograph_ids}/again")  # drawing one takes longer than all that is measured
        parts = {"shards": (shards, (PREDICT,)), "generated radiographs": (radiograph_ids, (ONE, MANY))}
        parts |= {Path(data).name: (data, (ONE, MANY))} if data else {}
        for name, (folder, peers) in parts.items():
            figures[name] = _measured(bundle, folder, peers)
            lines += _lines(name, figures[name], peers)
    return Part(lines, figures)


def _measured(bundle: str, folder: str, peers: tuple[str, ...]) -> Figures:
    figures: Figures = {}

    def measured(name: str) -> float:
        speed, *more = _child(name, bundle, folder)
        for what, value in zip((WHOLE, OF_CORES) if name == STEADY else (f"{name}{OF_CORES[4:]}",), more, strict=True):
            figures.setdefault(what, []).append(value)
        return speed

    return take_turns({name: partial(measured, name) for name in (STEADY, *peers)}, ROUNDS) | figures


def _lines(name: str, figures: dict[str, list[float]], peers: tuple[str, ...]) -> list[str]:
    rows = [f"| {who} | {spread(values)} |" for who, values in figures.items()]
    pairs = [(ours, peer + (OF_CORES[4:] if ours == OF_CORES else "")) for peer in peers for ours in OURS]
    wanted = [WANTED[peer] for peer in peers for _ in OURS]
    ratios = [f"| {a} / {b} | {ratio(figures[a], figures[b])} | {w} |" for (a, b), w in zip(pairs, wanted, strict=True)]
    lines = [f"### {name}", "", "| who, 2 cores | images/s |", "|---|---|", *rows, ""]
    return [*lines, "| ratio | measured | wanted |", "|---|---|---|", *ratios, ""]


def _child(what: str, bundle: str, folder: str) -> Any:
    command = ["taskset", "-c", "0,1", sys.executable, "-m", "tests.benchmarks.predicting", what, bundle, folder]
    # Ray's processes are nice to others, at 15; on a machine with other work that would be measured, and not ours.
    return child(command, TF_CPP_MIN_LOG_LEVEL="3", TF_USE_LEGACY_KERAS="1", RAY_worker_niceness="0")


def ours(bundle: str, folder: str) -> tuple[float, float, float]:
    """Images a second, steady; the same, whole; and images for each second of a core, steady."""
    from fracture.inference.bundle import read_bundle
    from fracture.inference.predict import find_inputs, predict
    from fracture.runtime.cluster import start_ray

    read = read_bundle(storage_path(bundle))
    start_ray(verbose=False)
    [whole] = find_inputs([storage_path(folder)], read.image_size)
    if whole.manifest:
        shards = {"test": whole.manifest.shards["test"]}
        whole = replace(whole, manifest=whole.manifest.model_copy(update={"shards": shards}))
        part = replace(whole, manifest=whole.manifest.model_copy(update={"shards": {"test": shards["test"][:1]}}))
    else:
        part = replace(whole, files=dict(islice(whole.files.items(), PART)))
    spans = []
    for asked in (part, whole):
        ends: list[tuple[float, float]] = []
        started, used = time.monotonic(), _cores()
        predict(read, [asked], lambda what, done, total: ends.append((time.monotonic(), _cores())))  # noqa: B023
        spans.append((len(asked), ends[-1][0] - started, ends[-1][1] - used))
    (fewer, short, little), (images, long, much) = spans
    return (images - fewer) / (long - short), images / long, (images - fewer) / (much - little)


def _cores() -> float:
    """Seconds that this process and all that it started have had of the cores."""
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def keras_alone(bundle: str, folder: str) -> tuple[float, float]:
    from fracture.dataset.format import Dataset, images_of, read_manifest

    model, manifest = _model(bundle), read_manifest(storage_path(folder))
    rows = manifest.rows("test") // 2  # as steady in half the time
    images = images_of(Dataset(storage_path(folder), manifest).read("test", 0, rows), manifest.image_size)
    model.predict(images[:64], verbose=0)  # traced
    started, used = time.monotonic(), _cores()
    model.predict(images, verbose=0)
    return rows / (time.monotonic() - started), rows / (_cores() - used)


def loop(bundle: str, folder: str, at_once: int) -> tuple[float, float]:
    """As a person writes it."""
    from PIL import Image

    model = _model(bundle)
    side = model.input_shape[1]
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())[: 128 if at_once > 1 else 64]
    model.predict(np.zeros((at_once, side, side, 1), np.uint8), verbose=0)  # traced
    started, used = time.monotonic(), _cores()
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
    return len(files) / (time.monotonic() - started), len(files) / (_cores() - used)


def _model(bundle: str) -> Any:
    from fracture.inference.bundle import read_bundle

    return read_bundle(storage_path(bundle)).model()


if __name__ == "__main__":
    asked = {STEADY: ours, PREDICT: keras_alone, ONE: partial(loop, at_once=1), MANY: partial(loop, at_once=32)}
    os.chdir(Path(__file__).parents[2])
    print(json.dumps(asked[sys.argv[1]](*sys.argv[2:])))
