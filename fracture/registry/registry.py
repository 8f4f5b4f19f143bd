"""The registry of models: a folder or bucket with all versions, the one in use, and the history of decisions.

  champion.json       the version in use; replaced atomically, so that a reader finds the old or the new one
  versions/0003/      an immutable bundle with its report; version.json and dataset/ describe how it was made
  history/000007.json one decision, never changed: who, when, on what data, with what figures
  ticks/2026-w48/     one retraining: its progress in state.json, then decision.json and report.html
  runs/2026-w48/      its training, as written by `fracture train`
  shards/             the datasets
  locks/              who is writing

A decision is first written to the history, then to `champion.json`. If a process is killed in between, the next one
completes the decision, so that the two agree whenever nobody is writing. A `champion.json` that names a later decision
than the history has stays: then a file of the history was removed.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from operator import attrgetter
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError

from fracture.dataset.format import LEDGER, MANIFEST, Dataset
from fracture.errors import UsageError
from fracture.inference.bundle import CARD, WEIGHTS, Bundle, is_bundle, read_bundle
from fracture.lock import HeldError, Lock, claim_of_this_process
from fracture.storage import StoragePath

CHAMPION = "champion.json"
VERSION = "version.json"
DATASET = "dataset"  # in a version: manifest and files of the data it was trained on, without their pixels
FORMAT_VERSION = 2
_PATIENCE = 30  # seconds to wait for another change of the champion, which takes one or two
Model = TypeVar("Model", bound=BaseModel)
_NAME = re.compile(r"\d{4,}")
_REPAIR = "Restore it from a copy."

STATE = "state.json"  # of a tick

Event = Literal["promoted", "rejected", "promoted by hand", "rolled back"]


class Version(BaseModel, frozen=True):
    """Content of `version.json`, beside a bundle."""

    format_version: Literal[2] = FORMAT_VERSION
    number: int
    tick: str
    made: datetime
    request_hash: str  # of the data and settings that it was made from
    dataset: str  # fingerprint
    groups: dict[str, int]  # class -> radiographs or patients, in all splits
    initial_weights: str  # "scratch", or the version whose weights training began with


class RegistryDecision(BaseModel, frozen=True):
    """One file of the history: which version was promoted or rejected, by whom and why."""

    format_version: Literal[2] = FORMAT_VERSION
    number: int
    time: datetime
    who: str
    event: Event
    version: int  # subject of the decision
    champion: int | None  # after the decision
    tick: str = ""  # of the retraining; empty if the decision was made by hand
    request_hash: str = ""
    dataset: str = ""
    figures: dict[str, float | None] = {}
    reason: str = ""


class Rule(BaseModel, frozen=True):
    """One rule of the gate and its result."""

    name: str
    value: float | None  # None: there was nothing to measure
    limit: float
    passed: bool
    explanation: str


class _TickDecision(BaseModel):
    """The part of a tick's `decision.json` that is read again."""

    rules: list[Rule]


class TickState(BaseModel):
    """Progress of a retraining, so that one that was killed can resume."""

    format_version: Literal[2] = FORMAT_VERSION
    after_decision: int  # number of the newest decision of a retraining when this one began
    request_hash: str
    recipe: str  # hash of the settings
    shards: str  # name of the dataset's folder
    dataset: str = ""  # fingerprint, once the shards are written
    initial: int | None = None  # version whose weights training begins with
    notified: bool = False


class _Champion(BaseModel):
    """Content of `champion.json`."""

    format_version: Literal[2]
    version: int
    bundle: str  # its folder, for readers other than this program
    decision: int  # number
    since: datetime


def _format_of(data: bytes) -> int | None:
    """Return the format that a file names; without a name it is 1, which only `champion.json` named."""
    try:
        content = json.loads(data)
    except ValueError:
        return None
    named = content.get("format_version", 1) if isinstance(content, dict) and content else None
    return named if isinstance(named, int) else None


def _parse(kind: type[Model], data: bytes, file: StoragePath, repair: str) -> Model:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise Damaged(f"{file} is damaged: {error.errors()[0]['msg']}. {repair}") from None


class Registry:
    """A registry in a folder or bucket, which may not exist yet."""

    def __init__(self, folder: StoragePath, who: str = "") -> None:
        """
        Args:
            who: person or job that decides, as it is recorded in the history.
        """
        self.folder, self._who = folder, who

    def _read(self, kind: type[Model], file: StoragePath, repair: str) -> Model:
        data = file.read_replaced_bytes()
        if (found := _format_of(data)) not in (None, FORMAT_VERSION):
            raise WrongFormat(
                f"{self.folder} is a registry of format {found}, and this program reads format {FORMAT_VERSION}: begin "
                "another registry with fracture retrain --registry; its models must be trained again."
            )
        return _parse(kind, data, file, repair)

    def champion(self) -> int | None:
        """Return the version in use, or None before the first.

        Raises:
            UsageError: `champion.json` is damaged or of another format.
        """
        champion = self._read_champion()
        return None if champion is None else champion.version

    def _read_champion(self) -> _Champion | None:
        repair = f"fracture registry promote VERSION --registry {self.folder} writes it again."
        try:
            return self._read(_Champion, self.folder / CHAMPION, repair)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def champion_bundle(self) -> Bundle:
        """
        Raises:
            UsageError: there is no champion, or its bundle is damaged.
        """
        return self.read_bundle(self.require_champion())

    def require_champion(self) -> int:
        """Return the version in use.

        Raises:
            UsageError: there is none.
        """
        version = self.champion()
        if version is None:
            raise UsageError(
                f"{self.folder} has no champion yet. Train one with: fracture retrain --data DIR --registry "
                f"{self.folder}"
            )
        return version

    def read_bundle(self, version: int) -> Bundle:
        """
        Raises:
            UsageError: there is no such version, or it is damaged.
        """
        self.version(version)
        return read_bundle(self.bundle_folder(version))

    def figures(self, version: int) -> dict[str, float | None]:
        """Return the metrics of a version per radiograph, on the test split of its own dataset."""
        test = self.read_bundle(version).evaluations["test"]["radiograph"]
        return {name: test[name] for name in ("auc", "recall", "specificity", "calibration_error")}

    def read_rules(self, tick: str) -> list[Rule]:
        """Return the gate's rules from a tick's `decision.json`; none where that file was removed.

        Raises:
            UsageError: it is damaged.
        """
        file = self.tick_folder(tick) / "decision.json"
        repair = "Restore it from a copy, or delete it: the version is then shown without its rules."
        try:
            return _parse(_TickDecision, file.read_replaced_bytes(), file, repair).rules
        except (FileNotFoundError, NotADirectoryError):
            return []

    def bundle_folder(self, version: int) -> StoragePath:
        return self.folder / "versions" / f"{version:04d}"

    def versions(self) -> list[Version]:
        """Return the complete versions, by number."""
        return [self.version(number) for number in self._version_numbers()]

    def _version_numbers(self) -> list[int]:
        names = [name for name in (self.folder / "versions").folders() if _NAME.fullmatch(name)]
        numbers = sorted(int(name) for name in names)
        return [number for number in numbers if is_bundle(self.bundle_folder(number))]

    def version(self, number: int) -> Version:
        """
        Raises:
            UsageError: there is no such version, or it is damaged or of another format.
        """
        folder = self.bundle_folder(number)
        repair = f"Restore it from a copy. Or delete {folder}, once another version is in use."
        try:
            return self._read(Version, folder / VERSION, repair)
        except (FileNotFoundError, NotADirectoryError):
            numbers = self._version_numbers()
            if number in numbers:
                raise UsageError(f"{folder / VERSION} is missing. {repair}") from None
            there = ", ".join(map(str, numbers)) or "none"
            raise UsageError(f"{self.folder} has no version {number}. There are: {there}.") from None

    def history(self) -> list[RegistryDecision]:
        """Return all decisions, the oldest first."""
        names = [info.base_name for info in (self.folder / "history").files()]
        found = [name for name in names if re.fullmatch(r"\d{6,}\.json", name)]
        found.sort(key=lambda name: int(name.partition(".")[0]))
        return [self._read(RegistryDecision, self.folder / "history" / name, _REPAIR) for name in found]

    def last_decision_number(self) -> int:
        """Return the number of the newest decision of a retraining, or 0 before the first."""
        return max((decision.number for decision in self.history() if decision.tick), default=0)

    def dataset_folder(self, version: int) -> StoragePath:
        """Return the folder with the manifest and the files of the dataset that the version was trained on."""
        return self.bundle_folder(version) / DATASET

    def tick_folder(self, name: str) -> StoragePath:
        return self.folder / "ticks" / name

    def run_folder(self, tick: str) -> StoragePath:
        return self.folder / "runs" / tick

    def shards_folder(self, name: str) -> StoragePath:
        return self.folder / "shards" / name

    def read_state(self, tick: str) -> TickState | None:
        """Return the progress of a retraining, or None if it has not begun or the file is damaged.

        Raises:
            UsageError: the registry is of another format, or the file may not be read.
        """
        try:
            return self._read(TickState, self.tick_folder(tick) / STATE, _REPAIR)
        except (FileNotFoundError, NotADirectoryError, Damaged):
            return None

    def write_state(self, tick: str, state: TickState) -> None:
        (self.tick_folder(tick) / STATE).write_bytes(state.model_dump_json(indent=1).encode())

    def add_version(self, describe: Callable[[int], Version], run: StoragePath, dataset: Dataset) -> Version:
        """Copy the bundle of a finished run to a new version, unless that is done already.

        A run that was deleted and trained anew is another version, whatever its tick and request. The caller must hold
        the lock of retraining.

        Args:
            describe: returns the facts about the version, given its number.
            dataset: that the run was trained on.
        """
        bundle = run / "bundle"
        versions = self.versions()
        used = [version.number for version in versions] + [decision.version for decision in self.history()]
        version = describe(1 + max(used, default=0))
        made_from = attrgetter("tick", "request_hash", "dataset")
        for other in versions:
            if made_from(other) == made_from(version) and self._has_weights_of(bundle, other.number):
                return other
        folder = self.bundle_folder(version.number)
        folder.delete()  # an incomplete copy
        (folder / DATASET / MANIFEST).write_bytes(dataset.manifest.model_dump_json(indent=1).encode())
        for file in (dataset.find_files(), dataset.folder / LEDGER):
            (folder / DATASET / file.name).write_bytes(file.read_bytes())
        (folder / VERSION).write_bytes(version.model_dump_json(indent=1).encode())
        (folder / "report.html").write_bytes((run / "report" / "report.html").read_bytes())
        names = [info.path[len(bundle.path) + 1 :] for info in bundle.files()]
        for name in sorted(names, key=lambda name: name == CARD):  # last, since it makes the copy complete
            (folder / name).write_bytes((bundle / name).read_bytes())
        return version

    def _has_weights_of(self, bundle: StoragePath, number: int) -> bool:
        weights = self.bundle_folder(number) / WEIGHTS
        return weights.is_file() and weights.read_bytes() == (bundle / WEIGHTS).read_bytes()

    def decide(self, version: Version, *, promote: bool, compared_with: int | None, reason: str) -> RegistryDecision:
        """Record the gate's decision on a challenger, and make it the champion if it is promoted.

        Args:
            compared_with: the version of the champion that it was compared with.

        Raises:
            ChampionChanged: another version is the champion by now; nothing was recorded.
            HeldError: another process is changing the champion.
        """
        with self._hold_champion():
            if done := next((decision for decision in self.history() if decision.tick == version.tick), None):
                return done
            if self.champion() != compared_with:
                raise ChampionChanged(f"the champion was changed from version {compared_with} to {self.champion()}")
            champion = version.number if promote else compared_with
            event: Event = "promoted" if promote else "rejected"
            retraining = {"tick": version.tick, "request_hash": version.request_hash}
            return self._append(event, version.number, champion, reason, **retraining)

    def promote(self, number: int, reason: str = "") -> RegistryDecision:
        """Make a version the champion by hand.

        Raises:
            UsageError: there is no such version, or it is the champion already.
        """
        with self._hold_champion():
            self._check_usable(number)
            champion = self._champion_or_none()
            if champion is not None and champion.version == number:
                raise UsageError(f"version {number} is the champion already")
            return self._append("promoted by hand", number, number, reason)

    def rollback(self, reason: str = "") -> RegistryDecision:
        """Make the previous champion the champion again.

        Raises:
            UsageError: there is no previous champion, or it or a file of the history was removed.
        """
        with self._hold_champion():
            decisions = self.history()
            self._check_none_lost(decisions)
            champions: list[int] = []  # each replaced the one before
            for decision in decisions:
                if decision.event == "rolled back":
                    champions.pop()
                elif decision.event != "rejected":
                    champions.append(decision.version)
            if len(champions) < 2:
                raise UsageError(f"{self.folder} has no previous champion, so there is nothing to roll back to.")
            self._check_usable(champions[-2])
            return self._append("rolled back", champions[-1], champions[-2], reason)

    def _check_usable(self, number: int) -> None:
        self.version(number)
        if not (self.bundle_folder(number) / WEIGHTS).is_file():
            raise UsageError(f"version {number} has lost its {WEIGHTS}, so it cannot be used. Name another version.")

    def _check_none_lost(self, decisions: list[RegistryDecision]) -> None:
        """Raise UsageError where a file of the history is missing: nobody knows then which champion was before."""
        there = {decision.number for decision in decisions}
        for number in range(1, 1 + self._newest_decision_number(decisions)):
            if number not in there:
                raise UsageError(
                    f"{self.folder}/history/{number:06d}.json is missing, so the previous champion is not known. "
                    f"{_REPAIR} Or name the version: fracture registry promote VERSION --registry {self.folder}"
                )

    def finish_pending_decision(self) -> None:
        """Complete the decision of a process that was killed while it wrote it, if there is one.

        Raises:
            HeldError: another process is changing the champion.
        """
        if self._find_pending_decision() is not None:
            with self._hold_champion():
                pass

    @contextmanager
    def _hold_champion(self) -> Iterator[None]:
        """Hold the lock of the history and the champion, and complete an interrupted decision first.

        Raises:
            HeldError: another process holds the lock and keeps it.
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
            if (pending := self._find_pending_decision()) is not None:
                self._write_champion(pending)
            yield

    def _find_pending_decision(self) -> RegistryDecision | None:
        """Return the newest decision if `champion.json` is older, damaged or missing, else None."""
        decisions = self.history()  # first, so that a decision that is made meanwhile is not taken for a pending one
        champion = self._champion_or_none()
        if not decisions or decisions[-1].champion is None:
            return None
        return decisions[-1] if champion is None or champion.decision < decisions[-1].number else None

    def find_prunable(self, keep: int, current: str = "") -> list[StoragePath]:
        """Return the folders of old versions, runs and datasets that may be removed.

        Versions that were ever the champion stay. So do the run and the shards of a retraining that may resume, which
        is `current` or one that no decision followed. The caller must hold the lock of retraining.

        Args:
            keep: number of the newest versions, and of the newest decided runs, that stay.
            current: tick of the retraining that is running.
        """
        decisions, numbers = self.history(), [version.number for version in self.versions()]
        champions = {decision.champion for decision in decisions}
        kept = champions | set(numbers[-keep:])
        folders = (self.folder / "versions").folders()
        found = [self.folder / "versions" / name for name in folders if _NAME.fullmatch(name) and int(name) not in kept]
        last = self.last_decision_number()
        decided = [decision.tick for decision in decisions if decision.tick]
        states = {name: self.read_state(name) for name in (self.folder / "ticks").folders()}
        unfinished = {name for name, s in states.items() if s and s.after_decision == last and name not in decided}
        runs = unfinished | {current} | set(decided[-keep:])
        names = (self.folder / "runs").folders()
        found += [self.run_folder(name) for name in names if states.get(name) and name not in runs]
        in_use = {states[name].shards for name in unfinished | {current, *decided[-1:]} if states.get(name)}
        known = {state.shards for state in states.values() if state}
        found += [self.shards_folder(name) for name in (self.folder / "shards").folders() if name in known - in_use]
        return found

    def prune(self, keep: int, current: str = "") -> list[StoragePath]:
        """Remove the folders that `find_prunable` returns, under the champion's lock, and return them."""
        with self._hold_champion():
            found = self.find_prunable(keep, current)
            for folder in found:
                (folder / CARD).delete()  # first, so that an incomplete version is not taken for a whole one
                folder.delete()
        return found

    def find_unfinished_tick(self, request_hash: str) -> str | None:
        """Return the tick that began with the same data and settings and that no decision followed, if any."""
        decided, last = {decision.tick for decision in self.history()}, self.last_decision_number()
        for name in (self.folder / "ticks").folders():
            state = None if name in decided else self.read_state(name)
            if state is not None and (state.request_hash, state.after_decision) == (request_hash, last):
                return name
        return None

    def _champion_or_none(self) -> _Champion | None:
        try:
            return self._read_champion()
        except Damaged:
            return None

    def _append(
        self, event: Event, version: int, champion: int | None, reason: str, **retraining: str
    ) -> RegistryDecision:
        decision = RegistryDecision(
            number=1 + self._newest_decision_number(self.history()),
            time=datetime.now(UTC),
            who=self._who,
            event=event,
            version=version,
            champion=champion,
            dataset=self.version(version).dataset,
            figures=self.figures(version),
            reason=reason,
            **retraining,
        )
        data = decision.model_dump_json(indent=1).encode()
        (self.folder / "history" / f"{decision.number:06d}.json").write_bytes(data)
        self._write_champion(decision)
        return decision

    def _newest_decision_number(self, decisions: list[RegistryDecision]) -> int:
        """Return the number of the newest decision that was ever made, also if its file was removed; 0 before any."""
        champion = self._champion_or_none()
        return max([decision.number for decision in decisions] + [champion.decision if champion else 0])

    def _write_champion(self, decision: RegistryDecision) -> None:
        if decision.champion is None:
            return
        champion = _Champion(
            format_version=FORMAT_VERSION,
            version=decision.champion,
            bundle=f"versions/{decision.champion:04d}",
            decision=decision.number,
            since=decision.time,
        )
        (self.folder / CHAMPION).write_bytes(champion.model_dump_json(indent=1).encode())


class ChampionChanged(Exception):
    """The champion is no longer the one that the challenger was compared with."""


class Damaged(UsageError):
    """A file of the registry holds something else than this program writes."""


class WrongFormat(UsageError):
    """The registry was written in another format."""
