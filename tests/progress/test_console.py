import io
import re

import pytest

from fracture.config import load_config
from fracture.progress import console as screen_module
from fracture.progress.console import Console
from fracture.training.phases import Phase

NAMES = ("loss", "accuracy", "precision", "recall", "auc")
RECORD = {"epoch": 3, "images_per_second": 51.2, "seconds": 65.0, "learning_rate": 1e-3}
RECORD |= dict.fromkeys(NAMES, 0.5) | {f"val_{name}": 0.25 for name in NAMES}
START = {"event": "start", "epochs_done": 2, "steps_done": 0, "workers": 2, "steps": 9, "precision": "float32"}
PHASE = {"event": "phase", "phase": Phase("all", 5, 1e-3), "parameters": 1684289, "learning": 1683300}
PHASE |= {"precision": "float32", "last": 5}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(*events: dict, stream: io.StringIO | None = None, settings: tuple[str, ...] = ()) -> str:
    stream = stream or io.StringIO()
    screen = Console(load_config(None, ["training.epochs=5", *settings]), stream)
    for event in events:
        screen.show(event)
    screen.close()
    return stream.getvalue()


def test_the_start_says_what_trains_on_what():
    text = shown(START, PHASE)
    assert "2 workers × 1 CPU · 9 steps of 32 images an epoch, at most 5 epochs" in text
    assert "network    cnn, float32 · 1,684,289 parameters" in text
    assert "resuming   after epoch 2" in text


def test_each_phase_says_what_learns_for_how_long_and_on_what():
    settings = ("model.name=mobilenetv2", "transfer.unfreeze=30")
    head = PHASE | {
        "phase": Phase("head", 40, 1e-3, on_frozen_features=True),
        "parameters": 2_261_825,
        "learning": 1281,
    }
    layers = PHASE | {"phase": Phase("fine-tuning", 5, 1e-5), "parameters": 2_261_825, "learning": 731_521}
    lines = shown(START, head, START, head, layers, settings=settings).splitlines()
    assert "at most 45 epochs" in lines[0]
    assert [line for line in lines if line.startswith(("network", "           on"))] == [
        "network    mobilenetv2, float32 · the head learns, 1,281 of 2,261,825 parameters, for at most 40 epochs",
        "           on features of the frozen backbone, computed once for each image and its mirror image",
        "network    mobilenetv2, float32 · the last 30 layers of the backbone learn too, 731,521 of 2,261,825 "
        "parameters, for at most 5 epochs",
    ]


def test_the_time_left_is_that_of_the_phase():
    settings = ("model.name=mobilenetv2", "transfer.unfreeze=30", "transfer.head_epochs=4")
    head = PHASE | {"phase": Phase("head", 4, 1e-3, on_frozen_features=True), "last": 4}
    layers = PHASE | {"phase": Phase("fine-tuning", 5, 1e-5), "last": 9}
    epoch = {"event": "epoch", "record": RECORD | {"seconds": 1.0}, "best_epoch": 3}
    text = shown(START, head, epoch, layers, epoch | {"record": RECORD | {"epoch": 5}}, settings=settings)
    assert "left: at most, if nothing stops it early, in this phase" in text
    assert re.findall("≤ (.*)", text) == ["1s", "4m20s"]


def test_a_loss_that_is_not_finite_names_the_rate_that_was_too_high():
    diverged = {"event": "diverged", "epoch": 3, "step": 1, "steps": 9}
    for phase, told in (
        (Phase("all", 5, 1e-3), r"Lower training.learning_rate (0.001) and"),
        (Phase("fine-tuning", 5, 1e-5), r"Lower transfer.learning_rate (1e-05) and"),
    ):
        screen = Console(load_config(None, ["model.name=mobilenetv2"]), io.StringIO())
        for event in (START, PHASE | {"phase": phase}, diverged):
            screen.show(event)
        assert told in screen.diverged


def test_going_on_inside_an_epoch():
    assert "resuming   in epoch 3, step 4 of 9, from its checkpoint" in shown(START | {"steps_done": 4})


def test_what_goes_wrong_is_one_line_each():
    failure = {"event": "failure", "failures": 1, "reason": "worker 1 was killed, or crashed"}
    damaged = {"event": "damaged", "checkpoint": "checkpoint_7", "reason": "Bad CRC-32"}
    lines = shown(
        START,
        failure,
        damaged,
        {"event": "resizing", "workers": 1},
        {"event": "stopping", "seconds": 30},
        {"event": "left", "epoch": 3, "step": 4},
        {"event": "placed", "workers": 1},  # concerns others
    ).splitlines()[-5:]
    assert lines == [
        "restart    1: worker 1 was killed, or crashed; going on from the last checkpoint",
        "damaged    checkpoint_7 cannot be read (Bad CRC-32); the one before it is tried",
        "restart    with 1 worker, since machines came or went",
        "stopping   after a last checkpoint, at most 30s; another signal: at once",
        "saved      in epoch 3, step 4",
    ]


def test_waiting_for_machines_says_how_many_there_are_and_does_not_repeat_itself():
    waiting = {"event": "waiting", "room": 1, "seconds": 45.0}
    told = "waiting    for machines: 1 of 2 workers fit now, 45s so far"
    assert shown(waiting, waiting) == told + "\n"
    assert shown({"event": "waiting", "room": 2, "seconds": 45.0}) == (
        "waiting    for the workers to start, 45s so far\n"
    )


def test_columns_stand_under_their_heads():
    lines = shown(START, PHASE, {"event": "epoch", "record": RECORD, "best_epoch": 3}).splitlines()
    head, row = lines[-2:]
    assert [m.start() for m in re.finditer("│", head)] == [m.start() for m in re.finditer("│", row)]
    assert " ".join(row.split()) == (
        "3 0.500 0.500 0.500 0.500 0.500 │ 0.250* 0.250 0.250 0.250 0.250 │ 51.2 1.0e-03 1m05s ≤ 2m10s"
    )


def test_a_file_gets_whole_lines_and_a_terminal_the_step_too():
    first, step = ({"event": "step", "epoch": 3, "step": n, "steps": 9} for n in (1, 4))
    assert "step 4 of 9" not in shown(START, first, step)
    assert "epoch 3: step 1 of 9\r" in shown(START, first, stream=Terminal()), "it compiled: no guess yet"
    assert "epoch 3: step 4 of 9, 0s left in it" in shown(START, first, step, stream=Terminal())
    assert "\033" not in shown(START, step, {"event": "validating", "epoch": 3}, {"event": "scoring"})


def test_a_file_is_told_how_far_it_is_after_a_long_silence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(screen_module, "SILENCE", -1.0)
    first, step = ({"event": "step", "epoch": 3, "step": n, "steps": 9} for n in (1, 4))
    assert shown(START, first, step).splitlines()[-1] == "  epoch 3: step 4 of 9, 0s left in it"


def test_the_header_is_not_repeated_after_a_restart():
    assert shown(START, PHASE, START, PHASE).count("val loss") == 1


def test_divergence_names_the_step_and_the_fix():
    screen = Console(load_config(), io.StringIO())
    screen.show({"event": "diverged", "epoch": 2, "step": 7, "steps": 9})
    assert screen.diverged == (
        "the loss is not finite: epoch 2, step 7 of 9. Lower training.learning_rate (0.001) and start a new run"
    )
