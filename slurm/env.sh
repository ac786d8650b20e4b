# The one file a site edits; every script of this folder sources it. Values given in the environment win.
# shellcheck shell=bash

: "${COMIR_ACCOUNT:=}"                 # SLURM account; empty where the site needs none
: "${COMIR_PARTITION:=}"               # partition of the GPU jobs; empty: the site's default
: "${COMIR_CPU_PARTITION:=${COMIR_PARTITION}}"   # partition of ingest, infer on CPUs, register, warp
: "${COMIR_IMAGE:=}"                   # Apptainer image (containers/README.md); empty: comir-hpc from PATH
: "${COMIR_BINDS:=}"                   # folders the image must see, comma-separated, e.g. /scratch,/project
: "${COMIR_MODULES:=}"                 # modules to load first, e.g. "apptainer cuda"
: "${COMIR_GPU_FLAG:=--nv}"            # how Apptainer gets at the GPUs; empty on CPU nodes
: "${COMIR_EXEC_FLAGS:=}"              # further flags of `apptainer exec`, e.g. --userns

die() { printf '%s\n' "$*" >&2; exit 2; }

# Options of sbatch that come from above, one a line.
site_options() {
  [ -z "$COMIR_ACCOUNT" ] || printf '%s\n' "--account=$COMIR_ACCOUNT"
  [ -z "${1-$COMIR_PARTITION}" ] || printf '%s\n' "--partition=${1-$COMIR_PARTITION}"
}

# comir ARG...: comir-hpc, inside the image when there is one.
comir() {
  if [ -z "$COMIR_IMAGE" ]; then
    comir-hpc "$@"
  else
    # shellcheck disable=SC2086  # flags are several words on purpose
    apptainer exec $COMIR_GPU_FLAG $COMIR_EXEC_FLAGS ${COMIR_BINDS:+--bind "$COMIR_BINDS"} "$COMIR_IMAGE" comir-hpc "$@"
  fi
}

check_tools() {
  for module in $COMIR_MODULES; do module load "$module" || die "module $module does not load; edit slurm/env.sh"; done
  if [ -n "$COMIR_IMAGE" ]; then
    [ -r "$COMIR_IMAGE" ] || die "image $COMIR_IMAGE is not readable; build it (containers/README.md) or edit slurm/env.sh"
    command -v apptainer >/dev/null || die "apptainer is not on PATH; add its module to COMIR_MODULES in slurm/env.sh"
  else
    command -v comir-hpc >/dev/null || die "comir-hpc is not on PATH; activate its environment or set COMIR_IMAGE in slurm/env.sh"
  fi
}
