"""What a run hands over: one folder with the model and everything needed to judge and use it.

`bundle.json` is written last: a folder without it is not a bundle.
"""

import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fracture.config import Config
from fracture.errors import UsageError
from fracture.evaluation.calibration import Decision
from fracture.evaluation.metrics import Evaluation, Metrics, as_json
from fracture.input.shards import Manifest, read_seen
from fracture.labels import CLASS_NAMES
from fracture.storage import Place

FORMAT_VERSION = 4
TRAINED_ON = "trained_on.parquet"


def export_model(model: Any, decision: Decision, bundle: Place) -> None:
    """Writes `model.keras` (for tf_keras) and `saved_model/` (for TensorFlow alone) into the bundle's folder.

    The SavedModel takes [N, H, W, 1] float32 in [0, 255] by `serve`, uint8 by `serve_uint8`.

    Args:
        decision: its calibration goes into the last layer's weights, so that both give calibrated probabilities.
    """
    import tensorflow as tf

    logit = model.get_layer("logit")
    kernel, bias = logit.get_weights()
    logit.set_weights([kernel / decision.temperature, bias / decision.temperature + decision.offset])

    module = tf.Module()
    module.model = model
    for name, dtype in (("serve", tf.float32), ("serve_uint8", tf.uint8)):
        images = tf.TensorSpec(model.input_shape, dtype, name="images")
        setattr(module, name, tf.function(lambda images: _probabilities(model, images), input_signature=[images]))
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model.keras")
        tf.saved_model.save(module, f"{folder}/saved_model", signatures={"serving_default": module.serve})
        bundle.upload(Path(folder))


def _probabilities(model: Any, images: Any) -> Any:
    import tensorflow as tf

    return model(tf.cast(images, tf.float32), training=False)


def write_bundle(
    bundle: Place,
    config: Config,
    manifest: Manifest,
    shards: Place,
    run: Mapping[str, Any],
    decision: Decision,
    evaluations: Mapping[str, Evaluation],
) -> None:
    """Adds `bundle.json` to an exported model, and the hashes of the files that it has seen.

    Args:
        run: name, epochs trained, best epoch, workers and precision of the training.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "synthetic": manifest.synthetic,
        "class_names": list(CLASS_NAMES),
        "input": {
            "shape": [None, manifest.image_size, manifest.image_size, 1],
            "range": [0, 255],
            "colour": "grey",
            "resize": "bilinear with antialiasing to the square; the aspect is not kept",
        },
        "output": "probability of a fracture, calibrated",
        "decision": decision.model_dump(),
        "metrics": as_json(evaluations),
        "dataset": {
            "fingerprint": manifest.fingerprint,
            "counts": manifest.counts,
            "groups": manifest.groups,
            "split": manifest.split,
            "split_reason": manifest.split_reason,
            "leakage": {split: leak.model_dump() for split, leak in manifest.leakage.items()},
            "alarms": manifest.alarms,
        },
        "run": run,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
    }
    (bundle / TRAINED_ON).write_parquet(pa.table({"sha256": read_seen(shards, manifest, "sha256")}))
    (bundle / "bundle.json").write_json(content)


def versions() -> dict[str, str]:
    named = {name: version(name) for name in ("tensorflow", "tf_keras", "ray", "pyarrow", "numpy")}
    return {"python": platform.python_version()} | named


@dataclass(frozen=True)
class Bundle:
    """A finished bundle, as read."""

    place: Place
    image_size: int
    synthetic: bool  # trained on drawings
    decision: Decision
    evaluations: dict[str, Evaluation]

    def trained_on(self) -> set[bytes]:
        """SHA-256 of the files that training or validation has seen."""
        return set((self.place / TRAINED_ON).read_parquet()["sha256"].to_pylist())

    @contextmanager
    def model(self) -> Iterator[Any]:
        """A model with Keras' `predict_on_batch`, of uint8 images [N, S, S, 1] to probabilities [N, 1]."""
        import tensorflow as tf

        with tempfile.TemporaryDirectory() as folder:
            (self.place / "saved_model").download(Path(folder))
            yield _Served(tf.saved_model.load(folder))


class _Served:
    def __init__(self, served: Any) -> None:
        self._served = served

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        return self._served.serve_uint8(images).numpy()


def is_bundle(place: Place) -> bool:
    return (place / "bundle.json").is_file()


def read_bundle(place: Place) -> Bundle:
    """
    Raises:
        UsageError: no bundle there, or one of another format.
    """
    if not is_bundle(place):
        raise UsageError(f"{place} is no bundle: bundle.json is missing. A finished run has one, in RUN/bundle.")
    content = (place / "bundle.json").read_json()
    if content.get("format_version") != FORMAT_VERSION:
        raise UsageError(
            f"{place} is of bundle format {content.get('format_version')}, and this program reads {FORMAT_VERSION}. "
            "Read it with the version that wrote it, or train anew under another --run name."
        )
    return Bundle(
        place=place,
        image_size=content["input"]["shape"][1],
        synthetic=content["synthetic"],
        decision=Decision.model_validate(content["decision"]),
        evaluations={
            part: {unit: Metrics.model_validate(metrics) for unit, metrics in evaluation.items()}
            for part, evaluation in content["metrics"].items()
        },
    )
