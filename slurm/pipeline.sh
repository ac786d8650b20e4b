#!/usr/bin/env bash
# Submit the whole chain, each job after the one before has succeeded:
#
#   slurm/pipeline.sh CONFIG.yaml RUN_DIR FIXED FIXED_MODALITY MOVING MOVING_MODALITY OUT_DIR
#
# ingest -> train -> infer (two arrays) -> register and warp. FIXED and MOVING are .zarr volumes, or files that are
# ingested as OUT_DIR/FIXED_MODALITY.zarr and OUT_DIR/MOVING_MODALITY.zarr; CONFIG.yaml may name these. Prints one line
# a job: its name and number. PARTS (default 4) is the length of each array; SBATCH_INGEST, SBATCH_TRAIN, SBATCH_INFER
# and SBATCH_REGISTER take further options of sbatch for each kind, REGISTER_OPTIONS those of comir-hpc register.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=job.sh
source "$here/job.sh"

[ $# -eq 7 ] || die "usage: $0 CONFIG.yaml RUN_DIR FIXED FIXED_MODALITY MOVING MOVING_MODALITY OUT_DIR"
config=$1 run=$2 fixed=$3 fixed_modality=$4 moving=$5 moving_modality=$6 out=$7
[ -r "$config" ] || die "config $config is not readable; configs/ has some to start from"
for volume in "$fixed" "$moving"; do [ -e "$volume" ] || die "volume $volume does not exist"; done
check_tools
parts=${PARTS:-4}
mkdir -p "$run" "$out"

# add NAME JOBS PARTITION OPTIONS SCRIPT WORD...: submit one job after the :JOBS have succeeded; its number in $job.
add() {
  local name=$1 after=$2 partition=$3 options; shift 3
  read -ra options <<< "$1"; shift
  # A job whose predecessor failed can never run: it is cancelled rather than left in the queue.
  job=$(submit "$partition" --kill-on-invalid-dep=yes ${after:+--dependency="afterok$after"} "${options[@]}" "$@")
  echo "$name $job"
}

ingested=
for side in fixed moving; do
  modality="${side}_modality"
  if [[ ${!side} != *.zarr ]]; then
    add "ingest-$side" "" "$COMIR_CPU_PARTITION" "${SBATCH_INGEST:-}" \
      "$here/ingest.sh" "${!side}" "$out/${!modality}.zarr"
    ingested+=":$job"
    printf -v "$side" %s "$out/${!modality}.zarr"
  fi
done
add train "$ingested" "$COMIR_PARTITION" "${SBATCH_TRAIN:-}" "$here/train.sh" "$config" "$run"
trained=":$job" encoded=
for side in fixed moving; do
  modality="${side}_modality"
  add "infer-$side" "$trained" "$COMIR_PARTITION" "--array=1-$parts ${SBATCH_INFER:-}" \
    "$here/infer.sh" "${!side}" "$run" "${!modality}" "$out/${side}_representation.zarr"
  encoded+=":$job"
done
read -ra register_options <<< "${REGISTER_OPTIONS:-}"
add register "$encoded" "$COMIR_CPU_PARTITION" "${SBATCH_REGISTER:-}" \
  "$here/register.sh" "$fixed" "$fixed_modality" "$moving" "$moving_modality" "$run" "$out/registration" \
  --fixed-representation "$out/fixed_representation.zarr" --moving-representation "$out/moving_representation.zarr" \
  "${register_options[@]}"
