#!/usr/bin/env bash
# Runs every benchmark with the binaries `make bench` built and prints their tables.
set -euo pipefail
cd "$(dirname "$0")/../.."
target/bench-lto/strata-bench http "$@"
