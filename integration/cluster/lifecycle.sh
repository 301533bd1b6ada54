#!/usr/bin/env bash
# lifecycle.sh: Strata is upgraded, rolled back, removed and installed again on the running cluster, as an administrator does it with
# Helm, while a pod outside the mesh asks another on the other node fifty times a second. No request may fail; after the removal
# nothing of Strata may be left on the nodes but the devices and routes of the pods that still run; installed again it takes them over.
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
# shellcheck source=checks.sh
. "$here/checks.sh"

kubectl delete namespace lifecycle --ignore-not-found --timeout=120s > /dev/null
sandbox lifecycle server:node-b client:node-a
server=$(kubectl -n lifecycle get pod server -o 'jsonpath={.status.podIP}')
under_traffic() { traffic_during "$1" lifecycle "$server" "${@:2}"; }

upgrade() { helm_quiet upgrade strata "$chart" -n istio-system -f "$here/values.yaml" --set log.level=debug --wait --timeout 180s; }
rollback() { helm_quiet rollback strata -n istio-system --wait --timeout 180s; }
uninstall() { helm_quiet uninstall strata -n istio-system --wait --timeout 120s; agents_gone; }
install() {
  helm_quiet install strata "$chart" -n istio-system -f "$here/values.yaml" --wait --timeout 180s
  kubectl wait --for=condition=Ready node --all --timeout=120s > /dev/null
}

say "upgrade"
under_traffic "helm upgrade" upgrade
say "rollback"
under_traffic "helm rollback" rollback
say "uninstall"
under_traffic "helm uninstall" uninstall
left_nothing
say "installed again, over the pods that ran on"
under_traffic "helm install" install
for n in $NODES; do check "node-$n: the agent knows every pod that runs" taken_over "$n"; done
# A new pod gets an address of its own, and names resolve (CoreDNS ran through it all).
sandbox lifecycle fresh:node-a
alone() { [ "$(kubectl get pods -A -o 'jsonpath={range .items[*]}{.status.podIP}{"\n"}{end}' | grep -cFx "$1")" = 1 ]; }
check "a new pod's address is its own" alone "$(kubectl -n lifecycle get pod fresh -o 'jsonpath={.status.podIP}')"
resolves() { timeout 30 kubectl -n lifecycle exec fresh -- strata-echo call "http://istiod.istio-system.svc.cluster.local:15014/version" --timeout 5s > /dev/null; }
check "names resolve and services answer" resolves
kubectl delete namespace lifecycle --wait=false > /dev/null
exit $failures
