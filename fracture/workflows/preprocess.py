"""Turn radiographs into the Parquet shards of a dataset, or only audit them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fracture.config import FORMER_COPY_SUFFIX, Config, SampleConfig, with_settings
from fracture.dataset.format import Dataset, read_dataset
from fracture.errors import UsageError
from fracture.progress.bars import ProgressBars
from fracture.runtime.cluster import check_capacity, start_ray
from fracture.storage import StoragePath, storage_path
from fracture.workflows.arguments import Report, RunArguments, patient_key, print_line
from fracture.workflows.locking import hold_output_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fracture.preparation.audit import Audit
    from fracture.preparation.identity import PatientKey
    from fracture.preparation.source import Source


@dataclass(frozen=True, kw_only=True)
class PreprocessArguments:
    """Radiographs and the folder that their shards are written to."""

    data: tuple[str, ...]  # folders or URIs
    out: str
    config: Config = field(default_factory=Config)
    labels: str | None = None  # table of labels, in place of class folders
    key_file: str | None = None  # of the secret key that hides patients' ids; None: patients.key beside `out`
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class AuditArguments:
    """Radiographs and the folder that their audit is written to."""

    data: tuple[str, ...]  # folders or URIs
    out: str | None = None  # None: audits/ and the name of the first folder
    config: Config = field(default_factory=Config)
    labels: str | None = None  # table of labels, in place of class folders
    key_file: str | None = None  # of the secret key that hides patients' ids; None: patients.key beside `out`
    verbose: bool = False


@dataclass(frozen=True)
class AuditResult:
    audit: Audit
    folder: StoragePath  # of audit.html, links.csv and audit.json


def preprocess(arguments: PreprocessArguments, report: Report = print_line) -> Dataset:
    """Write the shards of the radiographs, unless they are written already.

    Raises:
        UsageError: the data or the folder for the shards cannot be used.
    """
    out = storage_path(arguments.out)
    key = patient_key(arguments.key_file, out.parent)
    source = find_radiographs(arguments.data, arguments.labels, arguments.config, key, report)
    return prepare_dataset(source, out, arguments.config, lambda: start_ray(arguments.verbose), report)


def audit(arguments: AuditArguments, report: Report = print_line) -> AuditResult:
    """Look at every radiograph, and write what was found; no shards are written.

    Raises:
        UsageError: the data or the folder for the audit cannot be used.
    """
    from fracture.preparation.output import check_outside_data, write_audit
    from fracture.preparation.scan import scan_source

    out = storage_path(arguments.out or f"audits/{storage_path(arguments.data[0]).name}")
    key = patient_key(arguments.key_file, out.parent)
    source = find_radiographs(arguments.data, arguments.labels, arguments.config, key, report)
    check_outside_data(source, out)
    start_ray(arguments.verbose)
    with ProgressBars() as bars:
        scanned = scan_source(source, out, arguments.config.data, bars.show)
    write_audit(out, scanned)
    return AuditResult(scanned.audit, out)


def find_radiographs(
    data: Sequence[str], labels: str | None, config: Config, key: PatientKey, report: Report
) -> Source:
    """List the radiographs, and report where they are and what was left out."""
    from fracture.preparation.source import describe_source, find_source

    roots = [storage_path(folder) for folder in data]
    with ProgressBars() as bars:
        source = find_source(roots, config.data, storage_path(labels) if labels else None, key, bars.show)
    for line in describe_source(source):
        report(line)
    if key.state:
        report(f"key        {key.state}")
    return source


def prepare_dataset(
    source: Source,
    out: StoragePath,
    config: Config,
    start: Callable[[], None],
    report: Report,
    before: StoragePath | None = None,
) -> Dataset:
    """Write the shards of `source` into `out`, unless they are there already, and report what was found.

    Args:
        start: called when Ray is needed.
        before: manifest and files of an earlier dataset, whose split is kept.

    Raises:
        UsageError: the data or the folder cannot be used, or another job is writing to the folder.
    """
    from fracture.preparation.audit import format_audit
    from fracture.preparation.output import (
        OUTPUT_LOCK,
        check_output_folder,
        find_finished,
        list_changed_settings,
        read_audit,
    )
    from fracture.preparation.scan import scan_source
    from fracture.preparation.split import check_sources
    from fracture.preparation.write import summarize_split, write_dataset

    if config.data.folds == "source":
        check_sources([file.origin for file in source.files], [file.label for file in source.files])
    manifest = find_finished(source, out, config.data, before)
    state = "unchanged since they were written"
    if manifest is None:
        changed = list_changed_settings(out, config.data)
        check_output_folder(source, out)
        with hold_output_lock(out / OUTPUT_LOCK, f"the folder {out}", report):
            start()
            with ProgressBars() as bars:
                scanned = scan_source(source, out, config.data, bars.show, keep_pixels=True)
                manifest = write_dataset(scanned, out, config.data, bars.show, before)
        state = f"written in place of those with other settings: {'; '.join(changed)}" if changed else "written"
    for line in [*format_audit(read_audit(out)), *summarize_split(manifest)]:
        report(line)
    report(f"shards     {out} ({state}; audit.html shows the audit)")
    return read_dataset(out)


def prepare_run_data(
    arguments: RunArguments, config: Config, report: Report, batch_sizes: Sequence[int] = ()
) -> Dataset:
    """Read the named shards, or prepare the named data, or sample radiographs where neither is named.

    A run that has begun goes on with its own shards, although its data may have grown: to prepare the data again would
    remove them.

    Args:
        batch_sizes: of the trainings on the data; empty for one training with `config`.

    Raises:
        UsageError: the data cannot be used, or a batch would be larger; that is found out before the data is scanned.
    """
    from fracture.preparation.output import find_finished, name_output_folder
    from fracture.training.checks import check_batch_size

    if arguments.shards:
        return read_dataset(storage_path(arguments.shards))

    def start() -> None:
        start_ray(arguments.verbose, to_train=True)
        check_capacity(config.compute)  # fails before the radiographs are scanned, which takes long

    storage = storage_path(arguments.storage)
    data = arguments.data or (make_sample_radiographs(config, storage, report),)
    key = patient_key(arguments.key_file, storage)
    source = find_radiographs(data, arguments.labels, config, key, report)
    card = _read_begun_card(arguments.folder)
    if card and _has_former_suffix(card, config):
        config = with_settings(config, {"data.copy_suffix": FORMER_COPY_SUFFIX})
    out = storage / "shards" / name_output_folder(source, config.data)
    dataset = _find_begun_dataset(arguments.folder, card, out)
    if dataset and find_finished(source, out, config.data) is None:
        report(f"data       or program has changed since {arguments.run!r} began; it goes on with its own shards")
        report(f"shards     {out}")
        return dataset
    check_batch_size(max(batch_sizes, default=config.training.batch_size), len(source.files))
    return prepare_dataset(source, out, config, start, report)


def _read_begun_card(run: StoragePath) -> dict[str, Any] | None:
    """Return what the run, or a fold or trial of it, began with; None where nothing has begun."""
    from fracture.training.checks import RUN_CARD
    from fracture.tuning.space import RESULTS

    cards = [info for info in run.files() if info.base_name in (RUN_CARD, RESULTS)]
    return StoragePath(run.filesystem, cards[0].path).read_json() if cards else None  # the others began so, too


def _has_former_suffix(card: dict[str, Any], config: Config) -> bool:
    """Return whether the run began with an earlier version's `data.copy_suffix`, in place of which none is given."""
    began_with = card["recipe"] if "recipe" in card else card["settings"]  # of a run, or of a search
    is_given = "copy_suffix" in config.data.model_fields_set
    return not is_given and began_with["data"].get("copy_suffix") == FORMER_COPY_SUFFIX


def _find_begun_dataset(run: StoragePath, card: dict[str, Any] | None, shards: StoragePath) -> Dataset | None:
    """Return the dataset in the folder of shards if the run, or a fold or trial of it, began with it.

    A finished run needs no shards: None.
    """
    from fracture.inference.bundle import is_bundle

    if not card or is_bundle(run / "bundle"):
        return None
    try:
        dataset = read_dataset(shards)
    except UsageError:  # it is made anew, and may be the same again
        return None
    manifest = dataset.manifest
    folds = [manifest.fold(number) for number in range(1, len(manifest.folds) + 1)]
    return dataset if card["dataset"] in {one.fingerprint for one in (manifest, *folds)} else None


def _name_sample(sample: SampleConfig) -> str:
    return f"sample-{sample.images}-{sample.seed}{'-dicom' if sample.format == 'dicom' else ''}"


def make_sample_radiographs(config: Config, storage: StoragePath, report: Report) -> str:
    """Draw sample radiographs into the storage, unless they are there already, and return their folder.

    Raises:
        UsageError: the folder holds other things, or another job is drawing them.
    """
    from fracture.preparation.sample import has_sample, make_sample

    folder = storage / "data" / _name_sample(config.sample)
    report("sample     no --data and no --shards: training on SYNTHETIC sample radiographs, to try the job")
    if not has_sample(folder, config.sample):
        lock = storage / "locks" / folder.name  # not in the folder, which is removed where it is of another version
        with hold_output_lock(lock, f"the sample {folder}", report), ProgressBars() as bars:
            make_sample(folder, config.sample, lambda done: bars.show("draw sample", done, config.sample.images))
    return str(folder)
