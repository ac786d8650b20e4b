#!/usr/bin/env bash
#SBATCH --job-name=comir-ingest
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120
#SBATCH --output=%x-%j.log
# Turn a file into an OME-Zarr volume; requeued, it continues:
#
#   slurm/ingest.sh SOURCE OUT.zarr [--spacing Z Y X --unit um ...]
set -euo pipefail
if [ "${0##*/}" = slurm_script ]; then  # the copy that SLURM runs; where it was copied from
  here=${COMIR_SLURM_DIR:-$(scontrol show job "$SLURM_JOB_ID" | sed -n "s|^ *Command=\\([^ ]*\\)/[^ /]*.*|\\1|p" | head -n 1)}
else
  here=$(cd "$(dirname "$0")" && pwd)
fi
# shellcheck source-path=SCRIPTDIR source=job.sh
source "$here/job.sh"

split_options "$@"; set -- "${arguments[@]}"
[ $# -ge 2 ] || die "usage: $here/ingest.sh [options of sbatch] SOURCE OUT.zarr [options of comir-hpc ingest]"
[ -e "$1" ] || die "source $1 does not exist"
check_tools
submit_unless_in_job "$COMIR_CPU_PARTITION" "$@"
comir ingest "$@" --workers "${SLURM_CPUS_PER_TASK:-1}"
