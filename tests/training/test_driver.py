import pytest
import yaml

from fracture.config import Config
from fracture.errors import UsageError
from fracture.input.shards import Manifest
from fracture.storage import Place, place
from fracture.training.driver import check_batches, check_capacity, check_run


def test_more_workers_than_the_cluster_holds_is_told_at_once(ray_cluster, tiny_config):
    with pytest.raises(
        UsageError, match=r"5 workers need 5 CPUs, and the cluster has 4. Use --workers 4 or fewer, or add machines"
    ):
        check_capacity(tiny_config("compute.workers=5"))
    with pytest.raises(UsageError, match=r"2 workers need 2 GPUs, and the cluster has 0. Use a cluster with GPUs"):
        check_capacity(tiny_config("compute.gpu=true"))
    check_capacity(tiny_config("compute.workers=4"))


def test_a_worker_without_an_image_in_a_step(shard_folder, tiny_config):
    _, manifest = shard_folder(train=3)
    with pytest.raises(UsageError, match=r"3 training images in batches of 8 leave one of 4 workers with nothing"):
        check_batches(tiny_config("compute.workers=4"), manifest)
    check_batches(tiny_config("compute.workers=2"), manifest)


def begun(run: Place, config: Config, manifest: Manifest) -> None:
    """What `train` writes first."""
    (run / "config.yaml").write_bytes(yaml.safe_dump(config.model_dump(mode="json")).encode())
    (run / "run.json").write_json({"dataset": manifest.fingerprint})


def test_a_run_goes_on_with_its_own_settings_and_data_only(shard_folder, tiny_config, tmp_path):
    _, manifest = shard_folder()
    run = place(tmp_path / "runs/a")
    check_run(run, tiny_config(), manifest)
    begun(run, tiny_config(), manifest)
    check_run(run, tiny_config("compute.workers=1"), manifest)  # more or fewer workers change the speed alone
    with pytest.raises(UsageError, match=r"run 'a' was begun with other settings: training.epochs 12 -> 3. Give the"):
        check_run(run, tiny_config("training.epochs=3"), manifest)
    with pytest.raises(UsageError, match="run 'a' was begun with other data"):
        check_run(run, tiny_config(), manifest.model_copy(update={"fingerprint": "other"}))


def test_a_folder_of_other_things_is_no_run(shard_folder, tiny_config, tmp_path):
    _, manifest = shard_folder()
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="holds other things than a run"):
        check_run(place(tmp_path / "runs/a"), tiny_config(), manifest)
