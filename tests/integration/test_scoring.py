"""Scoring with finished models on Ray's workers."""

import re

import numpy as np
import psutil
import pytest

from fracture.config import ComputeConfig
from fracture.errors import UsageError
from fracture.inference.bundle import WEIGHTS, read_bundle
from fracture.inference.scoring import score_on_workers, score_rows
from fracture.storage import storage_path
from tests.conftest import TINY, quick_bundle

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ROWS = {"test": np.arange(150) % 3 > 0, "train": np.ones(40, bool)}


@pytest.fixture
def bundle(tmp_path):
    return read_bundle(storage_path(quick_bundle(tmp_path / "quick", *TINY)))


def scorers() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if "_Scorer" in process.name()]


def test_two_workers_give_the_scores_of_one_process_also_when_one_of_them_is_killed(bundle, dataset):
    data, killed = dataset(test=150), []
    here = score_rows([bundle], data, ROWS, ComputeConfig(), start=pytest.fail)
    found = {}
    for scores in score_on_workers([bundle], data, ROWS, ComputeConfig(), 2, flips=False):
        if not killed:
            killed = scorers()
            assert len(killed) == 2
            killed[0].kill()
        found |= {(row["split"], row["row"]): row for row in scores.to_pylist()}
    assert [found[row["split"], row["row"]] for row in here.to_pylist()] == here.to_pylist()
    assert len(found) == len(here) == 140


def test_the_workers_end_with_their_work(bundle, dataset):
    list(score_on_workers([bundle], dataset(test=150), ROWS, ComputeConfig(), 2, flips=False))
    psutil.wait_procs(scorers(), timeout=10)
    assert not scorers()


def test_a_bundle_that_is_damaged_meanwhile_is_one_line(bundle, dataset):
    (bundle.folder / WEIGHTS).delete()
    with pytest.raises(UsageError, match=re.escape(f"{WEIGHTS} is missing. Fetch the bundle again")) as caught:
        list(score_on_workers([bundle], dataset(test=150), ROWS, ComputeConfig(), 2, flips=False))
    assert "\n" not in str(caught.value)


def test_workers_that_do_not_fit_are_refused_before_anything_is_scored(bundle, dataset):
    rows = {"test": np.ones(600, bool)}
    with pytest.raises(UsageError, match=r"1 worker of 64 CPU does not fit"):
        score_rows([bundle], dataset(test=600), rows, ComputeConfig(workers=1, cpus_per_worker=64), start=lambda: None)
