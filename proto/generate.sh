#!/usr/bin/env bash
# Generate the Python stubs from proto/ into DIRECTORY (default: the repository's root).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
python=${PYTHON:-python}
# No gRPC stubs for the inference protocol: the server registers it by name, and clients have theirs.
"$python" -m grpc_tools.protoc -I proto --python_out="$out" --pyi_out="$out" \
    proto/gpt_dist/v1/*.proto proto/serve/inference/*.proto
"$python" -m grpc_tools.protoc -I proto --grpc_python_out="$out" \
    proto/gpt_dist/v1/*_service.proto
