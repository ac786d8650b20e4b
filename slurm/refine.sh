#!/usr/bin/env bash
#SBATCH --job-name=comir-refine
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --array=1-4
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120
#SBATCH --output=%x-%A_%a.log
# Refine a registration block by block as a job array, each task its part; the task that ends last makes the field:
#
#   slurm/refine.sh --array=1-16 RESULT_DIR OUT.zarr [options of comir-hpc refine]
#   PARTS=16 slurm/refine.sh --array=5 RESULT_DIR OUT.zarr      part 5 of 16 alone, once more
set -euo pipefail
if [ "${0##*/}" = slurm_script ]; then  # the copy that SLURM runs; where it was copied from
  here=${COMIR_SLURM_DIR:-$(scontrol show job "$SLURM_JOB_ID" | sed -n "s|^ *Command=\\([^ ]*\\)/[^ /]*.*|\\1|p" | head -n 1)}
else
  here=$(cd "$(dirname "$0")" && pwd)
fi
# shellcheck source-path=SCRIPTDIR source=job.sh
source "$here/job.sh"

split_options "$@"; set -- "${arguments[@]}"
[ $# -ge 2 ] || die "usage: $here/refine.sh [--array=1-N] RESULT_DIR OUT.zarr [options of comir-hpc refine]"
[ -r "$1/result.json" ] || die "$1 holds no registration (result.json); register first"
check_tools
submit_unless_in_job "$COMIR_CPU_PARTITION" "$@"
result=$1 output=$2; shift 2
comir refine "$result" --out "$output" \
  --part "${SLURM_ARRAY_TASK_ID:-1}/${PARTS:-${SLURM_ARRAY_TASK_COUNT:-1}}" "$@"
