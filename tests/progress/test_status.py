import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fracture.errors import RunError, UsageError
from fracture.lock import Claim, claim_of_this_process
from fracture.progress.events import (
    EpochDone,
    PhaseStarted,
    Scoring,
    StepDone,
    TrainingStarted,
    Validating,
    WaitingForMachines,
    WorkersFailed,
    WorkersStarted,
)
from fracture.progress.status import EVERY, LOCK, STATUS, Status, StatusWriter, status_lines
from fracture.storage import StoragePath, storage_path

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
START = TrainingStarted(
    workers=2,
    unit="CPU",
    units_per_worker=1,
    batch_size=32,
    steps=10,
    max_epochs=4,
    epochs_done=0,
    steps_done=0,
    precision="float32",
)


@pytest.fixture(params=["disk", "bucket"])
def runs(request, tmp_path: Path) -> StoragePath:
    return storage_path(tmp_path if request.param == "disk" else request.getfixturevalue("bucket")) / "runs"


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return NOON + timedelta(seconds=self.seconds)


def writer(run: StoragePath, clock: Clock, **more: object) -> StatusWriter:
    return StatusWriter(run, 4, clock=clock, now=clock.now, **more)


def step(number: int, epoch: int = 1) -> StepDone:
    return StepDone(epoch, number, 10)


def epoch(number: int, seconds: float = 60.0) -> EpochDone:
    return EpochDone({"epoch": number, "seconds": seconds}, best_epoch=number)


def phase(number: int, last_epoch: int) -> PhaseStarted:
    return PhaseStarted(
        number=number,
        phases=2,
        model="mobilenetv2",
        precision="float32",
        trained_part="head" if number == 1 else "fine-tuning",
        unfrozen_layers=30,
        max_epochs=3,
        last_epoch=last_epoch,
        parameters=100,
        trained_parameters=10,
        frozen_features=False,
        mirrored=False,
    )


def read(run: StoragePath) -> Status:
    return Status.model_validate((run / STATUS).read_json())


def shown(runs: StoragePath, after: float = 0.0, name: str = "x") -> dict[str, str]:
    """Return the lines that a person sees so many seconds after noon, by label."""
    lines = status_lines(runs, name, NOON + timedelta(seconds=after))
    return {line[:11].strip(): line[11:] for line in lines}


def hold(run: StoragePath, **changed: object) -> None:
    """A claim that is there, and whose beat was just now by the store's clock."""
    claim = Claim(**claim_of_this_process("job/train.py").model_dump() | {"beat": 1} | changed)
    (run / LOCK / "claim.json").write_bytes(claim.model_dump_json().encode())


def test_the_state_is_told_from_the_start_to_the_end(runs: StoragePath):
    clock, states = Clock(), []
    with writer(runs / "x", clock) as status:
        states.append(read(runs / "x").state)
        events = [START, step(1), Validating(1, 10, 10), epoch(1), Scoring(2)]
        for event in [*events, WorkersStarted(2)]:
            status.show(event)
            states.append(read(runs / "x").state)
    states.append(read(runs / "x").state)
    assert states == [
        "starting",
        "training",
        "training",
        "validating",
        "validating",
        "scoring",
        "scoring",
        "finished",
    ]


def test_steps_are_written_every_15_seconds_and_epochs_at_once(tmp_path: Path):
    clock, run = Clock(), storage_path(tmp_path / "x")
    with writer(run, clock) as status:
        status.show(START)
        steps = []
        for number in range(1, 6):
            clock.seconds += EVERY / 3
            status.show(step(number))
            steps.append(read(run).step)
        assert steps == [0, 0, 3, 3, 3]
        status.show(epoch(1))
        assert read(run).updated == clock.now()


def test_the_time_left_is_by_the_epochs_of_the_phase_under_way(tmp_path: Path):
    run, clock = storage_path(tmp_path) / "x", Clock()
    with writer(run, clock) as status:
        head, layers = phase(1, last_epoch=3), phase(2, last_epoch=4)
        for event in [START, head, epoch(1, 1.0)]:
            status.show(event)
        assert read(run).seconds_left == 2
        for event in [epoch(2, 1.0), layers, epoch(3, 60.0)]:
            status.show(event)
        assert read(run).seconds_left == 60


def test_the_time_left_is_that_of_the_epochs_left(tmp_path: Path):
    clock, run = Clock(), storage_path(tmp_path / "x")
    with writer(run, clock) as status:
        for event, at in ((START, 0), (step(1), 20), (step(6), 30)):
            clock.seconds = at
            status.show(event)
        status.show(Validating(1, 10, 10))  # a new state, which is written at once
        assert read(run).seconds_left == 2 * (4 * 10 - 6), "2 s a step; the first compiled and does not count"
        status.show(epoch(1, seconds=40.0))
        assert read(run).seconds_left == 40 * 3
        status.show(step(1, epoch=2))
        clock.seconds += 30
        status.show(step(7, epoch=2))
        assert read(run).seconds_left == 10 + 40 * 2


def test_restarts_are_counted_with_their_reason(tmp_path: Path):
    clock, runs = Clock(), storage_path(tmp_path)
    with writer(runs / "x", clock) as status:
        status.show(START)
        status.show(WorkersFailed("a worker was killed", failures=1))
        assert shown(runs)["restarts"] == "1 restart of workers, the last since a worker was killed"
        assert shown(runs)["state"] == "restarting: epoch 1 of 4"
        status.show(WaitingForMachines(1, 2, 30.0))
        assert shown(runs)["state"] == "waiting for machines: epoch 1 of 4"
        status.show(START)
        assert read(runs / "x").restarts == 1, "the same one"
        status.show(START)
        assert read(runs / "x").restarts == 2, "also where only the workers say so"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RunError("the loss is not finite"), "stopped: the loss is not finite"),
        (KeyboardInterrupt(), "stopped: by Ctrl-C or SIGTERM; every finished epoch is kept"),
        (KeyError("x"), "stopped: KeyError: 'x'"),
    ],
)
def test_what_stopped_it_is_told(tmp_path: Path, error: BaseException, message: str):
    runs = storage_path(tmp_path)
    with pytest.raises(type(error)), writer(runs / "x", Clock()):
        raise error
    assert shown(runs)["state"] == message
    assert shown(runs, after=10**6)["state"] == message


def test_a_store_that_fails_does_not_end_a_training(bucket: str, object_store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    run = storage_path(bucket) / "runs/x"
    with writer(run, Clock()) as status:
        object_store.fail(times=1, status=503, code="SlowDown")
        status.show(START)
        assert object_store.failures_left == 0
        assert read(run).state == "starting"
    assert read(run).state == "finished"


def test_who_was_taken_over_writes_no_more(tmp_path: Path):
    run = storage_path(tmp_path / "x")
    ours = [True]
    with writer(run, Clock(), may_write=lambda: ours[0]) as status:
        ours[0] = False
        status.show(START)
    assert read(run).state == "starting"


def test_a_run_under_way_is_told_with_its_best_epoch_and_the_time_left(runs: StoragePath):
    run = runs / "x"
    status = Status(updated=NOON, state="training", epochs=8, epoch=3, step=120, steps=247, seconds_left=750)
    (run / STATUS).write_bytes(status.model_dump_json().encode())
    history = [{"epoch": n, "val_loss": loss, "val_auc": 0.8 + n / 100} for n, loss in ((1, 0.6), (2, 0.5), (3, 0.7))]
    (run / "metrics.jsonl").write_bytes("".join(json.dumps(record) + "\n" for record in history).encode())
    assert shown(runs, after=30) == {
        "run": str(run),
        "state": "training: epoch 3 of 8, step 120 of 247",
        "best": "epoch 2: validation loss 0.500, AUC 0.820",
        "left": "about 12 min left, less if it stops early",
    }


def test_a_job_that_says_nothing_does_not_look_alive_for_ever(runs: StoragePath):
    status = Status(updated=NOON, state="training", epochs=8, epoch=3, step=120, steps=247)
    (runs / "x" / STATUS).write_bytes(status.model_dump_json().encode())
    assert shown(runs, after=59)["state"] == "training: epoch 3 of 8, step 120 of 247"
    assert shown(runs, after=240)["state"].startswith("no sign of life for 4 min; it was training: epoch 3 of 8")
    assert shown(runs, after=-5)["state"].startswith("training"), "another machine's clock is ahead"


def test_the_locks_beat_is_a_sign_of_life_too(runs: StoragePath):
    """One step may take minutes."""
    now = datetime.now(UTC)
    status = Status(updated=now - timedelta(minutes=4), state="training", epochs=8, epoch=3)
    (runs / "x" / STATUS).write_bytes(status.model_dump_json().encode())
    hold(runs / "x", since=now - timedelta(hours=1), machine="far", host="far", pid=7)
    lines = status_lines(runs, "x", now)
    assert lines[1] == "state      training: epoch 3 of 8"
    assert lines[-1].startswith("job        job/train.py on far, process 7, since ")


def test_a_killed_process_of_this_machine_is_told_at_once(tmp_path: Path):
    runs = storage_path(tmp_path)
    status = Status(updated=NOON, state="training", epochs=8, epoch=3)
    (runs / "x" / STATUS).write_bytes(status.model_dump_json().encode())
    hold(runs / "x", since=NOON - timedelta(hours=1), pid=2**22 + 1)
    assert shown(runs)["state"].startswith("killed: its process has ended without a word")
    assert shown(runs)["state"].endswith("it was training: epoch 3 of 8")


def test_a_last_word_counts_more_than_a_lock_that_could_not_be_given_back(tmp_path: Path):
    runs = storage_path(tmp_path)
    status = Status(updated=NOON, state="stopped", message="the store fails", epochs=8)
    (runs / "x" / STATUS).write_bytes(status.model_dump_json().encode())
    hold(runs / "x", since=NOON - timedelta(hours=1), pid=2**22 + 1)
    assert shown(runs)["state"] == "stopped: the store fails"


def test_what_an_earlier_job_said_does_not_count(tmp_path: Path):
    runs, now = storage_path(tmp_path), datetime.now(UTC)
    status = Status(updated=now - timedelta(minutes=4), state="stopped", message="the disk is full", epochs=8)
    (runs / "x" / STATUS).write_bytes(status.model_dump_json().encode())
    hold(runs / "x")
    assert status_lines(runs, "x", now)[1] == "state      starting: preparing the data"


def test_a_finished_run_gives_its_test_figures(runs: StoragePath):
    finish(runs / "x")
    assert shown(runs) == {
        "run": str(runs / "x"),
        "state": "finished: 5 epochs, the best was 3",
        "test": "90 radiographs: AUC 0.820 [0.710, 0.930], sensitivity 0.900, specificity undefined",
    }


def test_folds_take_a_line_each(runs: StoragePath):
    finish(runs / "x/fold-1")
    status = Status(updated=NOON, state="training", epochs=8, epoch=3, seconds_left=90)
    (runs / "x/fold-10" / STATUS).write_bytes(status.model_dump_json().encode())
    (runs / "x/fold-2" / STATUS).write_bytes(status.model_dump_json().encode())
    (runs / "x/fold-2/metrics.jsonl").write_bytes(b'{"epoch": 2, "val_loss": 0.5, "val_auc": 0.8}\n')
    lines = status_lines(runs, "x", NOON)
    assert [line.split()[0] for line in lines] == ["run", "fold-1", "fold-2", "fold-10"]
    assert lines[1].startswith("fold-1     finished: 5 epochs, the best was 3 · 90 radiographs: AUC 0.820")
    assert lines[2] == (
        "fold-2     training: epoch 3 of 8 · best epoch 2: validation loss 0.500, AUC 0.800 · "
        "about 2 min left, less if it stops early"
    )


def test_the_folds_of_each_contender_of_a_comparison_take_a_line(runs: StoragePath):
    for fold in ("wide/fold-1", "small/fold-1", "small/fold-2"):
        finish(runs / "x" / fold)
    (runs / "x/comparison.json").write_json({})
    lines = status_lines(runs, "x", NOON)
    assert [line.split()[0] for line in lines] == ["run", "small/fold-1", "small/fold-2", "wide/fold-1"]
    assert lines[1].startswith("small/fold-1 finished: 5 epochs, the best was 3 · 90 radiographs: AUC 0.820")


def test_a_run_that_is_not_there_lists_those_that_are(runs: StoragePath):
    with pytest.raises(UsageError, match=r"^there is no run 'y' in .*runs. There are none; check --storage.$"):
        status_lines(runs, "y", NOON)
    for name in ("b", "a"):
        (runs / name / "run.json").write_json({})
    with pytest.raises(UsageError, match=r"There are: a, b.$"):
        status_lines(runs, "y", NOON)
    assert shown(runs, name="a")["state"] == "started; no job is at work on it"


DAMAGED = [b"", b"{", b"{}", b"[]", b'"x"', b"\xff"]


@pytest.mark.parametrize("content", [*DAMAGED, b'{"run": {"epochs": 5, "best_epoch": 3}, "metrics": {}}'])
def test_a_damaged_bundle_is_named(tmp_path: Path, content: bytes):
    file = storage_path(tmp_path) / "x/bundle/bundle.json"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"x/bundle/bundle.json is damaged.*Restore it from a copy, or train again"):
        status_lines(storage_path(tmp_path), "x", NOON)


@pytest.mark.parametrize("content", [*DAMAGED, b'{"updated": "noon", "epochs": 8}'])
def test_a_damaged_status_is_named_and_may_be_deleted(tmp_path: Path, content: bytes):
    runs = storage_path(tmp_path)
    (runs / "x" / STATUS).write_bytes(content)
    with pytest.raises(UsageError, match=r"x/status.json is damaged.*Delete it; a job that is at work writes it again"):
        status_lines(runs, "x", NOON)
    (runs / "x" / STATUS).delete()
    assert shown(runs)["state"] == "started; no job is at work on it"


@pytest.mark.parametrize(
    ("line", "where"), [(b'{"epoch": 2, "val_l', " at line 2"), (b"{}", ""), (b'{"epoch": 2, "val_loss": "x"}', "")]
)
def test_a_damaged_log_is_named(tmp_path: Path, line: bytes, where: str):
    runs = storage_path(tmp_path)
    (runs / "x/metrics.jsonl").write_bytes(b'{"epoch": 1, "val_loss": 0.5, "val_auc": 0.8}\n' + line)
    message = rf"x/metrics.jsonl is damaged{where}. Restore it from a copy; a run that is not finished writes it anew"
    with pytest.raises(UsageError, match=message):
        status_lines(runs, "x", NOON)


def finish(run: StoragePath) -> None:
    nothing = {"value": None, "low": None, "high": None}
    figures = {"auc": {"value": 0.82, "low": 0.71, "high": 0.93}, "recall": nothing | {"value": 0.9}}
    metrics = {"unit": "radiograph", "count": 90, "figures": figures | {"specificity": nothing}}
    content = {"run": {"epochs": 5, "best_epoch": 3}, "metrics": {"test": {"radiograph": metrics}}}
    (run / "bundle/bundle.json").write_json(content)
