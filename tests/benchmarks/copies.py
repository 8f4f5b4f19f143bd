"""Measure how many planted copies are found, and what finding them costs.

make bench ONLY=copies                       planted copies of sample radiographs; 10,000 and 100,000 files
make bench ONLY=copies DATA=DIR              also planted copies of the radiographs in DIR
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from fracture.config import DataConfig, SampleConfig
from fracture.preparation.decoding.decode import Rejected, decode
from fracture.preparation.duplicates.alignment import compare_pairs
from fracture.preparation.duplicates.grouping import COPY_KINDS, find_links, number_groups, stack_views
from fracture.preparation.facts import FACTS, scan_bytes
from fracture.preparation.sample import draw_sample
from fracture.preparation.scan import scan_source
from fracture.preparation.source import ImageFile, find_source
from fracture.runtime.cluster import start_ray
from fracture.storage import storage_path
from tests.benchmarks.measure import Part
from tests.preparation.planted import EDITS, encoded

SIZE = 224
RADIOGRAPHS = 200


def run(data: str | None) -> Part:
    lines = ["### Planted copies", ""]
    radiographs = [
        decode(content, SIZE).pixels
        for path, content in draw_sample(SampleConfig(images=3 * RADIOGRAPHS))
        if "view1" in path
    ]
    lines += planted(radiographs, f"{RADIOGRAPHS} sample radiographs")
    if data:
        start_ray(verbose=False)
        lines += planted(real_radiographs(Path(data)), f"radiographs of {Path(data).name}")
    lines += [
        "",
        "### Cost",
        "",
        "| files | scan, ms a file | copies and groups, ms a file | peak memory, kB a file |",
        "|---|---|---|---|",
    ]
    for files in (10_000, 100_000):
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.copies", str(files)], capture_output=True, text=True, check=True
        )
        lines.append(done.stdout.strip())
    return Part(lines)


def planted(radiographs: list[np.ndarray], of_what: str) -> list[str]:
    """Count the planted copies that are found, one edit of every third kind for each radiograph, and wrong links."""
    generator = np.random.default_rng(0)
    rows, original, kinds = [], [], []
    for number, radiograph in enumerate(radiographs):
        edits = [(kind, edit) for i, (kind, edit) in enumerate(EDITS.items()) if i % 3 == number % 3]
        for kind, image in [("", radiograph), *((kind, edit(radiograph, generator)) for kind, edit in edits)]:
            data = encoded(image)
            rows.append(scan_bytes(ImageFile(f"{len(rows)}.png", 0, "", len(data), 0), data, SIZE)[0])
            original.append(number)
            kinds.append(kind)
    facts = pa.Table.from_pylist(rows, schema=FACTS)
    views = stack_views(facts)
    links = find_links(facts, DataConfig(), lambda pairs: compare_pairs(views, pairs))
    original_of, kind_of = np.array(original), np.array(kinds)
    groups = number_groups(len(facts), links, COPY_KINDS)
    radiograph_group = {number: group for number, group, kind in zip(original, groups, kinds, strict=True) if not kind}
    found = np.array([group == radiograph_group[number] for group, number in zip(groups, original, strict=True)])
    first, second = links["first"].to_numpy(), links["second"].to_numpy()
    wrong = int((original_of[first] != original_of[second]).sum())
    lines = [f"| {of_what} | found |", "|---|---|"]
    lines += [f"| {kind} | {found[kind_of == kind].sum()} of {(kind_of == kind).sum()} |" for kind in EDITS]
    return [*lines, f"| links between different radiographs | {wrong} of {len(links)} |", ""]


def real_radiographs(folder: Path) -> list[np.ndarray]:
    """Return one image of each radiograph, as our own grouping has them."""
    source = find_source([storage_path(folder)], DataConfig())
    with tempfile.TemporaryDirectory() as out:
        scanned = scan_source(source, storage_path(out) / "audit", DataConfig())
    groups = number_groups(len(scanned.facts), scanned.links, COPY_KINDS)
    readable = scanned.facts["sha256"].is_valid().to_numpy()
    first = sorted(np.unique(groups[readable], return_index=True)[1].tolist())
    paths = np.array(scanned.facts["path"].to_pylist())[readable][first]
    radiographs = []
    for path in paths:
        try:
            radiographs.append(decode((folder / path).read_bytes(), SIZE).pixels)
        except Rejected:
            continue
    return radiographs


def write_radiographs(folder: Path, files: int) -> None:
    """Write random textures; one file in ten is a rotated copy of the one before."""
    generator = np.random.default_rng(0)
    for label in ("fracture", "normal"):
        (folder / label).mkdir()
    radiograph = np.zeros((160, 160), np.uint8)
    for number in range(files):
        if number % 10 == 9:
            matrix = cv2.getRotationMatrix2D((79.5, 79.5), generator.uniform(0, 360), 1)
            radiograph = cv2.warpAffine(radiograph, matrix, (160, 160))
        else:
            coarse, fine = (
                cv2.resize(generator.normal(size=(n, n)), (160, 160), interpolation=cv2.INTER_CUBIC) for n in (6, 40)
            )
            radiograph = np.clip(110 + 50 * coarse + 18 * fine, 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / ("fracture", "normal")[number // 10 % 2] / f"{number}.jpg"), radiograph)


def cost(files: int) -> str:
    with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryDirectory() as out:
        write_radiographs(Path(temporary), files)
        start_ray(verbose=False)
        started = time.monotonic()
        marks: dict[str, float] = {}
        scanned = scan_source(
            find_source([storage_path(temporary)], DataConfig()),
            storage_path(out) / "audit",
            DataConfig(),
            lambda step, *_: marks.update({step: time.monotonic()}),
        )
        ended = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    copies = scanned.audit.copies["copy"]
    assert copies == files // 10, f"{copies} links for {files // 10} copies"
    scanning, joining = marks["scan"] - started, ended - marks["scan"]
    return f"| {files:,} | {1e3 * scanning / files:.1f} | {1e3 * joining / files:.1f} | {peak / files:.1f} |"


if __name__ == "__main__":
    print(cost(int(sys.argv[1])))
