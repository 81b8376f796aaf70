#!/usr/bin/env bash
# Build the Dockerfile and use the image, without Docker: with Debian's buildah (chroot isolation, vfs
# storage) and a base image made by debootstrap. `make image-check` runs this.
#
# The build uses the host's pip settings (index, certificates, local wheels). All files are under
# .cache/image; delete it to start over.
set -euo pipefail
cd "$(dirname "$0")/../.."

missing=()
[ "$(id -u)" = 0 ] || missing+=("root")
for tool in buildah debootstrap; do
  command -v "$tool" > /dev/null || missing+=("$tool (apt-get install $tool)")
done
if [ ${#missing[@]} -gt 0 ]; then
  printf -v list ', %s' "${missing[@]}"
  echo "image-check: cannot run, missing: ${list:2}"
  exit "${CI:+1}"
fi

cache="$PWD/.cache/image"
mkdir -p "$cache/tmp"
export TMPDIR="$cache/tmp" BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
buildah() { command buildah --root "$cache/storage" --runroot "$cache/run" "$@"; }

if [ ! -e "$cache/base.done" ]; then
  echo "image-check: making a base system with debootstrap"
  rm -rf "$cache/base"
  debootstrap --variant=minbase --include=ca-certificates,g++,python3-dev,python3-venv \
    bookworm "$cache/base" > "$cache/debootstrap.log" ||
    { tail -n 3 "$cache/debootstrap.log" >&2; exit 1; }
  rm -rf "$cache/base/var/cache/apt/archives" "$cache/base/var/lib/apt/lists"
  touch "$cache/base.done"
fi
if ! buildah images --format '{{.Name}}' | grep -q gpt_dist-base; then
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$cache/base" / > /dev/null
  buildah commit --quiet --rm "$container" gpt_dist-base > /dev/null
fi

# pip needs its settings and every local path that they name.
python=.venv/bin/python
[ -x "$python" ] || python=python3
mapfile -t volumes < <("$python" - "$cache/pip.conf" << 'PYTHON'
import re, subprocess, sys
from pathlib import Path

settings = {}
listing = subprocess.run(
    [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
).stdout
for line in listing.splitlines():
    key, _, value = line.partition("=")
    settings[key.rpartition(".")[2]] = value.strip("'\"").replace("\\n", " ")
Path(sys.argv[1]).write_text(
    "[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())
)
local = re.findall(r"(?:(file://)|(?<![\w:./]))(/[^\s'\"]+)", " ".join(settings.values()))
# The pages of a local index link to files next to it, so mount its parent directory.
paths = [str(Path(path).parent) if index else path for index, path in local]
print("--volume", f"{sys.argv[1]}:/etc/pip.conf:ro", sep="\n")
for path in dict.fromkeys(paths):
    if Path(path).exists():
        print("--volume", f"{path}:{path}:ro", sep="\n")
PYTHON
)

echo "image-check: building"
buildah bud --quiet --format docker --build-arg BASE_IMAGE=localhost/gpt_dist-base \
  "${volumes[@]}" --tag gpt_dist . > "$cache/build.log" 2>&1 ||
  { tail -n 20 "$cache/build.log" >&2; exit 1; }

container=$(buildah from gpt_dist)
trap 'buildah rm "$container" > /dev/null' EXIT
inside() {
  # torchrun resolves the host name, which a chroot cannot.
  buildah run --hostname localhost --volume /etc/hosts:/etc/hosts:ro "$container" -- \
    entrypoint.sh "$@"
}

echo "image-check: user and configuration"
[ "$(inside id -un)" = gpt ]
buildah inspect --type image gpt_dist > "$cache/inspect.json"
"$python" - "$cache/inspect.json" << 'PYTHON'
import json, sys
config = json.load(open(sys.argv[1]))["Docker"]["config"]
assert config["User"] == "gpt", config["User"]
assert config["Healthcheck"]["Test"] == ["CMD", "health.sh"], config["Healthcheck"]
assert config["Entrypoint"] == ["entrypoint.sh"], config["Entrypoint"]
PYTHON

echo "image-check: prepare, train 2 steps, serve, generate"
inside prepare shakespeare --tokenizer char --out data/shakespeare-char
inside train --config shakespeare-char-cpu --data.path data/shakespeare-char --out_dir run \
  --train.steps 2 --optim.warmup_steps 1 --train.eval_tokens 4096
# Single quotes, because the shell in the container expands the variables.
# shellcheck disable=SC2016
inside sh -euc '
  entrypoint.sh serve --checkpoint run --host 127.0.0.1 --port 0 > serve.log &
  server=$!
  until grep ^ready: serve.log; do kill -0 $server; sleep 0.2; done
  target=$(sed -n "s/^ready: \([0-9.:]*\).*/\1/p" serve.log)
  entrypoint.sh client health --target "$target"
  entrypoint.sh client generate "ROMEO:" --stream --max-new-tokens 16 --target "$target"
  kill $server
  wait $server
'
echo "image-check: passed"
