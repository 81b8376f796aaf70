#!/usr/bin/env bash
# Install what the cluster tests need and this machine lacks: Slurm, munge, iproute2, procps (Debian,
# Ubuntu; as root). The tests start their own daemons and networks and take them down again:
#
#   tests/cluster/setup.sh && python -m pytest -m cluster

set -euo pipefail

PATH="$PATH:/usr/sbin:/sbin"
packages=()
for pair in slurmctld:slurm-wlm munged:munge ip:iproute2 ps:procps; do
    command -v "${pair%%:*}" >/dev/null || packages+=("${pair#*:}")
done
if ((${#packages[@]} == 0)); then
    echo "cluster tests: everything is installed"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "error: install ${packages[*]} with this system's package manager" >&2
    exit 1
fi
if ((EUID != 0)); then
    echo "error: not root; run: sudo apt-get install ${packages[*]}" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
echo "cluster tests: installed ${packages[*]}"
