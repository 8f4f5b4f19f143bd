import json
from pathlib import Path

import pyarrow as pa
import pytest

from fracture.cli import main
from fracture.dataset.format import BOXES, FILES, MANIFEST
from fracture.errors import UsageError
from fracture.inference.bundle import Bundle, read_bundle
from fracture.labels import SPLITS
from fracture.storage import storage_path
from fracture.workflows.evaluate import ScoringArguments, prepare_test_data
from tests.conftest import TINY, give_space, quick_bundle, write_shards


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(storage_path(quick_bundle(tmp_path / "made", *TINY)))


def test_neither_a_run_nor_a_bundle_is_written_to(bundle: Bundle, tmp_path: Path):
    (tmp_path / "run.json").write_text("{}")
    for out in (str(tmp_path), str(bundle.folder)):
        with pytest.raises(UsageError, match=r"--out .* is a run or a bundle, whose files would be replaced. Name ano"):
            prepare_test_data(ScoringArguments(shards="shards", out=out), [bundle])


def test_a_model_counts_once(bundle: Bundle, tmp_path: Path):
    arguments = ScoringArguments(shards="shards", out=str(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"--bundle .* is named twice, and would count double. Name it once"):
        prepare_test_data(arguments, [bundle, bundle])


@pytest.mark.parametrize("command", ["evaluate", "explain"])
def test_boxes_are_compared_with_the_maps_in_the_lines_the_page_and_the_figures(
    shard_folder, bundle: Bundle, tmp_path: Path, capsys, command: str
):
    folder, manifest = shard_folder(test=24, hash_byte=1)  # the bundle's files have 0
    names = [f"{split}/{row}.png" for split in SPLITS for row in range(manifest.rows(split))]
    left = pa.array([[(0.0, 0.0, 0.5, 1.0)] if name.startswith("test/") else None for name in names], BOXES)
    table = (folder / FILES).read_parquet().append_column("path", pa.array(names)).append_column("boxes", left)
    (folder / FILES).write_parquet(table)
    (folder / MANIFEST).write_bytes(manifest.model_copy(update={"boxed": 24}).model_dump_json().encode())
    out = tmp_path / "out"
    assert main([command, "--bundle", str(bundle.folder), "--shards", str(folder), "--out", str(out)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("boxes "))
    assert "maximum of the map inside a box: model " in line
    assert " of 12, " in line, "normals have a box here too, and are not counted"
    assert "chance 0.500 [0.500, 0.500]" in line
    (page,) = out.glob("*.html")
    assert "chance: the share of the image that boxes cover" in page.read_text()
    if command == "evaluate":
        game = json.loads((out / "metrics.json").read_text())["pointing_game"]
        assert (game["radiographs"], game["pointers"]["chance"]["share"]["value"]) == (12, 0.5)


@pytest.mark.parametrize("given", [{}, {"data": ("a",), "shards": "b"}])
def test_either_radiographs_or_shards_are_scored(given: dict):
    with pytest.raises(UsageError, match="give either --data or --shards"):
        ScoringArguments(out="out", **given)


def test_radiographs_without_labels_are_for_predict(bundle: Bundle, image_folder, tmp_path: Path):
    out = str(tmp_path / "out")
    with pytest.raises(UsageError, match=r"If there are no labels, fracture predict says how many images are unlike"):
        prepare_test_data(ScoringArguments(data=(str(image_folder("1.png", "2.png")),), out=out), [bundle])
    with pytest.raises(UsageError, match=r"no such folder") as found:
        prepare_test_data(ScoringArguments(data=(str(tmp_path / "gone"),), out=out), [bundle])
    assert "labels" not in str(found.value)


def test_images_that_are_unlike_as_a_whole_are_in_doubt_on_screen_page_and_in_the_file(tmp_path: Path, capsys):
    folder = quick_bundle(tmp_path / "made", *TINY)
    give_space(folder)
    write_shards(storage_path(tmp_path / "others"), {"test": 70}, hash_byte=7)
    flags = ["--shards", str(tmp_path / "others"), "--out", str(tmp_path / "out")]
    assert main(["evaluate", "--bundle", str(folder), *flags]) == 0
    figures = json.loads((tmp_path / "out/metrics.json").read_text())
    for unit in ("image", "radiograph"):
        assert figures["test"][unit]["outcomes"]["doubt"] == 1
    assert figures["verdict"]["answer"] == "adjust"
    whole = "100% lie farther from the training images than half of those do: as a whole they are unlike them"
    assert figures["verdict"]["reasons"][-1].startswith(whole)
    assert "outcome    all in doubt: as a whole the images are unlike the training images" in capsys.readouterr().out
    assert "<b>All are in doubt</b>" in (tmp_path / "out/report.html").read_text()


def test_an_evaluation_ends_with_a_verdict_on_screen_page_and_file(tmp_path: Path, capsys):
    """A network of random weights ranks bright images above dark ones, and calls none a fracture."""
    folder = quick_bundle(tmp_path / "made", *TINY)
    others = storage_path(tmp_path / "others")
    write_shards(others, {"test": 70}, hash_byte=7)
    card = storage_path(folder) / "bundle.json"
    card.write_json(card.read_json() | {"properties": {"size": [100, 200, 300]}})
    files = pa.table({"path": [f"test/{n}.png" for n in range(70)], "width": [30] * 70, "height": [30] * 70})
    known = (others / "files.parquet").read_parquet()
    for name in files.column_names:
        known = known.append_column(name, files[name].cast(pa.string() if name == "path" else pa.int32()))
    (others / "files.parquet").write_parquet(known)
    assert main(["evaluate", "--bundle", str(folder), "--shards", str(others), "--out", str(tmp_path / "out")]) == 0
    verdict = json.loads((tmp_path / "out/metrics.json").read_text())["verdict"]
    assert verdict["answer"] == "adjust"
    assert verdict["reasons"][-1] == "size: the median is 900 here, above 5 to 95% of the training images, 100 to 300"
    lines = capsys.readouterr().out.splitlines()
    assert "outcome    fracture or none: a model of an earlier version has no second threshold" in lines
    assert not any("in doubt" in line for line in lines)
    assert lines[-2 - len(verdict["reasons"])] == f"verdict    {verdict['sentence']}"
    assert lines[-2].strip() == verdict["reasons"][-1]
    page = (tmp_path / "out/report.html").read_text()
    assert "<b>Verdict: usable on these radiographs after adjusting: fracture adapt" in page
    assert f"<li>{verdict['reasons'][0]}</li>" in page
