"""Progress bars of what takes long beside training: looking at files, writing shards, predicting."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS = 60  # between two lines in a file


class ProgressBars:
    """One progress bar after another on a terminal's stderr, each gone when the next begins.

    Where stderr is no terminal, stdout gets a line at the end of each instead, and one a minute until then, whatever
    FORCE_COLOR says.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeRemainingColumn(),
                console=Console(file=sys.stderr, force_terminal=True),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
        self._task: TaskID | None = None
        self._what = ""
        self._last_line = 0.0
        self._line = ""  # that is not written yet

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._write_line()

    def show(self, what: str, done: int, total: int | None) -> None:
        """Show that so many of the total are done, in the bar that is called `what`; a new name begins a new bar."""
        if self._progress is not None:
            self._draw(self._progress, what, done, total)
            return
        if what != self._what:
            self._write_line()
            self._what, self._last_line = what, time.monotonic()
        self._line = f"{what:<10} {done:,}{f' of {total:,}' if total else ''}"
        if time.monotonic() - self._last_line > _SECONDS:
            self._write_line()

    def _write_line(self) -> None:
        if self._line:
            print(self._line, flush=True)
            self._line, self._last_line = "", time.monotonic()

    def _draw(self, progress: Progress, what: str, done: int, total: int | None) -> None:
        if what != self._what or self._task is None:
            if self._task is not None:
                progress.remove_task(self._task)
            self._task = progress.add_task(what, total=total, unit="pairs" if what == "compare" else "images")
            self._what = what
        progress.update(self._task, completed=done, total=total)
