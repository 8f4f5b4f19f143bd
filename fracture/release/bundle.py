"""What a run hands over: one folder with the model and everything needed to judge and use it.

`bundle.json` is written last: a folder without it is not a bundle.
"""

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fracture.config import Config
from fracture.errors import UsageError
from fracture.evaluation.metrics import Metrics
from fracture.input.shards import Manifest
from fracture.labels import CLASS_NAMES
from fracture.storage import Place

FORMAT_VERSION = 1
THRESHOLD = 0.5  # probability from which a fracture is called


def export_model(model: Any, bundle: Place) -> None:
    """Writes `model.keras` (for tf_keras) and `saved_model/` (for TensorFlow alone) into the bundle's folder.

    The SavedModel takes [N, H, W, 1] float32 in [0, 255] by `serve`, uint8 by `serve_uint8`.
    """
    import tensorflow as tf

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
    bundle: Place, config: Config, manifest: Manifest, run: dict[str, Any], val: Metrics, test: Metrics
) -> dict[str, Any]:
    """Adds `bundle.json` to an exported model.

    Args:
        run: name, epochs trained, best epoch, workers and precision of the training.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "synthetic": manifest.synthetic,
        "class_names": list(CLASS_NAMES),
        "input": {"shape": [None, manifest.image_size, manifest.image_size, 1], "range": [0, 255], "colour": "grey"},
        "output": "probability of a fracture",
        "threshold": THRESHOLD,
        "metrics": {"val": val.as_dict(), "test": test.as_dict()},
        "dataset": {
            "fingerprint": manifest.fingerprint,
            "counts": manifest.counts,
            "copies": manifest.copies.model_dump(),
            "official_split": manifest.official_split,
        },
        "run": run,
        "config": config.model_dump(mode="json"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("tensorflow", "tf_keras", "ray", "pyarrow", "numpy")},
    }
    (bundle / "bundle.json").write_json(content)
    return content


def read_test_metrics(bundle: Place) -> Metrics | None:
    """The test figures of a finished bundle; None where there is none.

    Raises:
        UsageError: the bundle is of another format.
    """
    file = bundle / "bundle.json"
    if not file.is_file():
        return None
    content = file.read_json()
    if content.get("format_version") != FORMAT_VERSION:
        raise UsageError(
            f"{bundle} is of bundle format {content.get('format_version')}, and this program reads {FORMAT_VERSION}. "
            "Read it with the version that wrote it, or train anew under another --run name."
        )
    return Metrics(**content["metrics"]["test"])
