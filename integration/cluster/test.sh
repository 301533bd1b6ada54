#!/usr/bin/env bash
# test.sh: what only a real cluster can show. Brings the cluster up, has its API server read the chart, plays every scene, upgrades
# and removes Strata; the same cluster anew with another CNI and Strata behind it, with istio-cni and our proxy alone, and without istiod, which then
# takes over; and takes it away (KEEP=1 leaves it). What needs no cluster is in offline.sh.
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
finish() {
  local status=$?
  if [ $status != 0 ]; then
    kubectl get pods -A -o wide >&2 || true
    for of in app.kubernetes.io/name=strata-agent app=ztunnel app=istiod; do
      kubectl -n istio-system logs -l $of --tail=15 --prefix >&2 || true
    done
  fi
  [ -n "${KEEP:-}" ] || "$here/down.sh" --wipe
  exit $status
}
trap finish EXIT
"$here/build.sh"
"$here/cluster.sh"
say "the API server's opinion of the chart"
"$here/chart-test.sh"
say "objects from the API server, and the scenes"
cd "$repository"
cargo test --workspace --features strata-cluster/cluster-tests,compat-kubernetes/cluster-tests --test cluster -- --nocapture
cargo test --workspace --features compat-control/cluster-tests --test in_cluster
say "upgrade, rollback, uninstall"
"$here/lifecycle.sh"
"$here/down.sh" --wipe
say "behind another CNI"
"$here/chained.sh"
"$here/down.sh" --wipe
say "Istio's ambient mode with our proxy"
"$here/istio-cni.sh"
"$here/down.sh" --wipe
say "without istiod"
"$here/embedded.sh"
say "an istiod takes over, and back"
"$here/takeover.sh"
