"""What all jobs share: the settings' flags, the exit codes, and finding the package from any folder.

Exit codes: 0 success, 2 a mistake in what was asked, 1 anything else.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fracture.config import Config, load_config
from fracture.errors import RunError, UsageError

CONFIGS = Path(__file__).resolve().parent / "configs"


def parser(documentation: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("-v", "--verbose", action="store_true", help="show the logs of Ray and TensorFlow, and traces")
    settings = made.add_argument_group("settings")
    settings.add_argument("--config", metavar="FILE", help="YAML of settings that differ from the default recipe")
    settings.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="assignments",
        help="one setting, on top of --config; may be repeated: --set training.epochs=3",
    )
    return made


def settings(args: argparse.Namespace, assignments: list[str] | None = None, config: Path | None = None) -> Config:
    """The asked settings; `--set` wins over `assignments`, which win over the file."""
    return load_config(args.config or config, [*(assignments or []), *args.assignments])


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Calls `main` and turns its outcome into an exit code, mistakes of the user into one line."""
    try:
        main(args)
    except UsageError as error:
        _leave(f"error: {error}", 2, args.verbose)
    except RunError as error:
        _leave(f"stopped: {error}", 1, args.verbose)
    except KeyboardInterrupt:
        hint = f" Go on with: {args.resume_hint}" if getattr(args, "resume_hint", "") else ""
        _leave(f"\nstopped by Ctrl-C; nothing half-written will be taken for whole.{hint}", 1, False)


def _leave(message: str, code: int, verbose: bool) -> None:
    if verbose:
        import traceback

        traceback.print_exc()
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    sys.exit(code)


def default_storage() -> str:
    """The current folder; for `ray job submit`, which runs in a folder that Ray removes, one that stays."""
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return str(Path.home() / "fracture") if submitted else "."
