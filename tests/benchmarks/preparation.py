"""Compare preprocessing and its audit with decoding and resizing alone on as many cores, and with a plain loop.

make bench ONLY=preparation              generated radiographs as scanners give them, 1,500 to 2,500 pixels a side
make bench ONLY=preparation DATA=DIR     also the radiographs in DIR
"""

import io
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from fracture.config import DataConfig
from fracture.preparation.facts import scan_bytes
from fracture.preparation.sample_dicom import Stored, encode_dicom
from fracture.preparation.source import ImageFile, find_source
from fracture.storage import storage_path
from tests.benchmarks.measure import Figures, Part, ratio, spread, take_turns

RADIOGRAPHS, SIZE, ROUNDS, CORES = 1000, 224, 3, 2
OF_EACH_FORMAT = 60
_REDUCED = {
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
}
PNG, DICOM = "PNG of 8 bits", "DICOM of 16 bits, uncompressed"
JOB, BEYOND, FLOOR, LOOP = (
    "preprocessing, audit included",
    "the same, without start and end",
    "decode and resize alone, 2 processes",
    "plain Pillow loop, 1 process",
)


def run(data: str | None) -> Part:
    lines, figures = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        large = Path(scratch, "large")
        write_large_radiographs(large)
        folders = {"generated radiographs": large} | ({Path(data).name: Path(data)} if data else {})
        for name, folder in folders.items():
            found, again = _measure(folder, Path(scratch))
            figures[name] = found | {"again, with 1 % new files, s": [again]}
            lines += _lines(name, found, again)
        files = sorted(large.rglob("*.jpg"))[:OF_EACH_FORMAT]
        figures["formats"] = take_turns({name: partial(_scan, of) for name, of in encode(files).items()}, ROUNDS)
    return Part([*lines, *_format_lines(figures["formats"])], figures)


def encode(files: list[Path]) -> dict[str, list[bytes]]:
    """Return the same radiographs as files of several formats."""
    encoded: dict[str, list[bytes]] = {name: [] for name in ("JPEG", PNG, "PNG of 16 bits", DICOM, "DICOM of 8 bits")}
    for number, file in enumerate(files):
        grey = np.asarray(Image.open(file))
        deep = grey.astype(np.uint16) << 8 | grey
        contents = [
            file.read_bytes(),
            *(cv2.imencode(".png", pixels)[1].tobytes() for pixels in (grey, deep)),
            *(encode_dicom(grey, f"p{number}", "a", 0, Stored(bits=bits)) for bits in (16, 8)),
        ]
        for name, content in zip(encoded, contents, strict=True):
            encoded[name].append(content)
    return encoded


def _scan(files: list[bytes]) -> float:
    """Decode and examine files in this process, as a worker does; return files a second."""
    cv2.setNumThreads(1)
    started = time.monotonic()
    for data in files:
        scan_bytes(ImageFile("x", 0, "", len(data), 0, is_dicom=True), data, SIZE)
    return len(files) / (time.monotonic() - started)


def _format_lines(figures: Figures) -> list[str]:
    rows = [f"| {name} | {spread(values)} |" for name, values in figures.items()]
    return [
        f"### the same {OF_EACH_FORMAT} radiographs in several formats, decoded and examined by one process",
        "",
        "| format | images/s |",
        "|---|---|",
        *rows,
        "",
        f"- {DICOM} / {PNG}: {ratio(figures[DICOM], figures[PNG])} (wanted: 0.5)",
        "",
    ]


def write_large_radiographs(folder: Path, radiographs: int = RADIOGRAPHS) -> None:
    generator = np.random.default_rng(0)
    for number in range(radiographs):
        height, width = generator.integers(1500, 2500, 2)
        coarse, fine = (
            cv2.resize(generator.normal(size=(n, n)), (int(width), int(height)), interpolation=cv2.INTER_CUBIC)
            for n in (6, 300)
        )
        radiograph = np.clip(110 + 50 * coarse + 12 * fine, 0, 255).astype(np.uint8)
        file = folder / ("fracture", "normal")[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(radiograph).save(file, quality=90)


def _measure(folder: Path, scratch: Path) -> tuple[Figures, float]:
    source = find_source([storage_path(folder)], DataConfig())
    files = [folder / file.path for file in source.files]

    def job() -> float:
        out = Path(tempfile.mkdtemp(dir=scratch), "shards")
        return len(files) / _preprocess(folder, out)

    def floor() -> float:
        # Not forked: locks that OpenCV's threads hold would stay locked in the child.
        with ProcessPoolExecutor(CORES, get_context("spawn")) as pool:
            list(pool.map(decode_fast, files[:CORES]))  # starts the processes
            started = time.monotonic()
            list(pool.map(decode_fast, files, chunksize=16))
            return len(files) / (time.monotonic() - started)

    def loop() -> float:
        started = time.monotonic()
        for file in files:
            decode_plainly(file)
        return len(files) / (time.monotonic() - started)

    tenth = Path(tempfile.mkdtemp(dir=scratch), "tenth")
    for file in files[::10]:
        (tenth / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, tenth / file.relative_to(folder))

    def beyond() -> float:
        """Measure the whole folder and a tenth of it: the difference is without start and end."""
        whole = len(files) / job()
        part = _preprocess(tenth, Path(tempfile.mkdtemp(dir=scratch), "shards"))
        return (len(files) - len(files[::10])) / (whole - part)

    found = take_turns({JOB: job, BEYOND: beyond, FLOOR: floor, LOOP: loop}, ROUNDS)
    return found, _measure_again(folder, scratch, files)


def _measure_again(folder: Path, scratch: Path, files: list[Path]) -> float:
    """Return the seconds of a second run, after one file in a hundred has been added."""
    grown = Path(tempfile.mkdtemp(dir=scratch), "grown")
    shutil.copytree(folder, grown)
    added = [grown / file.relative_to(folder) for file in files[:: max(1, len(files) // (len(files) // 100))]]
    for file in added:
        file.unlink()
    _preprocess(grown, scratch / "again")
    for file in added:
        shutil.copy2(folder / file.relative_to(grown), file)
    return _preprocess(grown, scratch / "again")


def _preprocess(folder: Path, out: Path) -> float:
    started = time.monotonic()
    command = [sys.executable, "job/preprocess.py", "--data", str(folder), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def decode_fast(file: Path) -> int:
    """Decode a JPEG with OpenCV at 1/2, 1/4 or 1/8, chosen from the size in its header."""
    cv2.setNumThreads(1)
    data = file.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            shorter = min(image.size)
    except OSError:
        return 0
    flag = next((flag for reduction, flag in _REDUCED.items() if shorter >= 2 * SIZE * reduction), cv2.IMREAD_GRAYSCALE)
    grey = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    return 0 if grey is None else int(cv2.resize(grey, (SIZE, SIZE), interpolation=cv2.INTER_AREA)[0, 0])


def decode_plainly(file: Path) -> None:
    try:
        with Image.open(file) as image:
            np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    except OSError:  # truncated
        pass


def _lines(name: str, figures: Figures, again: float) -> list[str]:
    rows = [f"| {name} | {spread(values)} |" for name, values in figures.items()]
    return [
        f"### {name}",
        "",
        "| what | images/s |",
        "|---|---|",
        *rows,
        "",
        *(
            f"- {ours} / {peer}: {ratio(figures[ours], figures[peer])} (wanted: {wanted})"
            for ours in (JOB, BEYOND)
            for peer, wanted in ((FLOOR, 0.6), (LOOP, 1.5))
        ),
        f"- again after 1 % of the files are new: {again:.1f} s",
        "",
    ]
