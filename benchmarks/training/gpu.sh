#!/usr/bin/env bash
# All figures that need a GPU, in one command, from the root of a clone with the package installed:
#   benchmarks/training/gpu.sh [PYTHON]
# Patches a second and share of the peak of both engines, memory against the patch, the largest cubic patch with and
# without recomputing, and the tests marked gpu.
set -euo pipefail
python=${1:-python}
here=$(dirname "$0")
"$python" "$here/overhead.py" --device cuda --pairs 8 --side 32 --rounds 30 --out "$here/overhead_gpu.csv"
"$python" "$here/overhead.py" --device cuda --pairs 8 --side 96 --rounds 10 --out "$here/overhead_gpu_large.csv"
"$python" "$here/memory.py" --device cuda --sides 32 48 64 96 128 192 256 --out "$here/memory_gpu.csv"
"$python" -m pytest -q -m gpu
