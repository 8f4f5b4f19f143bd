import pytest

from fracture.config import Config, load_config
from fracture.errors import UsageError
from fracture.input.shards import Manifest
from fracture.storage import Place, place
from fracture.training.checkpoint import SNAPSHOT, SNAPSHOT_COPY
from fracture.training.driver import _mend_snapshot, check_batches, check_capacity, check_run, with_data_of


def test_more_workers_than_the_cluster_holds_is_told_at_once(ray_cluster, tiny_config):
    with pytest.raises(
        UsageError,
        match=r"5 workers of 1 CPU each do not fit: the cluster's nodes have 4 CPU. Use --workers 4 or f",
    ):
        check_capacity(tiny_config("compute.workers=5"))
    with pytest.raises(UsageError, match=r"2 workers of 1 CPU and 1 GPU each .* 4 CPU and 0 GPU. Ask for less, or add"):
        check_capacity(tiny_config("compute.gpu=true"))
    check_capacity(tiny_config("compute.workers=4"))
    check_capacity(tiny_config("compute.workers=8", "compute.min_workers=4"))
    with pytest.raises(UsageError, match=r"5 workers of 1 CPU each do not fit"):
        check_capacity(tiny_config("compute.workers=8", "compute.min_workers=5"))


def test_a_worker_without_an_image_in_a_step(shard_folder, tiny_config):
    _, manifest = shard_folder(train=9)
    with pytest.raises(UsageError, match=r"9 train images in batches of 8 leave one of 8 workers with nothing"):
        check_batches(tiny_config("compute.workers=8"), manifest)
    with pytest.raises(UsageError, match=r"leave one of 5 workers"):
        check_batches(tiny_config("compute.workers=8", "compute.min_workers=1"), manifest)
    check_batches(tiny_config("compute.workers=2"), manifest)


def test_a_batch_larger_than_the_training_data(shard_folder, tiny_config):
    _, manifest = shard_folder(train=7)
    with pytest.raises(UsageError, match=r"training.batch_size = 8 is more than the 7 training images"):
        check_batches(tiny_config(), manifest)


def test_validation_too_needs_an_image_for_each_worker(shard_folder, tiny_config):
    _, manifest = shard_folder(val=2)
    with pytest.raises(UsageError, match=r"2 val images in batches of 8 leave one of 3 workers with nothing"):
        check_batches(tiny_config("compute.workers=3"), manifest)


def test_shards_bring_their_own_data_settings(shard_folder):
    _, manifest = shard_folder()
    assert with_data_of(load_config(), manifest).data.image_size == 32
    with pytest.raises(UsageError, match=r"data.image_size = 64 is asked for, and the shards were made with 32"):
        with_data_of(load_config(None, ["data.image_size=64"]), manifest)


def listed(run: Place, *names: str) -> dict:
    """Ray Train's list of checkpoints, which are there."""
    for name in names:
        (run / name / "state.npz").write_bytes(b"x")
    results = [{"checkpoint_dir_name": name, "metrics": {}} for name in names]
    latest = results[-1] if results else None
    indices = list(range(len(names)))
    return {"checkpoint_results": results, "checkpoint_report_indices": indices, "latest_checkpoint_result": latest}


def test_half_a_list_of_checkpoints_is_mended_from_its_copy(tmp_path):
    run = place(tmp_path)
    whole = listed(run, "checkpoint_1", "checkpoint_2")
    (run / SNAPSHOT).write_bytes(b'{"a": ')
    (run / SNAPSHOT_COPY).write_json(whole)
    _mend_snapshot(run)
    assert (run / SNAPSHOT).read_json() == whole


def test_a_whole_list_is_left_alone(tmp_path):
    run = place(tmp_path)
    (run / SNAPSHOT_COPY).write_json(listed(run, "checkpoint_1"))
    newer = listed(run, "checkpoint_1", "checkpoint_2")
    (run / SNAPSHOT).write_json(newer)
    _mend_snapshot(run)
    assert (run / SNAPSHOT).read_json() == newer


def test_a_checkpoint_that_is_gone_leaves_the_list(tmp_path):
    run = place(tmp_path)
    (run / SNAPSHOT).write_json(listed(run, "checkpoint_1", "checkpoint_2"))
    (run / "checkpoint_2").delete()
    _mend_snapshot(run)
    assert (run / SNAPSHOT).read_json() == listed(run, "checkpoint_1")
    (run / "checkpoint_1").delete()
    _mend_snapshot(run)
    assert (run / SNAPSHOT).read_json()["latest_checkpoint_result"] is None


def test_two_lists_of_which_none_is_whole_are_no_list(tmp_path):
    run = place(tmp_path)
    for name in (SNAPSHOT, SNAPSHOT_COPY):
        (run / name).write_bytes(b"{")
    _mend_snapshot(run)
    assert not (run / SNAPSHOT).is_file()


def begun(run: Place, config: Config, manifest: Manifest) -> None:
    """What `train` writes first."""
    recipe = config.model_dump(mode="json", exclude={"compute", "sample"})
    (run / "run.json").write_json({"dataset": manifest.fingerprint, "recipe": recipe})


def test_a_run_goes_on_with_its_own_settings_and_data_only(shard_folder, tiny_config, tmp_path):
    _, manifest = shard_folder()
    run = place(tmp_path / "runs/a")
    check_run(run, tiny_config(), manifest)
    begun(run, tiny_config(), manifest)
    check_run(run, tiny_config("compute.workers=1"), manifest)  # more or fewer workers change the speed alone
    with pytest.raises(UsageError, match=r"run 'a' was begun with other settings: training.epochs 8 -> 3. Give the"):
        check_run(run, tiny_config("training.epochs=3"), manifest)
    with pytest.raises(UsageError, match="run 'a' was begun with other data"):
        check_run(run, tiny_config(), manifest.model_copy(update={"fingerprint": "other"}))


def test_a_folder_of_other_things_is_no_run(shard_folder, tiny_config, tmp_path):
    _, manifest = shard_folder()
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="holds other things than a run"):
        check_run(place(tmp_path / "runs/a"), tiny_config(), manifest)
