#!/usr/bin/env bash
# Trains a recipe on a Slurm cluster, one process a node with all of the node's devices.
#
#   sbatch --nodes=64 --gpus-per-node=8 scripts/launch_slurm.sh RECIPE [options of `v4train train`]
#
# The processes find each other through Slurm's own variables: no address to configure. Submit from the checkout (or set V4TRAIN_HOME),
# which must be on a file system that all nodes share, as must be the run directory. V4TRAIN_PYTHON names the interpreter.
# Two minutes before the time limit Slurm sends SIGTERM to the tasks: the run saves, and ends. It is then queued again, as it is after the
# loss of a node or when nothing gets on for half an hour (train.stall_seconds), up to V4TRAIN_RESTARTS times (default 20), until the run is
# finished or its recipe is wrong. A job that is cancelled or preempted saves as well, and is not queued again from here: that is Slurm's affair.
#SBATCH --job-name=v4train
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

if [[ $# -lt 1 || -z ${SLURM_JOB_ID:-} ]]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
recipe=$1
shift
cd "${V4TRAIN_HOME:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
python=${V4TRAIN_PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  [[ -z ${V4TRAIN_PYTHON:-} ]] || { echo "launch_slurm.sh: V4TRAIN_PYTHON: there is no program $python" >&2; exit 2; }
  python=python
fi

# A mistake in the recipe is told once, here, before any node starts a device.
"$python" -m v4train.train --config "$recipe" "$@" --dry-run >/dev/null || exit

# Since Slurm 22.05 srun does not inherit the job's --cpus-per-task: each task would get one core.
[[ -n ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# The notice before the time limit comes to the tasks alone; the shell waits for them and decides what follows. To the shell Slurm sends
# SIGTERM only when it ends the job itself.
stopped=75
signalled=
cancelled=
trap 'signalled=1 cancelled=1' TERM
defaults=(--set train.stall_seconds=1800 --set train.grace_seconds=100) # before "$@", which overrules them
srun --kill-on-bad-exit=1 "$python" -m v4train.train --config "$recipe" "${defaults[@]}" "$@" --stopped-code "$stopped" &
task=$!
while :; do
  signalled=
  wait "$task"
  code=$?
  [[ -n $signalled ]] || break # otherwise the signal has ended the wait, not the run
done

# Done; or asking again would not help.
((code == 0 || code == 2 || code == 130)) && exit "$code"
if [[ -n $cancelled ]]; then
  echo "launch_slurm.sh: Slurm has ended the job (cancelled or preempted); the same command goes on from the newest finished checkpoint"
  exit "$code"
fi
if ((${SLURM_RESTART_COUNT:-0} < ${V4TRAIN_RESTARTS:-20})); then
  echo "launch_slurm.sh: exit code $code before the last step; queued again (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
