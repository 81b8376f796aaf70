#!/bin/sh
# The image's commands, as in `docker run gpt_dist train …`. Any other command is run unchanged.
set -eu

command="${1:-help}"
[ $# -gt 0 ] && shift

case "$command" in
  train) exec local.sh "$@" ;;
  evaluate)
    # NPROC_PER_NODE is the number of ranks on this machine. local.sh reads it too.
    if [ -n "${NPROC_PER_NODE:-}" ]; then
      exec torchrun --standalone --nproc_per_node="$NPROC_PER_NODE" -m "gpt_dist.$command" "$@"
    fi
    exec python -m "gpt_dist.$command" "$@"
    ;;
  prepare | generate | export | import_hf | plot) exec python -m "gpt_dist.$command" "$@" ;;
  serve) exec python -m serve "$@" ;;
  client | bench | playground) exec python -m "serve.$command" "$@" ;;
  tensorboard) exec tensorboard --bind_all "$@" ;;
  help | --help | -h)
    echo "usage: docker run gpt_dist COMMAND [ARGUMENTS]"
    echo
    echo "commands: prepare train generate evaluate export import_hf plot"
    echo "          serve client bench playground tensorboard"
    echo "Each has --help. Data and runs are in /work: mount a directory there."
    echo "NPROC_PER_NODE=N sets the ranks of train and evaluate (train: default one per GPU)."
    ;;
  *) exec "$command" "$@" ;;
esac
