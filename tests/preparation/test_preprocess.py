import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fracture.config import DataConfig
from fracture.errors import RunError, UsageError
from fracture.input.shards import MANIFEST, images_of, read_manifest, read_rows
from fracture.preparation.decode import decode
from fracture.preparation.preprocess import copies_warning, find_done, preprocess, shards_name, summary
from fracture.preparation.source import find_source
from fracture.storage import Place, place
from tests.conftest import official_paths, small_disk

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]
CONFIG = DataConfig(image_size=32, rows_per_shard=3)


def run(folder: Path, out: Path, config: DataConfig = CONFIG, **kwargs):
    return preprocess(find_source(place(folder), config), place(out), config, **kwargs)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "input.json"}


def test_every_image_is_in_a_shard_with_its_pixels_label_and_source(image_folder, tmp_path):
    folder = image_folder(*official_paths(4))
    told: list[int] = []
    manifest = run(folder, tmp_path / "out", progress=told.append)
    assert sum(told) == 24
    assert manifest.counts == {s: {"normal": 4, "fracture": 4} for s in ("train", "val", "test")}
    assert [len(manifest.shards[s]) for s in ("train", "val", "test")] == [3, 3, 3]
    table = read_rows(place(tmp_path / "out"), manifest, "train", 0, 8)
    for row, pixels in zip(table.to_pylist(), images_of(table, 32), strict=True):
        assert np.array_equal(pixels[..., 0], decode((folder / row["source"]).read_bytes(), 32))
        assert row["label"] == (1 if "/fractured/" in row["source"] else 0)
    all_pixels = images_of(table, 32).astype(float)
    assert manifest.pixel_mean == pytest.approx(all_pixels.mean())
    assert manifest.pixel_std == pytest.approx(all_pixels.std())


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
        orders.append(read_rows(place(tmp_path / str(seed)), manifest, "train", 0, 16)["source"].to_pylist())
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) != orders[0]


def test_what_is_done_is_known_until_input_or_settings_change(image_folder, tmp_path):
    folder, out = image_folder(*official_paths(4)), place(tmp_path / "out")
    manifest = run(folder, tmp_path / "out")
    assert find_done(find_source(place(folder), CONFIG), out, CONFIG) == manifest
    other = DataConfig(image_size=48)
    assert find_done(find_source(place(folder), other), out, other) is None
    (folder / "train/fractured/new.png").write_bytes((folder / "train/fractured/0.png").read_bytes())
    source = find_source(place(folder), CONFIG)
    assert find_done(source, out, CONFIG) is None
    renewed = preprocess(source, out, CONFIG)
    assert renewed.counts["train"]["fracture"] == 5
    assert renewed.fingerprint != manifest.fingerprint
    named = {s.file for shards in renewed.shards.values() for s in shards}
    assert {p.name for p in (tmp_path / "out").glob("*.parquet")} == named, "the old shards are gone"


def test_interrupted_it_leaves_what_was_there_before(image_folder, tmp_path):
    folder, out = image_folder(*official_paths(4)), tmp_path / "out"
    before = run(folder, out)
    (folder / "train/fractured/new.png").write_bytes((folder / "val/fractured/0.png").read_bytes())

    class Killed(Exception):
        pass

    def die(files: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(folder, out, progress=die)
    assert read_manifest(place(out)) == before
    assert read_rows(place(out), before, "train", 0, 8).num_rows == 8


def test_interrupted_the_first_time_there_is_no_data_set(image_folder, tmp_path):
    run(image_folder(*official_paths(2)), tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(UsageError, match="holds no shards"):
        read_manifest(place(tmp_path / "out"))
    assert run(image_folder(*official_paths(2)), tmp_path / "out").rows("train") == 4


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
    assert "rejected   2 files (1.67%): 1 empty file, 1 not an image; paths in dataset.json" in summary(manifest, 120)
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
    with pytest.raises(UsageError, match="no readable image of class 'fracture' in split 'test'"):
        run(folder, tmp_path / "out", DataConfig(image_size=32, max_rejected_fraction=0.5))


def test_copies_across_splits_are_counted_and_told_loudly(image_folder, tmp_path):
    folder = image_folder(*official_paths(4))
    for copy in ("test/fractured/0.png", "test/fractured/1.png", "val/fractured/0.png"):
        (folder / copy).write_bytes((folder / "train/fractured/0.png").read_bytes())
    manifest = run(folder, tmp_path / "out")
    assert manifest.copies.model_dump() == {"val_in_train": 1, "test_in_train": 2, "test_in_val": 2}
    assert manifest.distinct_files == {"train": 8, "val": 8, "test": 7}
    assert copies_warning(manifest)[0] == (
        "WARNING    2 of 8 test images and 1 of 8 validation images are byte-for-byte copies of training images."
    )
    groups = pq.read_table(tmp_path / "out" / manifest.shards["test"][0].file)["group"].to_pylist()
    assert all(isinstance(group, int) for group in groups)


def test_shards_may_not_go_into_the_data_or_among_other_things(image_folder, tmp_path):
    folder = image_folder(*official_paths(2))
    with pytest.raises(UsageError, match=r"shards may not lie inside the data folder or around it"):
        run(folder, folder / "shards")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds other things, such as 'thesis.txt'"):
        run(folder, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "x"


def test_parquet_files_of_somebody_else_are_not_ours_to_remove(image_folder, tmp_path):
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
    source = find_source(place(folder), CONFIG)
    assert find_done(source, place(tmp_path / "out"), CONFIG) is None
    assert preprocess(source, place(tmp_path / "out"), CONFIG) == manifest
    assert shard.read_bytes() == whole


def test_shards_may_not_reach_the_data_by_a_detour(image_folder, tmp_path):
    folder = image_folder(*official_paths(2))
    (tmp_path / "link").symlink_to(folder)
    for out in (tmp_path / "data/../data/shards", tmp_path / "link/shards"):
        with pytest.raises(UsageError, match="shards may not lie inside the data folder"):
            run(folder, out)


def test_a_file_that_looks_compressed_is_no_image(image_folder, tmp_path):
    folder = image_folder(*official_paths(20))
    (folder / "train/fractured/x.gz").write_bytes(b"not gzip")
    assert [r.reason for r in run(folder, tmp_path / "out").rejected] == ["not an image"]


def test_a_full_disk_is_said_calmly(image_folder, tmp_path):
    with small_disk(tmp_path / "small", kilobytes=20) as disk:
        with pytest.raises(RunError, match=r"the disk is full: .*Free space and run the same command again"):
            run(image_folder(*official_paths(20)), disk / "out")
        assert not (disk / "out" / MANIFEST).exists()


def test_other_settings_go_to_another_folder():
    data = Place(place("/x").filesystem, "/data/wrists")
    names = {shards_name(data, DataConfig(seed=seed)) for seed in (0, 0, 1)}
    assert len(names) == 2
    assert all(name.startswith("wrists-") for name in names)
