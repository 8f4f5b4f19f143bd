"""One page on one retraining: what came in, how the two models compare, and what was decided."""

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
from fracture.registry.gate import Comparison, Rule
from fracture.storage import StoragePath

_SHOWN = 12  # cases on which the models disagree


@dataclass(frozen=True)
class Retraining:
    """All that the page tells."""

    tick: str
    registry: StoragePath
    version: int
    champion: int | None  # that was compared with
    initial_weights: str
    challenger_bundle: Bundle
    champion_bundle: Bundle | None
    compared: Comparison
    new: DataChanges
    rules: list[Rule]
    dataset: Dataset
    caveats: list[str]

    @property
    def promoted(self) -> bool:
        return all(rule.passed for rule in self.rules)

    @property
    def reason(self) -> str:
        """The decision in a sentence."""
        failed = [f"{rule.name}: {rule.told}" for rule in self.rules if not rule.passed]
        return "; ".join(failed) or f"all {len(self.rules)} rules hold"

    def as_json(self) -> dict[str, Any]:
        """What `decision.json` says."""
        compared, new = self.compared, self.new
        models = {"challenger": compared.challenger} | ({"champion": compared.champion} if compared.champion else {})
        return {
            "tick": self.tick,
            "version": self.version,
            "champion": self.champion,
            "initial_weights": self.initial_weights,
            "decision": "promoted" if self.promoted else "rejected",
            "reason": self.reason,
            "rules": [rule.model_dump() for rule in self.rules],
            "dataset": self.dataset.manifest.fingerprint,
            "test_images_left_out": compared.left_out,
            "models": as_json(models),
            "new": {
                "images": new.images,
                "radiographs": new.radiographs,
                "unreadable": new.unreadable,
                "gone": new.gone,
                "sources": new.origins,
                "conflicts": new.conflicts,
                "share_of_fractures": {"before": new.share_before, "now": new.share_now},
                "drift": {drift.name: drift.distance for drift in new.drifts},
            },
        }


def retraining_page(told: Retraining) -> bytes:
    """Self-contained HTML, with the pictures of the radiographs on which the models disagree."""
    labels, models, rows = _by_radiograph(told)
    caption = "\n".join(told.caveats)
    plots = {}
    if len(np.unique(labels)) == 2:
        plots["roc"] = png(plot_rocs(labels, models, caption))
    if told.new.drifts:
        plots["drift"] = png(plot_drifts({drift.name: (drift.before, drift.now) for drift in told.new.drifts}))
    return render(
        "retraining.html",
        told=told,
        names=NAMES,
        classes=list(reversed(CLASS_NAMES)),
        plots=plots,
        disagreements=_disagreements(told, labels, models, rows),
        shown=_SHOWN,
    )


def _by_radiograph(told: Retraining) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Labels, each model's probabilities, and the row in test of one image."""
    scores = told.compared.scores
    names = {f"version {told.version}, the challenger": "challenger"}
    if told.champion is not None:
        names[f"version {told.champion}, in use"] = "champion"
    labels, radiograph_ids, rows = (scores[name].to_numpy() for name in ("label", "radiograph_id", "row"))
    probabilities = (scores[column].to_numpy() for column in names.values())
    first, means = average_by_radiograph(labels, radiograph_ids, *probabilities)
    return labels[first], dict(zip(names, means, strict=True)), rows[first]


def _disagreements(
    told: Retraining, labels: np.ndarray, models: dict[str, np.ndarray], rows: np.ndarray
) -> list[dict[str, Any]]:
    """Radiographs that one model calls a fracture and the other does not, those apart the most first."""
    if told.champion_bundle is None:
        return []
    challenger, champion = models.values()
    ours = challenger >= told.challenger_bundle.operating_point.threshold
    theirs = champion >= told.champion_bundle.operating_point.threshold
    apart = np.flatnonzero(ours != theirs)
    order = apart[np.argsort(-np.abs(challenger - champion)[apart], kind="stable")]
    found = []
    for position, case in enumerate(order):
        right = "the challenger" if ours[case] == bool(labels[case]) else "the champion"
        facts = {"label": CLASS_NAMES[labels[case]], "right": right, "challenger": challenger[case]}
        facts |= {"champion": champion[case], "picture": "", "path": ""}
        if position < _SHOWN:
            row = told.dataset.read("test", int(rows[case]), int(rows[case]) + 1)
            facts["picture"] = picture(images_of(row, told.dataset.image_size)[0, ..., 0])
            facts["path"] = row["source"][0].as_py()
        found.append(facts)
    return found
