"""Adapt a finished model to few local cases, or to local images without labels, and write it as a new bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fracture.errors import UsageError
from fracture.progress.bars import ProgressBars
from fracture.storage import StoragePath, storage_path
from fracture.workflows.arguments import Report, patient_key, print_line
from fracture.workflows.evaluate import (
    ScoringArguments,
    check_out,
    count_scored,
    model_caveats,
    prepare_test_data,
)

if TYPE_CHECKING:
    from fracture.dataset.format import Dataset
    from fracture.evaluation.adaptation import Choice, LocalCases
    from fracture.evaluation.metrics import Evaluation
    from fracture.inference.batch_prediction import Input
    from fracture.inference.bundle import Adaptation, Bundle


@dataclass(frozen=True, kw_only=True)
class AdaptArguments(ScoringArguments):
    """A model, and what it is adapted to.

    Raises:
        UsageError: there is nothing to adapt to, or see `ScoringArguments`.
    """

    bundle: str  # folder or URI
    align: tuple[str, ...] = ()  # folders or URIs of images, which need no labels

    def __post_init__(self) -> None:
        if not (self.align or self.data or self.shards):
            raise UsageError("give --data or --shards, local cases with labels, or --align, local images without")
        if self.data or self.shards or self.labels:
            super().__post_init__()


@dataclass(frozen=True)
class AdaptResult:
    adaptation: Adaptation  # its figures are those on the local cases
    left_out: int  # images that the model was trained on, or that share a radiograph or patient with one
    threshold: float
    caveats: list[str]
    bundle: StoragePath  # the new one


@dataclass(frozen=True)
class _Local:
    """Local images with labels."""

    dataset: Dataset
    rows: dict[str, np.ndarray]  # split -> [rows] bool, true for what is new to the model

    @property
    def left_out(self) -> int:
        return sum(int((~chosen).sum()) for chosen in self.rows.values())


def adapt(arguments: AdaptArguments, report: Report = print_line) -> AdaptResult:
    """Adapt the model, judge it by folds of the local cases, and write OUT/bundle and OUT/predictions.parquet.

    Raises:
        UsageError: the bundle, the data or the folder for the new bundle cannot be used, or the cases are too few.
    """
    from fracture.evaluation.adaptation import check_cases, choose_head
    from fracture.evaluation.feature_space import compute_features, fit_feature_space
    from fracture.evaluation.report import list_caveats, list_training_caveats
    from fracture.evaluation.scores import write_predictions
    from fracture.evaluation.verdict import summarise_properties
    from fracture.inference.adaptation import align, compute_cases, set_last_layer
    from fracture.inference.bundle import export_model, read_bundle, write_adapted_bundle
    from fracture.models import cut_at_features

    initial, out = read_bundle(storage_path(arguments.bundle)), storage_path(arguments.out)
    _check_bundles(initial, out)
    images = _find_images(arguments, initial, out, report)
    local = _find_cases(arguments, initial, report)
    model, aligned_on, cases, choice = initial.build_model(), 0, None, None
    space, properties = initial.load_feature_space(), initial.properties
    threshold, figures = initial.operating_point.threshold, {}
    with ProgressBars() as bars:
        if local:
            cases = compute_cases(model, initial, local.dataset, local.rows, bars.show)
            figures["unadapted"] = cases.evaluate(threshold)
            check_cases(cases, figures["unadapted"], local.left_out)
        if images:
            aligned_on = align(model, images, initial.image_size, bars.show)
        if images and local:
            cases = compute_cases(model, initial, local.dataset, local.rows, bars.show)
            figures["aligned"] = cases.evaluate(threshold)
    # The initial model's calibration is in its weights.
    operating_point = initial.operating_point.model_copy(update={"temperature": 1.0, "offset": 0.0})
    if local and cases:
        choice = choose_head(cases, list(figures.values())[-1])
        figures |= choice.figures
        chosen = {split: np.flatnonzero(is_new) for split, is_new in local.rows.items()}
        space = fit_feature_space(*compute_features(cut_at_features(model), local.dataset, chosen)) or space
        properties = summarise_properties(local.dataset, cases.rows)
        operating_point = choice.judged.head.operating_point
        set_last_layer(model, choice.judged.head.layer)
        write_predictions(out, choice.judged.scores)
    caveats = list_training_caveats(initial.caveats)
    if local and cases:
        own = list_caveats(count_scored(local.dataset.manifest, cases.rows))  # by folds, they are the test
        caveats += [f"LOCAL CASES, {line}" for line in own if line not in caveats]
    adaptation = _describe(initial, local, cases, choice, figures, aligned_on)
    export_model(model, operating_point, out / "bundle")
    write_adapted_bundle(
        out / "bundle",
        initial,
        operating_point,
        choice.judged.evaluation if choice else None,
        adaptation,
        local.dataset if local else None,
        local.rows if local else {},
        caveats,
        space,
        properties,
    )
    caveats = [*model_caveats([initial]), *caveats]
    left_out = local.left_out if local else 0
    return AdaptResult(adaptation, left_out, operating_point.threshold, caveats, out / "bundle")


def _check_bundles(initial: Bundle, out: StoragePath) -> None:
    from fracture.inference.bundle import is_bundle

    check_out(out)
    if is_bundle(out / "bundle"):
        raise UsageError(f"--out {out} holds a bundle, which is never changed. Name another folder.")
    if initial.adapted:
        raise UsageError(
            f"--bundle {initial.folder} is adapted already: {initial.adapted.describe()}. Name the bundle that it was "
            "made from, with all local cases."
        )


def _find_images(arguments: AdaptArguments, initial: Bundle, out: StoragePath, report: Report) -> list[Input]:
    """List the images that features are aligned to."""
    from fracture.inference.adaptation import check_alignable
    from fracture.inference.batch_prediction import check_outside, find_inputs

    if not arguments.align:
        return []
    key, roots = patient_key(arguments.key_file, out.parent), [storage_path(folder) for folder in arguments.align]
    with ProgressBars() as bars:
        images = find_inputs(roots, initial.image_size, key, bars.show)
    if key.state:
        report(f"key        {key.state}")
    check_outside("--out", out, images)
    check_alignable(initial, images)
    return images


def _find_cases(arguments: AdaptArguments, initial: Bundle, report: Report) -> _Local | None:
    """Find the local cases that are new to the model: of shards those of training and validation, if there are any.

    So test is left for `fracture evaluate`.
    """
    if not (arguments.data or arguments.shards):
        return None
    dataset, _ = prepare_test_data(arguments, [initial], report)
    splits = [split for split in dataset.splits if split != "test"] or ["test"]
    local = _Local(dataset, initial.find_unseen_rows(dataset, splits))
    if not any(chosen.any() for chosen in local.rows.values()):
        raise UsageError(
            f"the model was trained on every one of these {local.left_out:,} images, or on others of their radiograph "
            "or patient: there is nothing local to adapt to. Name radiographs that are new to it."
        )
    return local


def _describe(
    initial: Bundle,
    local: _Local | None,
    cases: LocalCases | None,
    choice: Choice | None,
    figures: dict[str, Evaluation],
    aligned_on: int,
) -> Adaptation:
    from fracture.evaluation.adaptation import largest_unit
    from fracture.inference.bundle import Adaptation

    bundle = initial.hash_weights()
    if not (local and cases and choice):
        return Adaptation(bundle=bundle, aligned_on=aligned_on)
    metrics = largest_unit(figures["unadapted"])
    fractures = metrics.true_positives + metrics.false_negatives
    return Adaptation(
        bundle=bundle,
        dataset=local.dataset.manifest.fingerprint,
        unit=metrics.unit,
        fractures=fractures,
        normals=metrics.count - fractures,
        images=len(cases.rows),
        groups=metrics.groups,
        aligned_on=aligned_on,
        ridge=choice.ridge,
        figures=figures,
    )
