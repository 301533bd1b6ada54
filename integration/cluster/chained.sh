#!/usr/bin/env bash
# chained.sh: Strata behind another CNI (Debian's ptp), on a cluster of its own (not beside one that runs). Pods that run before Strata
# comes are governed without a restart; after Strata's removal the other CNI goes on alone. No request of theirs may fail.
set -euo pipefail
export CNI=ptp
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
# shellcheck source=checks.sh
. "$here/checks.sh"
"$here/build.sh"
"$here/up.sh"
"$here/images.sh"
"$here/istio.sh" --wait

say "pods that run before Strata"
# sandbox NAMESPACE PAIR...: a pod NAME on a node for each NAME:NODE.
sandbox chained server:node-b client:node-a neighbour:node-b
sandbox stranger client:node-a
# can CLIENT-NAMESPACE [HOST]: whether the namespace's client is answered by the server.
can() { timeout 20 kubectl -n "$1" exec client -- strata-echo call "http://${2:-$server}:8080/" --new-connection --timeout 3s > "$run/can.json" && answered 1 "$run/can.json"; }
cannot() { ! can "$@"; }
server=$(kubectl -n chained get pod server -o 'jsonpath={.status.podIP}')
check "the other CNI connects them" can chained

say "Strata comes"
install() { helm_quiet install strata "$chart" -n istio-system -f "$here/values.yaml" -f "$chart/profiles/chained-istiod.yaml" --wait --timeout 180s; }
traffic_during "helm install" chained "$server" install
for n in $NODES; do check "node-$n: the agent knows every pod that runs" taken_over "$n"; done
kubectl -n chained expose pod server --port 8080 > /dev/null
check "services are served to pods that run" eventually can chained server.chained.svc.cluster.local

kubectl -n chained apply -f - > /dev/null <<'YAML'
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: own}
spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}
YAML
check "NetworkPolicy keeps strangers out" eventually cannot stranger
check "NetworkPolicy lets its own in" can chained

say "into the mesh, without a restart"
kubectl -n chained delete networkpolicy own > /dev/null
kubectl label namespace chained istio.io/dataplane-mode=ambient > /dev/null
captured() { [ "$(kubectl -n chained get pods -o 'jsonpath={range .items[*]}{.metadata.annotations.ambient\.istio\.io/redirection}{"\n"}{end}' | grep -c enabled)" = 3 ]; }
check "pods say that they are captured" eventually captured
kubectl -n chained apply -f - > /dev/null <<'YAML'
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict}
spec: {mtls: {mode: STRICT}}
YAML
check "STRICT: plaintext is refused" eventually cannot stranger
check "STRICT: mTLS between nodes" can chained
# A pod that starts now is wired by both plugins.
sandbox chained later:node-a
later=$(kubectl -n chained get pod later -o 'jsonpath={.status.podIP}')
check "a new pod is in the mesh" can chained "$later"
check "and only there" cannot stranger "$later"
kubectl -n chained delete pod later --wait --timeout=60s > /dev/null
check "a pod ends as it should" test $? = 0

say "Strata goes"
kubectl -n chained delete peerauthentication strict > /dev/null
uninstall() { helm_quiet uninstall strata -n istio-system --wait --timeout 120s; agents_gone; }
traffic_during "helm uninstall" stranger "$server" uninstall
left_nothing
check "the other CNI connects pods that ran" can chained
sandbox chained last:node-b
last=$(kubectl -n chained get pod last -o 'jsonpath={.status.podIP}')
check "and new ones" can chained "$last"
exit $failures
