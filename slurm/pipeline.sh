#!/usr/bin/env bash
# Submit the whole chain, each job after the one before has succeeded:
#
#   slurm/pipeline.sh CONFIG.yaml RUN_DIR FIXED.zarr FIXED_MODALITY MOVING.zarr MOVING_MODALITY OUT_DIR
#
# train -> infer (two arrays) -> register and warp. Prints one line a job: its name and number. PARTS (default 4) is the
# length of each array; SBATCH_TRAIN, SBATCH_INFER and SBATCH_REGISTER take further options of sbatch for each kind.
set -euo pipefail
here=${COMIR_SLURM_DIR:-$(cd "$(dirname "$0")" && pwd)}
export COMIR_SLURM_DIR=$here
source "$here/env.sh"

[ $# -eq 7 ] || die "usage: $0 CONFIG.yaml RUN_DIR FIXED.zarr FIXED_MODALITY MOVING.zarr MOVING_MODALITY OUT_DIR"
config=$1 run=$2 fixed=$3 fixed_modality=$4 moving=$5 moving_modality=$6 out=$7
[ -r "$config" ] || die "config $config is not readable"
for volume in "$fixed" "$moving"; do [ -d "$volume" ] || die "volume $volume does not exist; ingest it first (slurm/ingest.sh)"; done
command -v sbatch >/dev/null || die "sbatch is not on PATH: run this on a login node"
check_tools
parts=${PARTS:-4}
mkdir -p "$run" "$out"

# submit NAME PARTITION SBATCH_OPTION... SCRIPT ARG...: prints the job's number.
submit() {
  local name=$1 partition=$2 options; shift 2
  mapfile -t options < <(site_options "$partition")
  sbatch --parsable --kill-on-invalid-dep=yes "${options[@]}" "$@" | cut -d ';' -f 1
}

read -ra train_options <<< "${SBATCH_TRAIN:-}"
read -ra infer_options <<< "${SBATCH_INFER:-}"
read -ra register_options <<< "${SBATCH_REGISTER:-}"
train=$(submit train "$COMIR_PARTITION" "${train_options[@]}" "$here/train.sh" "$config" "$run")
echo "train $train"
dependency=
for side in fixed moving; do
  modality="${side}_modality"
  job=$(submit infer "$COMIR_PARTITION" --dependency="afterok:$train" --array="1-$parts" "${infer_options[@]}" \
    "$here/infer.sh" "${!side}" "$run" "${!modality}" "$out/${side}_representation.zarr")
  echo "infer-$side $job"
  dependency+=":$job"
done
register=$(submit register "$COMIR_CPU_PARTITION" --dependency="afterok$dependency" "${register_options[@]}" \
  "$here/register.sh" "$fixed" "$fixed_modality" "$moving" "$moving_modality" "$run" "$out/registration" \
  --fixed-representation "$out/fixed_representation.zarr" --moving-representation "$out/moving_representation.zarr")
echo "register $register"
