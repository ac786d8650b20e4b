# What the scripts of this folder share; a site's own settings are in env.sh.
# shellcheck shell=bash
#
# Each script is run twice. You run it on a login node: it checks its input, then submits itself with the account and
# partition of env.sh. SLURM runs it on a node: it checks again and does the work. `sbatch SCRIPT` goes straight to the
# second part.

# shellcheck source-path=SCRIPTDIR source=env.sh
source "${BASH_SOURCE[0]%/*}/env.sh"
# Jobs that are submitted by this one, and the copy of the script that SLURM runs, find the folder by it.
COMIR_SLURM_DIR=$(cd "${BASH_SOURCE[0]%/*}" && pwd)
export COMIR_SLURM_DIR

die() { printf '%s\n' "$*" >&2; exit 2; }

# slurmd runs a copy of the batch script under this name.
in_job() { [ "${0##*/}" = slurm_script ]; }

# split_options WORD...: puts leading --option=value words, which are sbatch's, into $options, the rest into $arguments.
# shellcheck disable=SC2034  # the scripts use $arguments
split_options() {
  options=() arguments=()
  while [ $# -gt 0 ] && [[ $1 == -* ]]; do options+=("$1"); shift; done
  arguments=("$@")
  if in_job && [ ${#options[@]} -gt 0 ]; then die "${options[0]}: options of sbatch come before the script's name"; fi
}

# Whether comir-hpc can be started at all, before a job waits for hours to find out.
check_tools() {
  local module
  for module in $COMIR_MODULES; do
    set +u  # module's own functions use unset variables
    module load "$module" || die "module $module does not load; edit COMIR_MODULES in $COMIR_SLURM_DIR/env.sh"
    set -u
  done
  if [ -n "$COMIR_IMAGE" ]; then
    [ -r "$COMIR_IMAGE" ] ||
      die "image $COMIR_IMAGE is not readable; build it (containers/README.md) or edit COMIR_IMAGE in $COMIR_SLURM_DIR/env.sh"
    command -v apptainer >/dev/null ||
      die "apptainer is not on PATH; add its module to COMIR_MODULES in $COMIR_SLURM_DIR/env.sh"
  else
    command -v comir-hpc >/dev/null ||
      die "comir-hpc is not on PATH; activate its environment or set COMIR_IMAGE in $COMIR_SLURM_DIR/env.sh"
  fi
}

# submit PARTITION WORD...: sbatch with the site's account and partition; prints the job's number.
submit() {
  local partition=$1 site=(); shift
  [ -z "$COMIR_ACCOUNT" ] || site+=("--account=$COMIR_ACCOUNT")
  [ -z "$partition" ] || site+=("--partition=$partition")
  command -v sbatch >/dev/null || die "sbatch is not on PATH: run this on a login node of the cluster"
  local answer
  answer=$(sbatch --parsable "${site[@]}" "$@") ||
    die "sbatch refused the job (its reason is above) with account '${COMIR_ACCOUNT:-none}' and partition '${partition:-default}'; they are COMIR_ACCOUNT, COMIR_PARTITION and COMIR_CPU_PARTITION in $COMIR_SLURM_DIR/env.sh"
  echo "${answer%%;*}"
}

# submit_unless_in_job PARTITION ARGUMENT...: on a login node, submit this script and end here.
submit_unless_in_job() {
  local partition=$1 number; shift
  if in_job; then return; fi
  number=$(submit "$partition" "${options[@]}" "$COMIR_SLURM_DIR/${0##*/}" "$@")
  echo "job $number"
  exit 0
}

# comir ARG...: comir-hpc, one process a task of the job, inside the image when there is one. A job whose processes
# stopped on request (exit code 85) is put back into the queue from here: containers have no scontrol.
comir() {
  local command=(comir-hpc) flags status=0 step
  if [ -n "$COMIR_IMAGE" ]; then
    read -ra flags <<< "$COMIR_GPU_FLAG $COMIR_EXEC_FLAGS"
    command=(env "PATH=$COMIR_SLURM_DIR/fuse:$PATH" apptainer exec "${flags[@]}" ${COMIR_BINDS:+--bind "$COMIR_BINDS"} "$COMIR_IMAGE" comir-hpc)
  fi
  # Since SLURM 22.05 srun does not take this from sbatch; a task would be bound to one core.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  # What another launcher, or a training in the shell or notebook that submitted the job, left behind. sbatch hands it on, and
  # each task would take itself for the only one.
  if [ -n "${WORLD_SIZE:-}" ]; then unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT; fi
  # Not --kill-on-bad-exit: processes that stop on request do not all exit in the same moment, and the last would be
  # killed. With --wait, a process that died still takes the others with it, after a minute.
  srun --wait=60 "${command[@]}" "$@" &
  step=$!
  # The scheduler's signals reach the processes by themselves; this shell must outlive them.
  trap : USR2 TERM
  while kill -0 "$step" 2>/dev/null; do wait "$step" || :; done
  wait "$step" || status=$?
  if [ "$status" -eq 85 ]; then requeue; fi
  return "$status"
}

requeue() {
  # The bare number of one task of an array may be that of the whole array.
  local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job=${job:-$SLURM_JOB_ID}
  [ "${SLURM_RESTART_COUNT:-0}" -lt "$COMIR_MAX_REQUEUES" ] ||
    die "stopped on request after $SLURM_RESTART_COUNT requeues, which is COMIR_MAX_REQUEUES; is --time long enough for the start, some steps and the notice given by --signal?"
  # A preempted job is requeued by SLURM itself.
  if [ "$(squeue -h -j "$job" -o %T 2>/dev/null)" = RUNNING ]; then
    echo "stopped on request; requeueing job $job"
    scontrol requeue "$job" || die "job $job cannot be requeued; submit the same command again: it goes on where it was"
  fi
  exit 0
}
