#!/usr/bin/env bash
# Install what the tests need beside Python: Slurm, network namespaces, Node.js, a browser, a C++
# compiler, Docker Compose, kubectl and HAProxy. What is already there stays as it is.
set -euo pipefail
wanted=()
need() { command -v "$1" >/dev/null 2>&1 || wanted+=("$2"); }
PATH="$PATH:/usr/sbin:/sbin"
need sbatch slurm-wlm
need munged munge
need ip iproute2
need ps procps
need node nodejs
need npm npm
need chromium chromium
need g++ g++
need docker-compose docker-compose
need kubectl kubernetes-client
need haproxy haproxy
if [ ${#wanted[@]} -gt 0 ]; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
fi
