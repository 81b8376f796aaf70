#!/usr/bin/env bash
# Make a directory of wheels for gpu_suite.sh: what a rented machine with PyTorch, Triton,
# transformers, tensorboard, grpcio and rich lacks, DeepSpeed and our own package included.
# Everything is for Linux on x86-64; together it is below 40 MB.
#
#   benchmarks/gpu_wheels.sh wheels                       # for Python 3.12
#   PYTHON_VERSION=3.11 benchmarks/gpu_wheels.sh wheels
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: benchmarks/gpu_wheels.sh DIRECTORY" >&2; exit 2; }
root="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-python3}"
mkdir -p "$1"
wheels="$(cd "$1" && pwd)"
quiet=(--quiet --disable-pip-version-check --no-deps)

# Ours, and DeepSpeed without operations that would be compiled: they need what is installed here.
"$python" -m pip wheel "${quiet[@]}" --no-build-isolation --wheel-dir "$wheels" "$root"
DS_BUILD_OPS=0 "$python" -m pip wheel "${quiet[@]}" --no-build-isolation --wheel-dir "$wheels" \
  --constraint "$root/constraints.txt" deepspeed

"$python" -m pip download "${quiet[@]}" --dest "$wheels" --only-binary :all: \
  --constraint "$root/constraints.txt" --python-version "${PYTHON_VERSION:-3.12}" \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  pydantic pydantic_core annotated-types typing-inspection \
  grpcio grpcio-health-checking grpcio-reflection grpcio-status googleapis-common-protos protobuf \
  prometheus_client starlette orjson uvicorn anyio h11 click \
  hjson msgpack ninja py-cpuinfo psutil einops tqdm \
  matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six \
  pytest pluggy iniconfig hypothesis sortedcontainers filelock
rm -f "$wheels"/torch-* "$wheels"/triton-* "$wheels"/nvidia*

size="$(du -sm "$wheels" | cut -f1)"
echo "$wheels: $(find "$wheels" -name '*.whl' | wc -l) wheels, $size MB"
[ "$size" -lt 40 ] || { echo "error: 40 MB is the limit" >&2; exit 1; }
