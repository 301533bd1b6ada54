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
server=$(pod_ip chained server)
check "the other CNI connects them" can chained "$server"

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
check "NetworkPolicy keeps strangers out" eventually cannot stranger "$server"
check "NetworkPolicy lets its own in" can chained "$server"

say "into the mesh, without a restart"
kubectl -n chained delete networkpolicy own > /dev/null
into_the_mesh chained "$server"

say "Strata goes"
kubectl -n chained delete peerauthentication strict > /dev/null
uninstall() { helm_quiet uninstall strata -n istio-system --wait --timeout 120s; agents_gone; }
traffic_during "helm uninstall" stranger "$server" uninstall
left_nothing
check "the other CNI connects pods that ran" can chained "$server"
sandbox chained last:node-b
check "and new ones" can chained "$(pod_ip chained last)"
exit $failures
