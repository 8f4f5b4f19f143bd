"""Train anew on data that grows, and put the new model in use only if it proves to be no worse: the scheduled job.

  python job/retrain.py --data DIR --registry REGISTRY                 a week has one tick: 2026-w48
  python job/retrain.py --data DIR --registry REGISTRY --every day     or a day, an hour, a minute, a month
  python job/retrain.py --data s3://... --registry s3://... --tick ID  or the scheduler's own name of it
  python job/retrain.py ... --notify https://...                       JSON on promotion, rejection, failure

Leaves at once where another retraining of this registry is at work, or where nothing is new. Otherwise it preprocesses
what is new, trains, and compares the challenger with the model in use on radiographs of test that neither has seen.
The rules are the settings gate.*. A run that was killed goes on when its tick is given again. Writes in REGISTRY:

  champion.json            which version is in use; job/predict.py --registry REGISTRY takes that one
  versions/, history/      all versions, all decisions; job/registry.py shows them, and promotes or rolls back by hand
  ticks/TICK/report.html   the page on one retraining, decision.json with each rule beside it
  runs/TICK/, shards/      as of job/train.py, whose --status TICK --storage REGISTRY says how far it is

Exit codes: 0 promoted, or nothing new, or another is at work; 10 rejected by the gate, and the model in use stays; 2 a
mistake in what was asked; 1 failed: the same tick again goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import _cli
from preprocess import find, prepare
from train import add_compute_flags, compute_settings, held, train_once

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fracture.config import Config
    from fracture.dataset.format import Dataset, Manifest
    from fracture.preparation.source import Source
    from fracture.registry.registry import Registry, RegistryDecision, TickState, Version
    from fracture.registry.retraining_page import Retraining

REJECTED = 10  # exit code
_TICKS = {"minute": "%Y%m%d-%H%M", "hour": "%Y%m%d-%H", "day": "%Y-%m-%d", "week": "%G-w%V", "month": "%Y-%m"}  # UTC
_CHANGES = 3  # of the champion by hand, while it is being judged, that are followed


def main(args: argparse.Namespace) -> int:
    from fracture.lock import HeldError
    from fracture.registry.registry import Registry
    from fracture.registry.webhook import check_url
    from fracture.storage import storage_path

    tick = _tick(args, datetime.now(UTC))
    config = _settings(args)
    if args.notify:
        check_url(args.notify)
    registry = Registry(storage_path(args.registry), _cli.who())
    args.resume_hint = f"the same command with --tick {tick}"
    lock = registry.folder / "locks" / "retraining"
    try:
        source = _source(args, config, registry)
        with held(lock, f"the retraining of {registry.folder}", f"give the same --tick again: {tick}"):
            return _retrain(args, config, registry, tick, source)
    except HeldError as error:
        print(f"busy       {error}; nothing to do here", flush=True)
        return 0
    except Exception as error:  # told, and then told again on the screen
        _tell(args, {"event": "failed", "registry": args.registry, "tick": tick, "reason": str(error)})
        raise


def _source(args: argparse.Namespace, config: Config, registry: Registry) -> Source:
    from fracture.preparation.preprocess import check_apart
    from fracture.storage import storage_path

    source = find(args, [storage_path(data) for data in args.data], config)
    check_apart(source, registry.folder)
    return source


def _retrain(args: argparse.Namespace, config: Config, registry: Registry, tick: str, source: Source) -> int:
    from fracture.errors import RunError
    from fracture.lock import HeldError

    try:
        registry.finish_pending_decision()
    except HeldError as error:  # else it would pass for another retraining
        raise RunError(f"the last decision is not finished: {error}") from None
    _check_size(config, registry)
    request_hash = _request_hash(source, config, args.warm_start)
    tick = (
        tick if args.tick else registry.find_unfinished_tick(request_hash) or tick
    )  # a retry may come in the next week
    tick, done = _which(registry, tick, request_hash, args.force)
    args.resume_hint = f"the same command with --tick {tick}"
    print(f"tick       {tick}, registry {registry.folder}", flush=True)
    if done:
        print(f"decided    earlier: {done.event}", flush=True)
        return _finish(args, config, registry, done)
    recipe = _recipe(config, args.warm_start)
    state = _going_on(registry, tick, recipe)
    if state is None and not args.force and (known := _known(registry, request_hash)):
        print(f"nothing    new since {known}; --force trains anyway", flush=True)
        return 0
    if state is None:
        state = _begun(registry, tick, request_hash, recipe, source, config, args.warm_start)
    from fracture.training.checks import check_initial, with_data_of

    dataset = _prepared(args, config, registry, tick, state, source)
    config = with_data_of(config, dataset.manifest)
    initial = registry.read(state.initial) if state.initial else None
    if initial:
        check_initial(config, initial)
    train_once(config, dataset, registry.run(tick), args.verbose, initial)
    version = registry.add(lambda number: _version(number, tick, state, dataset.manifest), registry.run(tick), dataset)
    return _finish(args, config, registry, _decide(registry, version, dataset, config))


def _check_size(config: Config, registry: Registry) -> None:
    """Before hours of training, after which the two could not be compared."""
    from fracture.errors import UsageError

    champion = registry.champion()
    if champion is None:
        return
    size = registry.read(champion).image_size
    if size != config.data.image_size:
        raise UsageError(
            f"data.image_size = {config.data.image_size}, and version {champion}, which is in use, takes {size}: they "
            f"could not be compared on the same images. Use {size}, or begin another registry."
        )


def _which(registry: Registry, tick: str, request_hash: str, force: bool) -> tuple[str, RegistryDecision | None]:
    """The tick's name, and what was decided in it; TICK-2, TICK-3, ... is what was asked anew within it."""
    decided = {entry.tick: entry for entry in registry.history() if entry.tick}
    name, number = tick, 1
    while name in decided:
        state = registry.state(name)
        through = state is None or state.notified  # else it was killed before its end, and this is its retry
        if decided[name].request_hash == request_hash and not (force and through):
            return name, decided[name]
        number += 1
        name = f"{tick}-{number}"
    return name, None


def _known(registry: Registry, request_hash: str) -> str:
    """Where the very same was asked before; "" where it was not."""
    champion = registry.champion()
    if champion is not None and registry.version(champion).request_hash == request_hash:
        return f"version {champion}, which is in use"
    last = next((entry for entry in reversed(registry.history()) if entry.tick), None)
    if last is not None and last.request_hash == request_hash:
        return f"{last.tick}, which was {last.event}"
    return ""


def _going_on(registry: Registry, tick: str, recipe: str) -> TickState | None:
    """How far the tick is, if it can go on; what cannot is removed, and begins anew."""
    from fracture.dataset.format import read_dataset
    from fracture.errors import UsageError

    state = registry.state(tick)
    if state is None:
        registry.run(tick).delete()
        return None
    try:
        prepared = (
            not state.dataset or read_dataset(registry.shards(state.shards)).manifest.fingerprint == state.dataset
        )
    except UsageError:
        prepared = False
    if prepared and state.after_entry == registry.last_decided() and state.recipe == recipe:
        return state if state.dataset else None
    print("begins     anew: settings, data or the version in use have changed since this tick was begun", flush=True)
    registry.run(tick).delete()
    return None


def _begun(
    registry: Registry, tick: str, request_hash: str, recipe: str, source: Source, config: Config, warm: bool
) -> TickState:
    from fracture.preparation.preprocess import shards_name
    from fracture.registry.registry import TickState

    champion = registry.champion()
    if warm and champion is None:
        print("weights    from scratch: no version is in use yet that --warm-start could begin with", flush=True)
    state = TickState(
        after_entry=registry.last_decided(),
        request_hash=request_hash,
        recipe=recipe,
        shards=shards_name(source, config.data),
        initial=champion if warm else None,
    )
    registry.write_state(tick, state)
    return state


def _prepared(
    args: argparse.Namespace, config: Config, registry: Registry, tick: str, state: TickState, source: Source
) -> Dataset:
    """The shards of this tick; those it was begun with, if it goes on."""
    from fracture.dataset.format import read_dataset
    from fracture.runtime.cluster import check_capacity, start_ray

    def start() -> None:
        start_ray(args.verbose, to_train=True)
        check_capacity(config.compute)

    shards = registry.shards(state.shards)
    if state.dataset:
        print(f"shards     {shards}, as this tick was begun with them", flush=True)
        return read_dataset(shards)
    champion = registry.champion()
    prepare(source, shards, config, start, None if champion is None else registry.dataset(champion))
    dataset = read_dataset(shards)
    state.dataset = dataset.manifest.fingerprint
    registry.write_state(tick, state)
    return dataset


def _version(number: int, tick: str, state: TickState, manifest: Manifest) -> Version:
    from fracture.labels import CLASS_NAMES
    from fracture.registry.registry import Version

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


def _decide(registry: Registry, version: Version, dataset: Dataset, config: Config) -> RegistryDecision:
    """Judges the version beside the champion, writes the page, and then the decision."""
    from fracture.errors import RunError
    from fracture.lock import HeldError
    from fracture.registry.registry import ChampionChanged

    for _ in range(_CHANGES):
        told = _judged(registry, version, dataset, config)
        try:
            return registry.decide(version, promote=told.promoted, compared_with=told.champion, reason=told.reason)
        except HeldError as error:
            raise RunError(f"nothing was decided: {error}") from None
        except ChampionChanged as error:
            print(f"again      {error}", flush=True)
    raise RunError(
        f"the champion of {registry.folder} was changed {_CHANGES} times while version {version.number} was judged"
    )


def _judged(registry: Registry, version: Version, dataset: Dataset, config: Config) -> Retraining:
    from fracture.dataset.format import FILES
    from fracture.evaluation.report import caveats
    from fracture.registry.data_changes import find_data_changes
    from fracture.registry.gate import compare, judge
    from fracture.registry.retraining_page import Retraining, retraining_page

    number = registry.champion()
    print("gate       scoring both models on test", flush=True)
    champion = None if number is None else registry.read(number)
    before = None if number is None else (registry.dataset(number) / FILES).read_parquet()
    challenger = registry.read(version.number)
    new = find_data_changes((dataset.folder / FILES).read_parquet(), before)
    compared = compare(challenger, champion, registry.run(version.tick), dataset, new)
    told = Retraining(
        tick=version.tick,
        registry=registry.folder,
        version=version.number,
        champion=number,
        initial_weights=version.initial_weights,
        challenger_bundle=challenger,
        champion_bundle=champion,
        compared=compared,
        new=new,
        rules=judge(compared, new, dataset.manifest, config.gate),
        dataset=dataset,
        caveats=caveats(dataset.manifest),
    )
    folder = registry.tick(version.tick)
    (folder / "scores.parquet").write_parquet(compared.scores)
    (folder / "report.html").write_bytes(retraining_page(told))
    (folder / "decision.json").write_json(told.as_json())
    for rule in told.rules:
        print(f"{'  holds' if rule.passed else '  FAILS':<10} {rule.name}: {rule.told}", flush=True)
    return told


def _finish(args: argparse.Namespace, config: Config, registry: Registry, entry: RegistryDecision) -> int:
    """What comes after a decision, and may be done again: clears away what nobody needs, and tells of it."""
    from fracture.errors import RunError, UsageError

    try:
        if pruned := registry.prune(config.registry.keep, entry.tick):
            names = (folder.path[len(registry.folder.path) + 1 :] for folder in pruned)
            print(f"cleared    {', '.join(names)}", flush=True)
    except (OSError, RunError, UsageError) as error:  # the next time will do
        print(f"cleared    not all that nobody needs: {error}", flush=True)
    state, page = registry.state(entry.tick), registry.tick(entry.tick) / "report.html"
    if state is not None and not state.notified:
        _tell(args, entry.model_dump(mode="json") | {"registry": args.registry, "page": str(page)})
        state.notified = True
        registry.write_state(entry.tick, state)
    promoted = entry.event != "rejected"
    stays = f"version {entry.champion} stays in use" if entry.champion else "no version is in use"
    print(f"decision   version {entry.version} {entry.event}: {'in use from now on' if promoted else stays}")
    print(f"page       {page}", flush=True)
    return 0 if promoted else REJECTED


def _tell(args: argparse.Namespace, message: dict[str, Any]) -> None:
    from fracture.registry.webhook import notify

    if args.notify and (why := notify(args.notify, message)):
        print(f"notify     nobody was told: {why}", flush=True)


def _request_hash(source: Source, config: Config, warm: bool) -> str:
    """Differs where files, labels or settings of the recipe do."""
    return hashlib.sha256((source.stamp() + _recipe(config, warm)).encode()).hexdigest()


def _recipe(config: Config, warm: bool) -> str:
    return hashlib.sha256(repr((sorted(config.recipe().items()), warm)).encode()).hexdigest()


def _tick(args: argparse.Namespace, now: datetime) -> str:
    from fracture.errors import UsageError

    tick = args.tick or now.strftime(_TICKS[args.every])
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", tick):
        raise UsageError(f"--tick {tick!r}: a tick's name is letters, digits, '.', '_' and '-', such as 2026-w48")
    return tick


def _settings(args: argparse.Namespace) -> Config:
    from fracture.errors import UsageError

    config = _cli.settings(args, _cli.data_settings(args) + compute_settings(args))
    if config.data.folds or config.data.split == "test":
        raise UsageError(
            f"data.folds = {config.data.folds!r}, data.split = {config.data.split!r}: retraining needs training, "
            "validation and test. Use data.folds = 0, and auto, group or official."
        )
    return config


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked, on the command line or in `words`."""
    parser = _cli.parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", metavar="DIR", action="append", required=True, help="folder or URI of radiographs; repeated: several"
    )
    _cli.add_data_flags(data, folds=False)
    where = parser.add_argument_group("retraining")
    where.add_argument("--registry", metavar="DIR", required=True, help="folder or URI for all that it writes")
    when = where.add_mutually_exclusive_group()
    when.add_argument("--tick", metavar="NAME", help="the schedule's name of this time; the same again goes on")
    when.add_argument("--every", choices=_TICKS, default="week", help="makes the tick's name of the time (UTC; week)")
    where.add_argument("--warm-start", action="store_true", help="begin with the weights of the version in use")
    where.add_argument("--force", action="store_true", help="train also where nothing is new")
    where.add_argument("--notify", metavar="URL", help="POST promotion, rejection and failure there, as JSON")
    add_compute_flags(where)
    return parser.parse_args(words)


if __name__ == "__main__":
    _cli.run(main, arguments())
