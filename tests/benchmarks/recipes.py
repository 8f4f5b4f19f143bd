"""The search for a recipe: each trial is trained and tested on the same grouped folds of the radiographs in DATA.

  make bench ONLY=recipes DATA=DIR

A trial is a run of the job, runs/trial-NAME: one that is finished is not repeated, one that was interrupted goes on.
At 112 pixels, where an epoch takes a quarter of the time that it takes at 224. Five folds of 8 epochs take half an
hour on 2 CPU cores; the folds are part of the data settings, so every trial is tested on the same ones.

Beside the figures that the job reports, each trial is asked two more things, without training anew: what averaging
over the image and its mirror image adds, and what is left among images of one stored size, where size tells nothing.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fracture.config import Config, load_config
from fracture.dataset.format import Dataset, images_of, read_manifest
from fracture.evaluation.metrics import Metrics, average_by_radiograph, compute_metrics
from fracture.preparation.output import name_output_folder
from fracture.preparation.source import find_source
from fracture.storage import storage_path
from tests.benchmarks.measure import Part

COMMON = (
    "data.folds=5",
    "data.image_size=112",
    "training.epochs=8",
    "compute.workers=1",
    "compute.cpus_per_worker=2",
)
TRIALS: dict[str, tuple[str, ...]] = {
    "strong": (),
    "mild": ("augment.zoom=0.15", "augment.stretch=0", "augment.shift=0", "augment.exposure=0"),
    "turned": ("augment.rotation_degrees=180", "augment.vertical_flip=true"),
    "by-image": ("training.sampling=image",),
    "float32": ("training.precision=float32",),
}
HEADER = "AUC per radiograph | by folds | with mirror images | among images of one size | AUC per image"


def run(data: str | None) -> Part:
    if not data:
        return Part(["needs DATA=DIR"])
    lines = [f"| trial | settings | {HEADER} |", "|---|---|---|---|---|---|---|"]
    figures = {}
    for name, settings in TRIALS.items():
        command = [sys.executable, "job/train.py", "--data", data, "--run", f"trial-{name}"]
        for setting in (*COMMON, *settings):
            command += ["--set", setting]
        subprocess.run(command, check=True)
        found = judge(Path("runs", f"trial-{name}"), data, load_config(None, [*COMMON, *settings]))
        figures[name] = found
        changed = ", ".join(f"`{setting}`" for setting in settings) or "the default's"
        folds = found["by folds"]
        cells = [_text(found["radiograph"]), f"{np.mean(folds):.3f} ± {np.std(folds, ddof=1):.3f}"]
        cells += [_text(found[key]) for key in ("mirrored", "one size", "image")]
        lines.append(f"| {name} | {changed} | {' | '.join(cells)} |")
    return Part(lines, figures)


def judge(trial: Path, data: str, config: Config) -> dict[str, list[float]]:
    """AUC with its interval: [value, low, high]; and one AUC per radiograph for each fold."""
    shards = Path("shards", name_output_folder(find_source([storage_path(data)], config.data), config.data))
    scores = pq.read_table(trial / "predictions.parquet")
    mirrored = scores.set_column(
        scores.schema.get_field_index("probability"), "probability", pa.array(_mirrored(trial, shards, scores))
    )
    files = pq.read_table(shards / "files.parquet", columns=["path", "width", "height"]).to_pylist()
    size_of = {row["path"]: (row["width"], row["height"]) for row in files}
    sizes = [size_of[path] for path in scores["source"].to_pylist()]
    most = Counter(sizes).most_common(1)[0][0]
    folds = [scores.filter(pc.equal(scores["fold"], fold)) for fold in pc.unique(scores["fold"]).to_pylist()]
    return {
        "radiograph": _auc(scores),
        "by folds": [_auc(fold)[0] for fold in folds],
        "mirrored": _auc(mirrored),
        "one size": _auc(scores.filter(pa.array([size == most for size in sizes]))),
        "image": _auc(scores, "image"),
    }


def _auc(scores: pa.Table, unit: str = "radiograph") -> list[float]:
    labels, probabilities, radiograph_ids, groups = (
        scores[name].to_numpy() for name in ("label", "probability", "radiograph_id", "group_id")
    )
    if unit == "radiograph":
        first, [probabilities] = average_by_radiograph(labels, radiograph_ids, probabilities)
        labels, groups = labels[first], groups[first]
    found: Metrics = compute_metrics(labels, probabilities, groups, 0.5)
    figure = found.figures["auc"]
    return [figure.value, figure.low, figure.high]


def _mirrored(trial: Path, shards: Path, scores: pa.Table) -> np.ndarray:
    """[N] float32: each test image's mean logit over itself and its mirror image, as a probability."""
    import tensorflow as tf

    manifest = read_manifest(storage_path(shards))
    parts = []
    for number, title in enumerate(manifest.folds, 1):
        served = tf.saved_model.load(str(trial / f"fold-{number}/bundle/saved_model"))
        fold = manifest.fold(number)
        images = images_of(Dataset(storage_path(shards), fold).read("test", 0, fold.rows("test")), manifest.image_size)
        rows = scores.filter(pc.equal(scores["fold"], title))["row"].to_numpy()
        both = [
            np.concatenate([served.serve_uint8(view[i : i + 64]).numpy()[:, 0] for i in range(0, len(view), 64)])
            for view in (images, images[:, :, ::-1])
        ]
        logits = np.mean([np.log(p) - np.log1p(-p) for p in np.clip(both, 1e-7, 1 - 1e-7)], axis=0)
        parts.append((1 / (1 + np.exp(-logits)))[rows])
    return np.concatenate(parts).astype(np.float32)


def _text(figure: list[float]) -> str:
    value, low, high = figure
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
