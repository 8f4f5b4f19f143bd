"""The data of a run: prepared once, and then the run's own until it is finished."""

import shutil
from pathlib import Path

import pytest

from fracture.config import Config
from fracture.dataset.format import Dataset, read_dataset
from fracture.preparation.output import name_output_folder
from fracture.storage import StoragePath, storage_path
from fracture.training.checks import write_run_card
from fracture.tuning.space import write_results
from fracture.workflows.arguments import RunArguments
from fracture.workflows.preprocess import find_radiographs, prepare_run_data
from tests.conftest import official_paths, write_shards

ROWS = {"train": 40, "val": 16, "test": 16}
FOLDS = {"fold-1": 12, "fold-2": 12}


def arguments_of(folder: Path, run: str = "r") -> RunArguments:
    return RunArguments(run=run, storage=str(folder.parent / "storage"), data=(str(folder),))


def prepared(arguments: RunArguments, config: Config, rows: dict[str, int]) -> Dataset:
    """Write shards where those of the data are expected, as if the data had been other data when they were made."""
    source = find_radiographs(arguments.data, None, config, lambda line: None)
    folder = storage_path(arguments.storage) / "shards" / name_output_folder(source, config.data)
    return Dataset(folder, write_shards(folder, rows))


def begin_run(run: StoragePath, config: Config, dataset: Dataset) -> None:
    write_run_card(run, config, dataset, None)


def begin_second_fold(run: StoragePath, config: Config, dataset: Dataset) -> None:
    write_run_card(run / "fold-2", config, dataset.fold(2), None)


def begin_contender(run: StoragePath, config: Config, dataset: Dataset) -> None:
    write_run_card(run / "plain-cnn" / "fold-1", config, dataset.fold(1), None)


def begin_search(run: StoragePath, config: Config, dataset: Dataset) -> None:
    write_results(run, config, dataset.manifest, {})


@pytest.mark.parametrize(
    ("begin", "rows"),
    [(begin_run, ROWS), (begin_second_fold, FOLDS), (begin_contender, FOLDS), (begin_search, ROWS)],
)
def test_what_has_begun_goes_on_with_its_own_shards_when_the_data_has_grown(image_folder, tiny_config, begin, rows):
    arguments, config = arguments_of(image_folder(*official_paths())), tiny_config()
    dataset = prepared(arguments, config, rows)
    begin(arguments.folder, config, dataset)
    before = {info.path: info.mtime_ns for info in dataset.folder.files()}
    lines: list[str] = []
    assert prepare_run_data(arguments, config, lines.append) == read_dataset(dataset.folder)
    assert {info.path: info.mtime_ns for info in dataset.folder.files()} == before
    assert lines[-2:] == [
        "data       or program has changed since 'r' began; it goes on with its own shards",
        f"shards     {dataset.folder}",
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_data_is_prepared_again_for_another_run_and_where_the_shards_of_this_one_are_gone(
    image_folder, tiny_config
):
    folder, config, lines = image_folder(*official_paths(8)), tiny_config("compute.workers=1"), []
    first = prepare_run_data(arguments_of(folder), config, lines.append)
    write_run_card(arguments_of(folder).folder, config, first, None)
    assert prepare_run_data(arguments_of(folder), config, lines.append) == first
    assert lines[-1].endswith("(unchanged since they were written; audit.html shows the audit)")
    (first.folder / first.manifest.shards["val"][0].file).delete()
    assert prepare_run_data(arguments_of(folder), config, lines.append) == first, "the same shards are made again"
    image_folder(*official_paths(9))
    assert prepare_run_data(arguments_of(folder), config, lines.append) == first
    (arguments_of(folder).folder / "bundle/bundle.json").write_json({})
    kept = shutil.copytree(first.folder.path, folder.parent / "kept")
    grown = prepare_run_data(arguments_of(folder), config, lines.append)
    assert grown.rows("train") == 18, "a finished run needs its shards no more"
    shutil.rmtree(first.folder.path)
    shutil.copytree(kept, first.folder.path)
    assert prepare_run_data(arguments_of(folder, "another"), config, lines.append) == grown
