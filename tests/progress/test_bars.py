import io
import sys
import time

import pytest

from fracture.progress.bars import ProgressBars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_some() -> None:
    with ProgressBars() as bars:
        for done in (1, 2, 3):
            bars.show("examine", done, 3)
        bars.show("compare", 1, None)


def test_a_file_gets_a_line_at_the_end_of_each_bar_and_no_escape_codes(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_some()
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["examine    3 of 3", "compare    1"]
    assert shown.err == ""


def test_a_file_gets_a_line_a_minute_until_the_end(monkeypatch: pytest.MonkeyPatch, capsys):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with ProgressBars() as bars:
        for done in range(1, 9):  # one each 20 s
            bars.show("scan", done, 8)
            now += 20
        bars.show("scan", 8, 8)
    assert capsys.readouterr().out.splitlines() == ["scan       5 of 8", "scan       8 of 8"]


def test_a_terminal_gets_one_bar_at_a_time(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    show_some()
    assert "compare" in sys.stderr.getvalue()
    assert "pairs" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""
