"""Run functions on Ray's workers. Only this file of `preparation` imports Ray.

Ray tasks, not Ray Data: the inputs are names of files, and Ray Data takes four seconds and two processes to start.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fracture.errors import RunError, UsageError


def share(value: Any) -> Any:
    """Put a value into Ray's object store once; the result stands for the value as an argument of many tasks."""
    import ray

    return ray.put(value)


def map_unordered(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Yield the results of `function(*task)` as they are done.

    Raises:
        UsageError, RunError: as the function raised it.
    """
    import ray

    remote = ray.remote(function)
    running = [remote.remote(*arguments) for arguments in tasks]
    while running:
        [done], running = ray.wait(running)
        yield _get(done)


def map_in_order(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Yield the results of `function(*task)` in the order of the tasks; see `map_unordered`."""
    import ray

    remote = ray.remote(function)
    for running in [remote.remote(*arguments) for arguments in tasks]:
        yield _get(running)


def _get(result: Any) -> Any:
    import ray

    try:
        return ray.get(result)
    except (RunError, UsageError) as error:  # Ray's subclass of it, whose text is the stacks of all processes
        raise error.cause from None  # type: ignore[attr-defined]
