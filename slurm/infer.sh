#!/usr/bin/env bash
#SBATCH --job-name=comir-infer
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
#SBATCH --time=04:00:00
#SBATCH --array=1-4
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120
#SBATCH --output=%x-%A_%a.log
# Encode a volume as a job array, each task its part; a task that is requeued redoes only what it had not finished:
#
#   slurm/infer.sh --array=1-16 IN.zarr RUN_DIR MODALITY OUT.zarr [options of comir-hpc infer]
#   PARTS=16 slurm/infer.sh --array=5 IN.zarr RUN_DIR MODALITY OUT.zarr      part 5 of 16 alone, once more
set -euo pipefail
if [ "${0##*/}" = slurm_script ]; then  # the copy that SLURM runs; where it was copied from
  here=${COMIR_SLURM_DIR:-$(scontrol show job "$SLURM_JOB_ID" | sed -n "s|^ *Command=\\([^ ]*\\)/[^ /]*.*|\\1|p" | head -n 1)}
else
  here=$(cd "$(dirname "$0")" && pwd)
fi
# shellcheck source-path=SCRIPTDIR source=job.sh
source "$here/job.sh"

split_options "$@"; set -- "${arguments[@]}"
[ $# -ge 4 ] || die "usage: $here/infer.sh [--array=1-N] IN.zarr RUN_DIR MODALITY OUT.zarr [options of comir-hpc infer]"
[ -d "$1" ] || die "volume $1 does not exist; make it with slurm/ingest.sh"
[ -r "$2/model.json" ] || die "$2 holds no trained model (model.json); train first"
check_tools
submit_unless_in_job "$COMIR_PARTITION" "$@"
input=$1 run=$2 modality=$3 output=$4; shift 4
comir infer --zarr "$input" --model "$run" --modality "$modality" --out "$output" \
  --part "${SLURM_ARRAY_TASK_ID:-1}/${PARTS:-${SLURM_ARRAY_TASK_COUNT:-1}}" "$@"
