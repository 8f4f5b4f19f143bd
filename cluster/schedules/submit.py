"""Runs one command on a standing Ray cluster, once for each tick of a schedule, however often it is asked.

  RAY_AUTH_MODE=token python cluster/schedules/submit.py --address http://HEAD:8265 --submission-id TICK -- \\
    python /app/job/retrain.py --data URI --registry URI --tick TICK

A job of this tick that is at work is followed; one that has succeeded, or was rejected, is not run again. After one
that failed or was stopped comes TICK-2, then TICK-3: Ray takes each name once. `ray job submit` would refuse the second
start, and leaves with 1 whatever the job's own exit code was.

SIGTERM and Ctrl-C stop the job, which then saves. Exit codes: the job's own; 1 if it has none; 130 and 143 if stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

T = TypeVar("T")

ANSWERS = (0, 10)  # promoted or nothing new; rejected by the gate. Asking again would not change them
PATIENCE = 300  # seconds without an answer of the cluster: a head that is started anew is back within them
STOPPING = 75  # seconds for a stopped job to leave, more than the RAY_JOB_STOP_WAIT_TIME_S of our clusters


class Signalled(BaseException):
    """Not an Exception, so that nobody takes it for a failure of the network."""


def main(address: str, tick: str, command: list[str], patience: float = PATIENCE) -> int:
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # RAY_ADDRESS, where it is set, would win over the argument
    client = patiently(lambda: JobSubmissionClient(address), patience)
    name = ""
    try:
        while not name:
            jobs = patiently(client.list_jobs, patience)
            name = under_way(jobs, tick) or submitted(client, next_name(jobs, tick), tick, command, patience)
        for job in jobs:
            if job.submission_id == name and job.status.is_terminal():
                print(f"{name} is over since an earlier start of this tick", flush=True)
                return exit_code(job, tell=True)
        print(f"following {name}", flush=True)
        asyncio.run(follow(client, name, patience))
        return exit_code(patiently(lambda: client.get_job_info(name), patience), tell=True)
    except Signalled:
        stop(client, tick)
        raise


def under_way(jobs: list[JobDetails], tick: str) -> str:
    """The job of this tick that needs no other after it; empty if there is none."""
    ours = [job for job in jobs if (job.metadata or {}).get("tick") == tick]
    return next((j.submission_id for j in ours if not j.status.is_terminal() or exit_code(j) in ANSWERS), "")


def next_name(jobs: list[JobDetails], tick: str) -> str:
    taken = {job.submission_id for job in jobs}
    names = (tick if n == 1 else f"{tick}-{n}" for n in itertools.count(1))
    return next(name for name in names if name not in taken)


def submitted(client: JobSubmissionClient, name: str, tick: str, command: list[str], patience: float) -> str:
    """The name; empty if another start of this tick has just taken it."""
    ask = {"entrypoint": shlex.join(command), "submission_id": name, "metadata": {"tick": tick}}
    try:
        return patiently(lambda: client.submit_job(**ask), patience)
    except RuntimeError as error:
        if "already exists" in str(error):
            return ""
        raise


async def follow(client: JobSubmissionClient, name: str, patience: float) -> None:
    """Prints the log until the job is over. After a broken connection it goes on where it was."""
    printed = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(name):
                seen += len(text)
                print(text[-(seen - printed) :] if seen > printed else "", end="", flush=True)
                printed = max(printed, seen)
        except (RuntimeError, aiohttp.ClientError, OSError) as error:
            print(f"the log of {name} broke off: {error}", file=sys.stderr, flush=True)
        if patiently(lambda: client.get_job_info(name), patience).status.is_terminal():
            return
        await asyncio.sleep(1)


def exit_code(job: JobDetails, tell: bool = False) -> int:
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if tell:
        print(f"{job.submission_id}: {job.status.value}. {(job.message or '').partition(',')[0]}", file=sys.stderr)
    code = job.driver_exit_code
    return code if code and 0 < code < 256 else 1  # none if it never started or was stopped, negative after a signal


def stop(client: JobSubmissionClient, tick: str) -> None:
    for job in client.list_jobs():
        if (job.metadata or {}).get("tick") == tick and not job.status.is_terminal():
            print(f"stopping {job.submission_id}, which saves first", flush=True)
            client.stop_job(job.submission_id)
            deadline = time.monotonic() + STOPPING
            while not client.get_job_status(job.submission_id).is_terminal() and time.monotonic() < deadline:
                time.sleep(0.5)


def patiently(ask: Callable[[], T], patience: float) -> T:
    """Asks again while the cluster cannot be reached; whatever it answers is an answer."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return ask()
        except OSError as error:  # requests' errors are among them
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer for {patience:g} s, whether a job runs is not known: {error}") from error
            time.sleep(2)


def _signalled(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; the job is given its time
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Signalled(number)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="of the dashboard, such as http://127.0.0.1:8265")
    parser.add_argument("--submission-id", required=True, metavar="TICK", help="the same for each retry of one tick")
    parser.add_argument("--patience", type=float, default=PATIENCE, metavar="SECONDS", help="without any answer")
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _signalled)
    signal.signal(signal.SIGINT, _signalled)
    try:
        code = main(args.address, args.submission_id, args.command, args.patience)
    except Signalled as stopped:
        code = 128 + stopped.args[0]
    except (RuntimeError, OSError, RayError) as error:  # of the last, a wrong token
        print(f"stopped: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)
