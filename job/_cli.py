"""What all jobs share: the settings' flags, the exit codes, and finding the package from any folder.

Exit codes: 0 success, 2 a mistake in what was asked, 1 anything else.
"""

import argparse
import getpass
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from fracture.config import Config, load_config
    from fracture.errors import RunError, UsageError
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed here. Use .venv/bin/python, which `make setup` makes.")

_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it
CONFIGS = Path(__file__).resolve().parents[1] / "fracture/configs"


def parser(documentation: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("-v", "--verbose", action="store_true", help="show the logs of Ray and TensorFlow, and traces")
    settings = made.add_argument_group("settings")
    settings.add_argument(
        "--config",
        metavar="FILE",
        help="YAML of settings that differ from the default recipe; or a name in fracture/configs",
    )
    settings.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="assignments",
        help="one setting, on top of --config; may be repeated: --set training.epochs=3",
    )
    return made


def add_data_flags(group: argparse._ArgumentGroup, *, folds: bool = True) -> None:
    group.add_argument("--labels", metavar="CSV", help="path,label[,patient][,source] in place of class folders")
    group.add_argument("--split", choices=("auto", "official", "group"), help="data.split: whose split to use")
    if folds:
        group.add_argument("--folds", metavar="K", help="data.folds: K grouped folds in place of a split; or: source")


def data_settings(args: argparse.Namespace) -> list[str]:
    flags = {"data.split": args.split, "data.folds": getattr(args, "folds", None)}
    return [f"{key}={value}" for key, value in flags.items() if value is not None]


def settings(args: argparse.Namespace, assignments: list[str] | None = None, config: Path | None = None) -> Config:
    """The asked settings; `--set` wins over `assignments`, which win over the file."""
    asked = Path(args.config) if args.config else config
    if asked and not asked.exists() and (named := CONFIGS / f"{asked.name.removesuffix('.yaml')}.yaml").exists():
        asked = named  # `--config quick` will do
    return load_config(asked, [*(assignments or []), *args.assignments])


def run(main: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> None:
    """Calls `main` and turns its outcome into an exit code, mistakes of the user into one line."""
    try:
        code = main(args)
    except UsageError as error:
        _leave(f"error: {error}", 2, args.verbose)
    except RunError as error:
        _leave(f"stopped: {error}", 1, args.verbose)
    except KeyboardInterrupt:
        hint = f" Go on with: {args.resume_hint}" if getattr(args, "resume_hint", "") else ""
        kept = getattr(args, "kept", "every finished epoch is kept")
        _leave(f"\nstopped by Ctrl-C or SIGTERM; {kept}.{hint}", 1, False)
    if code:
        sys.stdout.flush()
        sys.exit(code)


def _leave(message: str, code: int, verbose: bool) -> None:
    if verbose:
        import traceback

        traceback.print_exc()
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    sys.exit(code)


@contextmanager
def python_alone_on_stderr() -> Iterator[None]:
    """Keeps the C++ sides of Ray and TensorFlow, which no logger holds, from writing there."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere, os.fdopen(os.dup(kept), "w", buffering=1) as stream:
        os.dup2(nowhere.fileno(), 2)
        try:
            with redirect_stderr(stream):
                yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def default_storage() -> str:
    """The current folder; for `ray job submit`, which runs in a folder that Ray removes, one that stays."""
    return str(Path.home() / "fracture") if _SUBMITTED in os.environ else "."


def submission() -> str | None:
    """The id of the Ray job that this is, by `ray job submit`."""
    told = json.loads(os.environ.get(_SUBMITTED, "{}"))
    return (told.get("metadata") or {}).get("job_submission_id")


def who() -> str:
    """Who asks for what is recorded: a Ray job, or a person on a machine."""
    if number := submission():
        return f"ray job {number}"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"user {os.getuid()}"
    return f"{user} on {socket.gethostname()}"
