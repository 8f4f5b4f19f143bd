"""A backbone and a head through both phases on real workers, on weights that were drawn: nothing can be downloaded."""

import json
from pathlib import Path

import numpy as np
import pytest

from fracture.config import Config, load_config
from fracture.training.checkpoint import BACKBONE
from tests.conftest import TINY
from tests.integration.conftest import Meddler, start

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


def settings(folder: Path, name: str, *changes: str) -> Config:
    """Begins with drawn weights of that backbone, from a file."""
    from fracture.models.transfer import build_backbone

    file = folder / f"{name}.h5"
    config = load_config(None, [*TINY, f"model.name={name}", f"transfer.weights={file}", *changes])
    if not file.exists():
        build_backbone(config).save_weights(file)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def both_phases(folder: Path, data) -> tuple[Config, Path, Meddler]:
    changes = ("transfer.head_epochs=2", "transfer.unfreeze=6", "training.epochs=2", "compute.workers=2")
    config = settings(folder, "mobilenetv2", *changes)
    screen = Meddler(config)
    start(config, data, folder / "both", screen)
    return config, folder / "both", screen


def test_the_head_learns_first_and_then_the_last_layers(both_phases):
    _, run, screen = both_phases
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["phase"]) for r in history] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    head, layers = screen.of("phase")
    assert (head["learning"], head["parameters"]) == (1281, layers["parameters"])
    assert head["learning"] < layers["learning"] < layers["parameters"]
    assert history[0]["learning_rate"] > 5e-4 > 1e-5 > history[2]["learning_rate"] > 0
    assert "computed once for each image and its mirror image" in screen.text
    assert not (run / BACKBONE).exists()


def test_what_is_frozen_stays_and_the_best_weights_are_handed_over(both_phases, folder, data):
    """By the weights in the bundle, whose order is backbone, then head."""
    from fracture.models.transfer import build_backbone

    config, run, screen = both_phases
    [weights] = [np.load(run / "bundle/weights.npz")]
    backbone = build_backbone(config)
    backbone.load_weights(folder / "mobilenetv2.h5")
    changed = [
        w.name for w, v in zip(backbone.weights, backbone.get_weights(), strict=True) if (v != weights[w.name]).any()
    ]
    best = screen.of("epoch")[-1]["best_epoch"]
    assert changed == (["block_16_project/kernel:0", "Conv_1/kernel:0"] if best > 2 else [])
    assert (weights["standardise/moving_variance:0"] != 1).all(), "set by the features of the training images"
