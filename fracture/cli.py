"""The command line: `fracture COMMAND`, and the scripts in job/ that run one command each.

Flags become the typed arguments of a workflow, its result becomes lines on the screen, and its outcome an exit code.
Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fracture.errors import RunError, UsageError

if TYPE_CHECKING:
    from fracture.config import Config
    from fracture.registry.registry import RegistryDecision
    from fracture.workflows.registry import ListedVersion

CONFIGS = Path(__file__).parent / "configs"
REJECTED = 10  # exit code of a retraining whose model was not promoted
_INT8_AUC_LOSS = 0.02  # from which a caveat warns of the int8 form
_SYNTHETIC = "CAVEAT     SYNTHETIC MODEL: it was trained on generated sample radiographs, not on real ones."


@dataclass(frozen=True)
class Command:
    """A command, whose help is the docstring of its function."""

    group: str
    run: Callable[[argparse.Namespace], int | None]  # returns the exit code; None is 0
    add_flags: Callable[[argparse.ArgumentParser], None]
    kept: str = "every finished epoch is kept"  # what remains after Ctrl-C

    @property
    def help(self) -> str:
        return inspect.getdoc(self.run) or ""

    @property
    def summary(self) -> str:
        return self.help.partition("\n")[0].rstrip(".")


def main(argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """Run a command and return its exit code: 0 success, 2 wrong arguments, settings or data, 1 anything else.

    Args:
        argv: the words after the program's name; None: those of this process.
        command: runs this command, and all of `argv` are its flags. None: the first word names it.
    """
    _make_output_safe()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run_words(words, command)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        return _discard_output()


def _make_output_safe() -> None:
    """Print `?` for what the output's encoding does not have, such as `±` in ASCII; and nothing where it is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for all that follows
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _discard_output() -> int:
    """Send what is still to be printed to nowhere: Python would flush it at its end, and fail with a trace."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    return 1


def _run_words(words: list[str], command: str | None) -> int:
    if command is None:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_front_page())
            return 0
        if words[0] == "--version":
            from importlib.metadata import version

            print(f"fracture {version('fracture')}")
            return 0
        command = words.pop(0)
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            print(f"error: there is no command {command!r}.{hint} fracture --help lists all.", file=sys.stderr)
            return 2
    try:
        args = _parse(build_parser(command), words)
    except SystemExit as error:  # --help, or a mistake that argparse has printed
        return int(error.code or 0)
    return _run(COMMANDS[command], args)


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse the flags; for one that does not exist, name the nearest that does."""
    args, unknown = parser.parse_known_args(words)
    if unknown:
        known = re.findall(r"--[a-z-]+", parser.format_usage())
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        parser.error(f"there is no {unknown[0]} here.{hint}")
    return args


def _run(command: Command, args: argparse.Namespace) -> int:
    """Run the command, and turn its errors into one line and an exit code."""
    from fracture.runtime.environment import replace_home

    replace_home()
    try:
        code = command.run(args) or 0
    except UsageError as error:
        code = _fail(f"error: {error}", 2, args.verbose)
    except RunError as error:
        code = _fail(f"stopped: {error}", 1, args.verbose)
    except KeyboardInterrupt as interrupt:
        hint = f" {notes[0]}" if (notes := getattr(interrupt, "__notes__", None)) else ""
        code = _fail(f"\nstopped by Ctrl-C or SIGTERM; {command.kept}.{hint}", 1)
    except ModuleNotFoundError as error:
        if (error.name or "fracture").split(".")[0] == "fracture":  # a defect of ours
            raise
        message = f"error: {error.name} is not installed here. Use .venv/bin/python, which `make setup` makes."
        code = _fail(message, 1, args.verbose)
    except BrokenPipeError:  # of the output
        raise
    except OSError as error:  # of a disk, and where no function knew what to do about it; its text names the file
        reason = str(error).strip().rpartition("\n")[2].rstrip(".")
        code = _fail(f"stopped: {reason}. Check the path, its permissions and the disk.", 1, args.verbose)
    return code


def _fail(message: str, code: int, trace: bool = False) -> int:
    if trace:
        import traceback

        traceback.print_exc()
    print(message, file=sys.stderr, flush=True)
    return code


def _front_page() -> str:
    lines = [
        "usage: fracture COMMAND [options]",
        "",
        "Train fracture classifiers on radiographs with Ray and Keras, test them, and use them.",
    ]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", group]
        lines += [f"  {name:<11} {command.summary}" for name, command in COMMANDS.items() if command.group == group]
    return "\n".join(
        [
            *lines,
            "",
            "Start with `fracture train`: without data of yours, it trains on generated sample radiographs in minutes.",
            "`fracture COMMAND --help` shows the options of a command, with examples.",
        ]
    )


def build_parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command's flags."""
    parser = argparse.ArgumentParser(
        prog=f"fracture {command}",
        description=COMMANDS[command].help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verbose=False)
    COMMANDS[command].add_flags(parser)
    return parser


# Flags that several commands have.


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="show the logs of Ray and TensorFlow, and traces")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    _add_verbose(parser)
    group = parser.add_argument_group("settings")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of settings that differ from the defaults, or a name in fracture/configs: "
        "default, quick or seed",
    )
    group.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="assignments",
        help="one setting, on top of --config; may be repeated: --set training.epochs=3",
    )


def _add_data(parser: argparse.ArgumentParser, folds: bool = True) -> None:
    """Add the flags of radiographs that have to be named."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="DIR",
        action="append",
        required=True,
        help="folder or URI of radiographs; repeat it for several",
    )
    _add_labels_and_split(group, folds)


def _add_labels_and_split(group: argparse._ArgumentGroup, folds: bool) -> None:
    _add_labels(group)
    group.add_argument("--split", choices=("auto", "official", "group"), help="data.split: which split to use")
    if folds:
        group.add_argument(
            "--folds",
            metavar="K",
            type=_folds,
            help="data.folds: K grouped folds in place of a split; or: source, to hold out one source at a time",
        )


def _add_labels(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--labels",
        metavar="FILE",
        help="table of labels (CSV, TSV, XLSX) by path, study, ..., in place of class folders",
    )
    group.add_argument("--key", metavar="COLUMN", help="data.label_key: the column that says which image a row is of")
    group.add_argument(
        "--layout",
        choices=("auto", "folders", "csv", "mura", "fracatlas", "grazpedwri", "yolo", "coco"),
        help="data.layout: class folders, a labels file, or a public set as it is downloaded (default: found out)",
    )
    _add_key_file(group)


def _add_key_file(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--key-file",
        metavar="FILE",
        help="secret key that hides patients' ids, made on first use (default: patients.key in --storage, beside the "
        "registry or the model's runs, or in the current folder)",
    )


def _add_run(parser: argparse.ArgumentParser, folds: bool = True) -> argparse._ArgumentGroup:
    """Add the flags of a run and of its data; return the group of those of the run."""
    data = parser.add_argument_group("data")
    which = data.add_mutually_exclusive_group()
    which.add_argument(
        "--data",
        metavar="DIR",
        action="append",
        help="folder or URI of radiographs; repeat it for several origins; left out: synthetic sample radiographs",
    )
    which.add_argument("--shards", metavar="SHARDS", help="folder or URI that fracture preprocess wrote")
    _add_labels_and_split(data, folds)
    run = parser.add_argument_group("run")
    _add_storage(run)
    run.add_argument("--run", metavar="NAME", help="name of the run; an unfinished run is resumed (default: the time)")
    _add_compute(run)
    return run


def _add_storage(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--storage",
        metavar="DIR",
        help="folder or URI for shards and runs, which all workers can reach (default: the current folder)",
    )


def _workers(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of workers, such as 2, nor the fewest and the most: 2:4"
        )
    return text


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _folds(text: str) -> str:
    if text != "source" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of folds, such as 5, nor: source")
    return text


def _add_compute(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workers",
        metavar="N",
        type=_workers,
        help="training processes (default: compute.workers, 2); 2:4 is four, and at least two when machines are lost",
    )
    group.add_argument("--gpu", action="store_true", help="give each worker a GPU")


def _add_scored_data(parser: argparse.ArgumentParser, required: bool = True) -> None:
    which = parser.add_mutually_exclusive_group(required=required)
    which.add_argument(
        "--data", metavar="DIR", action="append", help="folder or URI of radiographs; repeat it for several"
    )
    which.add_argument("--shards", metavar="SHARDS", help="folder or URI of shards that hold a test split")
    _add_labels(parser)


# From flags to arguments.


def find_config(name: str | None) -> Path | None:
    """Return the file that --config names: a path, or the name of a file in fracture/configs.

    Raises:
        UsageError: it is the name of neither.
    """
    if name is None:
        return None
    file = Path(name)
    packaged = CONFIGS / f"{file.name.removesuffix('.yaml')}.yaml"
    if not file.exists() and packaged.exists():
        return packaged
    if not file.exists() and file.name == name:
        recipes = ", ".join(sorted(recipe.stem for recipe in CONFIGS.glob("*.yaml")))
        raise UsageError(f"--config {name}: no such file. Give a YAML file, or one of these recipes: {recipes}")
    return file


def _load_config(args: argparse.Namespace, flags: Sequence[str] = (), default: Path | None = None) -> Config:
    """Load the settings: --set wins over other flags, which win over the file of --config, or else of `default`."""
    from fracture.config import load_config

    return load_config(find_config(args.config) or default, [*flags, *args.assignments])


def _data_settings(args: argparse.Namespace) -> list[str]:
    flags = {
        "data.split": getattr(args, "split", None),
        "data.folds": getattr(args, "folds", None),
        "data.layout": args.layout,
        "data.label_key": args.key,
    }
    return [f"{key}={value}" for key, value in flags.items() if value is not None]


def _compute_settings(args: argparse.Namespace) -> list[str]:
    least, colon, most = (args.workers or "").partition(":")
    flags = [f"compute.workers={most if colon else least}"] if args.workers is not None else []
    flags += [f"compute.min_workers={least}"] if colon else []
    return flags + (["compute.gpu=true"] if args.gpu else [])


def _run_flags(args: argparse.Namespace) -> dict[str, object]:
    """Return the fields of RunArguments."""
    from datetime import UTC, datetime

    return {
        "run": args.run if args.run is not None else datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "storage": _storage(args.storage),
        "data": tuple(args.data or ()),
        "labels": args.labels,
        "key_file": args.key_file,
        "shards": args.shards,
        "verbose": args.verbose,
    }


def _key_file(args: argparse.Namespace) -> str:
    """Return --key-file; or patients.key beside the runs or the registry that the model is from; or in the folder here.

    So the ids of a run and of predictions with it are hidden alike.
    """
    if args.key_file:
        return args.key_file
    bundles = [args.bundle] if isinstance(getattr(args, "bundle", None), str) else getattr(args, "bundle", None) or []
    beside = [Path(bundle).absolute().parents[2:3] for bundle in bundles]  # STORAGE/runs/NAME/bundle
    beside += [Path(args.registry).absolute().parents[:1]] if getattr(args, "registry", None) else []
    keys = [folder / "patients.key" for folders in beside for folder in folders]
    return str(next((key for key in keys if key.is_file()), Path(_storage(None)) / "patients.key"))


def _storage(storage: str | None) -> str:
    """Return --storage, or the current folder; for `ray job submit`, whose folder Ray removes, one that stays."""
    from fracture.runtime.submission import is_submitted

    if storage is not None:
        return storage
    if not is_submitted():
        return "."
    try:
        return str(Path.home() / "fracture")
    except RuntimeError:  # a container's user may have no home folder
        raise UsageError("no home folder is known here to write to: name a folder with --storage") from None


def _default_config(args: argparse.Namespace) -> Path | None:
    """Return the recipe for sample radiographs where no data is named."""
    return CONFIGS / "quick.yaml" if args.data is None and args.shards is None else None


def _report_idle_settings(config: Config, args: argparse.Namespace) -> None:
    """Say which settings of --set have no effect."""
    keys = {assignment.partition("=")[0].strip() for assignment in args.assignments}
    if idle := sorted(keys & config.without_effect):
        print(f"no effect  {', '.join(idle)}: {config.model.name} does not use it with these settings", flush=True)


def _print(lines: Sequence[str]) -> None:
    print("\n".join(lines), flush=True)


def _caveat_lines(caveats: Sequence[str]) -> list[str]:
    return [f"CAVEAT     {caveat}" for caveat in caveats]


# The commands.


def _download(args: argparse.Namespace) -> None:
    """Download the public Kaggle set of radiographs, 0.5 GB.

    Examples:
      fracture download --out data
      python job/download.py --out data      the same, from a clone

    The set is "Fracture Multi-Region X-Ray Data", 10,581 files by its page. kagglehub fetches it: sign in with
    ~/.kaggle/kaggle.json, or KAGGLE_USERNAME and KAGGLE_KEY. The set's licence is its publisher's (Open Data Commons
    Attribution 1.0); many of its images come from elsewhere: read it before you share them.
    """
    from fracture.workflows.download import download

    folder = download(args.out)
    _print([f"data       {folder}", f"next       make local-train DATA={folder}"])


def _add_download_flags(parser: argparse.ArgumentParser) -> None:
    _add_verbose(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to put the set into")


def _audit(args: argparse.Namespace) -> None:
    """Look for copies, leakage and shortcuts in a folder of radiographs.

    Examples:
      fracture audit --data DIR                    writes audits/NAME
      fracture audit --data DIR --labels labels.csv --out audits/first
      python job/preprocess.py --audit-only ...    the same, from a clone

    Every file is decoded once. Leaves in OUT: audit.html with pictures, links.csv with every copy, and audit.json.
    DIR is laid out as for `fracture preprocess`, and is never changed.
    """
    from fracture.preparation.audit import format_audit
    from fracture.workflows.preprocess import AuditArguments, audit

    config = _load_config(args, _data_settings(args))
    arguments = AuditArguments(
        data=tuple(args.data),
        out=args.out,
        config=config,
        labels=args.labels,
        key_file=_key_file(args),
        verbose=args.verbose,
    )
    result = audit(arguments)
    _print(
        [
            *format_audit(result.audit),
            f"audit      {result.folder} (audit.html to look at, links.csv with every copy, audit.json)",
        ]
    )


def _add_audit_flags(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    _add_data(parser)
    parser.add_argument("--out", metavar="DIR", help="folder or URI to write to (default: audits/NAME)")


def _preprocess(args: argparse.Namespace) -> None:
    """Write radiographs as Parquet shards for training.

    Examples:
      fracture preprocess --data DIR --out SHARDS
      fracture preprocess --data EXPORT --labels worklist.xlsx --out SHARDS
      fracture preprocess --data HOSPITAL_A --data HOSPITAL_B --out SHARDS
      fracture preprocess --data DIR --audit-only        as `fracture audit`
      python job/preprocess.py ...                       the same, from a clone

    DIR holds train/, val/ and test/, or class folders alone. Class folders are named fracture, fractured, normal, not
    fractured and the like, in any case and in several languages; or a table gives the labels (--labels), by path, file
    name, DICOM's UIDs, accession number or patient; or DIR is a public set as it is downloaded (--layout). Files may be
    DICOM, JPEG, PNG, GIF, BMP, WebP, AVIF, JPEG 2000, PGM or TIFF under any name; unreadable files are left out and
    listed. DIR is never changed. Patients of DICOM files stay in one split, and their ids are written as HMACs only,
    under the secret key of --key-file.

    Copies of one radiograph, even edited, turned or mirrored, are found and stay in one group. The split of the folders
    is kept if no group is in two of its parts (--split auto); otherwise, or with --split group, a split of whole groups
    is made. Run again on the same files, it is done in a second; on a folder that has grown, known files are not
    examined again, and no group changes its split.
    """
    from fracture.workflows.preprocess import PreprocessArguments, preprocess

    if args.audit_only:
        _audit(args)
        return
    if not args.out:
        raise UsageError("--out is missing: name the folder to write the shards to, or use --audit-only")
    config = _load_config(args, _data_settings(args))
    preprocess(
        PreprocessArguments(
            data=tuple(args.data),
            out=args.out,
            config=config,
            labels=args.labels,
            key_file=_key_file(args),
            verbose=args.verbose,
        )
    )


def _add_preprocess_flags(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    _add_data(parser)
    parser.add_argument("--out", metavar="DIR", help="folder or URI to write to")
    parser.add_argument("--audit-only", action="store_true", help="look at the data, write no shards")


def _train(args: argparse.Namespace) -> None:
    """Train and test a fracture classifier on Ray workers.

    Examples:
      fracture train                                sample radiographs, the quick recipe: minutes on 2 cores
      fracture train --data DIR --workers 2         your radiographs, the default recipe
      fracture train --shards SHARDS --run NAME     shards of `fracture preprocess`; the same NAME again resumes
      fracture status NAME                          how far a run is, from any machine, while it runs and after
      python job/train.py ...                       the same as fracture train, from a clone

    Preprocesses the data (unless its shards are there already), trains with early stopping on the validation loss, and
    scores the best weights once on test. Leaves in STORAGE/runs/NAME:

      bundle/            weights.safetensors, features.safetensors, model.keras, saved_model/, and bundle.json: metrics
                         and settings
      report/            report.html, and its plots as PNG files
      predictions.parquet, metrics.jsonl, config.yaml, tensorboard/, and the last two checkpoints

    Exit codes: 0 success, 2 wrong arguments, settings or data, 1 anything else.
    """
    from fracture.workflows.train import TrainArguments, train

    if args.status is not None:
        _print(_status_lines(args, "--status", args.status))
        return
    flags = _run_flags(args)
    config = _load_config(args, [*_data_settings(args), *_compute_settings(args)], _default_config(args))
    arguments = TrainArguments(config=config, **flags)
    _report_idle_settings(config, args)
    result = train(arguments)
    if result.pooled is not None:
        from fracture.evaluation.folds import format_folds

        lines = [*format_folds(result.pooled), f"report     {result.run / 'folds.html'}"]
    else:
        from fracture.evaluation.report import format_results

        lines = [
            *format_results(result.evaluations),
            f"bundle     {result.run / 'bundle'} (the model and its metrics)",
            f"report     {result.run / 'report' / 'report.html'}",
        ]
    _print([*lines, *_caveat_lines(result.caveats)])


def _add_train_flags(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    run = _add_run(parser)
    run.add_argument("--status", metavar="NAME", help="show how far that run is, and end; as `fracture status NAME`")


def _tune(args: argparse.Namespace) -> None:
    """Search for better settings with many short trainings.

    Examples:
      fracture tune --data DIR --run NAME                12 trials, sampled from tune.space of the default recipe
      fracture tune --shards SHARDS --run NAME --trials 30 --config mine.yaml
      fracture tune --run NAME                           the same NAME again resumes, or adds trials
      python job/tune.py ...                             the same, from a clone

    Each trial is a training on Ray Tune; the worse ones are stopped early. Trials are compared by their lowest
    validation loss, and none is scored on test. The first trial has the settings as they are. Leaves in
    STORAGE/runs/NAME:

      best.yaml          the settings of the best trial: fracture train --config best.yaml
      trials.json        the settings of all trials, and their results
      trial-00001/ ...   metrics.jsonl, config.yaml and tensorboard/ of each

    Exit codes: 0 success, 2 wrong arguments, settings or data, 1 anything else.
    """
    from fracture.workflows.tune import TuneArguments, tune

    flags = _run_flags(args)
    numbers = {"tune.trials": args.trials, "tune.concurrent": args.concurrent}
    assignments = [f"{key}={value}" for key, value in numbers.items() if value is not None]
    config = _load_config(args, [*_data_settings(args), *_compute_settings(args), *assignments], _default_config(args))
    arguments = TuneArguments(config=config, **flags)
    _report_idle_settings(config, args)
    result = tune(arguments)
    from fracture.tuning.space import table_lines

    best = result.best if result.best.is_local else f"a copy of {result.best}"
    storage = f" --storage {args.storage}" if args.storage else ""
    _print(
        [
            *table_lines(result.trials),
            "           * lowest validation loss; the best of many is also the luckiest, so expect less of it on test",
            f"best       {result.best}",
            f"train it   fracture train --config {best} --shards {result.shards}{storage}",
            *_caveat_lines(result.caveats),
        ]
    )


def _add_tune_flags(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    run = _add_run(parser, folds=False)
    run.add_argument("--trials", metavar="N", type=_positive, help="tune.trials: number of trainings (default: 12)")
    run.add_argument(
        "--concurrent",
        metavar="N",
        type=_positive,
        help="most trials at a time (default: as many as there is room for)",
    )


def _compare(args: argparse.Namespace) -> None:
    """Train several models on the same folds, and rank them.

    Examples:
      fracture compare --data DIR --run NAME          the contenders of fracture/configs/comparisons, 5 folds each
      fracture compare --run NAME                     the same on sample radiographs, with the quick recipe
      fracture compare --shards SHARDS --models FILE --only cnn qnn --run NAME    trains only these
      fracture compare --data A --data B --folds source --run NAME                holds out one source at a time
      python job/compare.py ...                       the same, from a clone

    FILE is YAML: titles, and the settings in which each contender differs, such as `cnn: {}` and `wide: {model:
    {filters: [128, 256]}}`. The first is the baseline; `against: TITLE` compares a contender with another one as well.
    --config and --set are for all contenders; --set may not change what a contender sets. The same command again
    resumes, and keeps finished folds. The page has all contenders of FILE that are finished. The cost is contenders
    times folds times one training. Leaves in STORAGE/runs/NAME:

      comparison.html, comparison.md, comparison.json      metrics with intervals, paired differences, costs
      CONTENDER/                                           folds.html, and fold-1 to fold-5: a run each, with its bundle

    Exit codes: 0 success, 2 wrong arguments, settings or data, 1 anything else.
    """
    from fracture.workflows.compare import DEFAULT_CONTENDERS, CompareArguments, compare

    assignments = [*_data_settings(args), *_compute_settings(args), *args.assignments]
    result = compare(
        CompareArguments(
            models=Path(args.models) if args.models else DEFAULT_CONTENDERS,
            only=tuple(args.only) if args.only else None,
            config_file=find_config(args.config) or _default_config(args),
            assignments=tuple(assignments),
            **_run_flags(args),
        )
    )
    from fracture.evaluation.comparison import format_comparison, format_table

    page = result.run / "comparison.html"
    _print(
        [
            *format_comparison(result.contenders),
            "",
            *format_table(result.contenders),
            "",
            *_caveat_lines(result.caveats),
            f"comparison {page} (comparison.md: the table; comparison.json: all metrics)",
        ]
    )


def _add_compare_flags(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    _add_run(parser)
    group = parser.add_argument_group("contenders")
    group.add_argument(
        "--models", metavar="FILE", help="YAML of contenders (default: fracture/configs/comparisons/default.yaml)"
    )
    group.add_argument("--only", metavar="TITLE", nargs="+", help="train only these contenders")


def _retrain(args: argparse.Namespace) -> int:
    """Retrain on data that grows, and promote the model if it is no worse.

    Examples:
      fracture retrain --data DIR --registry REGISTRY                 one retraining a week, called 2026-w48
      fracture retrain --data DIR --registry REGISTRY --every day     or one a day, an hour, a minute, a month
      fracture retrain --data s3://... --registry s3://... --tick ID  or named by the scheduler
      fracture retrain ... --notify https://...                       posts promotion, rejection and failure as JSON
      python job/retrain.py ...                                       the same, from a clone

    This is the job for a schedule. It ends at once if another retraining of this registry is at work, or if nothing is
    new. Otherwise it preprocesses what is new, trains, and compares the challenger with the model in use on test
    radiographs that neither has seen. The rules are the settings gate.*. A retraining that was killed goes on when its
    tick is given again. Writes in REGISTRY:

      champion.json            which version is in use; `fracture predict --registry REGISTRY` uses that one
      versions/, history/      all versions and decisions; `fracture registry` shows them, promotes and rolls back
      ticks/TICK/report.html   the page on one retraining; decision.json beside it has the result of each rule
      runs/TICK/, shards/      as of `fracture train`; `fracture status TICK --storage REGISTRY` shows how far it is

    Exit codes: 0 promoted, or nothing new, or another is at work; 10 rejected by the gate, and the model in use stays;
    2 wrong arguments, settings or data; 1 failed: the same tick again goes on.
    """
    from fracture.workflows.retrain import RetrainArguments, retrain

    result = retrain(
        RetrainArguments(
            data=tuple(args.data),
            registry=args.registry,
            config=_load_config(args, [*_data_settings(args), *_compute_settings(args)]),
            labels=args.labels,
            key_file=args.key_file,
            tick=args.tick,
            every=args.every,
            warm_start=args.warm_start,
            force=args.force,
            notify=args.notify,
            verbose=args.verbose,
        )
    )
    if decision := result.decision:
        stays = f"version {decision.champion} stays in use" if decision.champion else "no version is in use"
        outcome = stays if result.rejected else "in use from now on"
        _print(
            [
                f"decision   version {decision.version} {decision.event}: {outcome}",
                f"page       {result.page}",
            ]
        )
    return REJECTED if result.rejected else 0


def _add_retrain_flags(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    _add_data(parser, folds=False)
    group = parser.add_argument_group("retraining")
    group.add_argument("--registry", metavar="DIR", required=True, help="folder or URI for everything that it writes")
    when = group.add_mutually_exclusive_group()
    when.add_argument("--tick", metavar="NAME", help="the schedule's name of this retraining; the same name resumes it")
    when.add_argument(
        "--every",
        choices=("minute", "hour", "day", "week", "month"),
        default="week",
        help="name the tick after the time, in UTC (default: week)",
    )
    group.add_argument("--warm-start", action="store_true", help="begin with the weights of the version in use")
    group.add_argument("--force", action="store_true", help="train even if nothing is new")
    group.add_argument("--notify", metavar="URL", help="post promotion, rejection and failure to this URL, as JSON")
    _add_compute(group)


def _evaluate(args: argparse.Namespace) -> None:
    """Score a finished model on radiographs that are new to it.

    Examples:
      fracture evaluate --bundle runs/NAME/bundle --data DIR --out evaluations/NAME
      fracture evaluate --bundle runs/NAME/bundle --shards SHARDS --out evaluations/NAME   the shards' test split
      fracture evaluate --bundle A --bundle B --flips --data DIR --out evaluations/NAME    an ensemble
      python job/evaluate.py ...                                                           the same, from a clone

    DIR is laid out as for `fracture preprocess`; whatever splits it has, all of it is test. Copies are grouped. Images
    that the model was trained on, found byte for byte, are left out with their whole group, and counted. Figures are
    per image and per radiograph, with intervals, and for each origin (several --data, or the source column of
    --labels). The threshold is the bundle's own. Only numbers and settings are read from a bundle, so a bundle from
    elsewhere cannot run code.

    Of several bundles, the calibrated probabilities and the thresholds are averaged; what any of them was trained on is
    left out. --flips averages each image with its mirror image.

    The last lines are a verdict: usable there as it is, after adjusting, or not. The AUC per radiograph must be above
    evaluation.usable_auc with its whole interval, the sensitivity above evaluation.min_sensitivity less 0.05. It takes
    10 groups (patients, or radiographs that belong together) of each class. For a pretrained network a line "aligned"
    shows what features standardised by these images would gain.

    Of the settings, data.* (with --data), compute.* and recovery.* count. On a cluster, or with --set compute.gpu=true,
    workers score, compute.workers of them at most.

    Leaves in OUT: report.html and its plots, predictions.parquet, metrics.json, and shards if DIR was named.
    """
    from fracture.evaluation.report import format_own_test_comparison, format_results
    from fracture.evaluation.verdict import format_verdict
    from fracture.workflows.evaluate import EvaluateArguments, evaluate

    result = evaluate(
        EvaluateArguments(
            bundles=tuple(args.bundle),
            flips=args.flips,
            **_scoring_arguments(args),
        )
    )
    lines = _describe_seen(result.left_out)
    if result.models > 1:
        point = result.operating_point
        lines.append(f"ensemble   of {result.models} models; threshold {point.threshold:.3f}, {point.rule}")
    lines += format_results(result.evaluations, result.operating_point.fracture_threshold is not None)
    lines += [format_own_test_comparison(result.own, result.evaluations["test"])] if result.own else []
    lines += [f"aligned    {result.alignment.summary}"] if result.alignment else []
    lines += [f"boxes      {result.pointing.summary}"] if result.pointing else []
    lines += [*_caveat_lines(result.caveats), *format_verdict(result.verdict), f"report     {result.page}"]
    _print(lines)


def _add_evaluate_flags(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    parser.add_argument(
        "--bundle",
        metavar="DIR",
        action="append",
        required=True,
        help="folder or URI of a finished run's bundle; repeat it to average several models",
    )
    parser.add_argument("--flips", action="store_true", help="average each image with its mirror image")
    _add_scored_data(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder or URI for the report")


def _scoring_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return what all commands that score a finished model take: the fields of `ScoringArguments`."""
    return {
        "out": args.out,
        "data": tuple(args.data or ()),
        "labels": args.labels,
        "key_file": _key_file(args),
        "shards": args.shards,
        "config": _load_config(args, _data_settings(args)),
        "verbose": args.verbose,
    }


def _describe_seen(left_out: int) -> list[str]:
    """Return the line about images that are left out, since the model has seen them; none if there are none."""
    seen = "images that the model was trained on, or that share a radiograph or patient with one"
    return [f"left out   {left_out} {seen}"] if left_out else []


def _adapt(args: argparse.Namespace) -> None:
    """Adapt a finished model to few local cases.

    Examples:
      fracture adapt --bundle runs/NAME/bundle --data DIR --labels local.csv --out adapted/NAME
      fracture adapt --bundle runs/NAME/bundle --shards SHARDS --out adapted/NAME    of shards, train and val
      fracture adapt --bundle runs/NAME/bundle --align IMAGES --out adapted/NAME     without labels
      python job/adapt.py ...                                                        the same, from a clone

    With 50 local studies with labels, or radiographs where studies are not known, calibration and threshold are chosen
    on them as after a training. With 200, a ridge head on the network's frozen features is fitted as well, and takes
    the last layer's place if its AUC is higher. Both are judged by five grouped folds of the cases, beside the model as
    it was. DIR is laid out as for `fracture preprocess`; images that the model was trained on are left out.

    --align standardises features by the mean and variance of 100 local images or more, with or without labels, in place
    of the training's. It helps or harms: look at the figures, which need labelled cases.

    Leaves in OUT: bundle, a model for predict, evaluate and the others, whose bundle.json says what it was adapted to;
    predictions.parquet, the cases' probabilities by folds; and shards if DIR was named. Evaluate the new bundle on
    other cases: those it was adapted to count as seen.
    """
    from fracture.evaluation.adaptation import format_figures
    from fracture.workflows.adapt import AdaptArguments, adapt

    result = adapt(
        AdaptArguments(
            bundle=args.bundle,
            align=tuple(args.align or ()),
            **_scoring_arguments(args),
        )
    )
    lines = _describe_seen(result.left_out)
    lines += [*format_figures(result.adaptation.figures), f"adapted    {result.adaptation.describe()}"]
    _print(
        [
            *lines,
            *_caveat_lines(result.caveats),
            f"bundle     {result.bundle} (threshold {result.threshold:.3f})",
        ]
    )


def _add_adapt_flags(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    parser.add_argument("--bundle", metavar="DIR", required=True, help="folder or URI of a finished run's bundle")
    parser.add_argument(
        "--align",
        metavar="DIR",
        action="append",
        help="folder or URI of local images, with or without labels, to standardise features by; may be repeated",
    )
    _add_scored_data(parser, required=False)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder or URI for the new bundle")


def _predict(args: argparse.Namespace) -> None:
    """Predict fractures in any number of radiographs.

    Examples:
      fracture predict --bundle runs/NAME/bundle --data DIR --out predictions.csv
      fracture predict --registry REGISTRY --data s3://BUCKET/DIR --out predictions.parquet    the champion
      fracture predict --bundle BUNDLE --data SHARDS --out predictions.csv                     every row of shards
      fracture predict --bundle BUNDLE --data EXPORT --out studies.csv --by study              a row for each study
      python job/predict.py ...                                                                the same, from a clone

    DIR holds images in any layout, or is one file. Every file gets a row, except those that systems leave (Thumbs.db,
    names that begin with a dot). Preprocessing, calibration and threshold are the bundle's own, so the metrics are
    those of its evaluation.

    The ending of FILE says CSV or Parquet. Its columns: path, below --data (of several --data the whole path; of shards
    their source column; of DICOM files its HMAC, which patients.paths.csv beside the key explains); study_id of DICOM
    files, which patients.studies.csv explains; probability of a fracture, calibrated; decision, fracture or normal;
    outcome, fracture, doubt or none; unlike, whether the image is unlike the training images, which makes the outcome
    doubt, and distance, how far it is, 1 at the limit; seen, whether the model was trained or validated on the file, or
    on images of its patient or study; error, why a file is left out or cannot be read, in which case the other columns
    are empty. Where 50 new images or more are unlike the training images as a whole, every outcome is doubt. Rows are
    sorted by path; those of shards keep their order. An existing FILE is replaced when all is done.
    """
    from fracture.inference.batch_prediction import count_formula_paths, summarize
    from fracture.workflows.answer import AnswerArguments
    from fracture.workflows.predict import PredictArguments, predict

    result = predict(
        PredictArguments(
            data=tuple(args.data),
            out=args.out,
            bundle=args.bundle,
            registry=args.registry,
            by=args.by,
            key_file=_key_file(args),
            answers=AnswerArguments(
                out=args.dicom_out, secondary_capture=args.secondary_capture, stow=args.stow, store=args.store
            ),
            gpu=args.gpu,
            verbose=args.verbose,
        )
    )
    rows, seconds = result.rows, result.seconds
    lines = summarize(rows, result.bundle.operating_point, result.bundle.load_feature_space())
    lines.append(f"speed      {len(rows) / seconds:.3g} files/s, {seconds:.0f} s in all, including Ray's start")
    lines += [_SYNTHETIC] if result.bundle.synthetic else _caveat_lines(result.bundle.caveats)
    if args.secondary_capture and not result.bundle.map_similarity:
        why = "it is adapted" if result.bundle.adapted else "the bundle is of an earlier version"
        lines += _caveat_lines([f"MAPS NOT CHECKED: {why}. fracture explain checks them."])
    if result.out.name.lower().endswith(".csv") and (count := count_formula_paths(rows)):
        lines.append(
            f"CAVEAT     {count:,} paths begin with = + - or @: a spreadsheet would run them; import them as text."
        )
    lines.append(f"results    {result.out} ({result.written:,} rows)")
    if answers := result.answers:
        captures = f" and {answers.captures:,} captures" if args.secondary_capture else ""
        lines.append(f"answers    {args.dicom_out}: {answers.studies:,} reports{captures}, which name their patients")
        lines += [f"no answer  {count:,} studies: {why}" for why, count in answers.without.items()]
        lines += [f"sent       {line}" for line in answers.sent]
    _print(lines)


def _add_predict_flags(parser: argparse.ArgumentParser) -> None:
    _add_verbose(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--bundle", metavar="DIR", help="folder or URI of a finished run's bundle")
    which.add_argument("--registry", metavar="DIR", help="folder or URI of a registry, whose champion is used")
    parser.add_argument(
        "--data",
        metavar="DIR",
        action="append",
        required=True,
        help="folder, file or URI of radiographs, or a folder of shards; repeat it for several",
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="path or URI that ends in .csv or .parquet")
    parser.add_argument(
        "--by", choices=("image", "study"), default="image", help="a row for each image, or one for each study"
    )
    _add_key_file(parser)
    answers = parser.add_argument_group("answers in DICOM, for DICOM files")
    answers.add_argument("--dicom-out", metavar="DIR", help="folder or URI for a structured report of each study")
    answers.add_argument(
        "--secondary-capture", action="store_true", help="write each image under its Grad-CAM map, too"
    )
    answers.add_argument("--stow", metavar="URL", help="send the answers to this DICOMweb service")
    answers.add_argument("--store", metavar="AET@HOST:PORT", help="send the answers to this archive by C-STORE")
    parser.add_argument("--gpu", action="store_true", help="score on the cluster's GPUs, and decode on its CPUs")


def _explain(args: argparse.Namespace) -> None:
    """Show which parts of radiographs a model responds to.

    Examples:
      fracture explain --bundle runs/NAME/bundle --data DIR --out explanations/NAME
      fracture explain --bundle runs/NAME/bundle --shards SHARDS --out explanations/NAME    the shards' test split
      python job/explain.py ...                                                             the same, from a clone

    DIR is laid out as for `fracture preprocess`. Images that the model was trained on are shown too, and counted.
    Leaves in OUT: explanations.html, with the most confident true and false positives and negatives, each beside its
    Grad-CAM map of the regions that spoke for the decision, and a sanity check: networks with random weights have to
    give other maps. Where 10 or more fractures of test have boxes, also how often the maximum of the map lies inside
    one. And the shards, if DIR was named.
    """
    from fracture.workflows.explain import ExplainArguments, explain

    result = explain(
        ExplainArguments(
            bundle=args.bundle,
            count=args.count,
            **_scoring_arguments(args),
        )
    )
    groups = ", ".join(f"{len(examples)} {name}" for name, examples in result.gallery.groups.items())
    _print(
        [
            f"shown      {groups}",
            f"maps       {result.gallery.sanity_check}",
            *([f"boxes      {pointing.summary}"] if (pointing := result.gallery.pointing) else []),
            *_caveat_lines(result.caveats),
            f"page       {result.page}",
        ]
    )


def _add_explain_flags(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    parser.add_argument("--bundle", metavar="DIR", required=True, help="folder or URI of a finished run's bundle")
    _add_scored_data(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder or URI for the page")
    parser.add_argument("--count", metavar="N", type=int, default=6, help="most radiographs of each group (default: 6)")


def _export(args: argparse.Namespace) -> None:
    """Write a model for Keras 3, TensorFlow, ONNX or TFLite.

    Examples:
      fracture export --bundle runs/NAME/bundle --to keras        model.keras, for Keras 3 alone
      fracture export --bundle runs/NAME/bundle --to savedmodel   saved_model/, for TensorFlow alone
      fracture export --bundle runs/NAME/bundle --to onnx         model.onnx, with tf2onnx
      fracture export --bundle runs/NAME/bundle --to tflite --shards SHARDS    model.tflite and model-int8.tflite
      python job/export.py ...                                    the same, from a clone

    All take grey images [N, S, S, 1] in [0, 255] and give calibrated probabilities [N, 1] float32: normalisation and
    calibration are inside, the threshold is in export.json. They take float32; the int8 form takes uint8, and the
    SavedModel both (serve, serve_uint8). An ONNX or TFLite file in float32 whose probabilities on drawn images differ
    from the bundle's by more than 1e-5 is not kept, nor a SavedModel or .keras file if the model that it is saved from
    does.

    SHARDS are those that the model was trained on, of any split or folds: images that it has seen calibrate the int8
    form; the others test it, beside the float form and the bundle. Without them only model.tflite is written.
    """
    from fracture.workflows.export import ExportArguments, export

    result = export(
        ExportArguments(bundle=args.bundle, to=args.to, out=args.out, shards=args.shards, verbose=args.verbose)
    )
    _print([*export_lines(result.card, str(result.out)), *([_SYNTHETIC] if result.synthetic else [])])


def export_lines(card: dict, out: str) -> list[str]:
    """Return what was written into the folder `out`, how to load it, and how it was tested.

    Args:
        card: the content of export.json.
    """
    from fracture.evaluation.metrics import Metrics
    from fracture.evaluation.report import format_figure
    from fracture.inference.export import CARD, FORMATS, INT8

    form, (_, size, _, _) = FORMATS[card["format"]], card["input"]["shape"]
    lines = [f"written    {out}/{file} ({size_bytes / 1e6:.1f} MB)" for file, size_bytes in card["files"].items()]
    lines += [
        f"takes      images [N, {size}, {size}, 1] in [0, 255]; a fracture from {card['threshold']:.4f} on ({CARD})",
        f"compared   {form.file} differs from the bundle's model by at most {card['largest_difference']:.1e}",
        f"load       {form.line.format(f'{out}/{form.file}')}",
    ]
    if card["format"] == "tflite" and "test" not in card:
        lines.append("int8       not written: name the shards that the model was trained on with --shards")
    tested = {name: Metrics.model_validate(unit["radiograph"]) for name, unit in card.get("test", {}).items()}
    for name, m in tested.items():
        if name == "bundle":
            lines.append(f"test       {m.count:,} radiographs that the model has not seen:")
        auc, recall, specificity = (format_figure(m.figures[figure]) for figure in ("auc", "recall", "specificity"))
        lines.append(f"  {name:<18} AUC {auc}, sensitivity {recall}, specificity {specificity}")
    if tested and (exact := tested["bundle"]["auc"]) is not None and exact - tested[INT8]["auc"] > _INT8_AUC_LOSS:
        lines.append(
            f"CAVEAT     INT8: its AUC is {exact - tested[INT8]['auc']:.3f} below the bundle's. Take the float form."
        )
    return lines


def _add_export_flags(parser: argparse.ArgumentParser) -> None:
    _add_verbose(parser)
    parser.add_argument("--bundle", metavar="DIR", required=True, help="folder or URI of a finished run's bundle")
    parser.add_argument("--to", choices=("keras", "savedmodel", "onnx", "tflite"), required=True, help="the format")
    parser.add_argument("--out", metavar="DIR", help="folder or URI to write to (default: exports/NAME/FORMAT)")
    parser.add_argument("--shards", metavar="SHARDS", help="folder or URI of shards, for the int8 form of tflite")


def _status(args: argparse.Namespace) -> None:
    """Show how far a run is.

    Examples:
      fracture status NAME
      fracture status NAME --storage s3://BUCKET/DIR
      fracture status 2026-w48 --storage REGISTRY        a retraining
      python job/train.py --status NAME                  the same, from a clone

    Works from any machine that reaches the storage, while the run is trained and after.
    """
    _print(_status_lines(args, "NAME", args.name))


def _add_status_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of a run of train, tune, compare or retrain")
    _add_storage(parser)


def _status_lines(args: argparse.Namespace, flag: str, name: str) -> list[str]:
    from datetime import UTC, datetime

    from fracture.progress.status import status_lines
    from fracture.storage import storage_path
    from fracture.workflows.arguments import check_run_name

    check_run_name(flag, name)
    if args.storage == "":
        raise UsageError("--storage is empty: name a folder, or leave the flag out")
    return status_lines(storage_path(_storage(args.storage)) / "runs", name, datetime.now(UTC))


def _registry(args: argparse.Namespace) -> None:
    """List, show, promote, roll back or prune versions of a model.

    Examples:
      fracture registry list --registry REGISTRY                  all versions and all decisions
      fracture registry show [VERSION] --registry REGISTRY        one version: data, metrics, rules; default: in use
      fracture registry promote VERSION --registry REGISTRY       put that version in use, whatever the gate decided
      fracture registry rollback --registry REGISTRY              put the version back in use that was before
      fracture registry prune --registry REGISTRY [--dry-run]     remove what nobody needs, as each retraining does
      python job/registry.py ...                                  the same, from a clone

    REGISTRY/champion.json says which version is in use; it is replaced atomically. What is done by hand is recorded
    like the decisions of `fracture retrain`, and may be done while a retraining is at work.

    Exit codes: 0 success, 2 wrong arguments, settings or data, 1 anything else.
    """
    from fracture.workflows.registry import list_versions, open_registry, prune_registry, show_version

    registry = open_registry(args.registry)
    match args.action:
        case "list":
            listing = list_versions(registry)
            lines = ["version  tick                  AUC  sens.  spec.   fractures  normals  began with   state"]
            lines += [_version_line(version) for version in listing.versions]
            lines += [
                "",
                "Figures are per radiograph, on the test of the version's own data; counts are of groups.",
                "",
            ]
            _print(lines + [_decision_line(decision) for decision in listing.decisions])
        case "show":
            from fracture.evaluation.report import format_results

            shown = show_version(registry, args.version)
            version = shown.version
            counts = ", ".join(f"{count:,} {name} groups" for name, count in reversed(version.groups.items()))
            lines = [
                f"version    {version.number}, {'in use' if shown.in_use else 'not in use'}, "
                f"made {version.made:%Y-%m-%d %H:%M} UTC in {version.tick}",
                f"bundle     {shown.bundle.folder}",
                f"data       {counts}; fingerprint {version.dataset[:12]}",
                f"began      with {version.initial_weights}",
                *format_results(shown.bundle.evaluations),
            ]
            for rule in shown.rules:
                lines.append(f"{'  holds' if rule.passed else '  FAILS':<10} {rule.name}: {rule.explanation}")
            _print(lines + [_decision_line(decision) for decision in shown.decisions])
        case "promote":
            print(_decision_line(registry.promote(args.version, args.reason)))
        case "rollback":
            print(_decision_line(registry.rollback(args.reason)))
        case "prune":
            from fracture.config import RegistryConfig

            keep = RegistryConfig().keep if args.keep is None else args.keep
            for folder in prune_registry(registry, keep, args.dry_run):
                print(f"{'would go' if args.dry_run else 'removed':<10} {folder}")


def _version_line(listed: ListedVersion) -> str:
    version = listed.version
    figures = [listed.figures[name] for name in ("auc", "recall", "specificity")]
    columns = "  ".join("    –" if figure is None else f"{figure:.3f}" for figure in figures)
    columns += f"   {version.groups['fracture']:>9,}  {version.groups['normal']:>7,}  {version.initial_weights:<11}"
    return f"{version.number:>7}  {version.tick:<18.18} {columns}  {listed.state}"


def _decision_line(decision: RegistryDecision) -> str:
    from textwrap import shorten

    outcome = f"version {decision.champion} in use" if decision.champion else "none in use"
    reason = f": {shorten(decision.reason, 90, placeholder=' …')}" if decision.reason else ""
    return (
        f"{decision.number:>4}  {decision.time:%Y-%m-%d %H:%M}  {decision.tick or 'by hand':<12} "
        f"version {decision.version} {decision.event}, {outcome}{reason} ({decision.who})"
    )


def _add_registry_flags(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|show|promote|rollback|prune")
    made = {name: actions.add_parser(name) for name in ("list", "show", "promote", "rollback", "prune")}
    for action in made.values():
        action.add_argument("--registry", metavar="DIR", required=True, help="folder or URI of fracture retrain")
    made["show"].add_argument("version", type=int, nargs="?", help="number of a version (default: the one in use)")
    made["promote"].add_argument("version", type=int, help="number of a version")
    for name in ("promote", "rollback"):
        made[name].add_argument("--reason", default="", help="recorded with the decision")
    made["prune"].add_argument("--dry-run", action="store_true", help="only list what would be removed")
    made["prune"].add_argument(
        "--keep", type=int, metavar="N", help="newest versions and runs to keep (default: registry.keep, 5)"
    )


def _doctor(args: argparse.Namespace) -> int:
    """Check what a run needs on this machine.

    Examples:
      fracture doctor
      fracture doctor --storage s3://BUCKET/DIR

    One line each on Python, TensorFlow, GPU, CUDA libraries, memory, Ray and the folders and open files that it needs,
    and write access, and what to do about it.

    Exit codes: 0 a run can start, 1 something is missing.
    """
    from fracture.workflows.doctor import diagnose, finding_lines

    findings = diagnose(_storage(args.storage))
    _print(finding_lines(findings))
    return 0 if all(finding.ok for finding in findings) else 1


COMMANDS = {
    "download": Command("Data", _download, _add_download_flags, kept="finished files are kept"),
    "audit": Command("Data", _audit, _add_audit_flags, kept="what was scanned is kept"),
    "preprocess": Command("Data", _preprocess, _add_preprocess_flags, kept="what was scanned is kept"),
    "train": Command("Train", _train, _add_train_flags),
    "tune": Command("Train", _tune, _add_tune_flags),
    "compare": Command("Train", _compare, _add_compare_flags),
    "retrain": Command("Train", _retrain, _add_retrain_flags),
    "evaluate": Command("Use", _evaluate, _add_evaluate_flags, kept="no report was written"),
    "adapt": Command("Use", _adapt, _add_adapt_flags, kept="no bundle was written"),
    "predict": Command("Use", _predict, _add_predict_flags, kept="no results were written"),
    "explain": Command("Use", _explain, _add_explain_flags, kept="no page was written"),
    "export": Command("Use", _export, _add_export_flags, kept="nothing was exported"),
    "status": Command("Look", _status, _add_status_flags),
    "registry": Command("Look", _registry, _add_registry_flags, kept="what was recorded is kept"),
    "doctor": Command("Look", _doctor, _add_storage, kept="nothing was changed"),
}

if __name__ == "__main__":
    sys.exit(main())
