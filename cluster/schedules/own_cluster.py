"""Creates the RayJob of one tick, with a cluster of its own, and waits for its end; runs in the pod of a CronJob.

  python cluster/schedules/own_cluster.py --template rayjob.yaml --tick TICK --owner UID

TICK in the template becomes the tick, and the RayJob is called TICK-1: a second start finds it (409, AlreadyExists) and
waits for it. After one that failed comes TICK-2, with the same --tick. Not TICK alone, which is the name of the
CronJob's Job: KubeRay names a Job of its own after the RayJob, and would take that one for it. The Job with this UID
owns the RayJobs, so that Kubernetes removes them, and a cluster that may be left, with it.

It asks Kubernetes' API itself, with the pod's own account, since the image has no kubectl. Exit codes: the training's
own, which KubeRay has in the RayJob's message only; 1 without one, and where Kubernetes refuses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ANSWERS = (0, 10)  # promoted or nothing new; rejected by the gate. Asking again would not change them
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
API = "https://kubernetes.default.svc"


@dataclass
class Kubernetes:
    api: str
    account: Path

    def ask(self, name: str = "", body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Gets a RayJob, or creates one; the status and what came back."""
        namespace = (self.account / "namespace").read_text().strip()
        headers = {"Authorization": f"Bearer {(self.account / 'token').read_text().strip()}"}  # renewed each hour
        url = f"{self.api}/apis/ray.io/v1/namespaces/{namespace}/rayjobs" + (f"/{name}" if name else "")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers | {"Content-Type": "application/json"})
        trusted = None
        if self.api.startswith("https:"):
            trusted = ssl.create_default_context(cafile=self.account / "ca.crt")
        try:
            with urllib.request.urlopen(request, timeout=30, context=trusted) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, {"message": error.read().decode(errors="replace")}


def rayjob(template: str, tick: str, name: str, owner: str) -> dict[str, Any]:
    made = yaml.safe_load(template.replace("TICK", tick))
    made["metadata"]["name"] = name
    made["metadata"]["ownerReferences"] = [{"apiVersion": "batch/v1", "kind": "Job", "name": tick, "uid": owner}]
    return made


def exit_code(job: dict[str, Any]) -> int | None:
    """None while it is at work."""
    status = job.get("status", {})
    if status.get("jobDeploymentStatus") not in ("Complete", "Failed"):
        return None
    if status.get("jobStatus") == "SUCCEEDED":
        return 0
    found = re.search(r"failed with exit code (\d+)", status.get("message", ""))
    return int(found[1]) if found else 1


def main(kubernetes: Kubernetes, template: str, tick: str, owner: str, every: float) -> int:
    for attempt in itertools.count(1):
        name = f"{tick}-{attempt}"
        status, job = patiently(kubernetes, every, body=rayjob(template, tick, name, owner))
        new = status != 409
        if new and status != 201:
            print(f"stopped: Kubernetes does not create {name}: {status} {job['message']}", file=sys.stderr)
            return 1
        print(f"RayJob {name} {'is created' if new else 'is there'}", flush=True)
        code = None
        while code is None:
            status, job = patiently(kubernetes, every, name)
            if status != 200:
                print(f"stopped: RayJob {name} cannot be seen: {status} {job['message']}", file=sys.stderr)
                return 1
            code = exit_code(job)
            if code is None:
                time.sleep(every)
        if new or code in ANSWERS:
            print(f"RayJob {name} has left with {code}", flush=True)
            return code
    raise AssertionError


def patiently(kubernetes: Kubernetes, every: float, *args: Any, **kwargs: Any) -> tuple[int, dict[str, Any]]:
    """Asks again while Kubernetes is not there or too busy, as when its control plane is updated; ten times in all."""
    for _ in range(9):
        try:
            status, answer = kubernetes.ask(*args, **kwargs)
            if status < 500 and status != 429:
                return status, answer
        except OSError as error:
            print(f"Kubernetes does not answer: {error}", file=sys.stderr, flush=True)
        time.sleep(every)
    return kubernetes.ask(*args, **kwargs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", type=Path, required=True, help="YAML of a RayJob")
    parser.add_argument("--tick", required=True, help="the name of the Job, the same for each retry of one tick")
    parser.add_argument("--owner", required=True, metavar="UID", help="of the Job")
    parser.add_argument("--every", type=float, default=20, metavar="SECONDS", help="between two looks")
    parser.add_argument("--api", default=API, help="of Kubernetes")
    parser.add_argument("--account", type=Path, default=ACCOUNT, help="folder of the pod's own account")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a container's first process has to ask for it
    try:
        code = main(Kubernetes(args.api, args.account), args.template.read_text(), args.tick, args.owner, args.every)
    except OSError as error:
        print(f"stopped: Kubernetes does not answer: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)
