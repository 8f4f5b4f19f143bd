"""Writes a schedule for this machine: a systemd service with its timer, and a line for crontab. Take one of the two.

  make schedule DATA=/path/to/radiographs REGISTRY=/path/to/registry EVERY=week

Nothing is installed; what to do is printed. Both call job/retrain.py of this folder, by absolute paths.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fracture.errors import UsageError  # noqa: E402


@dataclass(frozen=True)
class Turn:
    on_calendar: str
    cron: str
    half_seconds: int  # half of what is between two turns


# At night, and not at the full hour, when everybody's start.
TURNS = {
    "minute": Turn("*-*-* *:*:00", "* * * * *", 30),
    "hour": Turn("*-*-* *:17:00", "17 * * * *", 1800),
    "day": Turn("*-*-* 03:17:00", "17 3 * * *", 43_200),
    "week": Turn("Mon *-*-* 03:17:00", "17 3 * * 1", 302_400),
    "month": Turn("*-*-01 03:17:00", "17 3 1 * *", 1_300_000),
}

# RestartPreventExitStatus: 2 is not mended by a retry, and 10 is an answer. StartLimit: the timer's start of a tick and
# two retries. KillMode=mixed: SIGTERM reaches the job alone, which saves; with Ray's processes ended too it could not.
SERVICE = """\
[Unit]
Description=Retrain the fracture classifier
StartLimitIntervalSec={half}
StartLimitBurst=3

[Service]
Type=oneshot
ExecStart=:{command}
SuccessExitStatus=10
Restart=on-failure
RestartSec=60
RestartPreventExitStatus=2 10
KillMode=mixed
TimeoutStopSec=90
"""

TIMER = """\
[Unit]
Description=Retrain the fracture classifier every {every}

[Timer]
OnCalendar={on_calendar}
AccuracySec=1s
Persistent=true

[Install]
WantedBy=timers.target
"""

INSTALL = """\
A retraining every {every}, written to {into}. Install one of the two.

systemd (a start that was missed, because the machine was off, is made up for; a failure is tried again twice):
  systemctl --user link {service}
  systemctl --user enable --now {timer}
  loginctl enable-linger                          # or it stops when you log out
  systemctl --user start fracture-retrain         # one now; journalctl --user -u fracture-retrain -f shows it
  systemctl --user disable --now fracture-retrain.timer fracture-retrain.service   # ends it
  systemctl --user daemon-reload                  # after another `make schedule`

cron (neither of these; it says what it did in {log}):
  (crontab -l 2> /dev/null; cat {crontab}) | crontab -
  crontab -e                                      # and remove the line, to end it
"""
CREDENTIALS = "Neither sees the variables of your shell: keys for a bucket belong in ~/.aws/credentials."


def command(data: str, registry: str, every: str, config: str, workers: str, notify: str) -> list[str]:
    asked = {
        "--data": _place("DATA", data),
        "--registry": _place("REGISTRY", registry),
        "--every": every,
        "--workers": _matching("WORKERS", workers, r"(\d+(:\d+)?)?", "a number such as 2, or MIN:MAX"),
        "--config": _config(config),
        "--notify": _matching("NOTIFY", notify, r"(https?://\S+)?", "a URL such as https://example.org/hook"),
    }
    if every not in TURNS:
        raise UsageError(f"EVERY is one of {', '.join(TURNS)}, not '{every}': give EVERY=week")
    if "://" not in data and not Path(data).expanduser().is_dir():
        raise UsageError(f"DATA is a folder or a URI, and '{data}' is neither: give the folder of the radiographs")
    parts = [str(ROOT / ".venv/bin/python"), str(ROOT / "job/retrain.py")]
    parts += [part for flag, value in asked.items() if value for part in (flag, value)]
    if '"' in parts[0] or "'" in parts[0]:
        raise UsageError(f"systemd runs no program with quotes in its path, as in {ROOT}: rename the folder")
    for part in parts:
        if re.search(r"[\x00-\x1f\x7f\\]", part):
            raise UsageError(f"neither systemd nor cron takes a line break or backslash, as in {part!r}: rename it")
    return parts


def service(parts: list[str], every: str) -> str:
    """`:` keeps systemd from looking for variables; it still takes % for one of its own names, and " for a quote."""
    quoted = " ".join('"' + part.replace("%", "%%").replace('"', '\\"') + '"' for part in parts)
    return SERVICE.format(half=TURNS[every].half_seconds, command=quoted)


def timer(every: str) -> str:
    return TIMER.format(every=every, on_calendar=TURNS[every].on_calendar)


def crontab(parts: list[str], every: str, into: Path) -> str:
    """`flock -n` leaves at once while the last one is at work. cron takes % for the end of the line."""
    line = f"flock -n {shlex.quote(str(into / 'retrain.lock'))} {shlex.join(parts)}"
    line += f" >> {shlex.quote(str(into / 'retrain.log'))} 2>&1"
    return f"{TURNS[every].cron} {line.replace('%', chr(92) + '%')}\n"


def _place(name: str, value: str) -> str:
    if not value:
        raise UsageError(f"{name} is not given: make schedule DATA=/path/to/radiographs REGISTRY=/path/to/registry")
    return value if "://" in value else str(Path(value).expanduser().absolute())


def _config(value: str) -> str:
    if not value or (ROOT / f"fracture/configs/{value.removesuffix('.yaml')}.yaml").is_file():
        return value
    if not Path(value).expanduser().is_file():
        raise UsageError(f"CONFIG is a file, or a name in fracture/configs, not '{value}': give CONFIG=seed, or a path")
    return str(Path(value).expanduser().absolute())


def _matching(name: str, value: str, pattern: str, what: str) -> str:
    if not re.fullmatch(pattern, value):
        raise UsageError(f"{name} is {what}, not '{value}': give {name} so, or leave it out")
    return value


def main(args: argparse.Namespace) -> None:
    into = args.into.absolute()
    parts = command(args.data, args.registry, args.every, args.config, args.workers, args.notify)
    into.mkdir(parents=True, exist_ok=True)
    files = {
        "fracture-retrain.service": service(parts, args.every),
        "fracture-retrain.timer": timer(args.every),
        "crontab": crontab(parts, args.every, into),
    }
    for name, text in files.items():
        (into / name).write_text(text)
    unit, clock, table, log = (shlex.quote(str(into / name)) for name in (*files, "retrain.log"))
    print(INSTALL.format(every=args.every, into=into, service=unit, timer=clock, crontab=table, log=log), end="")
    if "://" in args.data + args.registry:
        print(CREDENTIALS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder or URI of the radiographs")
    parser.add_argument("--registry", default="", help="folder or URI of the registry of models")
    parser.add_argument("--every", default="week", help=", ".join(TURNS))
    parser.add_argument("--config", default="", help="YAML of settings, or a name in fracture/configs")
    parser.add_argument("--workers", default="", help="N or MIN:MAX")
    parser.add_argument("--notify", default="", metavar="URL", help="is told how it went")
    parser.add_argument("--into", type=Path, default=ROOT / "schedule", help="folder for what is written")
    try:
        main(parser.parse_args())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
