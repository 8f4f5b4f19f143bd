"""Show the versions of a registry, and change by hand which one is in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fracture.errors import UsageError
from fracture.registry.registry import Registry, RegistryDecision, Rule, Version
from fracture.storage import storage_path
from fracture.workflows.arguments import Report, print_line
from fracture.workflows.locking import describe_user, hold_lock

if TYPE_CHECKING:
    from fracture.inference.bundle import Bundle
    from fracture.storage import StoragePath


@dataclass(frozen=True)
class ListedVersion:
    version: Version
    figures: dict[str, float | None]  # per radiograph, on the version's own test
    state: Literal["in use", "was in use", "rejected", "not decided"]


@dataclass(frozen=True)
class RegistryListing:
    versions: list[ListedVersion]
    decisions: list[RegistryDecision]  # the oldest first


@dataclass(frozen=True)
class ShownVersion:
    version: Version
    bundle: Bundle
    in_use: bool
    rules: list[Rule]  # of the gate, as in decision.json; empty where that file was removed
    decisions: list[RegistryDecision]  # about this version, the oldest first


def open_registry(folder: str) -> Registry:
    """Return the registry in a folder or URI.

    Raises:
        UsageError: it holds no version.
    """
    registry = Registry(storage_path(folder), describe_user())
    if not registry.versions():
        raise UsageError(
            f"{folder} is not a registry with a version in it. Make one with: fracture retrain --data DIR "
            f"--registry {folder}"
        )
    return registry


def list_versions(registry: Registry) -> RegistryListing:
    champion, decisions = registry.champion(), registry.history()
    champions, decided = {d.champion for d in decisions}, {d.version for d in decisions}

    def state(number: int) -> Literal["in use", "was in use", "rejected", "not decided"]:
        if number == champion:
            return "in use"
        if number not in decided:
            return "not decided"
        return "was in use" if number in champions else "rejected"

    versions = [
        ListedVersion(version, registry.figures(version.number), state(version.number))
        for version in registry.versions()
    ]
    return RegistryListing(versions, decisions)


def show_version(registry: Registry, number: int | None = None) -> ShownVersion:
    """Return what is known of a version; None: of the one in use.

    Raises:
        UsageError: there is no such version.
    """
    number = registry.require_champion() if number is None else number
    version = registry.version(number)
    return ShownVersion(
        version=version,
        bundle=registry.read_bundle(number),
        in_use=number == registry.champion(),
        rules=registry.read_rules(version.tick),
        decisions=[d for d in registry.history() if number in (d.version, d.champion)],
    )


def prune_registry(
    registry: Registry, keep: int, dry_run: bool = False, report: Report = print_line
) -> list[StoragePath]:
    """Remove the folders that nobody needs, and return them.

    Args:
        keep: how many of the newest versions and runs stay.
        dry_run: remove nothing.

    Raises:
        UsageError: `keep` is below 1, or a retraining is at work.
    """
    if keep < 1:
        raise UsageError(f"--keep {keep}: at least the newest version and run are kept; give 1 or more")
    name = f"the registry {registry.folder}"
    with hold_lock(retraining_lock(registry), name, "registry prune", "nothing else was removed", report):
        return registry.find_prunable(keep) if dry_run else registry.prune(keep)


def retraining_lock(registry: Registry) -> StoragePath:
    """Return the lock of the registry that a retraining holds from its first line to its last."""
    return registry.folder / "locks" / "retraining"
