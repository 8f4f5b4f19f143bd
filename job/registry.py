"""See which model is in use and why, and change that by hand.

  python job/registry.py list --registry REGISTRY                  all versions, and all decisions
  python job/registry.py show [VERSION] --registry REGISTRY        one version: data, figures, rules; default: in use
  python job/registry.py promote VERSION --registry REGISTRY       put that version in use, whatever the gate said
  python job/registry.py rollback --registry REGISTRY              back to the version that was in use before
  python job/registry.py prune --registry REGISTRY [--dry-run]     remove what nobody needs, as each retraining does

Readers find the version in use in REGISTRY/champion.json, which is replaced in one stroke. What is done by hand is
recorded like the decisions of job/retrain.py, and may be done while one is at work.

Exit codes: 0 success, 2 a mistake in what was asked, 1 anything else.
"""

from __future__ import annotations

import argparse
from textwrap import shorten
from typing import TYPE_CHECKING

import _cli

if TYPE_CHECKING:
    from fracture.registry.registry import Registry, RegistryDecision


def main(args: argparse.Namespace) -> None:
    from fracture.errors import UsageError
    from fracture.registry.registry import Registry
    from fracture.storage import storage_path

    registry = Registry(storage_path(args.registry), _cli.who())
    if not registry.versions():
        raise UsageError(
            f"{args.registry} is no registry with a version in it. Make one with: python job/retrain.py --data DIR "
            f"--registry {args.registry}"
        )
    match args.command:
        case "list":
            print("\n".join(_list(registry)))
        case "show":
            print("\n".join(_show(registry, args.version)))
        case "promote":
            print(_line(registry.promote(args.version, args.reason)))
        case "rollback":
            print(_line(registry.rollback(args.reason)))
        case "prune":
            _prune(registry, args)


def _list(registry: Registry) -> list[str]:
    champion, history = registry.champion(), registry.history()
    ever, decided = {entry.champion for entry in history}, {entry.version for entry in history}
    lines = ["version  tick                  AUC  sens.  spec.   fractures  normals  began with   state"]
    for version in registry.versions():
        figures = [registry.figures(version.number)[name] for name in ("auc", "recall", "specificity")]
        told = "  ".join("    –" if figure is None else f"{figure:.3f}" for figure in figures)
        told += f"   {version.groups['fracture']:>9,}  {version.groups['normal']:>7,}  {version.initial_weights:<11}"
        state = "in use" if version.number == champion else "was in use" if version.number in ever else "rejected"
        state = state if version.number in decided else "not decided"
        lines.append(f"{version.number:>7}  {version.tick:<18.18} {told}  {state}")
    lines += ["", "Figures are per radiograph, on the test of the version's own data; counts are of groups.", ""]
    return lines + [_line(entry) for entry in history]


def _show(registry: Registry, number: int | None) -> list[str]:
    number = number or registry.in_use()
    version, bundle = registry.version(number), registry.read(number)
    state = "in use" if number == registry.champion() else "not in use"
    counts = ", ".join(f"{count:,} {name} groups" for name, count in reversed(version.groups.items()))
    lines = [
        f"version    {number}, {state}, made {version.made:%Y-%m-%d %H:%M} UTC in {version.tick}",
        f"bundle     {bundle.folder}",
        f"data       {counts}; fingerprint {version.dataset[:12]}",
        f"began      with {version.initial_weights}",
    ]
    from fracture.evaluation.report import format_results

    lines += format_results(bundle.evaluations)
    decision = registry.decision(version.tick)
    for rule in decision["rules"] if decision else []:
        lines.append(f"{'  holds' if rule['passed'] else '  FAILS':<10} {rule['name']}: {rule['told']}")
    return lines + [_line(entry) for entry in registry.history() if number in (entry.version, entry.champion)]


def _line(entry: RegistryDecision) -> str:
    stays = f"version {entry.champion} in use" if entry.champion else "none in use"
    what = f"version {entry.version} {entry.event}, {stays}"
    why = f": {shorten(entry.reason, 90, placeholder=' …')}" if entry.reason else ""
    return f"{entry.number:>4}  {entry.time:%Y-%m-%d %H:%M}  {entry.tick or 'by hand':<12} {what}{why} ({entry.who})"


def _prune(registry: Registry, args: argparse.Namespace) -> None:
    from train import held

    from fracture.errors import UsageError

    if args.keep < 1:
        raise UsageError(f"--keep {args.keep}: at least the newest version and run are kept; give 1 or more")

    with held(registry.folder / "locks" / "retraining", f"the registry {registry.folder}", "nothing else was removed"):
        for folder in registry.prunable(args.keep) if args.dry_run else registry.prune(args.keep):
            print(f"{'would go' if args.dry_run else 'removed':<10} {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(verbose=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|show|promote|rollback|prune")
    made = {name: commands.add_parser(name) for name in ("list", "show", "promote", "rollback", "prune")}
    for command in made.values():
        command.add_argument("--registry", metavar="DIR", required=True, help="folder or URI of job/retrain.py")
    made["show"].add_argument("version", type=int, nargs="?")
    made["promote"].add_argument("version", type=int)
    for name in ("promote", "rollback"):
        made[name].add_argument("--reason", default="", help="recorded with it")
    made["prune"].add_argument("--dry-run", action="store_true", help="only say what would go")
    made["prune"].add_argument("--keep", type=int, default=_cli.Config().registry.keep, help="newest versions and runs")
    _cli.run(main, parser.parse_args())
