#!/usr/bin/env bash
# All of gpt_dist in a few minutes on two CPU cores: prepare the bundled Shakespeare, train on two
# ranks, sample, serve the model, call the server. A second run reuses the results of the first.
#
#   make demo                   # or, with the environment active: bash launch/demo.sh
set -euo pipefail
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

run=${OUT_DIR:-runs/demo}
data=${DATA_DIR:-data/shakespeare-char}

say "prepare: the bundled plays become token shards in $data"
python -m gpt_dist.prepare shakespeare --tokenizer char --out "$data"

say "train: 400 steps on 2 ranks"
# OMP_NUM_THREADS=1 only keeps torchrun from warning; the trainer sets its threads itself.
OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 -m gpt_dist.train --config demo \
  --data.path "$data" --out_dir "$run"

say "generate: a sample"
python -m gpt_dist.generate --checkpoint "$run" --prompt $'KING HENRY.\n' --max-new-tokens 300

say "serve: start the server on a free port, make one streamed call, stop"
log=$(mktemp)
python -m serve --checkpoint "$run" --port 0 >"$log" 2>&1 &
server=$!
stop() {
  kill "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
  rm -f "$log"
}
trap stop EXIT
port=
for _ in $(seq 300); do
  port=$(sed -n 's/.*ready.*127\.0\.0\.1:\([0-9][0-9]*\).*/\1/p' "$log" | head -n 1)
  [ -n "$port" ] && break
  kill -0 "$server" 2>/dev/null || break
  sleep 0.1
done
if [ -z "$port" ]; then
  cat "$log" >&2
  echo "error: the server did not become ready" >&2
  exit 1
fi
python -m serve.client generate "First, my love" --target "127.0.0.1:$port" --stream \
  --max-new-tokens 120 --seed 1

say "done"
echo "run      $run (metrics.jsonl, samples.txt, checkpoints, tensorboard)"
echo "picture  $run/loss.png"
echo "again    python -m gpt_dist.generate --checkpoint $run --prompt 'Once'"
