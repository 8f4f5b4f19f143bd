"""The channel between the driver and its workers: events one way, the request to stop the other way."""

from dataclasses import dataclass
from typing import Any

from fracture.progress.events import Event


class _Mailbox:
    """The Ray actor behind a channel."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stop_requested = False

    def send(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def request_stop(self) -> None:
        self._stop_requested = True

    def stop_requested(self) -> bool:
        return self._stop_requested


@dataclass(frozen=True)
class EventChannel:
    """A handle to the channel, which travels to other processes."""

    mailbox: Any  # the actor's handle

    def send(self, event: Event) -> None:
        """Send an event and wait the millisecond until it has arrived, so that a process's last event is not lost."""
        import ray

        ray.get(self.mailbox.send.remote(event))

    def send_soon(self, event: Event) -> None:
        """Send an event without waiting, from an actor of Ray's own that may not block."""
        self.mailbox.send.remote(event)

    def take(self) -> list[Event]:
        """Return the events since the last call."""
        import ray

        return ray.get(self.mailbox.take.remote())

    def request_stop(self) -> None:
        """Ask the workers to save and end."""
        self.mailbox.request_stop.remote()

    def stop_requested(self) -> bool:
        """Return whether the workers should save and end."""
        import ray

        return ray.get(self.mailbox.stop_requested.remote())


def start_channel() -> EventChannel:
    """Start a channel on this machine, so that no lost machine takes it away; its process starts meanwhile."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return EventChannel(ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote())
