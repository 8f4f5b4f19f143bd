"""Which model is in use, and how it came to be: one folder or bucket that outlives every run.

  champion.json       the version in use; replaced in one stroke, so that a reader finds the old one or the new
  versions/0003/      an immutable bundle, with its report, and what it was made from in version.json and dataset/
  history/000007.json one file for each decision, never changed: who, when, on what data, with what figures
  ticks/2026-w48/     one retraining: how far it is in state.json, then decision.json and report.html
  runs/2026-w48/      its training, as of job/train.py
  shards/             its data
  locks/              who is at work

A decision is first written into the history, then into `champion.json`. What is killed in between is finished by
whoever comes next, so that the two agree whenever nobody is at work.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from fracture.dataset.format import FILES, LEDGER, MANIFEST, Dataset
from fracture.errors import UsageError
from fracture.inference.bundle import CARD, WEIGHTS, Bundle, is_bundle, read_bundle
from fracture.lock import HeldError, Lock, claim_of_this_process
from fracture.storage import StoragePath

CHAMPION = "champion.json"
VERSION = "version.json"
DATASET = "dataset"  # in a version: manifest and files of the data it was trained on, without their pixels
_FORMAT = 1
_PATIENCE = 30  # seconds; a change takes one or two
Model = TypeVar("Model", bound=BaseModel)
_NAME = re.compile(r"\d{4,}")

STATE = "state.json"  # of a tick

Event = Literal["promoted", "rejected", "promoted by hand", "rolled back"]


class Version(BaseModel, frozen=True):
    """What `version.json` says beside a bundle."""

    number: int
    tick: str
    made: datetime
    request_hash: str  # hash of the data and settings it was made from
    dataset: str  # fingerprint
    groups: dict[str, int]  # class -> radiographs or patients, in all splits
    initial_weights: str  # "scratch", or the version whose weights it began with


class RegistryDecision(BaseModel, frozen=True):
    """One decision."""

    number: int
    time: datetime
    who: str
    event: Event
    version: int  # that was decided on
    champion: int | None  # from then on
    tick: str = ""  # of a retraining
    request_hash: str = ""
    dataset: str = ""
    figures: dict[str, float | None] = {}
    reason: str = ""


class TickState(BaseModel):
    """How far a retraining is, so that one that was killed goes on."""

    after_entry: int  # the newest decision of a retraining when it began
    request_hash: str
    recipe: str  # hash of the settings
    shards: str  # name of their folder
    dataset: str = ""  # fingerprint, once they are prepared
    initial: int | None = None  # version whose weights it begins with
    notified: bool = False


class _Champion(BaseModel):
    format_version: Literal[1]
    version: int


def _read(kind: type[Model], file: StoragePath) -> Model:
    try:
        return kind.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise UsageError(
            f"{file} is damaged: {error.errors()[0]['msg']}. Bring it back from a copy, or delete it to do without."
        ) from None


class Registry:
    """The registry in a folder, which may not exist yet."""

    def __init__(self, folder: StoragePath, who: str = "") -> None:
        """
        Args:
            who: asks for what is decided, as it is recorded.
        """
        self.folder, self._who = folder, who

    def champion(self) -> int | None:
        """The version in use; None before the first.

        Raises:
            UsageError: `champion.json` is not ours.
        """
        file = self.folder / CHAMPION
        try:
            return _Champion.model_validate_json(file.read_bytes()).version
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(
                f"{file} is damaged: {first['msg']}. job/registry.py promote VERSION --registry {self.folder} writes "
                "it anew."
            ) from None

    def champion_bundle(self) -> Bundle:
        """
        Raises:
            UsageError: there is no champion, or its bundle is damaged.
        """
        return self.read(self.in_use())

    def in_use(self) -> int:
        """As `champion`.

        Raises:
            UsageError: there is none.
        """
        version = self.champion()
        if version is None:
            raise UsageError(
                f"{self.folder} has no champion yet. Train one with: python job/retrain.py --data DIR --registry "
                f"{self.folder}"
            )
        return version

    def read(self, version: int) -> Bundle:
        """
        Raises:
            UsageError: there is none of that number, or it is damaged.
        """
        self.version(version)
        return read_bundle(self.bundle(version))

    def figures(self, version: int) -> dict[str, float | None]:
        """Per radiograph, on the test of its own data."""
        test = self.read(version).evaluations["test"]["radiograph"]
        return {name: test[name] for name in ("auc", "recall", "specificity", "calibration_error")}

    def decision(self, tick: str) -> dict[str, Any] | None:
        """What `decision.json` says; None where it was removed."""
        file = self.tick(tick) / "decision.json"
        return file.read_json() if file.is_file() else None

    def bundle(self, version: int) -> StoragePath:
        return self.folder / "versions" / f"{version:04d}"

    def versions(self) -> list[Version]:
        """The complete ones, by number."""
        names = [name for name in (self.folder / "versions").folders() if _NAME.fullmatch(name)]
        numbers = sorted(int(name) for name in names)
        return [self.version(number) for number in numbers if is_bundle(self.bundle(number))]

    def version(self, number: int) -> Version:
        """
        Raises:
            UsageError: there is none of that number.
        """
        try:
            return _read(Version, self.bundle(number) / VERSION)
        except (FileNotFoundError, NotADirectoryError):
            there = ", ".join(str(version.number) for version in self.versions())
            raise UsageError(f"{self.folder} has no version {number}. There are: {there or 'none'}.") from None

    def history(self) -> list[RegistryDecision]:
        """All decisions, the oldest first."""
        names = [info.base_name for info in (self.folder / "history").files()]
        found = [name for name in names if re.fullmatch(r"\d{6,}\.json", name)]
        found.sort(key=lambda name: int(name.partition(".")[0]))
        return [_read(RegistryDecision, self.folder / "history" / name) for name in found]

    def last_decided(self) -> int:
        """Number of the newest decision of a retraining; 0 before the first."""
        return max((entry.number for entry in self.history() if entry.tick), default=0)

    def dataset(self, version: int) -> StoragePath:
        """Manifest and files of the data that the version was trained on."""
        return self.bundle(version) / DATASET

    def tick(self, name: str) -> StoragePath:
        return self.folder / "ticks" / name

    def run(self, tick: str) -> StoragePath:
        return self.folder / "runs" / tick

    def shards(self, name: str) -> StoragePath:
        return self.folder / "shards" / name

    def state(self, tick: str) -> TickState | None:
        """None where it has not begun, or nobody can tell how far it is."""
        try:
            return _read(TickState, self.tick(tick) / STATE)
        except (FileNotFoundError, NotADirectoryError, UsageError):
            return None

    def write_state(self, tick: str, state: TickState) -> None:
        (self.tick(tick) / STATE).write_bytes(state.model_dump_json(indent=1).encode())

    def add(self, made: Callable[[int], Version], run: StoragePath, dataset: Dataset) -> Version:
        """Copies the bundle of a finished run to a version of its own, unless that is done.

        The caller holds the lock of retraining.

        Args:
            made: the version's facts, given its number.
            dataset: what it was trained on.
        """
        bundle = run / "bundle"
        there = self.versions()
        used = [version.number for version in there] + [entry.version for entry in self.history()]
        version = made(1 + max(used, default=0))
        for other in there:
            if (other.tick, other.request_hash, other.dataset) == (version.tick, version.request_hash, version.dataset):
                return other
        folder = self.bundle(version.number)
        folder.delete()  # half of a copy
        (folder / DATASET / MANIFEST).write_bytes(dataset.manifest.model_dump_json(indent=1).encode())
        for name in (FILES, LEDGER):
            (folder / DATASET / name).write_bytes((dataset.folder / name).read_bytes())
        (folder / VERSION).write_bytes(version.model_dump_json(indent=1).encode())
        (folder / "report.html").write_bytes((run / "report" / "report.html").read_bytes())
        names = [info.path[len(bundle.path) + 1 :] for info in bundle.files()]
        for name in sorted(names, key=lambda name: name == CARD):  # which makes it a bundle, last
            (folder / name).write_bytes((bundle / name).read_bytes())
        return version

    def decide(self, version: Version, *, promote: bool, compared_with: int | None, reason: str) -> RegistryDecision:
        """Records what the gate decided of a challenger, and makes it champion if so.

        Args:
            compared_with: the version of the champion that it was compared with.

        Raises:
            ChampionChanged: another is champion by now; nothing was recorded.
            HeldError: somebody is changing the champion.
        """
        with self._changing():
            if done := next((entry for entry in self.history() if entry.tick == version.tick), None):
                return done
            if self.champion() != compared_with:
                raise ChampionChanged(f"the champion was changed from version {compared_with} to {self.champion()}")
            champion = version.number if promote else compared_with
            event: Event = "promoted" if promote else "rejected"
            about = {"tick": version.tick, "request_hash": version.request_hash}
            return self._append(event, version.number, champion, reason, **about)

    def promote(self, number: int, reason: str = "") -> RegistryDecision:
        """Makes a version champion by hand.

        Raises:
            UsageError: there is no such version, or it is the champion.
        """
        with self._changing():
            self.version(number)
            if not (self.bundle(number) / WEIGHTS).is_file():
                raise UsageError(f"version {number} has lost its {WEIGHTS}, so it cannot be used. Name another.")
            if self.champion() == number:
                raise UsageError(f"version {number} is the champion already")
            return self._append("promoted by hand", number, number, reason)

    def rollback(self, reason: str = "") -> RegistryDecision:
        """Makes the champion before this one champion again.

        Raises:
            UsageError: there was none before it.
        """
        with self._changing():
            line: list[int] = []  # of champions, each having replaced the one before
            for entry in self.history():
                if entry.event == "rolled back":
                    line.pop()
                elif entry.event != "rejected":
                    line.append(entry.version)
            if len(line) < 2:
                raise UsageError(f"{self.folder}: no champion came before this one, so there is nothing to go back to.")
            return self._append("rolled back", line[-1], line[-2], reason)

    def finish_pending_decision(self) -> None:
        """Finishes the decision that somebody left half done, if there is one.

        Raises:
            HeldError: somebody is changing the champion.
        """
        entries = self.history()
        if entries and entries[-1].champion != self._champion_or_none():
            with self._changing():
                pass

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone with the history and the champion; what somebody left half done is finished first.

        Raises:
            HeldError: somebody else is at it, and stays.
        """
        lock, claim = self.folder / "locks" / "champion", claim_of_this_process(self._who)
        with ExitStack() as stack:
            for left in reversed(range(_PATIENCE)):
                try:
                    name = f"the champion of {self.folder}"
                    stack.enter_context(Lock(lock, claim, name, lambda: None, lambda line: None))
                    break
                except HeldError:
                    if not left:
                        raise
                    time.sleep(1)
            entries = self.history()
            if entries and entries[-1].champion != self._champion_or_none():
                self._point(entries[-1])
            yield

    def prunable(self, keep: int, current: str = "") -> list[StoragePath]:
        """Folders that nobody needs: all but the newest versions and runs, and what is or may be in use.

        Never a version that was ever champion; nor the run and the shards of a retraining that may go on: `current`,
        or one that no decision has come after. The caller holds the lock of retraining.

        Args:
            keep: how many of the newest versions and of the newest decided runs stay.
        """
        entries, there = self.history(), [version.number for version in self.versions()]
        champions = {entry.champion for entry in entries}
        kept = champions | set(there[-keep:])
        folders = (self.folder / "versions").folders()
        found = [self.folder / "versions" / name for name in folders if _NAME.fullmatch(name) and int(name) not in kept]
        last = self.last_decided()
        decided = [entry.tick for entry in entries if entry.tick]
        states = {name: self.state(name) for name in (self.folder / "ticks").folders()}
        going_on = {name for name, s in states.items() if s and s.after_entry == last and name not in decided}
        runs = going_on | {current} | set(decided[-keep:])
        found += [self.run(name) for name in (self.folder / "runs").folders() if states.get(name) and name not in runs]
        in_use = {states[name].shards for name in going_on | {current, *decided[-1:]} if states.get(name)}
        ours = {state.shards for state in states.values() if state}
        found += [self.shards(name) for name in (self.folder / "shards").folders() if name in ours - in_use]
        return found

    def prune(self, keep: int, current: str = "") -> list[StoragePath]:
        """Removes what is `prunable`; nobody changes the champion meanwhile."""
        with self._changing():
            found = self.prunable(keep, current)
            for folder in found:
                (folder / CARD).delete()  # first, so that half of a version is none
                folder.delete()
        return found

    def find_unfinished_tick(self, request_hash: str) -> str | None:
        """The tick that was begun with this very data and settings and not decided, nor any after it."""
        decided, last = {entry.tick for entry in self.history()}, self.last_decided()
        for name in (self.folder / "ticks").folders():
            state = None if name in decided else self.state(name)
            if state is not None and (state.request_hash, state.after_entry) == (request_hash, last):
                return name
        return None

    def _champion_or_none(self) -> int | None:
        try:
            return self.champion()
        except UsageError:
            return None

    def _append(self, event: Event, version: int, champion: int | None, reason: str, **about: str) -> RegistryDecision:
        entries = self.history()
        facts = self.version(version)
        entry = RegistryDecision(
            number=entries[-1].number + 1 if entries else 1,
            time=datetime.now(UTC),
            who=self._who,
            event=event,
            version=version,
            champion=champion,
            dataset=facts.dataset,
            figures=self.figures(version),
            reason=reason,
            **about,
        )
        data = entry.model_dump_json(indent=1).encode()
        (self.folder / "history" / f"{entry.number:06d}.json").write_bytes(data)
        self._point(entry)
        return entry

    def _point(self, entry: RegistryDecision) -> None:
        if entry.champion is None:
            return
        pointer = {"format_version": _FORMAT, "version": entry.champion, "bundle": f"versions/{entry.champion:04d}"}
        (self.folder / CHAMPION).write_json(pointer | {"entry": entry.number, "since": entry.time.isoformat()})


class ChampionChanged(Exception):
    """The champion is not the one that was compared with."""
