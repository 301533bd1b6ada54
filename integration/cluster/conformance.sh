#!/usr/bin/env bash
# conformance.sh [FOCUS]: Kubernetes' own network tests (e2e, [sig-network]) on the running cluster: all of conformance and NetworkPolicy, or
# those whose names match the regular expression FOCUS. 20 minutes on 2 cores. Not run: SCTP, which Strata does not balance; tests
# that want the cluster for themselves, or a cloud.
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
alive "$run/apiserver.pid" || die "no cluster runs: make cluster"
"$here/build.sh" e2e
"$here/images.sh" e2e
say "Kubernetes $KUBERNETES_VERSION: network tests"
log=$run/conformance.log
status=0
"$cluster/bin/e2e.test" -kubeconfig "$KUBECONFIG" -num-nodes "$(wc -w <<< "$NODES")" -ginkgo.v -ginkgo.no-color -ginkgo.timeout 60m \
  -ginkgo.focus "${1:-sig-network.*(Conformance|Netpol)}" -ginkgo.skip 'SCTP|Serial|Disruptive|Feature:LoadBalancer' > "$log" 2>&1 || status=$?
awk '/^• \[FAILED\]/ { getline; print "    FAILED: " $0 }' "$log"
grep -E '^(PASS|FAIL|SUCCESS)!? --|^Ran [0-9]+ of' "$log" | sed 's/^/    /' || tail -3 "$log"
note "the whole of it: $log"
exit $status
