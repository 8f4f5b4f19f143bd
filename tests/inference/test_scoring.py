import numpy as np
import pytest

from fracture.config import ComputeConfig
from fracture.evaluation.scores import Ensemble, score_blocks
from fracture.inference.bundle import read_bundle
from fracture.inference.scoring import count_scoring_workers, score_rows
from fracture.storage import storage_path
from tests.conftest import TINY, quick_bundle

BLOCKS = ("conv-pool-bn-relu", "conv-bn-relu-pool")


def compute(workers: int, cpus: int = 1, gpu: bool = False) -> ComputeConfig:
    return ComputeConfig(workers=workers, cpus_per_worker=cpus, gpu=gpu)


def test_workers_score_where_they_have_more_than_this_process_and_enough_to_do():
    assert count_scoring_workers(compute(8), images=100_000, cpus=4) == 8
    assert count_scoring_workers(compute(2, cpus=4), images=100_000, cpus=4) == 2
    assert count_scoring_workers(compute(4), images=100_000, cpus=4) == 0, "as many CPUs as here"
    assert count_scoring_workers(compute(8), images=2_999, cpus=4) == 5, "500 images each"
    assert count_scoring_workers(compute(8), images=2_499, cpus=4) == 0, "four of them have no more CPUs than here"
    assert count_scoring_workers(compute(3, gpu=True), images=1_000, cpus=64) == 2
    assert count_scoring_workers(compute(3, gpu=True), images=499, cpus=64) == 0


def test_rows_are_scored_here_in_order_with_progress(dataset, tmp_path):
    data, generator = dataset(val=300, test=70), np.random.default_rng(0)
    folders = [quick_bundle(tmp_path / block, *TINY, f"model.block={block}") for block in BLOCKS]
    bundles = [read_bundle(storage_path(folder)) for folder in folders]
    rows = {"test": generator.random(70) < 0.5, "val": generator.random(300) < 0.5}
    steps: list[tuple[str, int, int | None]] = []
    scores = score_rows(bundles, data, rows, ComputeConfig(), pytest.fail, lambda *step: steps.append(step), flips=True)
    assert scores["split"].to_pylist() == ["test"] * rows["test"].sum() + ["val"] * rows["val"].sum()
    assert scores["row"].to_pylist() == [*np.flatnonzero(rows["test"]), *np.flatnonzero(rows["val"])]
    model = Ensemble([bundle.build_model() for bundle in bundles], flips=True)
    alone = score_blocks(model, data, "val", 0, 1, only=rows["val"])
    assert scores["probability"].to_pylist()[-len(alone) :] == alone["probability"].to_pylist()
    assert len(steps) == 7, "two blocks of test, five of val"
    assert steps[-1] == ("score", len(scores), len(scores))
