"""The real loop on real Ray workers, with networks of a few thousand weights."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fracture.dataset.format import Dataset, Manifest
from fracture.dataset.sampler import row_weights
from fracture.errors import RunError
from fracture.evaluation.operating_point import OperatingPoint
from fracture.evaluation.scores import gather_scores, score_blocks
from fracture.inference.bundle import read_bundle
from fracture.progress.events import EpochDone, TrainingEvent, TrainingStarted, WorkersFailed
from fracture.runtime.signals import stop_requested, stop_soon
from fracture.storage import StoragePath, storage_path
from tests.conftest import TINY, shell, write_shards
from tests.integration.conftest import (
    MEASURES,
    ROWS,
    Meddler,
    assert_same_history,
    start,
    training_workers,
    wait_for_epochs,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PLAIN = (  # nothing whose statistics or random numbers belong to one worker
    "model.batch_norm=false",
    "model.dropout=0",
    "augment.horizontal_flip=false",
    "augment.rotation_degrees=0",
    "augment.zoom=0",
    "augment.stretch=0",
    "augment.shift=0",
    "augment.exposure=0",
)
AS_IT_IS = OperatingPoint(temperature=1.0, offset=0.0, threshold=0.5, rule="given: 0.5")
PLOTS = ("curves", "confusion_matrix", "roc", "precision_recall", "reliability", "histograms")


def status_of(command: list[str]) -> str:
    """Run the job's command with `--status` in place of `--run`, in a process without Ray and TensorFlow."""
    command = ["--status" if part == "--run" else part for part in command]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory, ray_cluster):
    """On 1 worker, with nothing that is random but the order."""
    from fracture.config import load_config

    config = load_config(None, [*TINY, *PLAIN, "training.epochs=3", "compute.workers=1"])
    return config, start(config, data, tmp_path_factory.mktemp("runs") / "plain")


def libraries_of_the_controller(event: TrainingEvent, found: set[str]) -> None:
    """Add the names of the files that Ray Train's controller has in its memory."""
    if isinstance(event, EpochDone):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "TrainController" in " ".join(process.cmdline()):
                    found |= {Path(part.path).name for part in process.memory_maps()}


@pytest.mark.smoke
def test_one_worker_and_two_give_the_same_losses_and_metrics(data, plain, tmp_path):
    config, on_one = plain
    libraries: set[str] = set()
    listener = Meddler(lambda event: libraries_of_the_controller(event, libraries))
    two = config.model_copy(update={"compute": config.compute.model_copy(update={"workers": 2})})
    assert_same_history(start(two, data, tmp_path / "on2", listener), on_one, tolerance=1e-4)
    assert on_one[0]["loss"] != on_one[1]["loss"], "it learns"
    assert "_raylet.so" in libraries
    assert not [name for name in libraries if "tensorflow" in name], "it costs seconds before any worker starts"


@pytest.mark.smoke
def test_a_killed_worker_is_replaced_and_a_stopped_job_resumes_to_the_same_losses(data, plain, tmp_path):
    config, expected = plain
    two = config.model_copy(update={"compute": config.compute.model_copy(update={"workers": 2})})

    def kill_then_stop(event: TrainingEvent) -> None:
        """Kill a worker after the first epoch, and stop the job as soon as its successor trains."""
        if isinstance(event, EpochDone) and event.record["epoch"] == 1:
            training_workers()[-1].kill()
        if isinstance(event, TrainingStarted) and event.epochs_done:
            stop_soon()

    disturbed, resumed = Meddler(kill_then_stop), Meddler()
    try:
        with pytest.raises(KeyboardInterrupt):
            start(two, data, tmp_path / "run", disturbed)
    finally:
        stop_requested.clear()
    (failed,) = disturbed.of(WorkersFailed)
    assert failed.reason in ("worker 0 was killed, or crashed", "worker 1 was killed, or crashed", "a worker was lost")
    assert_same_history(start(two, data, tmp_path / "run", resumed), expected, tolerance=1e-4)
    assert "resuming   " in resumed.text


def test_synchronised_batch_norm_gives_the_losses_of_one_worker_on_two(data, plain, tmp_path):
    """Its sums over the workers lie inside the network, and the steps run in groups."""
    config, _ = plain
    model = config.model.model_copy(update={"batch_norm": True, "sync_batch_norm": True})
    one, two = (
        start(
            config.model_copy(
                update={"model": model, "compute": config.compute.model_copy(update={"workers": workers})}
            ),
            data,
            tmp_path / f"on{workers}",
        )
        for workers in (1, 2)
    )
    assert_same_history(two, one, tolerance=1e-4)


def test_xla_gives_the_same_losses(data, plain, tmp_path):
    config, without = plain
    fused = config.model_copy(update={"training": config.training.model_copy(update={"xla": "always"})})
    assert_same_history(start(fused, data, tmp_path / "xla"), without, tolerance=1e-4)


def test_metrics_count_every_image_once(data, undisturbed):
    """19 validation images in batches of 8 on 2 workers: 9 or 10 each, and never padded or dropped."""
    _, run, history = undisturbed
    scores = pq.read_table(run / "predictions.parquet") if (run / "predictions.parquet").exists() else None
    scores = scores or gather_scores(storage_path(run), Dataset(*data), 2, AS_IT_IS)
    val = scores.filter(np.array(scores["split"]) == "val")
    labels, probabilities = val["label"].to_numpy(), val["probability"].to_numpy()
    best = min(history, key=lambda r: r["val_loss"])
    assert best["val_accuracy"] == pytest.approx(((probabilities >= 0.5) == labels).mean())
    losses = -np.log(np.where(labels == 1, probabilities, 1 - probabilities))
    weights = row_weights(val["radiograph_id"].to_numpy(), labels, "radiograph")
    assert best["val_loss"] == pytest.approx(np.average(losses, weights=weights), rel=1e-4), "as training samples"
    assert best["val_loss"] != pytest.approx(losses.mean(), rel=1e-4)
    for record in history:
        for key, rows in (("accuracy", ROWS["train"]), ("val_accuracy", ROWS["val"])):
            assert record[key] * rows == pytest.approx(round(record[key] * rows), abs=1e-4)


def test_the_log_has_the_promised_keys(undisturbed):
    _, run, history = undisturbed
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == history
    measured = {"images_per_second", "seconds", "learning_rate", "memory_gb", "trained_parameters"}
    assert set(lines[0]) == {"epoch", "phase", *MEASURES, *measured}
    assert 0.1 < lines[0]["memory_gb"] < 8
    assert [r["epoch"] for r in lines] == list(range(1, len(lines) + 1))
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert len(list(run.glob("checkpoint_*/"))) == 2


def test_given_weights_score_alike_on_any_number_of_workers(data, undisturbed, tmp_path):
    config, run, _ = undisturbed
    tables = []
    for workers in (1, 3):
        again = tmp_path / f"on{workers}"
        shutil.copytree(run, again)
        start(
            config.model_copy(update={"compute": config.compute.model_copy(update={"workers": workers})}), data, again
        )
        tables.append(gather_scores(storage_path(again), Dataset(*data), workers, AS_IT_IS))
    assert tables[0].equals(tables[1])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(data, tiny_config, tmp_path):
    config = tiny_config("training.learning_rate=1e38", "training.schedule=constant", "compute.workers=2")
    with pytest.raises(RunError, match=r"the loss is not finite: epoch 1, step \d of 6. Lower training.learning_rate"):
        start(config, data, tmp_path / "nan")


def test_a_job_stopped_by_any_signal_resumes_to_the_same_end(data, undisturbed, tmp_path):
    _, _, expected = undisturbed
    run = tmp_path / "runs" / "x"
    command = [sys.executable, "job/train.py", "--shards", str(data[0]), "--storage", str(tmp_path), "--run", "x"]
    for assignment in (*TINY, "training.epochs=4", "training.patience=3", "compute.workers=2"):
        command += ["--set", assignment]
    environment = shell()

    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_epochs(run, 2)
    assert first.poll() is None
    first.send_signal(signal.SIGSTOP)  # it lives, and does not get to its end meanwhile
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: run 'x' is held by fracture train on ")
    assert f"process {first.pid}, since 2" in refused.stderr
    assert refused.stderr.endswith("UTC. Wait for it to end, stop that job, or give another --run name.\n")
    assert f"process {first.pid}" in status_of(command)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert "state      killed: its process has ended without a word" in status_of(command)

    for number, line_before in ((signal.SIGTERM, "starting"), (signal.SIGINT, "resuming")):
        stopped = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in stopped.stdout:
            if line.startswith(line_before):
                break
        stopped.send_signal(number)
        _, error = stopped.communicate()
        assert stopped.returncode == 1
        assert error == (
            "\nstopped by Ctrl-C or SIGTERM; every finished epoch is kept. Go on with: the same command with --run x "
            "(make: RUN=x)\n"
        )
        assert "state      stopped: by Ctrl-C or SIGTERM; every finished epoch is kept" in status_of(command)
        assert not (run / "lock").exists()

    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "resuming   after epoch" in second.stdout
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert_same_history(history, expected, tolerance=1e-3)

    third = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert third.returncode == 0, third.stderr
    assert "finished   earlier" in third.stdout
    assert "state      finished: 4 epochs" in status_of(command)
    assert [line for line in third.stdout.splitlines() if line.startswith("test")] == [
        line for line in second.stdout.splitlines() if line.startswith("test")
    ]
    _check_what_a_run_leaves(run, second)
    _check_that_the_numbers_alone_give_the_same(run, *data)


def test_folds_are_trained_one_after_the_other_and_pooled(tmp_path):
    shards = storage_path(tmp_path / "shards")
    write_shards(shards, {"fold-1": 24, "fold-2": 24, "fold-3": 24})
    sides = pa.array([200] * 72, pa.int32())
    paths = [f"fold-{fold}/{i}.png" for fold in (1, 2, 3) for i in range(24)]
    files = (shards / "files.parquet").read_parquet().append_column("path", pa.array(paths))
    (shards / "files.parquet").write_parquet(files.append_column("width", sides).append_column("height", sides))
    command = [sys.executable, "job/train.py", "--shards", str(shards), "--storage", str(tmp_path), "--run", "cv"]
    for assignment in (*TINY, "training.epochs=1", "compute.workers=1"):
        command += ["--set", assignment]
    environment = shell()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pooled     60 radiographs: AUC" in done.stdout
    assert "  radiographs alike in size: AUC" in done.stdout
    assert f"{3 * 12 * 8} of {3 * 12 * 8} pairs" in done.stdout, "all are of one size, and pairs of one fold"
    scores = pq.read_table(tmp_path / "runs/cv/predictions.parquet")
    assert sorted(scores["source"].to_pylist()) == sorted(paths)
    assert (tmp_path / "runs/cv/folds.html").exists()


def _check_that_it_can_be_tried_elsewhere(run: Path) -> None:
    """On shards none of whose files it was trained on; the tests' shards all have the same hash, so it needs others."""
    others = storage_path(run.parent / "others")
    write_shards(others, {"test": 20}, hash_byte=7)
    command = [sys.executable, "job/evaluate.py", "--bundle", str(run / "bundle"), "--out", str(run.parent / "out")]
    tried = subprocess.run([*command, "--shards", str(others)], capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stderr
    assert "compare    AUC per radiograph" in tried.stdout
    assert "CAVEAT     SYNTHETIC MODEL: it was trained on generated sample radiographs" in tried.stdout
    page = (run.parent / "out/report.html").read_text()
    assert "SYNTHETIC MODEL" in page
    assert "What the network looks at" in page
    assert {p.name for p in (run.parent / "out").iterdir()} >= {"report.html", "predictions.parquet", "metrics.json"}
    write_shards(others, {"test": 20})
    known = subprocess.run([*command, "--shards", str(others)], capture_output=True, text=True, check=False)
    assert known.returncode == 2
    assert "the model was trained on every one of these 20 images, or on others of their radiograph" in known.stderr


def _check_that_the_numbers_alone_give_the_same(run: Path, shards: StoragePath, manifest: Manifest) -> None:
    """A network built of the bundle's settings and arrays, against what the run said of its own."""
    own = pq.read_table(run / "predictions.parquet", filters=[("split", "=", "test")])
    fresh = score_blocks(
        read_bundle(storage_path(run / "bundle")).build_model(), Dataset(shards, manifest), "test", rank=0, workers=1
    )
    assert fresh["row"].to_pylist() == own["row"].to_pylist()
    assert np.allclose(fresh["probability"], own["probability"], rtol=1e-5, atol=1e-7)  # calibrated within, or after


def _check_what_a_run_leaves(run: Path, job: subprocess.CompletedProcess) -> None:
    assert {p.name for p in (run / "report").iterdir()} == {"report.html", *(f"{name}.png" for name in PLOTS)}
    assert "What the network looks at" in (run / "report/report.html").read_text()
    left = {p.name for p in (run / "bundle").iterdir()}
    weights = {"weights.safetensors", "features.safetensors"}
    assert left == {"bundle.json", "model.keras", "saved_model", "trained_on.parquet", *weights}
    bundle = json.loads((run / "bundle/bundle.json").read_text())
    assert bundle["metrics"]["test"]["image"]["count"] == ROWS["test"]
    assert bundle["synthetic"]
    assert "CAVEAT     SYNTHETIC" in job.stdout
    assert job.stderr == "", "not a line of anybody's log"
    scores = pq.read_table(run / "predictions.parquet")
    assert scores.num_rows == ROWS["val"] + ROWS["test"]
    code = (
        "import sys; sys.modules['fracture'] = None; "  # so that importing it fails
        "import keras, numpy as np, tensorflow as tf; m = tf.saved_model.load(sys.argv[1]); "
        "x = np.full((2, 32, 32, 1), 7); a, b = m.serve(x.astype('float32')), m.serve_uint8(x.astype('uint8')); "
        "c = keras.saving.load_model(sys.argv[2]).predict_on_batch(x.astype('float32')); "
        "assert a.shape == (2, 1) and np.array_equal(a, b) and np.allclose(a, c, atol=1e-6); print('served')"
    )
    _check_that_it_can_be_tried_elsewhere(run)
    served = subprocess.run(
        [sys.executable, "-c", code, str(run / "bundle/saved_model"), str(run / "bundle/model.keras")],
        env=shell(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert served.stdout == "served\n", served.stderr
