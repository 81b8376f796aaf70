#!/usr/bin/env bash
# Train on this machine: one rank a GPU, or NPROC_PER_NODE ranks on the CPU.
#
#   launch/local.sh                                                # gpt2-124m on all GPUs
#   launch/local.sh --config shakespeare-char --train.steps 500
#   NPROC_PER_NODE=2 launch/local.sh --config shakespeare-char-cpu --device cpu
#
# All flags go to gpt_dist.train. On Ctrl-C, SIGTERM or SIGUSR1 the run writes a checkpoint and ends;
# the same command resumes it. If a rank crashes, all ranks restart from the last checkpoint, up to
# MAX_RESTARTS times (default 3). Several runs can share the machine: --standalone picks a free port.

set -euo pipefail

if [[ -x .venv/bin/torchrun ]]; then
    PATH="$PWD/.venv/bin:$PATH"
fi
gpus=0
if command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
fi
ranks=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
if ! [[ $ranks =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NPROC_PER_NODE = $ranks: expected a whole number, 1 or more" >&2
    exit 2
fi

# Without this variable torchrun sets it to 1, which a single rank on a CPU would obey. Several ranks
# ignore it: the trainer divides the cores among them.
cores=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"

exec torchrun \
    --standalone \
    --nproc-per-node="$ranks" \
    --max-restarts="${MAX_RESTARTS:-3}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout="${SHUTDOWN_TIMEOUT:-60}" \
    -m gpt_dist.train "$@"
