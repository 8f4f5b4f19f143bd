"""The end of a run: from the workers' scores to a model with its figures and its report.

`bundle.json` is written last. A job that is killed before it goes on here when it is started again: its workers find
nothing to train, score again, and all of this is done anew.
"""

from typing import TYPE_CHECKING

import numpy as np

from fracture.config import Config, flatten
from fracture.dataset.format import Dataset
from fracture.evaluation.metrics import Evaluation
from fracture.storage import StoragePath
from fracture.training.checkpoint import BACKBONE
from fracture.training.checkpoint_folder import BEST, read_state
from fracture.training.checks import describe_initial_weights
from fracture.training.launch import Outcome

if TYPE_CHECKING:
    from fracture.inference.bundle import Bundle


def finish_run(
    run: StoragePath, config: Config, dataset: Dataset, outcome: Outcome, initial: "Bundle | None" = None
) -> dict[str, Evaluation]:
    """Choose the operating point on validation, export the model, test it once, explain it, and write the report.

    Args:
        run: the run's folder, with the best weights and the workers' scores.
        initial: the model whose weights the training began with.

    Returns:
        The figures of each split and part of a split.

    Raises:
        RunError: scores are missing, the disk is full, or the store fails.
    """
    from fracture.evaluation.devices import hide_gpus
    from fracture.evaluation.feature_space import compute_features, fit_feature_space
    from fracture.evaluation.gallery import make_gallery, write_gallery
    from fracture.evaluation.operating_point import choose_operating_point
    from fracture.evaluation.report import Report, add_outcomes, evaluate_run, list_caveats, write_report
    from fracture.evaluation.scores import calibrate_scores, gather_scores, read_scores
    from fracture.evaluation.verdict import summarise_properties
    from fracture.inference.bundle import build_final_model, export_model, versions, write_bundle
    from fracture.models import cut_at_features

    workers, bundle = outcome.workers, run / "bundle"
    operating_point = choose_operating_point(read_scores(run, dataset, "val", workers), config.evaluation)
    hide_gpus()  # they are the workers'
    weights = read_state(run / BEST).best_weights
    model = build_final_model(config, dataset.manifest.pixel_mean, dataset.manifest.pixel_std, weights)
    export_model(model, operating_point, bundle)  # and from here on the model's probabilities are calibrated
    rows = {"train": np.arange(dataset.rows("train"))}
    space = fit_feature_space(*compute_features(cut_at_features(model), dataset, rows))
    test = calibrate_scores(read_scores(run, dataset, "test", workers), operating_point)
    gallery = make_gallery(model, test, dataset, operating_point.threshold)
    write_gallery(run, gallery)

    scores = gather_scores(run, dataset, workers, operating_point)
    evaluations = evaluate_run(scores, dataset, operating_point.threshold, config.evaluation.study_probability)
    add_outcomes(evaluations, scores, operating_point, config.evaluation.study_probability)
    training = {
        "name": run.name,
        "epochs": len(outcome.history),
        "best_epoch": outcome.best_epoch,
        "workers": workers,
        "precision": outcome.precision,
        "initial_weights": describe_initial_weights(config, initial),
    }
    facts = {f"run.{key}": value for key, value in training.items()} | {"dataset": dataset.manifest.fingerprint}
    facts |= versions() | dict(flatten(config.model_dump(mode="json", exclude={"tune"})))
    caveats = list_caveats(dataset.manifest)
    report = Report(
        f"Run {run.name}",
        dataset,
        operating_point,
        evaluations,
        outcome.history,
        outcome.best_epoch,
        facts,
        caveats,
        study_probability=config.evaluation.study_probability,
        gallery=gallery,
    )
    write_report(run / "report", report, scores)
    write_bundle(
        bundle,
        config,
        dataset,
        training,
        operating_point,
        evaluations,
        initial,
        caveats,
        gallery.similarity,
        space,
        summarise_properties(dataset, dataset.read_columns("train", ["source", "radiograph_id"])),
    )
    for temporary in (BEST, BACKBONE):  # all of it is in the bundle
        (run / temporary).delete()
    return evaluations
