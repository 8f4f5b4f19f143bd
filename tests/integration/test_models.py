"""Every model through the whole job on real workers; backbones begin with random weights: none can be downloaded."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from fracture.config import Config, load_config
from fracture.dataset.format import Dataset
from fracture.inference.bundle import read_bundle
from fracture.progress.events import EpochDone, PhaseStarted, TrainingEvent
from fracture.storage import storage_path
from fracture.training.checkpoint import BACKBONE, LoopState
from fracture.training.checks import check_initial, with_data_of
from fracture.workflows.train import train_run
from tests.conftest import TINY
from tests.integration.conftest import Meddler, assert_same_history, start

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

BOTH_PHASES = ("transfer.head_epochs=2", "transfer.unfreeze=6", "training.epochs=2", "compute.workers=2")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def settings(folder: Path, name: str, *changes: str) -> Config:
    """Return the settings of a model whose backbone, if it has one, begins with random weights from a file."""
    from fracture.models.transfer import build_backbone

    config = load_config(None, [*TINY, f"model.name={name}", *changes])
    if not config.backbone:
        return config
    file = folder / f"{config.backbone}.h5"
    if not file.exists():
        build_backbone(config).save(file)
    return load_config(None, [*TINY, f"model.name={name}", f"transfer.weights={file}", *changes])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qnn", ()),
        ("qnn", ("quantum.circuit=classical",)),
        ("qnn_transfer", ()),
        ("qnn_transfer", ("quantum.circuit=classical",)),
        ("mobilenetv2", ("transfer.features=augmented",)),
        ("mobilenetv2", ("transfer.weights=none",)),
        ("resnet50", ()),
        ("densenet121", ()),
        ("efficientnetv2b0", ()),
    ],
)
def test_each_model_trains_to_a_bundle_that_gives_the_probabilities_of_its_test(
    name: str, changes: tuple[str, ...], folder: Path, data, tmp_path: Path
):
    shards, manifest = data
    few = ("training.epochs=2", "transfer.head_epochs=2", "compute.workers=2")
    config = with_data_of(settings(folder, name, *few, *changes), manifest)
    run = tmp_path / "run"
    train_run(config, Dataset(shards, manifest), storage_path(run), verbose=False)
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in history] == [1, 2]
    assert (run / "report/report.html").exists()
    assert not (run / BACKBONE).exists()
    bundle = read_bundle(storage_path(run / "bundle"))
    assert bundle.config.model.name == name
    first, second = (LoopState.load(path) for path in sorted(run.glob("checkpoint_*")) if path.is_dir())
    last = 3 if "qnn" in name else 2  # of circuit and logit
    for before, after in zip(first.weights[-last:], second.weights[-last:], strict=True):
        assert not np.array_equal(before, after), "it learns"
    from fracture.dataset.format import images_of

    images = images_of(Dataset(shards, manifest).read("test", 0, manifest.rows("test")), manifest.image_size)
    table = pq.read_table(run / "predictions.parquet").to_pylist()
    scored = [row["probability"] for row in table if row["split"] == "test"]
    np.testing.assert_allclose(bundle.build_model()(images)[:, 0], scored, atol=1e-5)


@pytest.fixture(scope="module")
def both_phases(folder: Path, data) -> tuple[Config, Path, Meddler]:
    config = settings(folder, "mobilenetv2", *BOTH_PHASES)
    listener = Meddler()
    start(config, data, folder / "both", listener)
    return config, folder / "both", listener


def test_the_head_learns_first_and_then_the_last_layers(both_phases):
    _, run, listener = both_phases
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["phase"]) for r in history] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    head, layers = listener.of(PhaseStarted)
    assert (head.trained_parameters, head.parameters) == (1281, layers.parameters)
    assert head.trained_parameters < layers.trained_parameters < layers.parameters
    assert history[0]["learning_rate"] > 5e-4 > 1e-5 > history[2]["learning_rate"] > 0
    assert "computed once for each image and its mirror image" in listener.text


def test_what_is_frozen_stays_and_the_best_weights_are_handed_over(both_phases, folder: Path, data):
    """As seen in the last checkpoint, whose weights are the backbone's and then the head's, and in the bundle."""
    from fracture.models.transfer import build_backbone

    config, run, _ = both_phases
    backbone = build_backbone(config)
    backbone.load_weights(folder / "mobilenetv2.h5")
    names = [weight.path for weight in backbone.weights]
    state = LoopState.load(max(path for path in run.glob("checkpoint_*") if path.is_dir()))
    triples = zip(names, backbone.get_weights(), state.weights, strict=False)  # a head follows
    changed = [name for name, before, after in triples if (before != after).any()]
    assert changed == ["block_16_project/kernel", "Conv_1/kernel"]
    train_run(with_data_of(config, data[1]), Dataset(*data), storage_path(run))  # trains no more, and finishes the run
    weights = load_file(run / "bundle/weights.safetensors")
    for name, best in zip(names, state.best_weights, strict=False):
        assert np.array_equal(weights[name], best)
    assert (weights["standardise/moving_variance"] != 1).all(), "set by the features of the training images"


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_resumed_in_either_phase_and_between_them_it_repeats_the_undisturbed_run(
    both_phases, epoch: int, data, tmp_path: Path
):
    config, run, _ = both_phases

    class Stop(Exception):
        pass

    def stop(event: TrainingEvent) -> None:
        if isinstance(event, EpochDone) and event.record["epoch"] == epoch:
            raise Stop

    with pytest.raises(Stop):
        start(config, data, tmp_path / "again", Meddler(stop))
    again = start(config, data, tmp_path / "again")
    undisturbed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["phase"] for record in again] == [1, 1, 2, 2]
    assert_same_history(again, undisturbed, tolerance=1e-5)


def test_one_worker_and_two_compute_the_same_head(folder: Path, data, tmp_path: Path):
    plain = ("model.dropout=0", "transfer.head_epochs=2", "augment.horizontal_flip=false")
    histories = [
        start(settings(folder, "mobilenetv2", *plain, f"compute.workers={workers}"), data, tmp_path / f"on{workers}")
        for workers in (1, 2)
    ]
    assert_same_history(*histories, tolerance=1e-4)


def test_a_warm_start_goes_on_from_the_whole_of_a_finished_model(folder: Path, data, tmp_path: Path):
    shards, manifest = data
    config = with_data_of(settings(folder, "mobilenetv2", "transfer.head_epochs=1", "compute.workers=1"), manifest)
    train_run(config, Dataset(shards, manifest), storage_path(tmp_path / "first"), verbose=False)
    first = read_bundle(storage_path(tmp_path / "first/bundle"))
    check_initial(config, first)
    train_run(config, Dataset(shards, manifest), storage_path(tmp_path / "second"), verbose=False, initial=first)
    initial = json.loads((tmp_path / "second/bundle/bundle.json").read_text())["run"]["initial_weights"]
    assert initial == str(tmp_path / "first/bundle")
    weights = [load_file(tmp_path / f"{name}/bundle/weights.safetensors") for name in ("first", "second")]
    assert np.array_equal(weights[0]["Conv_1/kernel"], weights[1]["Conv_1/kernel"])
    assert not np.array_equal(weights[0]["logit/kernel"], weights[1]["logit/kernel"])


def test_a_ridge_head_is_the_same_on_one_worker_and_on_two(folder: Path, data, tmp_path: Path):
    """Of features at two reductions, standardised by source; the one epoch changes nothing."""
    changes = ("transfer.head=ridge", "transfer.standardise=source", "training.sampling=source")
    heads = []
    for workers in (1, 2):
        reductions = ("transfer.reductions=[1, 2]", f"compute.workers={workers}")
        config = settings(folder, "mobilenetv2", *changes, *reductions)
        listener, run = Meddler(), tmp_path / str(workers)
        start(config, data, run, listener)
        [epoch] = listener.of(EpochDone)
        assert epoch.record["learning_rate"] == 0
        state = LoopState.load(next(path for path in run.glob("checkpoint_*") if path.is_dir()))
        kernel, bias = state.weights[-2:]
        assert kernel.shape == (2560, 1)
        heads.append(np.concatenate([kernel[:, 0], bias]))
        assert np.abs(kernel).max() > 0
    np.testing.assert_allclose(heads[0], heads[1], rtol=1e-3, atol=1e-3 * np.abs(heads[0]).max())
