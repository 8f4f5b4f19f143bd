"""Run one line of a crontab as cron does, also on machines without cron.

crontab(5): five fields, each `*` or numbers with commas, then the command, in which % ends the line and \\% is a %.
"""

import re
import subprocess
from collections.abc import Callable
from datetime import datetime, timedelta


def is_due(line: str, moment: datetime) -> bool:
    fields = line.split(maxsplit=5)[:5]
    now = (moment.minute, moment.hour, moment.day, moment.month, moment.isoweekday() % 7)
    return all(field == "*" or n in map(int, field.split(",")) for field, n in zip(fields, now, strict=True))


def command(line: str) -> str:
    """Return the command that cron passes to the shell."""
    return re.split(r"(?<!\\)%", line.split(maxsplit=5)[5].rstrip("\n"), maxsplit=1)[0].replace("\\%", "%")


def start(line: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start the line's command with the small environment that cron gives to a job."""
    given = {"PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"} | (environment or {})
    return subprocess.Popen(["/bin/sh", "-c", command(line)], env=given, stdin=subprocess.DEVNULL)


def drive(line: str, starts: int, now: Callable[[], datetime], wait: Callable[[float], None]) -> list[datetime]:
    """Run the line at the given number of due minutes, each to its end, and return the times of the starts."""
    began: list[datetime] = []
    minute = now().replace(second=0, microsecond=0)
    while len(began) < starts:
        minute += timedelta(minutes=1)
        if is_due(line, minute):
            wait((minute - now()).total_seconds())
            began.append(now())
            assert start(line).wait() == 0
    return began
