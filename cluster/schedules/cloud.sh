#!/usr/bin/env bash
# One retraining on cloud machines that exist only for it: `ray up`, submit, `ray down`.
#
#   cluster/schedules/cloud.sh cluster/aws.yaml --data s3://BUCKET/radiographs --registry s3://BUCKET/registry \
#     --tick 2026-w48 --workers 2 --gpu
#
# The first argument, FILE, is one of cluster/ for `ray up`; all others are passed to the image's job/retrain.py. The
# cluster takes the name in FILE with -retrain added, so that a cluster of your own stays untouched. In a crontab:
#   17 3 * * 1  cd /path/to && PATH=$PWD/.venv/bin:$PATH cluster/schedules/cloud.sh FILE ... --tick $(date +\%G-w\%V)
#
# The cluster is taken down in every case, also when `ray up` fails half-way, and after SIGTERM or Ctrl-C, when the job
# is stopped first and saves. A trap cannot handle SIGKILL or the loss of this machine. Then run
#   ray down -y --cluster-name NAME-retrain FILE
#
# Exit codes: the job's own (0, 10, 2, 1); 1 if the cluster did not start, or could not be taken down and may still cost
# money, whatever the job's own code was; 130 and 143 after Ctrl-C and SIGTERM.
set -euo pipefail
set -m # each child gets its own process group, so that Ctrl-C reaches only this script, which ends them in order

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
file=${1:-}
[ "$#" -gt 0 ] && shift
tick=
previous=
for argument in "$@"; do
  [ "$previous" = --tick ] && tick=$argument
  case $argument in --tick=*) tick=${argument#--tick=} ;; esac
  previous=$argument
done
if [ ! -f "$file" ]; then
  echo "error: the first argument is a file for \`ray up\`, not '$file': give cluster/aws.yaml" >&2
  exit 2
fi
if [ -z "$tick" ]; then
  echo "error: a retraining needs the name of its tick, and none is given: give --tick 2026-w48" >&2
  exit 2
fi
name=$(sed -n 's/^cluster_name: *\([A-Za-z0-9_.-]*\).*/\1/p' "$file")
if [ -z "$name" ]; then
  echo "error: a file for \`ray up\` must have a cluster_name, and $file has none: give cluster/aws.yaml" >&2
  exit 2
fi
name=$name-retrain

for program in ray python flock; do
  if ! command -v "$program" > /dev/null; then
    echo "error: $program is not on the PATH: put .venv/bin there; flock is part of util-linux" >&2
    exit 2
  fi
done

exec 9< "$file" # locked: of two retrainings on this machine, the first to end would take down the other's cluster
if ! flock -n 9; then
  echo "another retraining with $file is running on this machine"
  exit 0
fi

export RAY_AUTH_MODE=token
child=
forward=

# Runs a command in the background and waits for it with `wait`: a trap interrupts `wait`, but not a command in the
# foreground. The command gets neither the lock nor the terminal, since it may outlive this script.
run() {
  "$@" < /dev/null 9<&- &
  child=$!
  wait "$child"
}

stop() {
  trap '' INT TERM HUP
  echo "stopped: taking the cluster down" >&2
  if [ -n "$child" ]; then
    kill -s TERM -- "-$child" 2> /dev/null || true
    wait "$child" || true
  fi
  exit "$1"
}

down() {
  code=$?
  trap '' INT TERM HUP EXIT
  [ -n "$forward" ] && kill -s TERM -- "-$forward" 2> /dev/null
  for attempt in 1 2 3 4 5; do
    if ray down -y --cluster-name "$name" "$file" < /dev/null 9<&-; then
      exit "$code"
    fi
    echo "\`ray down\` failed, attempt $attempt of 5" >&2
    sleep "${RAY_DOWN_WAIT:-30}"
  done
  {
    echo "################################################################################"
    echo "The cluster $name of $file could NOT be taken down. It may still cost money."
    echo "Check the cloud's console, and run: ray down -y --cluster-name $name $file"
    echo "################################################################################"
  } >&2
  exit 1
}

trap down EXIT
trap 'stop 130' INT
trap 'stop 143' TERM HUP

if ! run ray up -y --cluster-name "$name" "$file"; then
  echo "the cluster $name did not start" >&2
  exit 1
fi

# Forwards the dashboard to a free port of this machine through ssh, again whenever the connection breaks.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
(while :; do
  ray dashboard --cluster-name "$name" --port "$port" "$file" || true
  sleep 2
done) < /dev/null > /dev/null 2>&1 9<&- &
forward=$!

code=0
run python "$here/submit.py" --address "http://127.0.0.1:$port" --submission-id "$tick" -- \
  python /app/job/retrain.py "$@" || code=$?
exit "$code"
