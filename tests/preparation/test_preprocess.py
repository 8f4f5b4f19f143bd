import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from fracture.config import DataConfig
from fracture.dataset.format import FILES, MANIFEST, Dataset, Manifest, images_of, read_dataset
from fracture.errors import RunError, UsageError
from fracture.preparation.audit import format_audit
from fracture.preparation.decoding.decode import decode
from fracture.preparation.output import (
    find_finished,
    list_changed_settings,
    name_output_folder,
    read_audit,
    write_audit,
)
from fracture.preparation.scan import scan_source
from fracture.preparation.source import Source, find_source
from fracture.preparation.write import summarize_split, write_dataset
from fracture.storage import storage_path
from tests.conftest import official_paths, small_disk
from tests.preparation.planted import encoded

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
CONFIG = DataConfig(image_size=32, rows_per_shard=3)


def run(folder: Path, out: Path, config: DataConfig = CONFIG, **kwargs) -> Manifest:
    source = source_of(folder, config)
    scanned = scan_source(source, storage_path(out), config, keep_pixels=True)
    return write_dataset(scanned, storage_path(out), config, **kwargs)


def source_of(folder: Path, config: DataConfig = CONFIG) -> Source:
    return find_source([storage_path(folder)], config)


def content(folder: Path) -> dict[str, bytes]:
    """Return the files that do not depend on the path of the data or on earlier scans."""
    others = ("input.json", "audit.html", "scanned.parquet", "compared.parquet", "ledger.parquet")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in others}


def test_every_image_is_in_a_shard_with_its_pixels_label_and_source(image_folder, tmp_path):
    folder = image_folder(*official_paths(4))
    steps: list[tuple[str, int, int]] = []
    manifest = run(folder, tmp_path / "out", progress=lambda *event: steps.append(event))
    assert steps[-1] == ("write", 24, 24)
    assert manifest.split == "official"
    assert manifest.counts == {s: {"normal": 4, "fracture": 4} for s in ("train", "val", "test")}
    assert [len(manifest.shards[s]) for s in ("train", "val", "test")] == [3, 3, 3]
    table = Dataset(storage_path(tmp_path / "out"), manifest).read("train", 0, 8)
    for row, pixels in zip(table.to_pylist(), images_of(table, 32), strict=True):
        assert np.array_equal(pixels[..., 0], decode((folder / row["source"]).read_bytes(), 32).pixels)
        assert row["label"] == (1 if "/fractured/" in row["source"] else 0)
    all_pixels = images_of(table, 32).astype(float)
    assert manifest.pixel_mean == pytest.approx(all_pixels.mean())
    assert manifest.pixel_std == pytest.approx(all_pixels.std())


def test_boxes_of_yolo_and_of_coco_arrive_in_the_table_of_files(image_folder, tmp_path):
    """Two folders of one set each, boxes in either; images are 36 pixels wide and 40 high."""
    names = [f"images/{name}{i}.png" for name in "fn" for i in range(6)]
    yolo, coco = (image_folder(*names, root=root) for root in ("yolo", "coco"))
    (yolo / "labels").mkdir()
    for name in names:
        text = "0 0.5 0.5 0.5 0.25\n" if "/f" in name else ""
        (yolo / name.replace("images", "labels").replace("png", "txt")).write_text(text)
    (yolo / "data.yaml").write_text("names: [fracture]")
    listed = [{"id": i, "file_name": name, "width": 36, "height": 40} for i, name in enumerate(names)]
    boxes = [{"image_id": i, "category_id": 1, "bbox": [9, 10, 9, 20]} for i in range(6)]
    content = {"images": listed, "annotations": boxes, "categories": [{"id": 1, "name": "fracture"}]}
    (coco / "coco.json").write_text(json.dumps(content))
    for folder, box in ((yolo, [0.25, 0.375, 0.75, 0.625]), (coco, [0.25, 0.25, 0.5, 0.75])):
        out = tmp_path / f"{folder.name}-out"
        assert run(folder, out).boxed == 6
        found = read_dataset(storage_path(out)).read_boxes()
        assert {path: boxes.tolist() for path, boxes in found.items()} == {name: [box] for name in names[:6]}


def test_the_same_input_gives_the_same_bytes_anywhere(image_folder, tmp_path):
    folder = image_folder(*official_paths(4))
    run(folder, tmp_path / "a")
    shutil.copytree(folder, tmp_path / "elsewhere")
    run(tmp_path / "elsewhere", tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_rows_are_shuffled_by_the_seed(image_folder, tmp_path):
    folder = image_folder(*official_paths(8))
    orders = []
    for seed in (0, 1):
        manifest = run(folder, tmp_path / str(seed), DataConfig(image_size=32, seed=seed))
        orders.append(Dataset(storage_path(tmp_path / str(seed)), manifest).read("train", 0, 16)["source"].to_pylist())
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) != orders[0]


def test_a_finished_dataset_is_found_until_input_or_settings_change(image_folder, tmp_path):
    folder, out = image_folder(*official_paths(4)), storage_path(tmp_path / "out")
    manifest = run(folder, tmp_path / "out")
    assert find_finished(source_of(folder), out, CONFIG) == manifest
    other = DataConfig(image_size=48)
    assert find_finished(source_of(folder, other), out, other) is None
    (folder / "train/fractured/new.png").write_bytes((folder / "train/fractured/0.png").read_bytes())
    assert find_finished(source_of(folder), out, CONFIG) is None
    renewed = run(folder, tmp_path / "out")
    assert renewed.counts["train"]["fracture"] == 5
    assert renewed.fingerprint != manifest.fingerprint
    named = {s.file for shards in renewed.shards.values() for s in shards}
    assert {p.name for p in (tmp_path / "out").glob("*-*.parquet")} == named, "the old shards are gone"


def test_an_interrupted_run_leaves_the_earlier_dataset(image_folder, tmp_path):
    folder, out = image_folder(*official_paths(4)), tmp_path / "out"
    before = run(folder, out)
    (folder / "train/fractured/new.png").write_bytes((folder / "train/fractured/0.png").read_bytes())

    class Killed(Exception):
        pass

    def die(step: str, done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(folder, out, progress=die)
    assert read_dataset(storage_path(out)).manifest == before
    assert Dataset(storage_path(out), before).read("train", 0, 8).num_rows == 8


def test_a_kill_between_the_table_of_files_and_the_manifest_is_noticed_and_mended(image_folder, tmp_path):
    folder, out = image_folder(*official_paths(4)), tmp_path / "out"
    before = run(folder, out)
    assert Dataset(storage_path(out), before).find_files().name == FILES
    (folder / "train/fractured/new.png").write_bytes((folder / "train/fractured/0.png").read_bytes())
    run(folder, tmp_path / "grown")
    shutil.copy(tmp_path / "grown" / FILES, out / FILES)
    with pytest.raises(UsageError, match=r"files.parquet is not the one that dataset.json describes"):
        read_dataset(storage_path(out)).find_files()
    (folder / "train/fractured/new.png").unlink()
    assert find_finished(source_of(folder), storage_path(out), CONFIG) is None
    assert run(folder, out) == before
    assert Dataset(storage_path(out), before).find_files().name == FILES


def test_without_a_manifest_there_is_no_dataset(image_folder, tmp_path):
    run(image_folder(*official_paths(2)), tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(UsageError, match="holds no shards"):
        read_dataset(storage_path(tmp_path / "out"))
    assert run(image_folder(*official_paths(2)), tmp_path / "out").rows("train") == 4


def test_shards_whose_record_of_their_input_is_damaged_are_written_again(image_folder, tmp_path):
    folder, out = image_folder(*official_paths(2)), tmp_path / "out"
    manifest = run(folder, out)
    for text in ("[]", "{"):
        (out / "input.json").write_text(text)
        assert find_finished(source_of(folder), storage_path(out), CONFIG) is None
        assert run(folder, out) == manifest


def test_unreadable_files_are_listed_with_reason_and_never_touched(image_folder, tmp_path):
    folder = image_folder(*official_paths(20))
    (folder / "train/fractured/0.png").write_bytes(b"")
    (folder / "val/not fractured/1.png").write_bytes(b"hello")
    before = {p: p.read_bytes() for p in folder.rglob("*.png")}
    manifest = run(folder, tmp_path / "out")
    assert [(r.path, r.split, r.reason) for r in manifest.rejected] == [
        ("train/fractured/0.png", "train", "empty file"),
        ("val/not fractured/1.png", "val", "not an image"),
    ]
    assert (manifest.rows("train"), manifest.rows("val")) == (39, 39)
    audit = read_audit(storage_path(tmp_path / "out"))
    assert "rejected   2 files (1.67%): 1 empty file, 1 not an image; paths in audit.json" in format_audit(audit)
    assert {p: p.read_bytes() for p in folder.rglob("*.png")} == before


def test_too_many_unreadable_files_stop_the_job(image_folder, tmp_path):
    folder = image_folder(*official_paths(2))
    (folder / "train/fractured/0.png").write_bytes(b"")
    with pytest.raises(
        UsageError, match=r"1 of 12 files \(8.3%\) are unreadable \(1 empty file; first: train/.*max_rejected_fraction"
    ):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_class_with_no_readable_image(image_folder, tmp_path):
    folder = image_folder(*official_paths(20), root="lost")
    for file in (folder / "test/fractured").iterdir():
        file.write_bytes(b"")
    config = DataConfig(image_size=32, max_rejected_fraction=0.5, split="official")
    with pytest.raises(UsageError, match="no readable image of class 'fracture' in split 'test'"):
        run(folder, tmp_path / "out", config)


def leaky(image_folder) -> Path:
    """Make a folder of 6 images a split and class; 3 of test and 1 of val are copies of train's first."""
    folder = image_folder(*official_paths(6))
    for copy in ("test/fractured/0.png", "test/fractured/1.png", "test/fractured/2.png", "val/fractured/0.png"):
        (folder / copy).write_bytes((folder / "train/fractured/0.png").read_bytes())
    return folder


def test_a_leaky_split_is_kept_only_if_it_is_set_and_is_an_alarm(image_folder, tmp_path):
    config = DataConfig(image_size=32, split="official")
    manifest = run(leaky(image_folder), tmp_path / "out", config)
    assert (manifest.split, manifest.split_reason) == ("official", "as found: data.split = official")
    assert {s: leak.by_kind["bytes"] for s, leak in manifest.leakage.items()} == {"val": 1, "test": 3}
    assert manifest.counts["test"] == {"normal": 6, "fracture": 6}
    assert manifest.alarms[0] == (
        "3 of 12 test images show a radiograph or patient that training has too (3 are byte-for-byte copies): in the "
        "split as found, figures measure memory."
    )


def test_a_leaky_split_is_replaced_by_one_of_whole_groups(image_folder, tmp_path):
    manifest = run(leaky(image_folder), tmp_path / "out")
    assert manifest.split == "group"
    assert manifest.split_reason == (
        "ours, whole groups: 4 validation and test images of the split found leak from training"
    )
    assert {s: leak.leaking for s, leak in manifest.leakage.items()} == {"val": 0, "test": 0}
    assert {s: leak.leaking for s, leak in manifest.leakage_found.items()} == {"val": 1, "test": 3}
    assert manifest.left_out == {
        "a copy of the same pixels is kept": 4,
        "the radiograph has both labels": 0,
    }
    files = pq.read_table(tmp_path / "out/files.parquet").to_pandas()
    used = files[files.split_used != ""]
    assert (used.groupby("group_id").split_used.nunique() == 1).all()
    assert len(used) == 32
    assert summarize_split(manifest)[1].startswith(
        "  train    22 images: 10 fracture of 10 groups, 12 normal of 12 groups"
    )


def test_a_radiograph_under_both_labels_is_left_out_and_is_an_alarm(image_folder, tmp_path):
    folder = image_folder(*official_paths(6))
    (folder / "train/not fractured/0.png").write_bytes((folder / "train/fractured/0.png").read_bytes())
    manifest = run(folder, tmp_path / "out", DataConfig(image_size=32, split="group"))
    assert manifest.left_out["the radiograph has both labels"] == 2
    assert manifest.alarms == [
        "Radiographs under both labels: 1, for example 'train/fractured/0.png' and 'train/not fractured/0.png'."
    ]


def test_images_added_later_move_no_group(image_folder, tmp_path):
    names = [f"{c}/{i}.png" for c in ("fracture", "normal") for i in range(12)]
    folder = image_folder(*names)
    run(folder, tmp_path / "out")
    before = splits_of(tmp_path / "out")
    image_folder(*names, *[f"{c}/more{i}.png" for c in ("fracture", "normal") for i in range(9)])
    run(folder, tmp_path / "out")
    after = splits_of(tmp_path / "out")
    assert len(after) == 42
    assert {path: after[path] for path in before} == before


def grown(image_folder, out: Path) -> tuple[Path, str, str, DataConfig]:
    """Prepare a folder, then add an image: of the patient of a test image, with the bytes of a validation image.

    Returns:
        The folder, the paths of the two images, and the configuration.
    """
    config = DataConfig(image_size=32, group_pattern=r"/[fn]\d+")
    folder = image_folder(*[f"{c}/{c[0]}{i}-0.png" for c in ("fracture", "normal") for i in range(12)])
    run(folder, out, config)
    before = splits_of(out)
    test, val = (next(p for p, s in before.items() if s == split and "/f" in p) for split in ("test", "val"))
    patient = test.split("/")[1].split("-")[0]
    (folder / f"fracture/{patient}-1.png").write_bytes((folder / val).read_bytes())
    return folder, test, val, config


def test_a_test_group_that_new_images_join_to_another_split_is_retired(image_folder, tmp_path):
    folder, test, val, config = grown(image_folder, tmp_path / "out")
    before = splits_of(tmp_path / "out")
    manifest = run(folder, tmp_path / "out", config)
    after = splits_of(tmp_path / "out")
    assert after == {path: split for path, split in before.items() if path not in (test, val)} | {
        test: "retired",
        next(path for path in (val, test.replace("-0", "-1")) if path in after): "val",  # the same bytes, kept once
    }
    assert manifest.left_out["it was test, and now belongs to a group that is not"] == 1
    assert len(manifest.moved) == 1
    assert manifest.moved[0].endswith(": test, val")
    assert sum(manifest.counts["test"].values()) == list(before.values()).count("test") - 1


def test_the_split_of_another_dataset_may_be_kept(image_folder, tmp_path):
    """The split of the champion is kept, whatever was prepared since."""
    folder, test, _, config = grown(image_folder, tmp_path / "champion")
    champion = splits_of(tmp_path / "champion")
    out, there = tmp_path / "out", storage_path(tmp_path / "champion")
    with pytest.raises(
        UsageError, match=r"data.seed = 1 would make another split, .* trained with 0: .*Keep 0, or begin"
    ):
        run(folder, out, config.model_copy(update={"seed": 1}), before=there)
    run(folder, out, config.model_copy(update={"seed": 1}))
    assert {path: split for path, split in splits_of(out).items() if path in champion} != champion
    run(folder, out, config, before=there)
    after = splits_of(out)
    assert after[test] == "retired"
    assert {p: after[p] for p in champion if champion[p] == "train"} == {
        p: split for p, split in champion.items() if split == "train"
    }
    assert find_finished(source_of(folder, config), storage_path(out), config, there) is not None
    assert find_finished(source_of(folder, config), storage_path(out), config) is None


def test_retired_files_and_their_copies_train_nothing_in_later_weeks(image_folder, tmp_path):
    """Not even a copy that was in no split because of its pixels, or one re-encoded after all others were removed."""
    folder, test, _, config = grown(image_folder, tmp_path / "week0")
    copy = folder / "fracture/copy.png"
    (folder / "fracture/other.png").write_bytes((folder / test).read_bytes())
    for week in range(1, 5):
        if week == 3:
            pixels = cv2.imread(str(folder / test), cv2.IMREAD_UNCHANGED)
            (folder / test).unlink()
            (folder / "fracture/other.png").unlink()
            cv2.imwrite(str(copy), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 0])
        run(folder, tmp_path / f"week{week}", config, before=storage_path(tmp_path / f"week{week - 1}"))
        of_it = {"fracture/other.png", "fracture/copy.png", test}
        assert {s for path, s in splits_of(tmp_path / f"week{week}").items() if path in of_it} == {"retired"}


def test_a_test_image_that_had_both_labels_for_a_week_does_not_train(image_folder, tmp_path):
    """Its copy has the other label and the name of a training patient, so both are left out until it is removed."""
    config = DataConfig(image_size=32, group_pattern=r"/[fn]\d+")
    folder = image_folder(*[f"{c}/{c[0]}{i}-0.png" for c in ("fracture", "normal") for i in range(12)])
    run(folder, tmp_path / "out", config)
    before = splits_of(tmp_path / "out")
    test = next(path for path, split in before.items() if split == "test" and path.startswith("fracture"))
    train = next(path for path, split in before.items() if split == "train" and path.startswith("normal"))
    wrong = folder / train.replace("-0", "-1")
    wrong.write_bytes((folder / test).read_bytes())
    assert run(folder, tmp_path / "out", config).left_out["the radiograph has both labels"] == 2
    wrong.unlink()
    run(folder, tmp_path / "out", config)
    assert splits_of(tmp_path / "out") == before


def test_files_that_come_back_are_in_the_split_they_were_in(image_folder, tmp_path):
    folder = image_folder(*[f"{c}/{c[0]}{i}.png" for c in ("fracture", "normal") for i in range(20)])
    run(folder, tmp_path / "week1")
    before = splits_of(tmp_path / "week1")
    away = {path: (folder / path).read_bytes() for path in sorted(before)[::2]}
    for path in away:
        (folder / path).unlink()
    run(folder, tmp_path / "week2", before=storage_path(tmp_path / "week1"))
    for path, data in away.items():
        (folder / path).write_bytes(data)
    run(folder, tmp_path / "week3", before=storage_path(tmp_path / "week2"))
    assert splits_of(tmp_path / "week3") == before


def test_files_that_tested_the_champion_may_not_be_moved_to_training(image_folder, tmp_path):
    folder = image_folder(*official_paths(6))
    config = DataConfig(image_size=32)
    run(folder, tmp_path / "champion", config)
    (folder / "test/fractured/0.png").rename(folder / "train/fractured/9.png")
    manifest = run(folder, tmp_path / "out", config, before=storage_path(tmp_path / "champion"))
    assert manifest.split_reason == "ours, whole groups: 1 images that were test are in other splits as found"
    assert splits_of(tmp_path / "out")["train/fractured/9.png"] == "test"
    official = config.model_copy(update={"split": "official"})
    run(folder, tmp_path / "champion", official)
    (folder / "test/fractured/1.png").rename(folder / "train/fractured/8.png")
    with pytest.raises(
        UsageError, match=r"'train/fractured/8.png' is in training or validation, and has tested the champion. Move"
    ):
        run(folder, tmp_path / "out", official, before=storage_path(tmp_path / "champion"))


def test_the_audit_alone_writes_its_files_and_no_shards(image_folder, tmp_path):
    config = DataConfig(image_size=32)
    out = storage_path(tmp_path / "audit")
    write_audit(out, scan_source(source_of(leaky(image_folder), config), out, config))
    left = {p.name for p in (tmp_path / "audit").iterdir()}
    assert left == {"audit.json", "audit.html", "links.csv", "scanned.parquet", "compared.parquet"}
    assert read_audit(out).leakage["test"].by_kind["bytes"] == 3
    links = (tmp_path / "audit/links.csv").read_text().splitlines()
    assert links[0] == '"first","second","kind","texture","detail","degrees","flipped","inverted"'
    assert '"test/fractured/0.png","train/fractured/0.png","bytes",,,,,' in links


def test_all_of_it_may_be_test(image_folder, tmp_path):
    manifest = run(leaky(image_folder), tmp_path / "out", DataConfig(image_size=32, split="test"))
    assert (manifest.split, manifest.split_reason) == ("test", "none: all of it is test")
    assert {split: manifest.rows(split) for split in manifest.shards} == {"test": 32}


def test_grouped_folds(image_folder, tmp_path):
    manifest = run(leaky(image_folder), tmp_path / "out", DataConfig(image_size=32, folds=3))
    assert (manifest.split, manifest.folds) == ("folds", ["fold-1", "fold-2", "fold-3"])
    assert sorted(manifest.rows(fold) for fold in manifest.folds) == [10, 11, 11]
    files = pq.read_table(tmp_path / "out/files.parquet").to_pandas()
    used = files[files.split_used != ""]
    assert (used.groupby("group_id").split_used.nunique() == 1).all()


def test_folds_by_source(image_folder, tmp_path):
    roots = [image_folder(*official_paths(4), root=name) for name in ("north", "south")]
    for number, file in enumerate(sorted(roots[1].rglob("*.png"))):
        file.write_bytes(encoded(np.random.default_rng(1000 + number).integers(0, 256, (40, 36), np.uint8)))
    config = DataConfig(image_size=32, folds="source")
    source = find_source([storage_path(root) for root in roots], config)
    out = storage_path(tmp_path / "out")
    manifest = write_dataset(scan_source(source, out, config), out, config)
    assert manifest.folds == ["north", "south"]
    south = manifest.fold(2)
    table = Dataset(storage_path(tmp_path / "out"), south).read("test", 0, south.rows("test"))
    assert set(table["origin"].to_pylist()) == {"south"}
    assert south.rows("test") == 24
    assert {split: south.rows(split) for split in ("train", "val")} == {"train": 20, "val": 4}


def test_a_source_of_one_class_trains_in_each_fold(image_folder, tmp_path):
    paths = {"a": official_paths(4), "b": official_paths(4), "c": ["normal/1.png", "normal/2.png", "normal/3.png"]}
    for first, (name, names) in enumerate(paths.items()):
        folder = image_folder(*names, root=name)
        for number, file in enumerate(folder / path for path in names):
            pixels = np.random.default_rng([first, number]).integers(0, 256, (40, 36), np.uint8)
            file.write_bytes(encoded(pixels))
    config, out = DataConfig(image_size=32, folds="source"), storage_path(tmp_path / "out")
    source = find_source([storage_path(tmp_path / name) for name in paths], config)
    manifest = write_dataset(scan_source(source, out, config), out, config)
    assert (manifest.folds, manifest.counts["untested"]) == (["a", "b"], {"normal": 3, "fracture": 0})
    line = (
        "source 'c' has 0 separate fractured and 3 normal radiographs or patients, and needs two of each to be tested; "
        "it trains in every fold"
    )
    assert manifest.untested == [line]
    assert f"not tested {line}" in summarize_split(manifest)
    for number, trains in ((1, "b"), (2, "a")):
        fold = Dataset(out, manifest.fold(number))
        assert set(fold.read("train", 0, 99)["origin"].to_pylist()) == {trains, "c"}
        assert set(fold.read("val", 0, 99)["origin"].to_pylist()) == {trains}
    assert write_dataset(scan_source(source, out, config), out, config) == manifest


def splits_of(out: Path) -> dict[str, str]:
    files = pq.read_table(out / "files.parquet").to_pydict()
    return {path: split for path, split in zip(files["path"], files["split_used"], strict=True) if split}


def test_shards_may_not_go_into_the_data_or_among_other_things(image_folder, tmp_path):
    folder = image_folder(*official_paths(2))
    with pytest.raises(
        UsageError, match=r"--out .*: may not be inside the data folder, which is never written to, or around it"
    ):
        run(folder, folder / "shards")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds other things, such as 'thesis.txt'"):
        run(folder, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "x"


def test_a_dataset_of_the_former_schema_is_preprocessed_again_in_its_folder(image_folder, tmp_path):
    """The message about an older version says so: its files are replaced, and those of another name are removed."""
    folder, out = image_folder(*official_paths(2)), tmp_path / "out"
    run(folder, out)
    (out / MANIFEST).write_text('{"schema_version": 3}')
    (out / "examined.parquet").write_bytes(b"facts of schema version 3")
    with pytest.raises(UsageError, match=r"reads version 5. Run preprocessing again"):
        read_dataset(storage_path(out))
    assert run(folder, out) == read_dataset(storage_path(out)).manifest
    assert not (out / "examined.parquet").exists()


def test_other_parquet_files_are_not_removed(image_folder, tmp_path):
    out = tmp_path / "out"
    for name in ("my_table.parquet", "deep/train-00000-0123456789ab.parquet"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"mine")
        with pytest.raises(UsageError, match="holds other things, such as"):
            run(image_folder(*official_paths(2)), out)
        assert (out / name).read_bytes() == b"mine"
        (out / name).unlink()


def test_a_damaged_shard_is_made_again(image_folder, tmp_path):
    folder = image_folder(*official_paths(2))
    manifest = run(folder, tmp_path / "out")
    shard = tmp_path / "out" / manifest.shards["train"][0].file
    whole = shard.read_bytes()
    shard.write_bytes(whole[:500])
    assert find_finished(source_of(folder), storage_path(tmp_path / "out"), CONFIG) is None
    assert run(folder, tmp_path / "out") == manifest
    assert shard.read_bytes() == whole
    shard.write_bytes(bytes(len(whole)))
    image_folder("train/fractured/more.png")
    assert run(folder, tmp_path / "out").rows("train") == 5
    assert read_dataset(storage_path(tmp_path / "out")).read("train", 0, 5).num_rows == 5


def test_shards_may_not_go_into_the_data_through_a_link(image_folder, tmp_path):
    folder = image_folder(*official_paths(2))
    (tmp_path / "link").symlink_to(folder)
    for out in (tmp_path / "data/../data/shards", tmp_path / "link/shards"):
        with pytest.raises(UsageError, match="may not be inside the data folder"):
            run(folder, out)


def test_a_file_that_looks_compressed_is_no_image(image_folder, tmp_path):
    folder = image_folder(*official_paths(20))
    (folder / "train/fractured/x.gz").write_bytes(b"not gzip")
    assert [r.reason for r in run(folder, tmp_path / "out").rejected] == ["not an image"]


def test_a_full_disk_is_one_clear_error(image_folder, tmp_path):
    with small_disk(tmp_path / "small", kilobytes=20) as disk:
        with pytest.raises(RunError, match=r"the disk is full: .*Free space and run the same command again"):
            run(image_folder(*official_paths(20)), disk / "out")
        assert not (disk / "out" / MANIFEST).exists()


def test_a_disk_that_fills_up_while_shards_are_written(image_folder, tmp_path):
    source = source_of(image_folder(*official_paths(20)))
    with small_disk(tmp_path / "small", kilobytes=8000) as disk:
        out = storage_path(disk / "out")
        scanned = scan_source(source, out, CONFIG, keep_pixels=True)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(RunError, match=r"the disk is full: .*Free space and run the same command again"):
            write_dataset(scanned, out, CONFIG)
        assert not (disk / "out" / MANIFEST).exists()
        assert not list((disk / "out").glob("pixels-*")), "pending pixels are removed"


@pytest.mark.parametrize("spoil", ["another job's", "half of it", "gone"])
def test_pending_pixels_are_used_only_if_they_are_those_that_were_scanned(image_folder, tmp_path, spoil):
    folder = image_folder(*official_paths(4))
    run(folder, tmp_path / "expected")
    scanned = scan_source(source_of(folder), storage_path(tmp_path / "out"), CONFIG, keep_pixels=True)
    [pending] = (tmp_path / "out").glob("pixels-*.raw")
    pixels = pending.read_bytes()
    if spoil == "gone":
        pending.unlink()
    else:
        pending.write_bytes(pixels[::-1] if spoil == "another job's" else pixels[: len(pixels) // 2 + 7])
    write_dataset(scanned, storage_path(tmp_path / "out"), CONFIG)
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_a_folder_that_a_task_cannot_write_to(image_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"file/out.* cannot be written: .*Check the path and its permissions\.$"):
        run(image_folder(*official_paths(4)), tmp_path / "file/out")


def test_a_folder_without_one_readable_image(image_folder, tmp_path):
    folder = image_folder(*official_paths(1))
    for file in folder.rglob("*.png"):
        file.write_bytes(b"%PDF-1.7")
    with pytest.raises(
        UsageError,
        match=r"not one of 6 files can be read \(6 not an image; first: .*\). DICOM, .* convert others first",
    ):
        run(folder, tmp_path / "out")


def test_every_radiograph_under_both_labels(image_folder, tmp_path):
    folder = image_folder(*(f"fracture/{i}.png" for i in range(3)))
    shutil.copytree(folder / "fracture", folder / "normal")
    with pytest.raises(UsageError, match="every radiograph has both labels, for example 'fracture/"):
        run(folder, tmp_path / "out")


def test_the_split_is_remembered_though_a_shard_is_lost(image_folder, tmp_path):
    folder = image_folder(*(f"{name}/{i}.png" for i in range(12) for name in ("fracture", "normal")))
    run(folder, tmp_path / "out")
    before = splits_of(tmp_path / "out")
    next((tmp_path / "out").glob("train-*.parquet")).unlink()
    image_folder(*(f"{name}/{i}.png" for i in range(24) for name in ("fracture", "normal")))
    run(folder, tmp_path / "out")
    after = splits_of(tmp_path / "out")
    assert len(after) == 48
    assert {path: after[path] for path in before} == before


def test_the_split_is_remembered_though_the_manifest_is_damaged_and_a_damaged_ledger_is_an_error(
    image_folder, tmp_path
):
    names = [f"{c}/{i}.png" for c in ("fracture", "normal") for i in range(12)]
    folder = image_folder(*names)
    run(folder, tmp_path / "out")
    before = splits_of(tmp_path / "out")
    image_folder(*names, *[f"{c}/more{i}.png" for c in ("fracture", "normal") for i in range(9)])
    ledger = tmp_path / "out/ledger.parquet"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"ledger.parquet cannot be read: .*Put back a copy of it"):
        run(folder, tmp_path / "out")
    assert splits_of(tmp_path / "out") == before, "nothing was written"
    ledger.write_bytes(whole)
    (tmp_path / "out" / MANIFEST).write_text("{")
    run(folder, tmp_path / "out")
    after = splits_of(tmp_path / "out")
    assert {path: after[path] for path in before} == before


def test_a_clean_split_that_becomes_leaky_moves_only_what_leaks(image_folder, tmp_path):
    folder = image_folder(*official_paths(8))
    assert run(folder, tmp_path / "out").split == "official"
    before = splits_of(tmp_path / "out")
    shutil.copy(folder / "val/fractured/0.png", folder / "test/fractured/copy.png")
    manifest = run(folder, tmp_path / "out")
    assert manifest.split == "group"
    after = splits_of(tmp_path / "out")
    assert {path for path in before if after.get(path) != before[path]} <= {"val/fractured/0.png"}


def test_settings_that_differ_from_those_of_the_shards_are_listed(image_folder, tmp_path):
    run(image_folder(*official_paths()), tmp_path / "out")
    assert list_changed_settings(storage_path(tmp_path / "out"), CONFIG) == []
    other = CONFIG.model_copy(update={"split": "group", "seed": 3})
    assert list_changed_settings(storage_path(tmp_path / "out"), other) == [
        "data.seed 0 -> 3",
        "data.split 'auto' -> 'group'",
    ]
    assert list_changed_settings(storage_path(tmp_path / "nothing"), CONFIG) == []


def test_other_settings_go_to_another_folder():
    source = Source({"": storage_path("/data/wrists")}, (), {}, False, "")
    names = {name_output_folder(source, DataConfig(seed=seed)) for seed in (0, 0, 1)}
    assert len(names) == 2
    assert all(name.startswith("wrists-") for name in names)


def make_radiograph(number: int) -> np.ndarray:
    generator = np.random.default_rng(number)
    layers = (
        cv2.resize(generator.normal(size=(n, n)), (96, 96), interpolation=cv2.INTER_CUBIC) * 30 for n in (5, 12, 40)
    )
    return np.clip(110 + sum(layers), 0, 255).astype(np.uint8)


def blank_out(*files: Path) -> None:
    """Replace files by other bytes of the same size and time: a job that reads them again will notice."""
    for file in files:
        stamp = file.stat()
        file.write_bytes(bytes(stamp.st_size))
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@pytest.mark.parametrize("split", ["test", "official"])
def test_only_new_files_of_a_grown_folder_are_scanned_and_the_result_is_that_of_a_fresh_start(tmp_path, split: str):
    folder, config = tmp_path / "data", DataConfig(image_size=96, rows_per_shard=3, split=split)
    for number, path in enumerate(official_paths(2)):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(make_radiograph(number)))
        file.with_name(f"{file.stem}-mirrored.png").write_bytes(encoded(make_radiograph(number)[:, ::-1]))
        shutil.copy2(file, file.with_name(f"{file.stem}-copy.png"))
    (folder / "train/fractured/damaged.png").write_bytes(b"damaged")
    config = config.model_copy(update={"max_rejected_fraction": 0.5})
    known = list(folder.rglob("*.png"))
    run(folder, tmp_path / "out", config)
    again: list[str] = []
    scan_source(source_of(folder, config), storage_path(tmp_path / "out"), config, lambda step, *_: again.append(step))
    assert again == [], "no file is scanned, no pair compared"

    (folder / "train/fractured/new.png").write_bytes(encoded(make_radiograph(99)))
    (folder / "val/not fractured/new-mirrored.png").write_bytes(encoded(make_radiograph(99)[:, ::-1]))
    (folder / "test/fractured/0-mirrored.png").unlink()
    (folder / "test/fractured/1-mirrored.png").rename(folder / "test/fractured/renamed.png")
    shutil.copytree(folder, tmp_path / "elsewhere")
    run(tmp_path / "elsewhere", tmp_path / "fresh", config)
    blank_out(*(file for file in known if file.exists()))
    steps: list[tuple[str, int, int | None]] = []
    source, out = source_of(folder, config), storage_path(tmp_path / "out")
    write_dataset(scan_source(source, out, config, lambda *event: steps.append(event)), out, config)
    assert ("scan", 3, 3) in steps
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_a_file_that_changed_unnoticed_stops_one_run_and_not_the_next(image_folder, tmp_path):
    folder = image_folder(*official_paths(4))
    run(folder, tmp_path / "out")
    file = folder / "train/fractured/0.png"
    stamp = file.stat()
    file.write_bytes((folder / "train/fractured/1.png").read_bytes()[: stamp.st_size].ljust(stamp.st_size, b"\0"))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    next((tmp_path / "out").glob("train-*.parquet")).unlink()
    with pytest.raises(RunError, match=r"train/fractured/0.png changed while it was being prepared; run the same"):
        run(folder, tmp_path / "out")
    assert run(folder, tmp_path / "out").rows("train") == 8


def test_pixels_are_written_as_they_were_scanned(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fracture.preparation.scan.FILES_PER_TASK", 5)
    folder = image_folder(*official_paths(4))
    (folder / "train/fractured/damaged.png").write_bytes(b"damaged")
    config = CONFIG.model_copy(update={"max_rejected_fraction": 0.5})
    run(folder, tmp_path / "undisturbed", config)
    out = storage_path(tmp_path / "out")
    scanned = scan_source(source_of(folder, config), out, config, keep_pixels=True)
    assert len(list((tmp_path / "out").glob("pixels-*.raw"))) == 5
    blank_out(*folder.rglob("*.png"))  # no file is read again
    write_dataset(scanned, out, config)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed"), "and no pending pixels are left"


def test_a_killed_job_keeps_what_it_has_scanned(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fracture.preparation.scan.FILES_PER_TASK", 4)
    monkeypatch.setattr("fracture.preparation.scan.SECONDS_BETWEEN_SAVES", -1)
    source, out = source_of(image_folder(*official_paths(4))), storage_path(tmp_path / "out")

    def die(step: str, done: int, total: int | None) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan_source(source, out, CONFIG, die)
    steps: list[tuple[str, int, int | None]] = []
    scan_source(source, out, CONFIG, lambda *event: steps.append(event))
    assert ("scan", 16, 16) in steps


def test_pixels_are_not_taken_from_shards_that_other_code_made(image_folder, tmp_path, monkeypatch):
    folder = image_folder(*official_paths(4))
    run(folder, tmp_path / "out")
    monkeypatch.setattr("PIL.__version__", "0")
    assert find_finished(source_of(folder), storage_path(tmp_path / "out"), CONFIG) is None
    blank_out(*folder.rglob("0.png"))
    with pytest.raises(UsageError, match=r"6 of 24 files \(25.0%\) are unreadable \(6 not an image"):
        run(folder, tmp_path / "out")


def test_facts_of_one_folder_are_not_used_for_another(image_folder, tmp_path):
    folder = image_folder(*official_paths(2))
    scan_source(source_of(folder), storage_path(tmp_path / "out"), CONFIG)
    shutil.copytree(folder, tmp_path / "other")
    steps: list[tuple[str, int, int | None]] = []
    scan_source(
        source_of(tmp_path / "other"), storage_path(tmp_path / "out"), CONFIG, lambda *event: steps.append(event)
    )
    assert ("scan", 12, 12) in steps


def test_a_scan_by_other_code_or_at_another_size_is_repeated(image_folder, tmp_path, monkeypatch):
    source, out = source_of(image_folder(*official_paths(2))), storage_path(tmp_path / "out")
    scan_source(source, out, CONFIG)

    def scanned_again(config: DataConfig = CONFIG) -> bool:
        steps: list[tuple[str, int, int | None]] = []
        scan_source(source, out, config, lambda *event: steps.append(event))
        return ("scan", 12, 12) in steps

    assert not scanned_again()
    assert scanned_again(DataConfig(image_size=48))
    assert scanned_again()
    monkeypatch.setattr("PIL.__version__", "0")
    assert scanned_again()
    for name in ("scanned", "compared"):
        file = tmp_path / f"out/{name}.parquet"
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 3] ^= 1
        file.write_bytes(whole)
    assert scanned_again(), "a flipped bit is found"


def test_a_file_that_could_not_be_opened_is_tried_again(image_folder, tmp_path):
    source, out = source_of(image_folder(*official_paths(2))), storage_path(tmp_path / "out")
    file = tmp_path / "data" / source.files[3].path
    file.rename(tmp_path / "away.png")
    assert scan_source(source, out, CONFIG).audit.rejected[0].reason == "cannot be opened"
    (tmp_path / "away.png").rename(file)
    assert not scan_source(source, out, CONFIG).audit.rejected
