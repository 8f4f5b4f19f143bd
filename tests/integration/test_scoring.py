"""Scoring with finished models on Ray's workers."""

import re

import numpy as np
import psutil
import pytest

from fracture.config import Config, load_config
from fracture.errors import RunError, UsageError
from fracture.inference.bundle import WEIGHTS, read_bundle
from fracture.inference.scoring import score_on_workers, score_rows
from fracture.storage import storage_path
from tests.conftest import TINY, quick_bundle

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ROWS = {"test": np.arange(1500) % 3 > 0, "train": np.ones(40, bool)}  # seven parts


@pytest.fixture
def bundle(tmp_path):
    return read_bundle(storage_path(quick_bundle(tmp_path / "quick", *TINY)))


def scorers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if process.is_running() and "_PartScorer" in process.name()]


def test_workers_give_the_scores_of_one_process(bundle, dataset, monkeypatch):
    data, started, steps = dataset(test=1500), [], []
    here = score_rows([bundle], data, ROWS, Config(), start=pytest.fail, flips=True)
    monkeypatch.setenv("RAY_ADDRESS", "of the cluster")
    arguments = lambda: started.append(1), lambda *step: steps.append(step)
    found = score_rows([bundle], data, ROWS, Config(), *arguments, flips=True)
    assert found.equals(here)
    assert len(found) == 1040
    assert started == [1]
    assert (steps[0], steps[-1], len(steps)) == (("score", 0, 1040), ("score", 1040, 1040), 8)


def test_the_part_of_a_worker_that_is_killed_goes_to_another_and_all_end_with_their_work(bundle, dataset):
    rows, seen = [], []
    for scores in score_on_workers([bundle], dataset(test=1500), ROWS, Config(), 2, flips=False):
        if not rows:
            seen = scorers()
            assert len(seen) == 2
            for process in seen:
                process.kill()
        rows += [(row["split"], row["row"]) for row in scores.to_pylist()]
    wanted = [("test", int(row)) for row in np.flatnonzero(ROWS["test"])] + [("train", row) for row in range(40)]
    assert sorted(rows) == wanted
    psutil.wait_procs(scorers(), timeout=20)
    assert not scorers()


def test_workers_that_are_lost_too_often_end_it_in_one_line(bundle, dataset):
    config = load_config(None, ["recovery.max_failures=0"])
    scored = score_on_workers([bundle], dataset(test=1500), ROWS, config, 1, flips=False)
    next(scored)
    scorers()[0].kill()
    with pytest.raises(RunError, match=r"1 worker was lost while scoring; of the last, worker 0 was killed"):
        list(scored)


def test_a_bundle_that_is_damaged_meanwhile_is_one_line(bundle, dataset):
    (bundle.folder / WEIGHTS).delete()
    with pytest.raises(UsageError, match=re.escape(f"{WEIGHTS} is missing. Fetch the bundle again")) as caught:
        list(score_on_workers([bundle], dataset(test=1500), ROWS, Config(), 2, flips=False))
    assert "\n" not in str(caught.value)


def test_a_worker_that_can_never_start_ends_it(bundle, dataset):
    config = load_config(None, ["compute.cpus_per_worker=64", "recovery.wait_minutes=0.02"])
    with pytest.raises(RunError, match=r"nothing was scored for 0.02 minutes, recovery.wait_minutes: no worker could"):
        list(score_on_workers([bundle], dataset(test=1500), ROWS, config, 1, flips=False))


def test_a_worker_that_fits_nowhere_is_refused_before_anything_is_scored(bundle, dataset, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "of the cluster")
    config = load_config(None, ["compute.workers=3", "compute.cpus_per_worker=1000"])
    with pytest.raises(UsageError, match=r"1 worker of 1000 CPU does not fit"):
        score_rows([bundle], dataset(test=1500), ROWS, config, start=lambda: None)
