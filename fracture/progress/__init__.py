"""How far long work is, for people and programs."""

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]  # what is done, how many are, of how many if that is known
