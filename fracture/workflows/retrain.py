"""Retrain on data that grows, and put the new model in use only if it is shown to be no worse.

One retraining is a tick. It scans what is new, trains a challenger, compares it with the champion on radiographs that
neither has seen, and records the decision. A tick that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from fracture.config import Config
from fracture.dataset.format import Dataset, read_dataset, read_manifest
from fracture.errors import RunError, UsageError
from fracture.labels import CLASS_NAMES
from fracture.lock import HeldError
from fracture.progress.bars import ProgressBars
from fracture.registry.registry import ChampionChanged, Registry, RegistryDecision, TickState, Version
from fracture.runtime.cluster import check_capacity, start_ray
from fracture.storage import storage_path
from fracture.workflows.arguments import Report, patient_key, print_line, resumable
from fracture.workflows.locking import describe_user, hold_lock
from fracture.workflows.preprocess import find_radiographs, prepare_dataset
from fracture.workflows.registry import retraining_lock
from fracture.workflows.train import train_run

if TYPE_CHECKING:
    from pyarrow import Table

    from fracture.dataset.format import Manifest
    from fracture.preparation.source import Source
    from fracture.registry.retraining_page import Retraining
    from fracture.storage import StoragePath

Interval = Literal["minute", "hour", "day", "week", "month"]
_TICK_NAMES: dict[Interval, str] = {  # formats of the time in UTC
    "minute": "%Y%m%d-%H%M",
    "hour": "%Y%m%d-%H",
    "day": "%Y-%m-%d",
    "week": "%G-w%V",
    "month": "%Y-%m",
}
_MOST_COMPARISONS = 3  # with a champion that is changed by hand during each comparison


@dataclass(frozen=True, kw_only=True)
class RetrainArguments:
    """The data, the registry, and the name of the tick.

    Raises:
        UsageError: the tick's name cannot be a folder's, or the settings leave no training, validation or test split.
    """

    data: tuple[str, ...]  # folders or URIs
    registry: str  # folder or URI for everything that is written
    config: Config = field(default_factory=Config)
    labels: str | None = None  # table of labels, in place of class folders
    key_file: str | None = None  # of the secret key that hides patients' ids; None: patients.key beside the registry
    tick: str | None = None  # the schedule's name of this retraining; None: named after the time
    every: Interval = "week"  # how long a tick lasts that is named after the time
    warm_start: bool = False  # whether training begins with the champion's weights
    force: bool = False  # train even if nothing is new
    notify: str | None = None  # URL of a web hook
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.tick is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.tick):
            raise UsageError(
                f"--tick {self.tick!r}: a tick's name is letters, digits, '.', '_' and '-', such as 2026-w48"
            )
        if self.config.data.folds or self.config.data.split == "test":
            raise UsageError(
                f"data.folds = {self.config.data.folds!r}, data.split = {self.config.data.split!r}: retraining needs "
                "training, validation and test. Use data.folds = 0, and auto, group or official."
            )


@dataclass(frozen=True)
class RetrainResult:
    """The decision and its page; None where nothing was new or another retraining is at work."""

    decision: RegistryDecision | None
    page: StoragePath | None

    @property
    def rejected(self) -> bool:
        return self.decision is not None and self.decision.event == "rejected"


def retrain(arguments: RetrainArguments, report: Report = print_line) -> RetrainResult:
    """Run one tick, or finish it if it was interrupted.

    Raises:
        UsageError: the data, the registry, the settings or the web hook's URL cannot be used.
        RunError: training or the decision failed; the same tick again goes on.
        KeyboardInterrupt: a signal came; what could be saved in time is saved. Its note says how to resume.
    """
    from fracture.preparation.output import check_outside_data
    from fracture.registry.webhook import check_url

    tick = arguments.tick or name_tick(arguments.every, datetime.now(UTC))
    if arguments.notify:
        check_url(arguments.notify)
    registry = Registry(storage_path(arguments.registry), describe_user())
    name, advice = f"the retraining of {registry.folder}", f"give the same --tick again: {tick}"
    try:
        with resumable(f"the same command with --tick {tick}"):
            key = patient_key(arguments.key_file, registry.folder.parent)
            source = find_radiographs(arguments.data, arguments.labels, arguments.config, key, report)
            check_outside_data(source, registry.folder)
            with hold_lock(retraining_lock(registry), name, "retrain", advice, report):
                return run_tick(arguments, registry, tick, source, report)
    except HeldError as error:
        report(f"busy       {error}; nothing to do here")
        return RetrainResult(None, None)
    except Exception as error:  # posted to the web hook, and then raised to whoever called
        event = {"event": "failed", "registry": arguments.registry, "tick": tick, "reason": str(error)}
        _notify(arguments, event, report)
        raise


def name_tick(every: Interval, now: datetime) -> str:
    """Return the name of the minute, hour, day, ISO week or month that `now` is in."""
    return now.strftime(_TICK_NAMES[every])


def run_tick(
    arguments: RetrainArguments, registry: Registry, tick: str, source: Source, report: Report
) -> RetrainResult:
    """Run the tick from where it is to its decision. The caller holds the lock of retraining."""
    from fracture.training.checks import check_initial, with_data_of

    config = arguments.config
    try:
        registry.finish_pending_decision()
    except HeldError as error:  # which would otherwise mean that another retraining is at work
        raise RunError(f"the last decision is not finished: {error}") from None
    _check_image_size(config, registry)
    recipe = _hash_recipe(config, arguments.warm_start)
    request_hash = _hash_request(source, config, arguments.warm_start)
    if not arguments.tick:  # a retry may come after the week in which its tick began
        tick = registry.find_unfinished_tick(request_hash) or tick
    tick, decision = find_decided_tick(registry, tick, request_hash, arguments.force)
    report(f"tick       {tick}, registry {registry.folder}")
    if decision:
        report(f"decided    earlier: {decision.event}")
        return finish_tick(arguments, registry, decision, report)
    state = _resume_tick(registry, tick, recipe, report)
    if state is None and not arguments.force and (same := _find_same_request(registry, request_hash)):
        report(f"nothing    new since {same}; --force trains anyway")
        return RetrainResult(None, None)
    with resumable(f"the same command with --tick {tick}"):
        if state is None:
            state = _begin_tick(arguments, registry, tick, request_hash, recipe, source, report)
        dataset = _prepare_tick_dataset(arguments, registry, tick, state, source, report)
        config = with_data_of(config, dataset.manifest)
        initial = registry.read_bundle(state.initial) if state.initial else None
        if initial:
            check_initial(config, initial)
        train_run(config, dataset, registry.run_folder(tick), arguments.verbose, report, initial)
        version = registry.add_version(
            lambda number: _describe_version(number, tick, state, dataset.manifest), registry.run_folder(tick), dataset
        )
        decision = _decide(registry, version, dataset, config, arguments.verbose, report)
        return finish_tick(arguments, registry, decision, report)


def _check_image_size(config: Config, registry: Registry) -> None:
    """Raise UsageError where challenger and champion could not be compared, before hours of training."""
    champion = registry.champion()
    if champion is None:
        return
    size = registry.read_bundle(champion).image_size
    if size != config.data.image_size:
        raise UsageError(
            f"data.image_size = {config.data.image_size}, but version {champion}, which is in use, takes {size}: the "
            f"two could not be compared on the same images. Use {size}, or begin another registry."
        )


def find_decided_tick(
    registry: Registry, tick: str, request_hash: str, force: bool
) -> tuple[str, RegistryDecision | None]:
    """Return the tick's final name, and its decision if this very request was decided in it.

    A tick that was decided for another request gets a number: TICK-2, TICK-3 and so on.

    Args:
        force: train again, unless the decided tick was killed before its end and this is its retry.
    """
    decided = {decision.tick: decision for decision in registry.history() if decision.tick}
    name, number = tick, 1
    while name in decided:
        state = registry.read_state(name)
        finished = state is None or state.notified
        if decided[name].request_hash == request_hash and not (force and finished):
            return name, decided[name]
        number += 1
        name = f"{tick}-{number}"
    return name, None


def _find_same_request(registry: Registry, request_hash: str) -> str:
    """Return where this very request was decided last, in words; "" where it was not."""
    champion = registry.champion()
    if champion is not None and registry.version(champion).request_hash == request_hash:
        return f"version {champion}, which is in use"
    last = next((decision for decision in reversed(registry.history()) if decision.tick), None)
    if last is not None and last.request_hash == request_hash:
        return f"{last.tick}, which was {last.event}"
    return ""


def _resume_tick(registry: Registry, tick: str, recipe: str, report: Report) -> TickState | None:
    """Return the state of a tick that can go on; remove what is left of one that cannot, and return None."""
    state = registry.read_state(tick)
    if state is None:
        registry.run_folder(tick).delete()
        return None
    prepared = not state.dataset or _is_prepared(registry, state)
    if prepared and state.after_decision == registry.last_decision_number() and state.recipe == recipe:
        return state if state.dataset else None
    report("starts     again: settings, data or the version in use have changed since this tick began")
    registry.run_folder(tick).delete()
    return None


def _is_prepared(registry: Registry, state: TickState) -> bool:
    """Return whether the dataset that the tick began with is still there, whole."""
    try:
        dataset = read_dataset(registry.shards_folder(state.shards))
        dataset.find_files()
    except UsageError:
        return False
    return dataset.manifest.fingerprint == state.dataset


def _begin_tick(
    arguments: RetrainArguments,
    registry: Registry,
    tick: str,
    request_hash: str,
    recipe: str,
    source: Source,
    report: Report,
) -> TickState:
    """Write the state of a new tick, and return it."""
    from fracture.preparation.output import name_output_folder

    champion = registry.champion()
    if arguments.warm_start and champion is None:
        report("weights    from scratch: no version is in use yet whose weights --warm-start could take")
    state = TickState(
        after_decision=registry.last_decision_number(),
        request_hash=request_hash,
        recipe=recipe,
        shards=name_output_folder(source, arguments.config.data),
        initial=champion if arguments.warm_start else None,
    )
    registry.write_state(tick, state)
    return state


def _prepare_tick_dataset(
    arguments: RetrainArguments, registry: Registry, tick: str, state: TickState, source: Source, report: Report
) -> Dataset:
    """Return the dataset of this tick: the one that it began with, if it is being resumed."""
    from fracture.training.checks import check_batch_size

    def start() -> None:
        start_ray(arguments.verbose, to_train=True)
        check_capacity(arguments.config.compute)

    shards = registry.shards_folder(state.shards)
    if state.dataset:
        report(f"shards     {shards}, as when this tick began")
        return read_dataset(shards)
    check_batch_size(arguments.config.training.batch_size, len(source.files))  # before the files are scanned
    champion = registry.champion()
    before = None if champion is None else registry.dataset_folder(champion)
    dataset = prepare_dataset(source, shards, arguments.config, start, report, before)
    state.dataset = dataset.manifest.fingerprint
    registry.write_state(tick, state)
    return dataset


def _describe_version(number: int, tick: str, state: TickState, manifest: Manifest) -> Version:
    groups = manifest.groups.values()
    return Version(
        number=number,
        tick=tick,
        made=datetime.now(UTC),
        request_hash=state.request_hash,
        dataset=state.dataset,
        groups={name: sum(split[name] for split in groups) for name in CLASS_NAMES},
        initial_weights=f"version {state.initial}" if state.initial else "scratch",
    )


def _decide(
    registry: Registry, version: Version, dataset: Dataset, config: Config, verbose: bool, report: Report
) -> RegistryDecision:
    """Compare the version with the champion, write the page, and then record the decision."""
    for _ in range(_MOST_COMPARISONS):
        retraining = _judge_challenger(registry, version, dataset, config, verbose, report)
        try:
            return registry.decide(
                version,
                promote=retraining.promoted,
                compared_with=retraining.champion,
                reason=retraining.reason,
            )
        except HeldError as error:
            raise RunError(f"nothing was decided: {error}") from None
        except ChampionChanged as error:
            report(f"again      {error}")
    raise RunError(
        f"the champion of {registry.folder} was changed {_MOST_COMPARISONS} times while version {version.number} was "
        "compared with it"
    )


def _judge_challenger(
    registry: Registry, version: Version, dataset: Dataset, config: Config, verbose: bool, report: Report
) -> Retraining:
    """Score challenger and champion, apply the gate's rules, and write scores, page and `decision.json`."""
    from fracture.evaluation.devices import hide_gpus
    from fracture.evaluation.report import list_caveats
    from fracture.inference.scoring import score_rows
    from fracture.registry.data_changes import find_data_changes
    from fracture.registry.gate import apply_rules, compare_with_champion
    from fracture.registry.retraining_page import Retraining, render_retraining_page

    number = registry.champion()
    report("gate       scoring both models on test")
    hide_gpus()  # as at the end of the training, which may have been in another process
    champion = None if number is None else registry.read_bundle(number)
    before = None if number is None else _read_files(registry.dataset_folder(number))
    challenger = registry.read_bundle(version.number)
    changes = find_data_changes(dataset.find_files().read_parquet(), before)
    with ProgressBars() as bars:
        start = partial(start_ray, verbose)
        score = partial(score_rows, config=config, start=start, progress=bars.show)
        run = registry.run_folder(version.tick)
        compared = compare_with_champion(challenger, champion, run, dataset, changes, score)
    retraining = Retraining(
        tick=version.tick,
        registry=registry.folder,
        version=version.number,
        champion=number,
        initial_weights=version.initial_weights,
        challenger_bundle=challenger,
        champion_bundle=champion,
        comparison=compared,
        changes=changes,
        rules=apply_rules(compared, changes, dataset.manifest, config.gate),
        dataset=dataset,
        caveats=list_caveats(dataset.manifest),
    )
    folder = registry.tick_folder(version.tick)
    (folder / "scores.parquet").write_parquet(compared.scores)
    (folder / "report.html").write_bytes(render_retraining_page(retraining))
    (folder / "decision.json").write_json(retraining.as_json())
    for rule in retraining.rules:
        report(f"{'  holds' if rule.passed else '  FAILS':<10} {rule.name}: {rule.explanation}")
    return retraining


def _read_files(folder: StoragePath) -> Table:
    """Read the files of a version's dataset, whose shards are not kept."""
    return Dataset(folder, read_manifest(folder)).find_files().read_parquet()


def finish_tick(
    arguments: RetrainArguments, registry: Registry, decision: RegistryDecision, report: Report
) -> RetrainResult:
    """Remove what nobody needs and notify the web hook; may be done again after an interruption."""
    try:
        if pruned := registry.prune(arguments.config.registry.keep, decision.tick):
            names = (folder.path[len(registry.folder.path) + 1 :] for folder in pruned)
            report(f"removed    {', '.join(names)}")
    except (OSError, RunError, UsageError) as error:  # the next tick tries again
        report(f"removed    not all that nobody needs: {error}")
    state, page = registry.read_state(decision.tick), registry.tick_folder(decision.tick) / "report.html"
    if state is not None and not state.notified:
        event = decision.model_dump(mode="json") | {"registry": arguments.registry, "page": str(page)}
        _notify(arguments, event, report)
        state.notified = True
        registry.write_state(decision.tick, state)
    return RetrainResult(decision, page)


def _notify(arguments: RetrainArguments, event: dict[str, Any], report: Report) -> None:
    from fracture.registry.webhook import post_to_webhook

    if arguments.notify and (reason := post_to_webhook(arguments.notify, event)):
        report(f"notify     failed: {reason}")


def _hash_request(source: Source, config: Config, warm_start: bool) -> str:
    """Return a hash that differs where files, labels or settings of the recipe do."""
    return hashlib.sha256((source.hash_listing() + _hash_recipe(config, warm_start)).encode()).hexdigest()


def _hash_recipe(config: Config, warm_start: bool) -> str:
    return hashlib.sha256(repr((sorted(config.recipe().items()), warm_start)).encode()).hexdigest()
