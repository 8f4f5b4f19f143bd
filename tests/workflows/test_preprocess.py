"""The data of a run: prepared once, and then the run's own until it is finished."""

import shutil
import uuid
from pathlib import Path

import pytest

from fracture.config import FORMER_COPY_SUFFIX, Config, with_settings
from fracture.dataset.format import Dataset, read_dataset
from fracture.errors import UsageError
from fracture.lock import HeldError, Lock, claim_of_this_process
from fracture.preparation.identity import PatientKey
from fracture.preparation.output import check_output_folder, name_output_folder
from fracture.storage import StoragePath, storage_path
from fracture.training.checks import with_data_of, write_run_card
from fracture.tuning.space import write_results
from fracture.workflows.arguments import RunArguments
from fracture.workflows.preprocess import (
    find_radiographs,
    make_sample_radiographs,
    prepare_dataset,
    prepare_run_data,
)
from tests.conftest import official_paths, write_shards

ROWS = {"train": 40, "val": 16, "test": 16}
FOLDS = {"fold-1": 12, "fold-2": 12}


def arguments_of(folder: Path, run: str = "r") -> RunArguments:
    return RunArguments(run=run, storage=str(folder.parent / "storage"), data=(str(folder),))


def prepared(arguments: RunArguments, config: Config, rows: dict[str, int]) -> Dataset:
    """Write shards where those of the data are expected, as if the data had been other data when they were made."""
    source = find_radiographs(arguments.data, None, config, PatientKey(None), lambda line: None)
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


@pytest.mark.parametrize(
    ("begin", "rows"),
    [(begin_run, ROWS), (begin_second_fold, FOLDS), (begin_contender, FOLDS), (begin_search, ROWS)],
)
def test_what_has_begun_with_the_former_copy_suffix_goes_on_with_its_own_shards(image_folder, tiny_config, begin, rows):
    """Its shards are in the folder that is named after the settings as they were."""
    arguments, config = arguments_of(image_folder(*official_paths())), tiny_config()
    former = with_settings(config, {"data.copy_suffix": FORMER_COPY_SUFFIX})
    dataset = prepared(arguments, former, rows)
    manifest = dataset.manifest.model_copy(update={"parameters": former.data.model_dump(mode="json")})
    (dataset.folder / "dataset.json").write_json(manifest.model_dump(mode="json"))
    begin(arguments.folder, former, dataset)
    found = prepare_run_data(arguments, config, lambda line: None)
    assert found.folder == dataset.folder
    assert with_data_of(config, found.manifest).recipe() == former.recipe(), "so the run's settings are its own, too"


def test_a_copy_suffix_that_is_given_is_kept(image_folder, tiny_config):
    """Its shards are other ones than those of the run that began with the former default."""
    arguments, config = arguments_of(image_folder(*official_paths())), tiny_config()
    former = with_settings(config, {"data.copy_suffix": FORMER_COPY_SUFFIX})
    begin_run(arguments.folder, former, prepared(arguments, former, ROWS))
    given = tiny_config("data.copy_suffix=-copy$", "training.batch_size=1000")
    with pytest.raises(UsageError, match=r"training.batch_size = 1000 is more than the \d+ images"):  # to be prepared
        prepare_run_data(arguments, given, lambda line: None)


def refuse_to_start() -> None:
    raise AssertionError("nothing is started")


def test_shards_that_another_job_is_writing_are_left_alone(image_folder, tiny_config, tmp_path):
    config, out = tiny_config(), storage_path(tmp_path / "out")
    source = find_radiographs([str(image_folder(*official_paths()))], None, config, PatientKey(None), lambda line: None)
    with Lock(out / "lock", claim_of_this_process("fracture train"), "it", on_lost=lambda: None):
        with pytest.raises(
            UsageError,
            match=r"^the folder .*/out is held by fracture train on .*, process \d+, since .* UTC\. Two would "
            r"remove each other's files: wait for its end, or stop that job\.$",
        ) as caught:
            prepare_dataset(source, out, config, refuse_to_start, lambda line: None)
        assert not isinstance(caught.value, HeldError), "which a retraining would take for another retraining"
        assert len(out.files()) == 1, "the other job's claim"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("roots", "message"),
    [
        ({"a": ("fractured", "not fractured")}, r"all 12 images are of one source\. Name several --data folders"),
        (
            {"a": ("fractured",), "b": ("not fractured",)},
            r"nothing to test on: source 'a' has 6 fractured and 0 normal images; source 'b' has 0 fractured and 6 n",
        ),
        (
            {"a": ("fractured", "not fractured"), "b": ("fractured",)},
            r"can test on 'a' alone, and then has no other source .*: source 'b' has 6 fractured and 0 normal images",
        ),
    ],
    ids=["one source", "two sources of one class", "one source with both classes"],
)
def test_sources_that_cannot_be_left_out_are_refused_before_the_scan(
    image_folder, tiny_config, tmp_path, roots: dict[str, tuple[str, ...]], message: str
):
    config = tiny_config("data.folds=source")
    folders = [
        str(image_folder(*(path for path in official_paths() if path.split("/")[1] in classes), root=name))
        for name, classes in roots.items()
    ]
    source = find_radiographs(folders, None, config, PatientKey(None), lambda line: None)
    with pytest.raises(UsageError, match=message):
        prepare_dataset(source, storage_path(tmp_path / "out"), config, refuse_to_start, lambda line: None)
    assert not (tmp_path / "out").exists()


def test_claims_of_a_killed_job_are_no_other_things(image_folder, tiny_config, tmp_path):
    out, claim = storage_path(tmp_path / "out"), uuid.uuid4().hex
    source = find_radiographs(
        [str(image_folder(*official_paths()))], None, tiny_config(), PatientKey(None), lambda line: None
    )
    for name in (f"{claim}.json", f".{claim}.json.0123abcd.part"):
        (out / "lock" / name).write_bytes(b"")
    check_output_folder(source, out)
    (out / "lock/thesis.json").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds other things, such as 'thesis.json'"):
        check_output_folder(source, out)


def test_a_sample_is_drawn_by_one_job_at_a_time(tiny_config, tmp_path):
    storage, config = storage_path(tmp_path), tiny_config("sample.images=60")
    lock = Lock(storage / "locks/sample-60-0", claim_of_this_process("fracture train"), "it", on_lost=lambda: None)
    with (
        lock,
        pytest.raises(
            UsageError, match=r"^the sample .*/sample-60-0 is held by fracture train on .*: wait for its end"
        ),
    ):
        make_sample_radiographs(config, storage, lambda line: None)
    assert list(tmp_path.iterdir()) == []
    folder = make_sample_radiographs(config, storage, lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["data"], "no lock is left"
    with Lock(storage / "locks/sample-60-0", claim_of_this_process("fracture train"), "it", on_lost=lambda: None):
        assert make_sample_radiographs(config, storage, lambda line: None) == folder, "complete: nothing to wait for"


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
