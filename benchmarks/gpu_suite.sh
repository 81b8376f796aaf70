#!/usr/bin/env bash
# Run all measurements of one GPU, in under nine minutes. Prints figures as it goes and writes JSON
# records to OUT (default: benchmarks/results/gpu).
#
#   benchmarks/gpu_suite.sh                     # in an environment that has gpt_dist installed
#   WHEELS=wheels benchmarks/gpu_suite.sh       # a bare machine: torch 2.11 or newer, no network
#   DEVICE=cpu benchmarks/gpu_suite.sh          # without a GPU: tests this script on a tiny model
#
# WHEELS is a directory of wheels. Fill it on a machine with a network:
#   pip download --dest wheels -c constraints.txt . transformers && rm -f wheels/torch-* wheels/nvidia*
# PEERS is the Python interpreter of an environment with litgpt. Without it litgpt is left out and the
# record says so.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
OUT="${OUT:-benchmarks/results/gpu}"
DEVICE="${DEVICE:-cuda}"
mkdir -p "$OUT"
python="${PYTHON:-python3}"
if [ -n "${WHEELS:-}" ]; then
  "$python" -m venv --system-site-packages .gpu-venv
  python=.gpu-venv/bin/python
  "$python" -m pip install --quiet --no-index --find-links "$WHEELS" --no-deps "$WHEELS"/*.whl || exit 1
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi

begun=$SECONDS
failed=()
part() { # SECONDS NAME COMMAND...; a part that fails does not stop the others
  local limit="$1" name="$2"
  shift 2
  echo "== $name (at ${SECONDS}s)"
  timeout "$limit" "$@" || failed+=("$name")
}

"$python" -c 'import torch; print("torch", torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
gpu=(--device "$DEVICE")
small=()
[ "$DEVICE" = cpu ] && small=(--shape tiny --context 256)
part 120 losses "$python" benchmarks/gpu.py losses "${gpu[@]}" "${small[@]}" --json "$OUT/gpu-losses.json"
part 60 resume "$python" benchmarks/gpu.py resume "${gpu[@]}" "${small[@]}" --json "$OUT/gpu-resume.json"
part 30 greedy "$python" benchmarks/gpu.py greedy "${gpu[@]}" "${small[@]}" --json "$OUT/gpu-greedy.json"
part 60 decoding "$python" benchmarks/gpu.py decoding "${gpu[@]}" "${small[@]}" --json "$OUT/gpu-decoding.json"
[ "$DEVICE" = cpu ] || small=(--context 1024)
part 240 training "$python" benchmarks/training.py "${gpu[@]}" "${small[@]}" --accumulate 4 \
  ${PEERS:+--peers-python "$PEERS"} --json "$OUT/gpu-training.json" --picture "$OUT/gpu-training.png"

echo "== done in $((SECONDS - begun)) s, records in $OUT"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
