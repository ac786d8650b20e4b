# The one file a site edits; every script of this folder reads it. Values given in the environment win.
# shellcheck shell=bash disable=SC2034  # job.sh uses them

: "${COMIR_ACCOUNT:=}"                 # SLURM account; empty where the site needs none
: "${COMIR_PARTITION:=}"               # partition of the GPU jobs (train, infer); empty: the site's default
: "${COMIR_CPU_PARTITION:=${COMIR_PARTITION}}"   # partition of ingest and register
: "${COMIR_IMAGE:=}"                   # Apptainer image (containers/README.md); empty: comir-hpc from PATH
: "${COMIR_BINDS:=}"                   # folders the image must see, comma-separated, e.g. /scratch,/project
: "${COMIR_MODULES:=}"                 # modules to load first, e.g. "apptainer"
: "${COMIR_GPU_FLAG=--nv}"             # how Apptainer gets at the GPUs; empty where there are none
: "${COMIR_EXEC_FLAGS:=}"              # further flags of `apptainer exec`, e.g. --userns
: "${COMIR_MAX_REQUEUES:=100}"         # a job that stopped and was requeued more often than this fails
: "${COMIR_REQUIRE:=pass}"             # poorest verdict of register.sh that is no failure: pass or warn
