#!/usr/bin/env bash
#SBATCH --job-name=comir-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120
#SBATCH --output=%x-%j.log
# Train on one or many GPUs, one task a GPU:
#
#   sbatch slurm/train.sh CONFIG.yaml RUN_DIR [--set a.b=c ...]
#   sbatch --nodes=4 --ntasks-per-node=4 --gpus-per-node=4 slurm/train.sh CONFIG.yaml RUN_DIR
#
# Two minutes before the time limit, and when the job is preempted, all ranks save at the same step and exit 85; this
# script, outside the container, then puts the job back in the queue, and it goes on where it was.
set -euo pipefail
here=${COMIR_SLURM_DIR:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}/slurm}
[ -r "$here/env.sh" ] || { echo "$here/env.sh is missing; submit from the repository or set COMIR_SLURM_DIR" >&2; exit 2; }
source "$here/env.sh"

usage() { die "usage: sbatch $here/train.sh CONFIG.yaml RUN_DIR [--set a.b=c ...]"; }
[ $# -ge 2 ] || usage
config=$1 run=$2; shift 2
[ -r "$config" ] || die "config $config is not readable"
check_tools
mkdir -p "$run"

# Every rank finds the first one here (engine.py reads SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID itself).
first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-$(hostname)}" | head -n 1)
export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 40000))}

export -f comir
export COMIR_IMAGE COMIR_BINDS COMIR_GPU_FLAG COMIR_EXEC_FLAGS
status=0
# --kill-on-bad-exit: a rank that dies fails the job at once instead of leaving the others in a collective.
srun --kill-on-bad-exit=1 bash -c 'comir train "$@"' comir "$config" --run "$run" "$@" &
steps=$!
# The signal reaches srun's tasks by themselves; this shell must outlive it to requeue.
trap ':' USR2 TERM
while :; do
  wait "$steps" && status=0 || status=$?
  kill -0 "$steps" 2>/dev/null || break
done
if [ "$status" -eq 85 ]; then
  echo "saved; requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
