#!/usr/bin/env bash
#SBATCH --job-name=comir-benchmark
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=24G
#SBATCH --time=12:00:00
#SBATCH --array=1-8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120
#SBATCH --output=%x-%A_%a.log
# Register many pairs by many methods as a job array, each task its part of the cases; all write into one table. A task
# that is requeued does only what the table lacks:
#
#   slurm/benchmark.sh --array=1-32 CONFIG.yaml TABLE.csv [options of comir-hpc benchmark]
set -euo pipefail
if [ "${0##*/}" = slurm_script ]; then  # the copy that SLURM runs; where it was copied from
  here=${COMIR_SLURM_DIR:-$(scontrol show job "$SLURM_JOB_ID" | sed -n "s|^ *Command=\\([^ ]*\\)/[^ /]*.*|\\1|p" | head -n 1)}
else
  here=$(cd "$(dirname "$0")" && pwd)
fi
# shellcheck source-path=SCRIPTDIR source=job.sh
source "$here/job.sh"

split_options "$@"; set -- "${arguments[@]}"
[ $# -ge 2 ] || die "usage: $here/benchmark.sh [--array=1-N] CONFIG.yaml TABLE.csv [options of comir-hpc benchmark]"
[ -r "$1" ] || die "config $1 is not readable; configs/benchmark.yaml is one to start from"
check_tools
submit_unless_in_job "$COMIR_CPU_PARTITION" "$@"
config=$1 table=$2; shift 2
comir benchmark "$config" --out "$table" --workers "${SLURM_CPUS_PER_TASK:-1}" \
  --part "${SLURM_ARRAY_TASK_ID:-1}/${PARTS:-${SLURM_ARRAY_TASK_COUNT:-1}}" "$@"
