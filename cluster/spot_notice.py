"""Tells Ray when this spot machine is about to be taken away, so that the job on it saves first.

  python cluster/spot_notice.py aws       2 minutes before; asks the machine's metadata every 2 s
  python cluster/spot_notice.py gcp       30 s before

Runs beside Ray on every worker that may be taken away; the workers of Ray Train there are told, save, and are replaced.
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
https://cloud.google.com/compute/docs/instances/spot#preemption-process
"""

import fcntl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

EVERY = 2  # seconds
NOTICE = {"aws": 110, "gcp": 25}  # seconds that are left when it is seen, at least
METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}


def taken_away(cloud: str, metadata: str) -> bool:
    """Whether the notice has come. A metadata server that does not answer says nothing."""
    try:
        if cloud == "gcp":
            path = "/computeMetadata/v1/instance/preempted"
            return _ask(metadata + path, {"Metadata-Flavor": "Google"}) == "TRUE"
        token = _ask(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
        return bool(_ask(f"{metadata}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}))
    except (urllib.error.URLError, TimeoutError, ConnectionError):  # AWS says 404 until there is a notice
        return False


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=2) as answer:
        return answer.read().decode()


def main(cloud: str, metadata: str) -> None:
    with (Path(tempfile.gettempdir()) / "spot_notice.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # Ray was started anew; one is enough
            return
        while not taken_away(cloud, metadata):
            time.sleep(EVERY)
        drain = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
        subprocess.run([*drain, "--deadline-remaining-seconds", str(NOTICE[cloud])], check=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else METADATA[sys.argv[1]])
