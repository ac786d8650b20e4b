#!/usr/bin/env bash
#SBATCH --job-name=comir-ingest
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Turn a file into an OME-Zarr volume; requeued, it continues:
#
#   sbatch slurm/ingest.sh SOURCE OUT.zarr [--spacing Z Y X --unit um ...]
set -euo pipefail
here=${COMIR_SLURM_DIR:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}/slurm}
[ -r "$here/env.sh" ] || { echo "$here/env.sh is missing; submit from the repository or set COMIR_SLURM_DIR" >&2; exit 2; }
source "$here/env.sh"

[ $# -ge 2 ] || die "usage: sbatch $here/ingest.sh SOURCE OUT.zarr [options of comir-hpc ingest]"
[ -e "$1" ] || die "source $1 does not exist"
check_tools
comir ingest "$@" --workers "${SLURM_CPUS_PER_TASK:-1}"
