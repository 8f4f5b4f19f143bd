"""Predict fractures with a finished model, for any number of radiographs."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fracture.errors import UsageError
from fracture.progress.bars import ProgressBars
from fracture.runtime.cluster import start_ray
from fracture.runtime.quiet import silence_native_stderr
from fracture.storage import StoragePath, storage_path
from fracture.workflows.arguments import Report, print_line

if TYPE_CHECKING:
    from pyarrow import Table

    from fracture.inference.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class PredictArguments:
    """A model, radiographs, and the file for the predictions.

    Raises:
        UsageError: not exactly one of `bundle` and `registry` is given.
    """

    data: tuple[str, ...]  # folders, files or URIs of radiographs, or folders of shards
    out: str  # path or URI that ends in .csv or .parquet
    bundle: str | None = None  # folder or URI
    registry: str | None = None  # folder or URI, whose champion is used
    gpu: bool = False  # score on the cluster's GPUs, decode on its CPUs
    verbose: bool = False

    def __post_init__(self) -> None:
        if bool(self.bundle) == bool(self.registry):
            raise UsageError("give either --bundle or --registry: the model to predict with")


@dataclass(frozen=True)
class PredictResult:
    rows: Table  # the columns path, probability, decision and error
    bundle: Bundle
    out: StoragePath
    seconds: float  # for all of it, Ray's start included


def predict(arguments: PredictArguments, report: Report = print_line) -> PredictResult:
    """Write one row for each file or row of shards.

    Raises:
        UsageError: the model, the data or the file for the predictions cannot be used.
    """
    from fracture.inference.batch_prediction import check_output, find_inputs, predict, write_results

    bundle, facts = _read_model(arguments)
    out = storage_path(arguments.out)
    inputs = find_inputs([storage_path(data) for data in arguments.data], bundle.image_size)
    check_output(out, inputs)
    version = f"version {facts['version']}, " if arguments.registry else ""
    report(f"model      {version}{bundle.folder}, threshold {bundle.operating_point.threshold:.3f}")
    report(f"data       {', '.join(arguments.data)}: {sum(map(len, inputs)):,} files")
    started = time.monotonic()
    start_ray(arguments.verbose)
    with nullcontext() if arguments.verbose else silence_native_stderr(), ProgressBars() as bars:
        rows = predict(bundle, inputs, bars.show, gpu=arguments.gpu, verbose=arguments.verbose)
    write_results(out, rows, facts)
    return PredictResult(rows, bundle, out, time.monotonic() - started)


def _read_model(arguments: PredictArguments) -> tuple[Bundle, dict[str, str]]:
    """Return the bundle, and the facts about it that are written beside the predictions."""
    from fracture.inference.bundle import read_bundle
    from fracture.registry.registry import Registry

    if arguments.registry:
        bundle = Registry(storage_path(arguments.registry)).champion_bundle()
    else:
        bundle = read_bundle(storage_path(arguments.bundle))
    facts = {"bundle": str(bundle.folder), "threshold": f"{bundle.operating_point.threshold!r}"}
    return bundle, facts | ({"version": str(int(bundle.folder.name))} if arguments.registry else {})
