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
#   slurm/train.sh CONFIG.yaml RUN_DIR [--set a.b=c ...]
#   slurm/train.sh --nodes=4 --ntasks-per-node=4 --gpus-per-node=4 CONFIG.yaml RUN_DIR
#
# Two minutes before the time limit, and when the job is preempted, all ranks save at the same step and exit 85; the
# job then goes back into the queue and continues where it was.
set -euo pipefail
if [ "${0##*/}" = slurm_script ]; then  # the copy that SLURM runs; where it was copied from
  here=${COMIR_SLURM_DIR:-$(scontrol show job "$SLURM_JOB_ID" | sed -n "s|^ *Command=\\([^ ]*\\)/[^ /]*.*|\\1|p" | head -n 1)}
else
  here=$(cd "$(dirname "$0")" && pwd)
fi
# shellcheck source-path=SCRIPTDIR source=job.sh
source "$here/job.sh"

split_options "$@"; set -- "${arguments[@]}"
[ $# -ge 2 ] || die "usage: $here/train.sh [options of sbatch] CONFIG.yaml RUN_DIR [--set a.b=c ...]"
[ -r "$1" ] || die "config $1 is not readable; configs/ has some to start from"
check_tools
mkdir -p "$2"
submit_unless_in_job "$COMIR_PARTITION" "$@"
config=$1 run=$2; shift 2
comir train "$config" --run "$run" "$@"
