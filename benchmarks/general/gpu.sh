#!/usr/bin/env bash
# Trains the general model on the GPUs of this machine, longer and with larger patches than two CPU cores allow, and
# runs the comparison with it. Stopped and started again, it goes on.
#
#   benchmarks/general/gpu.sh RUN [DATA]
#
# RUN is the folder of the training. DATA holds the volumes of the development families (benchmarks/general/run.py).
set -euo pipefail
cd "$(dirname "$0")/../.."
run=${1:?"usage: benchmarks/general/gpu.sh RUN [DATA]"}
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || { echo "no GPU on this machine: nothing was done" >&2; exit 1; }
torchrun --standalone --nproc-per-node "$gpus" -m comir_hpc train configs/general.yaml --run "$run" \
  --set optimiser.steps=24000 --set "sampling.patch=[48, 48, 48]" --set sampling.pairs_per_step=$((16 * gpus)) \
  --set sampling.workers=8 --set checkpoint.every_steps=1000
if [ -n "${2:-}" ]; then
  python benchmarks/general/run.py --data "$2" --model "$run" --out benchmarks/general/gpu.csv
fi
