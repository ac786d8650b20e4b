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
#SBATCH --output=%x-%A_%a.log
# Encode a volume as a job array, each task its part; a task that is requeued redoes only what it had not finished:
#
#   sbatch --array=1-16 slurm/infer.sh IN.zarr RUN_DIR MODALITY OUT.zarr [options of comir-hpc infer]
set -euo pipefail
here=${COMIR_SLURM_DIR:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}/slurm}
[ -r "$here/env.sh" ] || { echo "$here/env.sh is missing; submit from the repository or set COMIR_SLURM_DIR" >&2; exit 2; }
source "$here/env.sh"

[ $# -ge 4 ] || die "usage: sbatch --array=1-N $here/infer.sh IN.zarr RUN_DIR MODALITY OUT.zarr [options]"
input=$1 run=$2 modality=$3 output=$4; shift 4
[ -d "$input" ] || die "volume $input does not exist"
[ -r "$run/model.json" ] || die "$run holds no trained model (model.json); train first"
check_tools
comir infer --zarr "$input" --model "$run" --modality "$modality" --out "$output" \
  --part "${SLURM_ARRAY_TASK_ID:-1}/${SLURM_ARRAY_TASK_COUNT:-1}" "$@"
