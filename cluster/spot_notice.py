"""Drain this spot machine from Ray when the cloud announces that it will be reclaimed, so that the job saves first.

  python cluster/spot_notice.py aws       AWS announces it 2 minutes before
  python cluster/spot_notice.py gcp       Google Cloud announces it 30 seconds before

Runs beside Ray on every spot worker and reads the machine's metadata every 2 seconds. Ray Train's workers on a drained
machine save a checkpoint and are replaced.
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

POLL_SECONDS = 2
SECONDS_LEFT = {"aws": 110, "gcp": 25}  # at least, once the notice has been read
METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}


def is_reclaimed(cloud: str, metadata: str) -> bool:
    """Return True once the notice has been given; False while the metadata server does not answer."""
    try:
        if cloud == "gcp":
            path = "/computeMetadata/v1/instance/preempted"
            return _request(metadata + path, {"Metadata-Flavor": "Google"}) == "TRUE"
        token = _request(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
        return bool(_request(f"{metadata}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}))
    except (urllib.error.URLError, TimeoutError, ConnectionError):  # AWS answers 404 until there is a notice
        return False


def _request(url: str, headers: dict[str, str], method: str = "GET") -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=2) as response:
        return response.read().decode()


def main(cloud: str, metadata: str) -> None:
    with (Path(tempfile.gettempdir()) / "spot_notice.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # Ray was restarted; one process is enough
            return
        while not is_reclaimed(cloud, metadata):
            time.sleep(POLL_SECONDS)
        drain = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
        subprocess.run([*drain, "--deadline-remaining-seconds", str(SECONDS_LEFT[cloud])], check=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else METADATA[sys.argv[1]])
