"""Check the split without the code of the grouping: bytes, names, and pixels over all rotations and flips.

  make bench ONLY=leaks DATA=DIR

Brute force on purpose: every test image, in 144 poses, against every training image.
"""

import hashlib
import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from fracture.config import DataConfig
from fracture.preparation.scan import scan_source
from fracture.preparation.source import find_source
from fracture.preparation.write import write_dataset
from fracture.runtime.cluster import start_ray
from fracture.storage import storage_path
from tests.benchmarks.measure import Part

SIDE, STEP = 40, 5  # pixels; degrees
SUSPICIOUS = 0.97  # correlation above which two images are listed
_y, _x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
DISC = np.hypot(_x, _y) < SIDE / 2 - 2


def run(data: str | None) -> Part:
    if not data:
        return Part(["needs DATA=DIR"])
    root = Path(data)
    config = DataConfig(split="group")
    start_ray(verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        out = storage_path(folder) / "shards"
        write_dataset(scan_source(find_source([storage_path(root)], config), out, config), out, config)
        files = pq.read_table(f"{folder}/shards/files.parquet").to_pandas()
    ours = files[files.split_used != ""].groupby("split_used").path.apply(list)
    found = files[files.sha256.notna()].groupby("split").path.apply(list)
    lines = _check(root, ours["train"], ours["test"])
    if {"train", "test"} <= set(found.index):  # the check has to find the leaks that are known
        lines += ["", "The same check of the split as found:", "", *_check(root, found["train"], found["test"])[:4]]
    return Part(lines)


def _check(root: Path, train: list[str], test: list[str]) -> list[str]:
    hashes = [{path: hashlib.sha256((root / path).read_bytes()).digest() for path in paths} for paths in (train, test)]
    families = [{path: _find_family(path) for path in paths} for paths in (train, test)]
    known, named = set(hashes[0].values()), set(families[0].values()) - {None}
    best = _find_closest(root, test, train)
    close = sorted(((c, p, q) for p, (c, q) in best.items() if c > SUSPICIOUS), reverse=True)
    closest = sorted((c for c, _ in best.values()), reverse=True)[:3]
    lines = [
        f"{len(test)} test images against {len(train)} training images:",
        f"- the same bytes as in training: {sum(digest in known for digest in hashes[1].values())}",
        f"- named as a rotated copy of what is in training: {sum(family in named for family in families[1].values())}",
        f"- correlation above {SUSPICIOUS} in one of {2 * 360 // STEP} poses: {len(close)} (the closest: "
        f"{', '.join(f'{c:.3f}' for c in closest)})",
    ]
    return lines + [f"  - {c:.4f} {p} · {q}" for c, p, q in close]


def _find_family(path: str) -> str | None:
    """Return `CLASS/7` for `train/CLASS/7-rotated1-rotated2.jpg`."""
    match = re.search(r"([^/]+/[^/]+?)(?:-rotated\d+)+", path)
    return match.group(1) if match else None


def _find_closest(root: Path, test: list[str], train: list[str]) -> dict[str, tuple[float, str]]:
    """Return the best correlation of each test image with any training image, and that image."""
    known = np.stack([_standardise(_read_small(root / path)) for path in train])
    found = {}
    for path in test:
        small = _read_small(root / path)
        poses = [
            image.rotate(angle, Image.Resampling.BILINEAR)
            for image in (small, ImageOps.mirror(small))
            for angle in range(0, 360, STEP)
        ]
        correlations = np.abs(np.stack([_standardise(pose) for pose in poses]) @ known.T)
        at = int(correlations.max(axis=0).argmax())
        found[path] = (float(correlations[:, at].max()), train[at])
    return found


def _read_small(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)


def _standardise(image: Image.Image) -> np.ndarray:
    values = np.asarray(image, np.float32)[DISC]
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-3)
