"""The search for a recipe: each trial is trained and tested on the same grouped folds of the radiographs in DATA.

  make bench ONLY=recipes DATA=DIR

A trial is a run of the job, runs/trial-NAME: one that is finished is not repeated, one that was interrupted goes on.
At 112 pixels, where an epoch takes a quarter of the time that it takes at 224. Five folds of 12 epochs take half an
hour on 2 CPU cores; the folds are part of the data settings, so every trial is tested on the same ones.
"""

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.measure import Part

COMMON = ("data.image_size=112", "training.epochs=12", "compute.workers=1", "compute.cpus_per_worker=2")
STRONG = ("augment.zoom=0.25", "augment.stretch=0.2", "augment.shift=0.1", "augment.exposure=0.3")
TURNED = ("augment.rotation_degrees=180", "augment.vertical_flip=true")
TRIALS: dict[str, tuple[str, ...]] = {
    "by-image": ("training.sampling=image",),
    "by-radiograph": (),
    "strong": STRONG,
    "strong-turned": (*STRONG, *TURNED),
}


def run(data: str | None) -> Part:
    if not data:
        return Part(["needs DATA=DIR"])
    lines = [
        "| trial | settings | AUC per radiograph, pooled | mean of folds ± deviation | AUC per image, pooled |",
        "|---|---|---|---|---|",
    ]
    figures = {}
    for name, settings in TRIALS.items():
        command = [sys.executable, "job/train.py", "--data", data, "--folds", "5", "--run", f"trial-{name}"]
        for setting in (*COMMON, *settings):
            command += ["--set", setting]
        subprocess.run(command, check=True)
        figures[name] = json.loads(Path(f"runs/trial-{name}/folds.json").read_text())
        lines.append(row(name, settings, figures[name]))
    return Part(lines, figures)


def row(name: str, settings: tuple[str, ...], folds: dict) -> str:
    by_radiograph, by_image = (folds["pooled"][unit]["figures"]["auc"] for unit in ("radiograph", "image"))
    mean, deviation = folds["mean_and_deviation"]["auc"]
    told = ", ".join(f"`{setting}`" for setting in settings) or "the default's"
    return f"| {name} | {told} | {_text(by_radiograph)} | {mean:.3f} ± {deviation:.3f} | {_text(by_image)} |"


def _text(figure: dict) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"
