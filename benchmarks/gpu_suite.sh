#!/usr/bin/env bash
# Run the measurements of one GPU: two commands of under nine minutes each. Each part prints figures
# as it goes and writes its record to OUT (default: benchmarks/results/gpu) at once; a part that
# fails stops no other.
#
#   benchmarks/gpu_suite.sh correctness
#   benchmarks/gpu_suite.sh speed
#   WHEELS=wheels benchmarks/gpu_suite.sh correctness   # a bare machine, see gpu_wheels.sh
#   DEVICE=cpu benchmarks/gpu_suite.sh speed            # without a GPU: tests this script
#
# WHEELS is a directory of wheels, installed to .gpu-site once. PARTS names some of the parts.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
command="${1:-}"
[ "$command" = correctness ] || [ "$command" = speed ] ||
  { echo "usage: benchmarks/gpu_suite.sh correctness|speed" >&2; exit 2; }
OUT="${OUT:-benchmarks/results/gpu}"
DEVICE="${DEVICE:-cuda}"
mkdir -p "$OUT"
python="${PYTHON:-python3}"
if [ -n "${WHEELS:-}" ]; then
  # Not a virtual environment: python3 may be one itself, and then another finds no torch.
  site="${SITE:-$PWD/.gpu-site}"
  [ -d "$site" ] || "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
    --target "$site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
fi

begun=$SECONDS
failed=()
part() { # SECONDS NAME COMMAND...
  local limit="$1" name="$2"
  shift 2
  [ -z "${PARTS:-}" ] || [[ " $PARTS " == *" $name "* ]] || return 0
  echo "== $name (at $((SECONDS - begun)) s)"
  timeout "$((limit * patience))" "$@" 2>&1 | tee "$OUT/$name.log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || { failed+=("$name"); echo "failed: $name"; }
}
gpu() { # SECONDS NAME FLAGS...
  local limit="$1" name="$2"
  shift 2
  part "$limit" "$name" "$python" benchmarks/gpu.py "$name" --device "$DEVICE" "${small[@]}" "$@" \
    --json "$OUT/gpu-$name.json"
}

"$python" -c 'import torch; print("torch", torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
patience=1
small=()
batches=(1 8 64 256)
shape=124m
micro=(16 32)
steps=50
if [ "$DEVICE" = cpu ]; then
  patience=6 # some CPUs emulate bf16
  small=(--shape tiny --context 192)
  batches=(1 4)
  shape=tiny
  micro=(2)
  steps=14
fi
if [ "$command" = correctness ]; then
  gpu 60 operations
  gpu 60 greedy
  gpu 200 losses --steps "$steps"
  gpu 120 resume
  gpu 150 strategies
  part 120 tests "$python" -m pytest -q -p no:cacheprovider tests/gpu tests/inference/test_cuda_backend.py
else
  gpu 120 decoding --batches "${batches[@]}"
  part 260 training "$python" benchmarks/training.py --device "$DEVICE" --shape "$shape" \
    ${small[@]+--context 192} --accumulate 4 --micro-batch "${micro[@]}" \
    --trainers gpt_dist transformers --kernels --json "$OUT/gpu-training.json"
  gpu 90 server
fi

echo "== $command done in $((SECONDS - begun)) s, records in $OUT"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
