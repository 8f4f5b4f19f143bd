"""Score a finished model, or the mean of several, on radiographs that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fracture.config import Config, with_settings
from fracture.dataset.format import Dataset, Manifest, read_dataset
from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES
from fracture.progress.bars import ProgressBars
from fracture.runtime.cluster import start_ray
from fracture.storage import StoragePath, storage_path
from fracture.workflows.arguments import Report, patient_key, print_line
from fracture.workflows.preprocess import find_radiographs, prepare_dataset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyarrow import Table

    from fracture.evaluation.metrics import Evaluation
    from fracture.evaluation.operating_point import OperatingPoint
    from fracture.evaluation.pointing import PointingGame
    from fracture.evaluation.verdict import Verdict
    from fracture.inference.adaptation import AlignedFigures
    from fracture.inference.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class ScoringArguments:
    """Radiographs or shards that a finished model is scored on.

    Raises:
        UsageError: not exactly one of `data` and `shards` is given, or `labels` comes without `data`.
    """

    out: str  # folder or URI for what is written
    data: tuple[str, ...] = ()  # folders or URIs of radiographs; all of them are test
    labels: str | None = None  # table of the labels of `data`
    key_file: str | None = None  # of the secret key that hides patients' ids; None: patients.key beside `out`
    shards: str | None = None  # folder or URI of shards with a test split, in place of `data`
    config: Config = field(default_factory=Config)  # how `data` is prepared, but for the image size; who scores
    verbose: bool = False

    def __post_init__(self) -> None:
        if bool(self.data) == bool(self.shards):
            raise UsageError("give either --data or --shards: the radiographs that the model is scored on")
        if self.labels and not self.data:
            raise UsageError("--labels belongs to --data; --shards have their labels. Leave one out.")


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(ScoringArguments):
    bundles: tuple[str, ...]  # folders or URIs; of several, the probabilities are averaged
    flips: bool = False  # whether each image is averaged with its mirror image


@dataclass(frozen=True)
class EvaluateResult:
    evaluations: dict[str, Evaluation]  # "test", and one for each origin
    own: Evaluation | None  # the model's figures on its own test; None for a mean of several models or with flips
    operating_point: OperatingPoint
    models: int
    left_out: int  # images that a model was trained on, or that share a radiograph or patient with one
    caveats: list[str]
    pointing: PointingGame | None  # where a single model was scored, and enough fractures have boxes
    alignment: AlignedFigures | None  # where a single model with a backbone was scored, not adapted
    verdict: Verdict
    page: StoragePath  # report.html


def evaluate(arguments: EvaluateArguments, report: Report = print_line) -> EvaluateResult:
    """Score the models on what is new to them, and write the report, `predictions.parquet` and `metrics.json`.

    Raises:
        UsageError: a bundle, the data or the folder for the report cannot be used, nothing is new to the models, or no
            worker fits.
        RunError: workers are lost too often.
    """
    from fracture.evaluation.feature_space import are_unlike, describe_distances
    from fracture.evaluation.gallery import make_gallery
    from fracture.evaluation.metrics import as_json, average_by_radiograph
    from fracture.evaluation.operating_point import mean_operating_point
    from fracture.evaluation.report import Report as EvaluationReport
    from fracture.evaluation.report import add_outcomes, evaluate_run, list_caveats, write_report
    from fracture.evaluation.scores import write_predictions
    from fracture.evaluation.verdict import describe_differences, judge, summarise_properties
    from fracture.inference.adaptation import compare_aligned
    from fracture.inference.bundle import read_bundle, versions
    from fracture.inference.scoring import score_rows

    bundles, out = [read_bundle(storage_path(bundle)) for bundle in arguments.bundles], storage_path(arguments.out)
    dataset, is_new = prepare_test_data(arguments, bundles, report)
    if not is_new.any():
        which = "the model was" if len(bundles) == 1 else "at least one of the models was"
        raise UsageError(
            f"{which} trained on every one of these {len(is_new)} images, or on others of their radiograph or patient: "
            "they cannot test it. Name radiographs that are new to it."
        )
    with ProgressBars() as bars:
        config, start, rows = arguments.config, partial(start_ray, arguments.verbose), {"test": is_new}
        scores = score_rows(bundles, dataset, rows, config, start, bars.show, flips=arguments.flips)
    operating_point = mean_operating_point([bundle.operating_point for bundle in bundles])
    dataset = Dataset(dataset.folder, count_scored(dataset.manifest, scores))
    notes = [*model_caveats(bundles), *list_caveats(dataset.manifest)]
    study_probability = bundles[0].config.evaluation.study_probability
    evaluations = evaluate_run(scores, dataset, operating_point.threshold, study_probability)
    as_a_whole, differences = False, []
    if len(bundles) == 1:  # several may have been trained on different images
        columns = (scores[name].to_numpy() for name in ("label", "radiograph_id", "distance"))
        (distances,), space = average_by_radiograph(*columns)[1], bundles[0].load_feature_space()
        as_a_whole, differences = are_unlike(distances, space), describe_distances(distances, space)
        differences += describe_differences(summarise_properties(dataset, scores), bundles[0].properties)
    add_outcomes(evaluations, scores, operating_point, study_probability, as_a_whole=as_a_whole)
    groups = dataset.manifest.groups["test"]
    verdict = judge(evaluations["test"], groups, bundles[0].config.evaluation, differences)
    named = ", ".join(str(bundle.folder) for bundle in bundles)
    facts = {"bundle": named, "flips": arguments.flips, "dataset": dataset.manifest.fingerprint} | versions()
    own, gallery, alignment = None, None, None
    if len(bundles) == 1 and not arguments.flips:  # else the test and the maps would not be those of what is scored
        own = test if (test := bundles[0].evaluations["test"])["radiograph"].count else None
        model = bundles[0].build_model()
        if bundles[0].config.backbone and not bundles[0].adapted:
            with ProgressBars() as bars:
                alignment = compare_aligned(model, dataset, scores, bars.show)
        gallery = make_gallery(model, scores, dataset, operating_point.threshold)
    content = EvaluationReport(
        _title(arguments),
        dataset,
        operating_point,
        evaluations,
        history=[],
        best_epoch=0,
        facts=facts,
        caveats=notes,
        own_test=own,
        study_probability=study_probability,
        models=len(bundles),
        gallery=gallery,
        verdict=verdict,
        alignment=alignment.summary if alignment else "",
    )
    write_report(out, content, scores)
    write_predictions(out, scores)
    pointing = gallery.pointing if gallery else None
    figures = as_json(evaluations) | {"verdict": verdict.model_dump()}
    figures |= {"aligned": alignment.model_dump()} if alignment else {}
    (out / "metrics.json").write_json(figures | ({"pointing_game": pointing.model_dump()} if pointing else {}))
    left_out = int((~is_new).sum())
    page = out / "report.html"
    return EvaluateResult(
        evaluations, own, operating_point, len(bundles), left_out, notes, pointing, alignment, verdict, page
    )


def _title(arguments: EvaluateArguments) -> str:
    count = len(arguments.bundles)
    what = arguments.bundles[0] if count == 1 else f"The mean of {count} models"
    return f"{what} elsewhere{', each image with its mirror image' if arguments.flips else ''}"


def prepare_test_data(
    arguments: ScoringArguments, bundles: Sequence[Bundle], report: Report = print_line
) -> tuple[Dataset, np.ndarray]:
    """Read or write the shards to score, and say which of their test rows are new to the models.

    Returns:
        The dataset, and one bool per row of its test split: false where a model was trained on a file of the same
        radiograph or patient.

    Raises:
        UsageError: a run or a bundle would be overwritten, the bundles cannot be averaged, or the shards do not fit.
    """
    out = storage_path(arguments.out)
    check_out(out)
    image_size = _common_image_size(bundles)
    if arguments.data:
        needed = {"data.image_size": image_size, "data.split": "test", "data.folds": 0}
        config = with_settings(arguments.config, needed)
        try:
            source = find_radiographs(
                arguments.data, arguments.labels, config, patient_key(arguments.key_file, out.parent), report
            )
        except UsageError as error:
            if arguments.labels or not all(storage_path(folder).is_dir() for folder in arguments.data):
                raise
            hint = "If there are no labels, fracture predict says how many images are unlike the training images."
            raise UsageError(f"{error} {hint}") from None
        dataset = prepare_dataset(source, out / "shards", config, lambda: start_ray(arguments.verbose), report)
    else:
        dataset = read_dataset(storage_path(arguments.shards))
    if "test" not in dataset.splits or dataset.image_size != image_size:
        raise UsageError(
            f"{dataset.folder}: the model needs a test split of images of {image_size} pixels; these shards have "
            f"{', '.join(dataset.splits)} of {dataset.image_size}. Name the radiographs with --data instead."
        )
    is_new = [bundle.find_unseen_rows(dataset, ["test"])["test"] for bundle in bundles]
    return dataset, np.logical_and.reduce(is_new)


def check_out(out: StoragePath) -> None:
    """Raise UsageError where the folder for what is written is a run or a bundle."""
    from fracture.inference.bundle import is_bundle

    if (out / "run.json").is_file() or is_bundle(out):
        raise UsageError(f"--out {out} is a run or a bundle, whose files would be replaced. Name another folder.")


def _common_image_size(bundles: Sequence[Bundle]) -> int:
    first = bundles[0]
    for number, bundle in enumerate(bundles):
        if bundle.folder in [other.folder for other in bundles[:number]]:
            raise UsageError(f"--bundle {bundle.folder} is named twice, and would count double. Name it once.")
        if bundle.image_size != first.image_size:
            raise UsageError(
                f"{bundle.folder} takes images of {bundle.image_size} pixels, and {first.folder} of "
                f"{first.image_size}: they cannot be averaged on the same shards. Name bundles of one data.image_size."
            )
    return first.image_size


def model_caveats(bundles: Sequence[Bundle]) -> list[str]:
    """Return the notices of models that were trained on synthetic radiographs, and of adapted ones."""
    notices, synthetic = [], sum(bundle.synthetic for bundle in bundles)
    if synthetic:
        which = "it was" if len(bundles) == 1 else f"{synthetic} of {len(bundles)} were"
        notices.append(f"SYNTHETIC MODEL: {which} trained on generated sample radiographs, not on real ones.")
    for bundle in bundles:
        if bundle.adapted:
            which = "" if len(bundles) == 1 else f" {bundle.folder}:"
            notices.append(f"ADAPTED MODEL:{which} {bundle.adapted.describe()}. {bundle.adapted.describe_test()}")
    return notices


def count_scored(manifest: Manifest, scores: Table) -> Manifest:
    """Return the manifest with the counts of what was scored."""
    rows = list(zip(scores["label"].to_pylist(), scores["group_id"].to_pylist(), strict=True))
    of_class = {name: [group for label, group in rows if label == i] for i, name in enumerate(CLASS_NAMES)}
    counts = {"test": {name: len(groups) for name, groups in of_class.items()}}
    groups = {"test": {name: len(set(groups)) for name, groups in of_class.items()}}
    # Its leakage is between its own splits; what this model has seen of it is left out.
    return manifest.model_copy(update={"counts": counts, "groups": groups, "leakage": {}})
