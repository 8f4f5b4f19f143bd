"""The end of a run, from scores as the workers leave them."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fracture.config import Config
from fracture.dataset.format import Dataset
from fracture.evaluation.gallery import Gallery
from fracture.evaluation.report import list_caveats
from fracture.evaluation.scores import score_blocks, write_scores
from fracture.inference.bundle import is_bundle, read_bundle
from fracture.models import build_model
from fracture.storage import StoragePath, storage_path
from fracture.training.checkpoint import BACKBONE, LoopState
from fracture.training.checkpoint_folder import BEST, write_state
from fracture.training.launch import Outcome
from fracture.workflows.finish import finish_run

WORKERS = 2
METRICS = ("loss", "accuracy", "precision", "recall", "auc")


@pytest.fixture
def outcome() -> Outcome:
    record = dict.fromkeys([*METRICS, *(f"val_{name}" for name in METRICS), "learning_rate"], 0.5)
    return Outcome([record | {"epoch": epoch, "phase": 1} for epoch in (1, 2)], 1, "float32", WORKERS)


def score(run: StoragePath, config: Config, dataset: Dataset) -> None:
    """Leave what the workers do."""
    model = build_model(config, dataset.manifest.pixel_mean, dataset.manifest.pixel_std)
    if (run / BEST).is_dir():  # they score the same weights again
        from fracture.training.checkpoint_folder import read_state

        model.set_weights(read_state(run / BEST).best_weights)
    for split in ("val", "test"):
        for rank in range(WORKERS):
            write_scores(run, score_blocks(model, dataset, split, rank, WORKERS), split, rank, WORKERS)
    write_state(run / BEST, LoopState(best_weights=model.get_weights()))


def test_a_run_is_finished_once_it_has_its_bundle_also_after_a_kill(
    shard_folder, tiny_config, outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, dataset, run = tiny_config(), Dataset(*shard_folder()), storage_path(tmp_path / "runs/x")
    score(run, config, dataset)
    (run / BACKBONE).write_bytes(b"x")
    with monkeypatch.context() as killed:
        killed.setattr("fracture.evaluation.report.write_report", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finish_run(run, config, dataset, outcome)
    assert not is_bundle(run / "bundle")

    score(run, config, dataset)
    evaluations = finish_run(run, config, dataset, outcome)
    bundle = read_bundle(run / "bundle")
    assert evaluations["test"]["image"].count == dataset.rows("test")
    assert bundle.evaluations["test"]["image"].count == dataset.rows("test")
    point, outcomes = bundle.operating_point, bundle.evaluations["test"]["radiograph"].outcomes
    assert point.fracture_threshold >= point.threshold
    assert sum(sum(counts.values()) for counts in outcomes.counts.values()) == 12, "radiographs"
    space = bundle.load_feature_space()
    assert (bundle.features.width, space.components.shape) == (8, (4, 8)), "half of its 8 features"
    assert min(space.medians[0], space.limit[0]) > 0
    assert bundle.caveats == tuple(list_caveats(dataset.manifest))
    assert bundle.caveats[0].startswith("SYNTHETIC: generated sample radiographs")
    assert len(bundle.map_similarity) == 5
    gallery = Gallery.model_validate_json((run / "gallery.json").read_bytes())
    assert list(bundle.map_similarity) == pytest.approx(gallery.similarity)
    assert {path.name for path in (tmp_path / "runs/x").iterdir()} == {
        "bundle",
        "gallery.json",
        "predictions.parquet",
        "report",
    }
    table = pq.read_table(tmp_path / "runs/x/predictions.parquet", filters=[("split", "=", "test")])
    again = score_blocks(bundle.build_model(), dataset, "test", 0, 1)
    assert again["probability"].to_pylist() == pytest.approx(table["probability"].to_pylist(), rel=1e-5)
