"""Predict fractures with a finished model, for any number of radiographs."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fracture.errors import UsageError
from fracture.progress.bars import ProgressBars
from fracture.runtime.cluster import start_ray
from fracture.runtime.quiet import silence_native_stderr
from fracture.storage import StoragePath, storage_path
from fracture.workflows.answer import AnswerArguments, AnswerResult, write_answers
from fracture.workflows.arguments import Report, patient_key, print_line

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
    by: Literal["image", "study"] = "image"  # what a row is of
    key_file: str | None = None  # of the secret key that hides patients' ids; None: patients.key beside `out`
    answers: AnswerArguments = field(default_factory=AnswerArguments)
    gpu: bool = False  # score on the cluster's GPUs, decode on its CPUs
    verbose: bool = False

    def __post_init__(self) -> None:
        if bool(self.bundle) == bool(self.registry):
            raise UsageError("give either --bundle or --registry: the model to predict with")


@dataclass(frozen=True)
class PredictResult:
    rows: Table  # of `batch_prediction.RESULTS`, one for each image
    written: int  # rows of the file: of images, or of studies
    bundle: Bundle
    out: StoragePath
    seconds: float  # for all of it, Ray's start included
    answers: AnswerResult | None  # None where none were asked for


def predict(arguments: PredictArguments, report: Report = print_line) -> PredictResult:
    """Write one row for each file or row of shards.

    Raises:
        UsageError: the model, the data or the file for the predictions cannot be used.
    """
    from fracture.inference.batch_prediction import (
        are_unlike_as_a_whole,
        check_output,
        find_inputs,
        join_by_study,
        predict,
        put_in_doubt,
        write_results,
    )

    bundle, facts = _read_model(arguments)
    out = storage_path(arguments.out)
    key = patient_key(arguments.key_file, out.parent)
    with ProgressBars() as bars:
        inputs = find_inputs([storage_path(data) for data in arguments.data], bundle.image_size, key, bars.show)
    check_output(out, inputs)
    arguments.answers.check(inputs, bundle)
    version = f"version {facts['version']}, " if arguments.registry else ""
    report(f"model      {version}{bundle.folder}, threshold {bundle.operating_point.threshold:.3f}")
    if bundle.adapted:
        report(f"adapted    {bundle.adapted.describe()}")
    report(f"data       {', '.join(arguments.data)}: {sum(map(len, inputs)):,} files")
    if key.state:
        report(f"key        {key.state}")
    started = time.monotonic()
    start_ray(arguments.verbose)
    with nullcontext() if arguments.verbose else silence_native_stderr(), ProgressBars() as bars:
        rows = predict(bundle, inputs, bars.show, gpu=arguments.gpu, verbose=arguments.verbose)
    if are_unlike_as_a_whole(rows, bundle.load_feature_space()):
        rows = put_in_doubt(rows)
    written = rows
    if arguments.by == "study":
        rule = bundle.config.evaluation.study_probability
        written = join_by_study(rows, bundle.operating_point, rule)
    write_results(out, written, facts)
    answers = None
    if arguments.answers.out:
        answers = write_answers(arguments.answers, storage_path(arguments.answers.out), inputs, rows, bundle)
    return PredictResult(rows, len(written), bundle, out, time.monotonic() - started, answers)


def _read_model(arguments: PredictArguments) -> tuple[Bundle, dict[str, str]]:
    """Return the bundle, and the facts about it that are written beside the predictions."""
    from fracture.inference.bundle import read_bundle
    from fracture.registry.registry import Registry

    if arguments.registry:
        bundle = Registry(storage_path(arguments.registry)).champion_bundle()
    else:
        bundle = read_bundle(storage_path(arguments.bundle))
    facts = {"bundle": str(bundle.folder), "threshold": f"{bundle.operating_point.threshold!r}"}
    facts |= {"adapted": bundle.adapted.describe()} if bundle.adapted else {}
    return bundle, facts | ({"version": str(int(bundle.folder.name))} if arguments.registry else {})
