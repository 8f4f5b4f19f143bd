"""A check of the split that shares no code with the grouping: bytes, names, and pixels over all rotations and flips.

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
from fracture.preparation.preprocess import examine_source, preprocess
from fracture.preparation.source import find_source
from fracture.storage import place
from fracture.training.driver import start_ray

SIDE, STEP = 40, 5  # pixels; degrees
SUSPICIOUS = 0.97  # correlation above which two images are looked at
_y, _x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
DISC = np.hypot(_x, _y) < SIDE / 2 - 2


def run(data: str | None) -> list[str]:
    """Lines of a Markdown report."""
    if not data:
        return ["needs DATA=DIR"]
    root = Path(data)
    config = DataConfig(split="group")
    start_ray(verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        out = place(folder) / "shards"
        preprocess(examine_source(find_source([place(root)], config), config), out, config)
        files = pq.read_table(f"{folder}/shards/files.parquet").to_pandas()
    used = files[files.split_used != ""]
    train, test = (used[used.split_used == split].path.tolist() for split in ("train", "test"))
    hashes = {
        split: {hashlib.sha256((root / p).read_bytes()).digest() for p in paths}
        for split, paths in (("train", train), ("test", test))
    }
    names = {split: {_family(p) for p in paths} for split, paths in (("train", train), ("test", test))}
    best = _closest(root, test, train)
    close = sorted(((c, p, q) for p, (c, q) in best.items() if c > SUSPICIOUS), reverse=True)
    lines = [
        f"{len(test)} test images against {len(train)} training images:",
        f"- the same bytes: {len(hashes['train'] & hashes['test'])}",
        f"- rotated copies by name, of one class: {sorted(names['train'] & names['test'] - {None}) or 'none'}",
        f"- correlation above {SUSPICIOUS} over {360 // STEP} rotations and flips: {len(close)}",
    ]
    return lines + [f"  - {c:.4f} {p} · {q}" for c, p, q in close]


def _family(path: str) -> str | None:
    """`CLASS/7` for `train/CLASS/7-rotated1-rotated2.jpg`."""
    match = re.search(r"([^/]+/[^/]+?)(?:-rotated\d+)+", path)
    return match.group(1) if match else None


def _closest(root: Path, test: list[str], train: list[str]) -> dict[str, tuple[float, str]]:
    """The best correlation of each test image with any training image, and which."""
    known = np.stack([_standardised(_small(root / path)) for path in train])
    found = {}
    for path in test:
        small = _small(root / path)
        poses = [
            image.rotate(angle, Image.Resampling.BILINEAR)
            for image in (small, ImageOps.mirror(small))
            for angle in range(0, 360, STEP)
        ]
        correlations = np.abs(np.stack([_standardised(pose) for pose in poses]) @ known.T)
        at = int(correlations.max(axis=0).argmax())
        found[path] = (float(correlations[:, at].max()), train[at])
    return found


def _small(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)


def _standardised(image: Image.Image) -> np.ndarray:
    values = np.asarray(image, np.float32)[DISC]
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-3)
