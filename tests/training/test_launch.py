import pytest

from fracture.config import Config, load_config
from fracture.dataset.format import Dataset, Manifest
from fracture.errors import UsageError
from fracture.runtime.cluster import check_capacity
from fracture.storage import StoragePath, storage_path
from fracture.training.checkpoint import FILE, SNAPSHOT
from fracture.training.launch import _list_checkpoints, check_batches, check_run, with_data_of


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
    dataset = Dataset(*shard_folder(train=9))
    with pytest.raises(UsageError, match=r"9 train images in batches of 8 leave one of 8 workers with nothing"):
        check_batches(tiny_config("compute.workers=8"), dataset)
    with pytest.raises(UsageError, match=r"leave one of 5 workers"):
        check_batches(tiny_config("compute.workers=8", "compute.min_workers=1"), dataset)
    check_batches(tiny_config("compute.workers=2"), dataset)


def test_a_batch_larger_than_the_training_data(shard_folder, tiny_config):
    dataset = Dataset(*shard_folder(train=7))
    with pytest.raises(UsageError, match=r"training.batch_size = 8 is more than the 7 training images"):
        check_batches(tiny_config(), dataset)


def test_validation_too_needs_an_image_for_each_worker(shard_folder, tiny_config):
    dataset = Dataset(*shard_folder(val=2))
    with pytest.raises(UsageError, match=r"2 val images in batches of 8 leave one of 3 workers with nothing"):
        check_batches(tiny_config("compute.workers=3"), dataset)


def test_shards_bring_their_own_data_settings(shard_folder):
    dataset = Dataset(*shard_folder())
    assert with_data_of(load_config(), dataset.manifest).data.image_size == 32
    with pytest.raises(UsageError, match=r"data.image_size = 64 is asked for, and the shards were made with 32"):
        with_data_of(load_config(None, ["data.image_size=64"]), dataset.manifest)


def test_ray_trains_list_of_checkpoints_is_made_of_those_that_are_there(tmp_path):
    """Also where a kill left half of the list, and the newest checkpoint out of it."""
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

    run = storage_path(tmp_path)
    names = [f"checkpoint_2026-11-24_15-36-3{second}.5" for second in (2, 3)]
    for name in reversed(names):
        (run / name / FILE).write_bytes(b"x")
    (run / "checkpoint_2026-11-24_15-36-34.5/half").write_bytes(b"x")
    (run / SNAPSHOT).write_bytes(b'{"a": ')
    _list_checkpoints(run)
    known = _CheckpointManagerState.model_validate((run / SNAPSHOT).read_json())
    assert [result.checkpoint_dir_name for result in known.checkpoint_results] == names
    assert known.latest_checkpoint_result.checkpoint_dir_name == names[1]
    assert known.checkpoint_report_indices == [0, 1]


def test_a_list_of_checkpoints_none_of_which_is_there_is_no_list(tmp_path):
    run = storage_path(tmp_path)
    (run / SNAPSHOT).write_bytes(b"{}")
    _list_checkpoints(run)
    assert not (run / SNAPSHOT).is_file()


def begun(run: StoragePath, config: Config, manifest: Manifest) -> None:
    """What `train` writes first."""
    recipe = config.model_dump(mode="json", exclude={"compute", "sample"})
    (run / "run.json").write_json({"dataset": manifest.fingerprint, "recipe": recipe})


def test_a_run_goes_on_with_its_own_settings_and_data_only(shard_folder, tiny_config, tmp_path):
    dataset = Dataset(*shard_folder())
    run = storage_path(tmp_path / "runs/a")
    check_run(run, tiny_config(), dataset)
    begun(run, tiny_config(), dataset.manifest)
    check_run(run, tiny_config("compute.workers=1"), dataset)  # more or fewer workers change the speed alone
    with pytest.raises(UsageError, match=r"run 'a' was begun with other settings: training.epochs 8 -> 3. Give the"):
        check_run(run, tiny_config("training.epochs=3"), dataset)
    other = dataset.manifest.model_copy(update={"fingerprint": "other"})
    with pytest.raises(UsageError, match="run 'a' was begun with other data"):
        check_run(run, tiny_config(), Dataset(dataset.folder, other))


def test_a_folder_of_other_things_is_no_run(shard_folder, tiny_config, tmp_path):
    dataset = Dataset(*shard_folder())
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="holds other things than a run"):
        check_run(storage_path(tmp_path / "runs/a"), tiny_config(), dataset)
