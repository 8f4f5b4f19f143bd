"""Progress bars of what takes long beside training."""

import sys
import time
from typing import Any, Self


class ProgressBars:
    """One progress bar after another, each gone when the next begins; a file gets a line a minute instead."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._what = ""
        self._last_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, what: str, done: int, total: int | None) -> None:
        if sys.stderr.isatty():
            self._draw(what, done, total)
        elif what != self._what or time.monotonic() - self._last_line > 60:
            print(f"{what:<10} {done:,}{f' of {total:,}' if total else ''}", flush=True)
            self._what, self._last_line = what, time.monotonic()

    def _draw(self, what: str, done: int, total: int | None) -> None:
        from tqdm import tqdm

        if what != self._what:
            self.__exit__()
            unit = " pairs" if what == "compare" else " images"
            self._bar, self._what = tqdm(total=total, desc=what, unit=unit, leave=False), what
        self._bar.update(done - self._bar.n)
