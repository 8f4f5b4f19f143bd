"""Run one command on a permanent Ray cluster once for each tick of a schedule, however often this program is started.

  RAY_AUTH_MODE=token python cluster/schedules/submit.py --address http://HEAD:8265 --submission-id TICK -- \\
    python /app/job/retrain.py --data URI --registry URI --tick TICK

If a job of this tick is running, its log is followed. If one has succeeded or was rejected by the gate, nothing is run
again. If the last one failed or was stopped, the next is TICK-2, then TICK-3, since Ray accepts each name only once.
`ray job submit` would refuse the second start, and its exit code is 1 whatever the job's own was.

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

FINAL_CODES = (0, 10)  # promoted or nothing new; rejected by the gate: running again would change neither
PATIENCE = 300  # seconds to wait for the cluster's answer; a restarted head is back within them
STOPPING = 75  # seconds that a stopped job may take, more than our clusters' RAY_JOB_STOP_WAIT_TIME_S


class Signalled(BaseException):
    """A signal was received. It is no Exception, so that no handler takes it for a failure of the network."""


def main(address: str, tick: str, command: list[str], patience: float = PATIENCE) -> int:
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # otherwise RAY_ADDRESS would override the argument
    client = retry(lambda: JobSubmissionClient(address), patience)
    name = ""
    try:
        while not name:
            jobs = retry(client.list_jobs, patience)
            name = find_job(jobs, tick) or submit(client, next_name(jobs, tick), tick, command, patience)
        for job in jobs:
            if job.submission_id == name and job.status.is_terminal():
                print(f"{name} ended in an earlier start of this tick", flush=True)
                return exit_code(job, verbose=True)
        print(f"following {name}", flush=True)
        asyncio.run(follow(client, name, patience))
        return exit_code(retry(lambda: client.get_job_info(name), patience), verbose=True)
    except Signalled:
        stop(client, tick)
        raise


def find_job(jobs: list[JobDetails], tick: str) -> str:
    """Return the id of this tick's job that is running or has a final exit code, or an empty string."""
    ours = [job for job in jobs if (job.metadata or {}).get("tick") == tick]
    return next((j.submission_id for j in ours if not j.status.is_terminal() or exit_code(j) in FINAL_CODES), "")


def next_name(jobs: list[JobDetails], tick: str) -> str:
    taken = {job.submission_id for job in jobs}
    names = (tick if n == 1 else f"{tick}-{n}" for n in itertools.count(1))
    return next(name for name in names if name not in taken)


def submit(client: JobSubmissionClient, name: str, tick: str, command: list[str], patience: float) -> str:
    """Return the job's id, or an empty string if another start of this tick has just taken it."""
    job = {"entrypoint": shlex.join(command), "submission_id": name, "metadata": {"tick": tick}}
    try:
        return retry(lambda: client.submit_job(**job), patience)
    except RuntimeError as error:
        if "already exists" in str(error):
            return ""
        raise


async def follow(client: JobSubmissionClient, name: str, patience: float) -> None:
    """Print the log until the job ends; a broken connection is resumed without repeating a line."""
    printed = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(name):
                seen += len(text)
                print(text[-(seen - printed) :] if seen > printed else "", end="", flush=True)
                printed = max(printed, seen)
        except (RuntimeError, aiohttp.ClientError, OSError) as error:
            print(f"the log of {name} was interrupted: {error}", file=sys.stderr, flush=True)
        if retry(lambda: client.get_job_info(name), patience).status.is_terminal():
            return
        await asyncio.sleep(1)


def exit_code(job: JobDetails, verbose: bool = False) -> int:
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if verbose:
        print(f"{job.submission_id}: {job.status.value}. {(job.message or '').partition(',')[0]}", file=sys.stderr)
    code = job.driver_exit_code
    return code if code and 0 < code < 256 else 1  # None if it never started or was stopped, negative after a signal


def stop(client: JobSubmissionClient, tick: str) -> None:
    for job in client.list_jobs():
        if (job.metadata or {}).get("tick") == tick and not job.status.is_terminal():
            print(f"stopping {job.submission_id}, which saves first", flush=True)
            client.stop_job(job.submission_id)
            deadline = time.monotonic() + STOPPING
            while not client.get_job_status(job.submission_id).is_terminal() and time.monotonic() < deadline:
                time.sleep(0.5)


def retry(call: Callable[[], T], patience: float) -> T:
    """Call again while the cluster cannot be reached; any answer of the cluster, an error too, is final."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return call()
        except OSError as error:  # requests' errors are among them
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer for {patience:g} s, a job may be running: {error}") from error
            time.sleep(2)


def _raise_signalled(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not cut the job's time short
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Signalled(number)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="address of the dashboard, such as http://127.0.0.1:8265")
    parser.add_argument(
        "--submission-id", required=True, metavar="TICK", help="name of the tick, the same for its retries"
    )
    parser.add_argument("command", nargs="+", help="the command to run, after --")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _raise_signalled)
    signal.signal(signal.SIGINT, _raise_signalled)
    try:
        code = main(args.address, args.submission_id, args.command)
    except Signalled as stopped:
        code = 128 + stopped.args[0]
    except (RuntimeError, OSError, RayError) as error:  # a wrong token is a RayError
        print(f"stopped: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)
