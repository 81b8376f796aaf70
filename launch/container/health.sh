#!/bin/sh
# A server is healthy if it reports SERVING; any other command, as long as it runs.
case "$(tr '\0' ' ' < /proc/1/cmdline)" in
  *"-m serve "*)
    exec python -m serve.client health --target "localhost:${GPT_DIST_SERVE_PORT:-50051}" --timeout 4
    ;;
esac
