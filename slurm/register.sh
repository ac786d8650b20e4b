#!/usr/bin/env bash
#SBATCH --job-name=comir-register
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Find the transform between two volumes, and put the moving one on the fixed grid:
#
#   sbatch slurm/register.sh FIXED.zarr FIXED_MODALITY MOVING.zarr MOVING_MODALITY RUN_DIR OUT_DIR [options]
set -euo pipefail
here=${COMIR_SLURM_DIR:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}/slurm}
[ -r "$here/env.sh" ] || { echo "$here/env.sh is missing; submit from the repository or set COMIR_SLURM_DIR" >&2; exit 2; }
source "$here/env.sh"

[ $# -ge 6 ] || die "usage: sbatch $here/register.sh FIXED.zarr FIXED_MODALITY MOVING.zarr MOVING_MODALITY RUN_DIR OUT_DIR"
fixed=$1 fixed_modality=$2 moving=$3 moving_modality=$4 run=$5 out=$6; shift 6
for volume in "$fixed" "$moving"; do [ -e "$volume" ] || die "volume $volume does not exist"; done
check_tools
comir register --fixed "$fixed" --moving "$moving" --model "$run" --fixed-modality "$fixed_modality" \
  --moving-modality "$moving_modality" --out "$out" "$@"
comir warp --zarr "$moving" --transform "$out/transform.tfm" --like "$fixed" --out "$out/moving_on_fixed.zarr"
