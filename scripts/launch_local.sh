#!/usr/bin/env bash
# Trains a recipe with N processes on this machine, as a cluster would with N hosts; CPU collectives go through gloo.
#
#   scripts/launch_local.sh N RECIPE [--restarts K] [options of `v4train train`]
#
# Each of them gets --coordinator, --processes and --process. mesh.emulate_devices is the number of devices of all together.
# Ctrl-C and SIGTERM go to all: they save, and end together. When one ends badly, the others are given 15 s to do so themselves.
# --restarts K starts all again, from the newest finished checkpoint, up to K times after a failure of the machine (not of the recipe).
# Exit code: 0 done, 2 the user's input is wrong, 130 after Ctrl-C, otherwise the first code that is not 0. V4TRAIN_PYTHON names the interpreter.
set -uo pipefail
set -m # each process in a group of its own: Ctrl-C comes to this script alone, which passes it on once

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || usage
count=$1 recipe=$2
shift 2
restarts=0
options=()
while [[ $# -gt 0 ]]; do
  if [[ $1 == --restarts ]]; then
    [[ ${2:-} =~ ^[0-9]+$ ]] || usage
    restarts=$2
    shift 2
  else
    options+=("$1")
    shift
  fi
done
python=${V4TRAIN_PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  [[ -z ${V4TRAIN_PYTHON:-} ]] || { echo "launch_local.sh: V4TRAIN_PYTHON: there is no program $python" >&2; exit 2; }
  python=python
fi

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

pids=()
forward() { kill -s "$1" "${pids[@]}"; }
stopped=
trap 'stopped=1; forward TERM' TERM
trap 'stopped=1; forward INT' INT

# Starts all, waits for all, and sets $code.
attempt() {
  local port i ended killer=
  port=$(free_port) || exit 1
  pids=() code=0
  for ((i = 0; i < count; i++)); do
    "$python" -m v4train.train --config "$recipe" "${options[@]}" \
      --coordinator "127.0.0.1:$port" --processes "$count" --process "$i" 2>&3 3>&- 4>&- &
    pids+=($!)
  done
  # Not `wait -n`: it forgets a job that ended while another was looked after.
  while ((${#pids[@]} > 0)); do
    for i in "${!pids[@]}"; do
      kill -0 "${pids[i]}" && continue
      wait "${pids[i]}"
      ended=$?
      unset "pids[i]"
      if ((ended > 128 && ended != 130)); then
        echo "launch_local.sh: process $i was ended by signal $((ended - 128))" >&3
      fi
      if ((ended != 0 && code == 0)); then
        code=$ended
        { sleep 15; kill -KILL "${pids[@]}"; } >/dev/null 3>&- 4>&- &
        killer=$!
      fi
    done
    read -rt 0.1 -u 4 # sleeps without a process, which would take Ctrl-C from this one
  done
  if [[ -n $killer ]]; then
    kill -- "-$killer"
    wait "$killer"
  fi
}

# A mistake in the recipe is told once, not by each process.
"$python" -m v4train.train --config "$recipe" "${options[@]}" --dry-run >/dev/null || exit
# What the shell itself says of jobs is not for people; 3 is where errors go, and nothing ever comes from 4.
exec 3>&2 2>/dev/null 4<> <(:)

for ((tried = 0; ; tried++)); do
  attempt
  if ((code == 0 || code == 2 || code == 130 || tried >= restarts)) || [[ -n $stopped ]]; then
    exit "$code"
  fi
  echo "launch_local.sh: exit code $code; restart $((tried + 1)) of $restarts" >&3
done
