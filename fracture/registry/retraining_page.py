"""The page of one retraining: the new data, how the two models compare, and the decision."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fracture.dataset.format import Dataset, images_of
from fracture.evaluation.metrics import as_json, average_by_radiograph
from fracture.evaluation.plots import plot_drifts, plot_rocs
from fracture.evaluation.report import NAMES
from fracture.inference.bundle import Bundle
from fracture.labels import CLASS_NAMES
from fracture.page import picture, png, render
from fracture.registry.data_changes import DataChanges
from fracture.registry.gate import Comparison
from fracture.registry.registry import Rule
from fracture.storage import StoragePath

_SHOWN = 12  # radiographs on which the models disagree


@dataclass(frozen=True)
class Retraining:
    """Content of the page."""

    tick: str
    registry: StoragePath
    version: int
    champion: int | None  # version that the challenger was compared with
    initial_weights: str
    challenger_bundle: Bundle
    champion_bundle: Bundle | None
    comparison: Comparison
    changes: DataChanges
    rules: list[Rule]
    dataset: Dataset
    caveats: list[str]

    @property
    def promoted(self) -> bool:
        return all(rule.passed for rule in self.rules)

    @property
    def reason(self) -> str:
        """Why the version was promoted or rejected, in one line."""
        failed = [f"{rule.name}: {rule.explanation}" for rule in self.rules if not rule.passed]
        return "; ".join(failed) or f"all {len(self.rules)} rules hold"

    def as_json(self) -> dict[str, Any]:
        """Return the content of `decision.json`."""
        comparison, changes = self.comparison, self.changes
        models = {"challenger": comparison.challenger}
        if comparison.champion:
            models["champion"] = comparison.champion
        return {
            "tick": self.tick,
            "version": self.version,
            "champion": self.champion,
            "initial_weights": self.initial_weights,
            "decision": "promoted" if self.promoted else "rejected",
            "reason": self.reason,
            "rules": [rule.model_dump() for rule in self.rules],
            "dataset": self.dataset.manifest.fingerprint,
            "test_images_left_out": comparison.left_out,
            "models": as_json(models),
            "data_changes": {
                "new_images": changes.new_images,
                "new_radiographs": changes.new_radiographs,
                "unreadable_files": changes.unreadable_files,
                "removed_files": changes.removed_files,
                "origins": changes.origins,
                "conflicting": changes.conflicting,
                "lost_from_test": changes.lost_from_test,
                "fracture_share": {"before": changes.fracture_share_before, "now": changes.fracture_share_now},
                "drift": {drift.name: drift.distance for drift in changes.drifts},
            },
        }


def render_retraining_page(retraining: Retraining) -> bytes:
    """Return self-contained HTML, with pictures of the radiographs on which the models disagree."""
    labels, models, rows = _average_by_radiograph(retraining)
    caption = "\n".join(retraining.caveats)
    plots = {}
    if len(np.unique(labels)) == 2:
        plots["roc"] = png(plot_rocs(labels, models, caption))
    if retraining.changes.drifts:
        measures = {drift.name: (drift.before, drift.now) for drift in retraining.changes.drifts}
        plots["drift"] = png(plot_drifts(measures))
    return render(
        "retraining.html",
        retraining=retraining,
        names=NAMES,
        classes=list(reversed(CLASS_NAMES)),
        plots=plots,
        disagreements=_find_disagreements(retraining, labels, models, rows),
        shown=_SHOWN,
    )


def _average_by_radiograph(retraining: Retraining) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Return per radiograph: label, each model's probability, and the row in test of one image."""
    scores = retraining.comparison.scores
    names = {f"version {retraining.version}, the challenger": "challenger"}
    if retraining.champion is not None:
        names[f"version {retraining.champion}, in use"] = "champion"
    labels, radiograph_ids, rows = (scores[name].to_numpy() for name in ("label", "radiograph_id", "row"))
    probabilities = (scores[column].to_numpy() for column in names.values())
    first, means = average_by_radiograph(labels, radiograph_ids, *probabilities)
    return labels[first], dict(zip(names, means, strict=True)), rows[first]


def _find_disagreements(
    retraining: Retraining, labels: np.ndarray, models: dict[str, np.ndarray], rows: np.ndarray
) -> list[dict[str, Any]]:
    """Return the radiographs that only one model calls a fracture, the largest difference first."""
    if retraining.champion_bundle is None:
        return []
    challenger, champion = models.values()
    ours = challenger >= retraining.challenger_bundle.operating_point.threshold
    theirs = champion >= retraining.champion_bundle.operating_point.threshold
    apart = np.flatnonzero(ours != theirs)
    order = apart[np.argsort(-np.abs(challenger - champion)[apart], kind="stable")]
    found = []
    for position, case in enumerate(order):
        right = "the challenger" if ours[case] == bool(labels[case]) else "the champion"
        facts = {"label": CLASS_NAMES[labels[case]], "right": right, "challenger": challenger[case]}
        facts |= {"champion": champion[case], "picture": "", "path": ""}
        if position < _SHOWN:
            row = retraining.dataset.read("test", int(rows[case]), int(rows[case]) + 1)
            facts["picture"] = picture(images_of(row, retraining.dataset.image_size)[0, ..., 0])
            facts["path"] = row["source"][0].as_py()
        found.append(facts)
    return found
