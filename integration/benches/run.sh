#!/usr/bin/env bash
# Runs every benchmark with the binaries `make bench` built and prints their tables; several minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
echo "HTTP/1.1, one worker each, a header route and a 90/10 split to two upstreams:"
target/bench-lto/strata-bench http
echo "HTTP through a waypoint, one worker each, from HBONE to plaintext and to HBONE:"
target/bench-lto/strata-bench waypoint
echo "Between two pods, everything on one CPU:"
taskset -c 0 target/bench-lto/strata-bench l4
echo "The control plane's translation:"
target/bench-lto/strata-bench control
