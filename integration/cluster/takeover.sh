#!/usr/bin/env bash
# takeover.sh: on a cluster with the embedded control plane (embedded.sh, KEEP=1 or `CONTROL=embedded make cluster`) an istiod takes over,
# and strata-control takes over from that, as docs/upgrade.md says it, while a meshed pod calls a service through its waypoint. No
# request may fail, the root stays, and the waypoint is made anew by whoever is in charge.
set -euo pipefail
export CONTROL=embedded
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
# shellcheck source=checks.sh
. "$here/checks.sh"

kubectl delete namespace takeover --ignore-not-found --timeout=120s > /dev/null
meshed takeover server:node-b client:node-a
govern takeover
check "requests are governed" eventually governed takeover
root() { kubectl -n takeover get configmap istio-ca-root-cert -o 'jsonpath={.data.root-cert\.pem}'; }
before=$(root)
same_root() { [ "$(root)" = "$before" ]; }
# upgrade PROFILE [ARGS...]: returns when the node proxies hear from the new control plane.
upgrade() {
  helm_quiet upgrade strata "$chart" -n istio-system -f "$here/values.yaml" --set "profile.controlPlane=$1" --wait --timeout 180s "${@:2}"
  kubectl -n istio-system rollout status daemonset/ztunnel --timeout=180s > /dev/null
}
istiod() {
  helm_quiet upgrade --install istiod "$cluster/istio/manifests/charts/istio-control/istio-discovery" -n istio-system \
    --set profile=ambient -f "$here/config/istiod.yaml" --wait --timeout 120s "$@"
}
waypoint_rolled() { kubectl -n takeover rollout status deployment/waypoint --timeout=120s > /dev/null; }
# address: where the waypoint's template says the control plane is.
address() { kubectl -n takeover get deployment waypoint -o 'jsonpath={.spec.template.spec.containers[0].env}'; }
led_by() { [[ "$(address)" == *"$1."* && "$(address)" != *"$2."* ]]; }
# First the one in charge rests: both would write the same objects, each in its own way. Then the node proxies change over, and only
# then the waypoints, or node proxies would not hear where a waypoint has gone.
to_istiod() {
  kubectl -n istio-system scale deployment/strata-control --replicas=0 > /dev/null
  kubectl -n istio-system wait pod -l app.kubernetes.io/name=strata-control --for=delete --timeout=60s > /dev/null
  # istiod's chart brings one of its own, and takes over none.
  kubectl -n istio-system delete configmap istio --ignore-not-found > /dev/null
  istiod --set-string env.PILOT_ENABLE_GATEWAY_API_DEPLOYMENT_CONTROLLER=false
  upgrade istiod
  istiod
  check "the waypoint is istiod's" eventually led_by istiod strata-control
  check "and is ready" waypoint_rolled
}
to_strata() {
  kubectl -n istio-system scale deployment/istiod --replicas=0 > /dev/null
  kubectl -n istio-system wait pod -l app=istiod --for=delete --timeout=60s > /dev/null
  upgrade embedded --set control.deployWaypoints=false
  upgrade embedded
  check "the waypoint is strata-control's" eventually led_by strata-control istiod
  check "and is ready" waypoint_rolled
  helm_quiet uninstall istiod -n istio-system --wait --timeout 60s
}
say "an istiod takes over"
traffic_during "from strata-control to istiod" takeover server.takeover.svc.cluster.local to_istiod
check "the root is the same" same_root
sandbox takeover later:node-b
check "requests are governed as before" eventually governed takeover
say "and strata-control takes over again"
traffic_during "from istiod to strata-control" takeover server.takeover.svc.cluster.local to_strata
check "the root is the same" same_root
check "requests are governed as before" eventually governed takeover
kubectl delete namespace takeover --wait=false > /dev/null
exit $failures
