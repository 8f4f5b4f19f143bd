"""The agreement of workers between two groups of steps."""

from fracture.progress.events import Event, StepDone
from fracture.training.agreement import Agreed, Agreement


class Channel:
    """The driver's side of a channel, without Ray."""

    def __init__(self) -> None:
        self.sent: list[Event] = []
        self.stop = False

    def send(self, event: Event) -> None:
        self.sent.append(event)

    def stop_requested(self) -> bool:
        return self.stop


def test_a_group_has_a_second_of_steps_as_rank_0_measured_it():
    agreement = Agreement(Channel(), list, lambda: False, save_seconds=1e9)
    assert agreement.steps == 1, "the first steps also trace and compile"
    agreement.reach(StepDone(1, 1, 90), steps=1, seconds=8.0)
    assert agreement.steps == 1
    agreement.reach(StepDone(1, 2, 90), steps=1, seconds=0.05)
    assert agreement.steps == 20
    agreement.begin()
    assert agreement.steps == 1, "a batch of validation may take another time, and a step of the next phase"


def test_all_stop_where_rank_0_hears_of_it_and_save_once_where_a_machine_is_taken_away():
    channel = Channel()
    alone = Agreement(channel, list, lambda: True, save_seconds=1e9)
    assert alone.reach() == Agreed(save=True, stop=False)
    assert alone.reach() == Agreed(save=False, stop=False), "once is enough"
    channel.stop = True
    assert alone.reach() == Agreed(save=False, stop=True)
    other = Agreement(None, lambda own: [own[0] + 1, own[1], own[2] + 7], lambda: False, save_seconds=0)
    assert other.reach() == Agreed(save=False, stop=True), "what rank 0 adds counts for all"
    assert other.steps == 7


def test_rank_0_saves_when_the_time_has_come_and_sends_an_event_a_second():
    channel = Channel()
    agreement = Agreement(channel, list, lambda: False, save_seconds=0)
    assert agreement.reach(StepDone(1, 1, 9)).save
    agreement.saved()
    assert agreement.reach(StepDone(1, 2, 9)).save
    assert channel.sent == [StepDone(1, 1, 9)], "the second comes too soon"
