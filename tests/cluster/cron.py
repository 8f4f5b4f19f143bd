"""What cron does with one line of a crontab, so that the tests run such a line also where there is no cron.

crontab(5): five fields, each `*` or numbers with commas; of the rest, % is the end of the line, and \\% is a %.
"""

import re
import subprocess
from collections.abc import Callable
from datetime import datetime, timedelta


def due(line: str, moment: datetime) -> bool:
    fields = line.split(maxsplit=5)[:5]
    now = (moment.minute, moment.hour, moment.day, moment.month, moment.isoweekday() % 7)
    return all(field == "*" or n in map(int, field.split(",")) for field, n in zip(fields, now, strict=True))


def command(line: str) -> str:
    """What is handed to the shell."""
    return re.split(r"(?<!\\)%", line.split(maxsplit=5)[5].rstrip("\n"), maxsplit=1)[0].replace("\\%", "%")


def start(line: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """With the little that cron gives to a job."""
    given = {"PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"} | (environment or {})
    return subprocess.Popen(["/bin/sh", "-c", command(line)], env=given, stdin=subprocess.DEVNULL)


def drive(line: str, turns: int, now: Callable[[], datetime], wait: Callable[[float], None]) -> list[datetime]:
    """Runs the line at so many of its turns, each to its end; when they were."""
    began: list[datetime] = []
    minute = now().replace(second=0, microsecond=0)
    while len(began) < turns:
        minute += timedelta(minutes=1)
        if due(line, minute):
            wait((minute - now()).total_seconds())
            began.append(now())
            assert start(line).wait() == 0
    return began
