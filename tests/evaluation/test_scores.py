import numpy as np
import pyarrow.parquet as pq
import pytest

from fracture.errors import RunError
from fracture.evaluation.operating_point import OperatingPoint
from fracture.evaluation.scores import Ensemble, gather_scores, read_scores, score, score_blocks, write_scores
from fracture.storage import storage_path

UNCALIBRATED = OperatingPoint(temperature=1.0, offset=0.0, threshold=0.5, rule="given: 0.5")


class FirstPixel:
    """A model whose probability is the image's first pixel / 256; that pixel is the row's number."""

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        return images[:, :1, 0, 0] / 256


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_every_row_is_scored_once_by_any_number_of_workers(dataset, tmp_path, workers: int, rows: int):
    data = dataset(val=rows, test=5)
    run = storage_path(tmp_path / "run")
    for split in ("val", "test"):
        for rank in range(workers):
            scores = score_blocks(FirstPixel(), data, split, rank, workers)
            write_scores(run, scores, split, rank, workers)
    gathered = gather_scores(run, data, workers, UNCALIBRATED)
    assert gathered["split"].to_pylist() == ["val"] * rows + ["test"] * 5
    assert gathered["row"].to_pylist()[:rows] == list(range(rows))
    assert gathered["probability"].to_numpy()[:rows] == pytest.approx(np.arange(rows) / 256, abs=1e-6)
    assert gathered["label"].to_pylist()[:rows] == [i % 2 for i in range(rows)]
    assert pq.read_table(tmp_path / "run/predictions.parquet").equals(gathered)


def test_a_row_scored_twice_is_noticed(dataset, tmp_path):
    data = dataset(val=100)
    run = storage_path(tmp_path / "run")
    for rank in (0, 1):
        write_scores(run, score_blocks(FirstPixel(), data, "val", 0, 2), "val", rank, 2)
    with pytest.raises(RunError, match="val: 128 scores for 100 images; run the job again"):
        read_scores(run, data, "val", 2)


def test_only_some_rows_are_scored_and_blocks_without_any_are_not_read(dataset):
    data = dataset(val=200)
    only = np.zeros(200, bool)
    only[[3, 5, 63, 199]] = True
    scored: list[int] = []

    class Counting(FirstPixel):
        def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
            scored.append(len(images))
            return super().predict_on_batch(images)

    scores = score_blocks(Counting(), data, "val", 0, 1, only=only)
    assert scores["row"].to_pylist() == [3, 5, 63, 199]
    assert scores["source"].to_pylist() == [f"val/{n}.png" for n in (3, 5, 63, 199)]
    assert scores["probability"].to_numpy() == pytest.approx(np.array([3, 5, 63, 199]) / 256)
    assert scored == [16, 16], "one part of one size for each of two blocks"


def test_an_ensemble_is_the_mean_of_its_models():
    class Half(FirstPixel):
        def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
            return super().predict_on_batch(images) / 2

    images = np.full((3, 4, 4, 1), 64, np.uint8)
    assert score(Ensemble([FirstPixel()]), images).tolist() == [0.25, 0.25, 0.25]
    assert score(Ensemble([FirstPixel(), Half()]), images).tolist() == [0.1875, 0.1875, 0.1875]


def test_with_flips_an_image_and_its_mirror_image_are_the_same():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), np.uint8)
    flipped, both = images[:, :, ::-1], Ensemble([FirstPixel()], flips=True)
    assert (score(both, images) == score(both, flipped)).all()
    assert score(both, images) == pytest.approx((images[:, 0, 0, 0] / 256 + images[:, 0, -1, 0] / 256) / 2)
