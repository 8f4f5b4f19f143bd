import numpy as np
import pytest

from fracture.config import Config
from fracture.evaluation.scores import Ensemble, score_blocks
from fracture.inference.bundle import read_bundle
from fracture.inference.scoring import plan_parts, score_rows
from fracture.storage import storage_path
from tests.conftest import TINY, quick_bundle

BLOCKS = ("conv-pool-bn-relu", "conv-bn-relu-pool")


def test_parts_have_256_rows_and_one_to_score():
    only = np.zeros(1000, bool)
    only[[3, 999]] = True
    rows = {"val": np.zeros(300, bool), "test": only}
    assert plan_parts(rows) == [("test", 0, 256), ("test", 768, 1000)]
    assert plan_parts({"val": rows["val"]}) == [("val", 0, 256)], "an empty table needs one"


def test_rows_are_scored_here_in_order_with_progress(dataset, tmp_path):
    data, generator = dataset(val=600, test=70), np.random.default_rng(0)
    folders = [quick_bundle(tmp_path / block, *TINY, f"model.block={block}") for block in BLOCKS]
    bundles = [read_bundle(storage_path(folder)) for folder in folders]
    rows = {"test": generator.random(70) < 0.5, "val": np.ones(600, bool)}
    steps: list[tuple[str, int, int | None]] = []
    scores = score_rows(bundles, data, rows, Config(), pytest.fail, lambda *step: steps.append(step), flips=True)
    new = rows["test"].sum()
    assert scores["split"].to_pylist() == ["test"] * new + ["val"] * 600
    assert scores["row"].to_pylist() == [*np.flatnonzero(rows["test"]), *range(600)]
    alone = score_blocks(Ensemble([bundle.build_model() for bundle in bundles], flips=True), data, "val", 0, 1)
    assert scores["probability"].to_pylist()[new:] == alone["probability"].to_pylist()
    assert [done for _, done, _ in steps] == [0, new, *(new + np.array([256, 512, 600]))]
    assert {(name, total) for name, _, total in steps} == {("score", new + 600)}


def test_nothing_to_score_is_an_empty_table(dataset, tmp_path):
    bundle = read_bundle(storage_path(quick_bundle(tmp_path / "quick", *TINY)))
    scores = score_rows([bundle], dataset(test=70), {"test": np.zeros(70, bool)}, Config(), pytest.fail)
    assert (len(scores), "probability" in scores.column_names) == (0, True)
