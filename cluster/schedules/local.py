"""Write a schedule for this machine: a systemd service with its timer, and a line for crontab. Use one of the two.

  make schedule DATA=/path/to/radiographs REGISTRY=/path/to/registry EVERY=week

It writes into schedule/, installs nothing, and prints how to install. Both call job/retrain.py of this folder by its
absolute path.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from fracture.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Interval:
    on_calendar: str
    cron: str
    half_seconds: int  # half of the time between two starts


# At night, and not on the hour, when many other schedules start.
INTERVALS = {
    "minute": Interval("*-*-* *:*:00", "* * * * *", 30),
    "hour": Interval("*-*-* *:17:00", "17 * * * *", 1800),
    "day": Interval("*-*-* 03:17:00", "17 3 * * *", 43_200),
    "week": Interval("Mon *-*-* 03:17:00", "17 3 * * 1", 302_400),
    "month": Interval("*-*-01 03:17:00", "17 3 1 * *", 1_300_000),
}

# RestartPreventExitStatus: a retry does not fix 2, and 10 is a result. StartLimit: the timer's start and two retries.
# KillMode=mixed: SIGTERM reaches only the job, which saves; it could not if Ray's processes were ended with it.
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

systemd (a start missed while the machine was off is made up for; a failure is retried twice):
  systemctl --user link {service}
  systemctl --user enable --now {timer}
  loginctl enable-linger                          # otherwise it stops when you log out
  systemctl --user start fracture-retrain         # one now; journalctl --user -u fracture-retrain -f shows its output
  systemctl --user disable --now fracture-retrain.timer fracture-retrain.service   # removes it
  systemctl --user daemon-reload                  # after another `make schedule`

cron (does neither; its output goes to {log}):
  (crontab -l 2> /dev/null; cat {crontab}) | crontab -
  crontab -e                                      # remove the line to end it
"""
CREDENTIALS = "Neither has your shell's variables: put keys for a bucket into ~/.aws/credentials."


def build_command(data: str, registry: str, every: str, config: str, workers: str, notify: str) -> list[str]:
    flags = {
        "--data": _absolute_path("DATA", data),
        "--registry": _absolute_path("REGISTRY", registry),
        "--every": every,
        "--workers": _match_pattern("WORKERS", workers, r"(\d+(:\d+)?)?", "a number such as 2, or MIN:MAX"),
        "--config": _find_config(config),
        "--notify": _match_pattern("NOTIFY", notify, r"(https?://\S+)?", "a URL such as https://example.org/hook"),
    }
    if every not in INTERVALS:
        raise UsageError(f"EVERY is one of {', '.join(INTERVALS)}, not '{every}': give EVERY=week")
    if "://" not in data and not Path(data).expanduser().is_dir():
        raise UsageError(f"DATA is a folder or a URI, and '{data}' is neither: give the folder of the radiographs")
    parts = [str(ROOT / ".venv/bin/python"), str(ROOT / "job/retrain.py")]
    parts += [part for flag, value in flags.items() if value for part in (flag, value)]
    if '"' in parts[0] or "'" in parts[0]:
        raise UsageError(f"systemd cannot run a program with quotes in its path, as in {ROOT}: rename the folder")
    for part in parts:
        if re.search(r"[\x00-\x1f\x7f\\]", part):
            raise UsageError(f"neither systemd nor cron accepts a line break or a backslash, as in {part!r}: rename it")
    return parts


def format_service(parts: list[str], every: str) -> str:
    """Return the text of the systemd service that runs the command."""
    # `:` before the command turns variables off; % and " keep their meaning for systemd and are escaped.
    quoted = " ".join('"' + part.replace("%", "%%").replace('"', '\\"') + '"' for part in parts)
    return SERVICE.format(half=INTERVALS[every].half_seconds, command=quoted)


def format_timer(every: str) -> str:
    return TIMER.format(every=every, on_calendar=INTERVALS[every].on_calendar)


def format_crontab(parts: list[str], every: str, into: Path) -> str:
    """Return the crontab line that runs the command."""
    # `flock -n` exits at once while the previous start is running. cron reads % as the end of the line.
    line = f"flock -n {shlex.quote(str(into / 'retrain.lock'))} {shlex.join(parts)}"
    line += f" >> {shlex.quote(str(into / 'retrain.log'))} 2>&1"
    return f"{INTERVALS[every].cron} {line.replace('%', chr(92) + '%')}\n"


def _absolute_path(name: str, value: str) -> str:
    if not value:
        raise UsageError(f"{name} is not given: make schedule DATA=/path/to/radiographs REGISTRY=/path/to/registry")
    return value if "://" in value else str(Path(value).expanduser().absolute())


def _find_config(value: str) -> str:
    if not value or (ROOT / f"fracture/configs/{value.removesuffix('.yaml')}.yaml").is_file():
        return value
    if not Path(value).expanduser().is_file():
        raise UsageError(f"CONFIG is a file, or a name in fracture/configs, not '{value}': give CONFIG=seed, or a path")
    return str(Path(value).expanduser().absolute())


def _match_pattern(name: str, value: str, pattern: str, what: str) -> str:
    if not re.fullmatch(pattern, value):
        raise UsageError(f"{name} is {what}, not '{value}': correct {name}, or leave it out")
    return value


def main(args: argparse.Namespace) -> None:
    into = ROOT / "schedule"
    parts = build_command(args.data, args.registry, args.every, args.config, args.workers, args.notify)
    into.mkdir(exist_ok=True)
    files = {
        "fracture-retrain.service": format_service(parts, args.every),
        "fracture-retrain.timer": format_timer(args.every),
        "crontab": format_crontab(parts, args.every, into),
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
    parser.add_argument("--every", default="week", help=", ".join(INTERVALS))
    parser.add_argument("--config", default="", help="YAML of settings, or a name in fracture/configs")
    parser.add_argument("--workers", default="", help="N or MIN:MAX")
    parser.add_argument("--notify", default="", metavar="URL", help="web hook that is posted the result")
    try:
        main(parser.parse_args())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
