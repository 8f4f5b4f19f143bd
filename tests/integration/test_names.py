"""Files of any name get their row: when they are prepared, in a labels file, and when they are predicted."""

import os
from pathlib import Path

import numpy as np
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fracture.cli import main
from tests.conftest import TINY, quick_bundle

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NAMES = [
    *("a b.png", " a.png ", "a\nb.png", 'q".png', "it's.png", "=1+1.png", "%20.png", "#1.png", "c:\\x.png", "-rf.png"),
    *("ö.png", "o\u0308.png", "ﬁ.png", "骨折.png", "😀.png", "\u202egnp.png", "no ending", "x" * 250),
]
LATIN = {b"R\xf6ntgen_01.png": r"R\xf6ntgen_01.png", b"\xff\xfe": r"\xff\xfe"}  # as they are shown


def write_images(folder: Path) -> set[str]:
    """Write an image of each name into both class folders; return the paths as they are shown."""
    shown = set()
    for number, name in enumerate(("fracture", "normal")):
        (folder / name).mkdir(parents=True)
        named = [(os.fsencode(one), one) for one in NAMES] + list(LATIN.items())
        for count, (raw, as_shown) in enumerate(named):
            pixels = np.random.default_rng([number, count]).integers(0, 256, (40, 36), np.uint8)
            with open(os.fsencode(folder / name) + b"/" + raw, "wb") as file:
                Image.fromarray(pixels).save(file, "png")
            shown.add(f"{name}/{as_shown}")
    return shown


def test_files_of_any_name_have_their_row(tmp_path: Path):
    shown = write_images(tmp_path / "data")
    size = ["--set", "data.image_size=32"]
    assert main(["preprocess", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "shards"), *size]) == 0
    files = pq.read_table(tmp_path / "shards/files.parquet")
    assert set(files["path"].to_pylist()) == shown
    assert files["reason"].null_count == len(shown) == 2 * (len(NAMES) + len(LATIN))

    bundle, out = quick_bundle(tmp_path / "quick", *TINY), tmp_path / "out.csv"
    assert main(["predict", "--bundle", str(bundle), "--data", str(tmp_path / "data"), "--out", str(out)]) == 0
    rows = pacsv.read_csv(out, parse_options=pacsv.ParseOptions(newlines_in_values=True)).to_pylist()
    assert {row["path"] for row in rows} == shown
    assert all(row["probability"] is not None for row in rows)


def test_a_labels_file_of_windows_names_files_of_an_old_system(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(12):
        with open(os.fsencode(folder) + f"/Röntgen_{number:02d}.png".encode("cp1252"), "wb") as file:
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 36), np.uint8)).save(file, "png")
    lines = ["Datei;Befund", *(f"Röntgen_{n:02d}.png;{('Fraktur', 'unauffällig')[n % 2]}" for n in range(12)), ";"]
    (tmp_path / "labels.csv").write_bytes("\r\n".join(lines).encode("cp1252"))
    words = ["preprocess", "--data", str(folder), "--labels", str(tmp_path / "labels.csv")]
    assert main([*words, "--out", str(tmp_path / "shards"), "--set", "data.image_size=32"]) == 0
    files = pq.read_table(tmp_path / "shards/files.parquet")
    assert files["path"].to_pylist() == [rf"R\xf6ntgen_{number:02d}.png" for number in range(12)]
    assert files["label"].to_pylist() == [1, 0] * 6
