"""What driver and workers tell each other: events one way, the wish to stop the other."""

from collections.abc import Callable
from typing import Any

Tell = Callable[..., bool]  # an event's fields by keyword; whether the driver wants the workers to stop


class Messages:
    """A Ray actor beside the driver, so that no lost machine takes it away."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = False

    def put(self, event: dict[str, Any]) -> bool:
        self._events.append(event)
        return self._stop

    def take(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        self._stop = True


def start_messages() -> Any:
    """The actor; its process starts while the caller goes on."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Messages).options(num_cpus=0, scheduling_strategy=here).remote()


def teller(messages: Any) -> Tell:
    """Sends, and waits the millisecond it takes, so that a last word is not lost."""
    import ray

    return lambda **event: ray.get(messages.put.remote(event))
