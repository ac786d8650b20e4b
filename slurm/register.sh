#!/usr/bin/env bash
#SBATCH --job-name=comir-register
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120
#SBATCH --output=%x-%j.log
# Find the transform between two volumes, and put the moving one on the fixed grid if the verdict is PASS
# (COMIR_REQUIRE=warn: if it is PASS or WARN):
#
#   slurm/register.sh FIXED.zarr FIXED_MODALITY MOVING.zarr MOVING_MODALITY RUN_DIR OUT_DIR [options]
set -euo pipefail
if [ "${0##*/}" = slurm_script ]; then  # the copy that SLURM runs; where it was copied from
  here=${COMIR_SLURM_DIR:-$(scontrol show job "$SLURM_JOB_ID" | sed -n "s|^ *Command=\\([^ ]*\\)/[^ /]*.*|\\1|p" | head -n 1)}
else
  here=$(cd "$(dirname "$0")" && pwd)
fi
# shellcheck source-path=SCRIPTDIR source=job.sh
source "$here/job.sh"

split_options "$@"; set -- "${arguments[@]}"
[ $# -ge 6 ] ||
  die "usage: $here/register.sh [options of sbatch] FIXED.zarr FIXED_MODALITY MOVING.zarr MOVING_MODALITY RUN_DIR OUT_DIR [options of comir-hpc register]"
for volume in "$1" "$3"; do [ -e "$volume" ] || die "volume $volume does not exist"; done
[ -r "$5/model.json" ] || die "$5 holds no trained model (model.json); train first"
check_tools
submit_unless_in_job "$COMIR_CPU_PARTITION" "$@"
fixed=$1 fixed_modality=$2 moving=$3 moving_modality=$4 run=$5 out=$6; shift 6
comir register --fixed "$fixed" --moving "$moving" --model "$run" --fixed-modality "$fixed_modality" \
  --moving-modality "$moving_modality" --out "$out" --require "$COMIR_REQUIRE" "$@"
comir warp --zarr "$moving" --transform "$out/transform.tfm" --like "$fixed" --out "$out/moving_on_fixed.zarr"
