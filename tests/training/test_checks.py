import pytest

from fracture.config import Config, load_config
from fracture.dataset.format import Dataset, Manifest
from fracture.errors import UsageError
from fracture.storage import StoragePath, storage_path
from fracture.training.checks import check_batches, check_run, with_data_of


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
    with pytest.raises(UsageError, match=r"data.image_size = 64 is set, and the shards were made with 32"):
        with_data_of(load_config(None, ["data.image_size=64"]), dataset.manifest)


@pytest.mark.parametrize(
    ("image_size", "assignment", "message"),
    [
        (
            32,
            "model.filters=[4,4,4,4,4,4]",
            "have 32 pixels: model.filters: 6 poolings need data.image_size of at least",
        ),
        (
            1024,
            "model.filters=[512]",
            "have 1024 pixels: model.filters: 512 filters at 1024 pixels take 2.0 GB for one",
        ),
    ],
)
def test_settings_that_do_not_fit_to_the_shards(shard_folder, image_size: int, assignment: str, message: str):
    _, manifest = shard_folder(image_size=image_size, train=2, val=2, test=2)
    config = load_config(None, [assignment])
    with pytest.raises(UsageError, match=message):
        with_data_of(config, manifest)


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
    with pytest.raises(UsageError, match=r"run 'a' was started with other settings: training.epochs 8 -> 3. Give the"):
        check_run(run, tiny_config("training.epochs=3"), dataset)
    card = run / "run.json"
    recipe = card.read_json()["recipe"]
    data = {name: value for name, value in recipe["data"].items() if name not in ("layout", "normal_labels")}
    data["normal_folders"] = recipe["data"]["normal_labels"]
    before = {"training": recipe["training"] | {"xla": False}, "data": data}
    card.write_json(card.read_json() | {"recipe": recipe | before})
    check_run(run, tiny_config(), dataset)  # a run of an earlier version
    other = dataset.manifest.model_copy(update={"fingerprint": "other"})
    with pytest.raises(UsageError, match="run 'a' was started with other data"):
        check_run(run, tiny_config(), Dataset(dataset.folder, other))


def test_a_folder_of_other_things_is_no_run(shard_folder, tiny_config, tmp_path):
    dataset = Dataset(*shard_folder())
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="holds other things than a run"):
        check_run(storage_path(tmp_path / "runs/a"), tiny_config(), dataset)
