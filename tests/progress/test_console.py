import io
import re
from dataclasses import replace

import pytest

from fracture.progress import console as console_module
from fracture.progress.console import Console
from fracture.progress.events import (
    DamagedCheckpoint,
    Diverged,
    EpochDone,
    PhaseStarted,
    Resizing,
    Scoring,
    StepDone,
    Stopping,
    TrainingEvent,
    TrainingStarted,
    TrainingStopped,
    Validating,
    WaitingForMachines,
    WorkersFailed,
    WorkersStarted,
)

NAMES = ("loss", "accuracy", "precision", "recall", "auc")
RECORD = {"epoch": 3, "images_per_second": 51.2, "seconds": 65.0, "learning_rate": 1e-3}
RECORD |= dict.fromkeys(NAMES, 0.5) | {f"val_{name}": 0.25 for name in NAMES}
START = TrainingStarted(
    workers=2,
    unit="CPU",
    units_per_worker=1,
    batch_size=32,
    steps=9,
    max_epochs=5,
    epochs_done=2,
    steps_done=0,
    precision="float32",
)
PHASE = PhaseStarted(
    number=1,
    phases=1,
    model="cnn",
    precision="float32",
    trained_part="all",
    unfrozen_layers=0,
    max_epochs=5,
    last_epoch=5,
    parameters=1_684_289,
    trained_parameters=1_683_300,
    frozen_features=False,
    mirrored=True,
)
TRANSFER = replace(PHASE, phases=2, model="mobilenetv2", parameters=2_261_825, unfrozen_layers=30)
HEAD = replace(TRANSFER, trained_part="head", trained_parameters=1281, max_epochs=40, last_epoch=40)
HEAD = replace(HEAD, frozen_features=True)
LAYERS = replace(TRANSFER, number=2, trained_part="fine-tuning", trained_parameters=731_521, last_epoch=45)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(*events: TrainingEvent, stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    with Console(stream) as console:
        for event in events:
            console.show(event)
    return stream.getvalue()


def test_the_start_says_what_trains_on_what():
    text = shown(START, PHASE)
    assert "2 workers × 1 CPU · 9 steps of 32 images an epoch, at most 5 epochs" in text
    assert "network    cnn, float32 · 1,684,289 parameters" in text
    assert "resuming   after epoch 2" in text


def test_each_phase_says_what_it_trains_for_how_long_and_on_what():
    start = replace(START, max_epochs=45)
    lines = shown(start, HEAD, start, HEAD, LAYERS).splitlines()
    assert "at most 45 epochs" in lines[0]
    assert [line for line in lines if line.startswith(("network", "           on"))] == [
        "network    mobilenetv2, float32 · trains the head, 1,281 of 2,261,825 parameters, for at most 40 epochs",
        "           on features of the frozen backbone, computed once for each image and its mirror image",
        "network    mobilenetv2, float32 · trains the head and the last 30 layers of the backbone, 731,521 of "
        "2,261,825 parameters, for at most 5 epochs",
    ]


def test_the_time_left_is_that_of_the_phase():
    head, layers = replace(HEAD, last_epoch=4), replace(LAYERS, last_epoch=9)
    first = EpochDone(RECORD | {"seconds": 1.0}, best_epoch=3)
    text = shown(START, head, first, layers, EpochDone(RECORD | {"epoch": 5}, best_epoch=3))
    assert "left: at most, if nothing stops it early, in this phase" in text
    assert re.findall("≤ (.*)", text) == ["1s", "4m20s"]


def test_going_on_inside_an_epoch():
    assert "resuming   in epoch 3, step 4 of 9, from its checkpoint" in shown(replace(START, steps_done=4))


def test_what_goes_wrong_is_one_line_each():
    lines = shown(
        START,
        WorkersFailed("worker 1 was killed, or crashed", failures=1),
        DamagedCheckpoint("checkpoint_7", "Bad CRC-32"),
        Resizing(1),
        Stopping(30),
        TrainingStopped(3, 4),
        WorkersStarted(1),  # concerns others
    ).splitlines()[-5:]
    assert lines == [
        "restart    1: worker 1 was killed, or crashed; going on from the last checkpoint",
        "damaged    checkpoint_7 cannot be read (Bad CRC-32); the one before it is tried",
        "restart    with 1 worker, since machines came or went",
        "stopping   after a last checkpoint, at most 30s; another signal: at once",
        "saved      in epoch 3, step 4",
    ]


def test_waiting_for_machines_says_how_many_there_are_and_does_not_repeat_itself():
    waiting = WaitingForMachines(workers_that_fit=1, workers=2, seconds=45.0)
    line = "waiting    for machines: 1 of 2 workers fit now, 45s so far"
    assert shown(waiting, waiting) == line + "\n"
    assert shown(replace(waiting, workers_that_fit=2)) == ("waiting    for the workers to start, 45s so far\n")


def test_columns_stand_under_their_heads():
    lines = shown(START, PHASE, EpochDone(RECORD, best_epoch=3)).splitlines()
    head, row = lines[-2:]
    assert [m.start() for m in re.finditer("│", head)] == [m.start() for m in re.finditer("│", row)]
    assert " ".join(row.split()) == (
        "3 0.500 0.500 0.500 0.500 0.500 │ 0.250* 0.250 0.250 0.250 0.250 │ 51.2 1.0e-03 1m05s ≤ 2m10s"
    )


def test_a_file_gets_whole_lines_and_a_terminal_the_step_too():
    first, step = (StepDone(3, n, 9) for n in (1, 4))
    assert "step 4 of 9" not in shown(START, first, step)
    assert "epoch 3: step 1 of 9\r" in shown(START, first, stream=Terminal()), "it compiled: no guess yet"
    assert "epoch 3: step 4 of 9, 0s left in it" in shown(START, first, step, stream=Terminal())
    assert "\033" not in shown(START, step, Validating(3, 9, 9), Scoring(2))


def test_a_file_gets_a_line_with_the_step_after_a_long_silence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console_module, "SILENCE", -1.0)
    first, step = (StepDone(3, n, 9) for n in (1, 4))
    assert shown(START, first, step).splitlines()[-1] == "  epoch 3: step 4 of 9, 0s left in it"


def test_the_header_is_not_repeated_after_a_restart():
    assert shown(START, PHASE, START, PHASE).count("val loss") == 1


def test_divergence_names_the_step_and_the_fix():
    assert str(Diverged(2, 7, 9, "training.learning_rate", 0.001)) == (
        "the loss is not finite: epoch 2, step 7 of 9. Lower training.learning_rate (0.001) and start a new run"
    )


def test_a_pipe_gets_no_escape_codes_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\033" not in shown(START, PHASE, StepDone(3, 1, 9), EpochDone(RECORD, best_epoch=3))
