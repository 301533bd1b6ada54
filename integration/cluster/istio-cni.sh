#!/usr/bin/env bash
# istio-cni.sh: the application layer alone, in a cluster of Istio's ambient mode (not beside one that runs): another CNI (Debian's ptp)
# and kube-proxy carry packets, Istio's own charts bring istiod, istio-cni and the DaemonSet ztunnel, the last with our image. Pods that
# run join without a restart, a waypoint governs, and our proxy and istio-cni may be replaced at any time: no request fails.
set -euo pipefail
export CNI=ptp SERVICES=kube-proxy
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
# shellcheck source=checks.sh
. "$here/checks.sh"
"$here/build.sh"
"$here/up.sh"
"$here/images.sh"
"$here/istio.sh" --wait

say "pods that run before the mesh"
sandbox ambient server:node-b client:node-a neighbour:node-b
sandbox stranger client:node-a
kubectl -n ambient expose pod server --port 8080 > /dev/null
server=$(pod_ip ambient server) service=server.ambient.svc.cluster.local
check "the other CNI connects them" can ambient "$server"
check "kube-proxy serves them" eventually can ambient $service

say "istio-cni, and our proxy in ztunnel's place"
istio_chart() { helm_quiet upgrade --install "$1" "$cluster/istio/manifests/charts/$1" -n istio-system --set profile=ambient --set "image=$2" --wait --timeout 120s; }
install() { istio_chart istio-cni ks.local/install-cni:1; istio_chart ztunnel strata.io/proxy:dev; }
traffic_during "helm install" ambient "$server" install

say "into the mesh, without a restart"
into_the_mesh ambient "$server"
waypoint ambient
check "the waypoint is Programmed" kubectl -n ambient wait gateway/waypoint --for=condition=Programmed --timeout=60s
govern ambient
check "requests are governed" eventually governed ambient
known() { istioctl ztunnel-config workloads | grep -q '^ambient  *server .*HBONE'; }
check "istioctl knows our proxies as ztunnel" known
# The kubelet comes in plaintext from the node; istio-cni sees to it.
kubectl -n ambient apply -f - > /dev/null <<'YAML'
apiVersion: v1
kind: Pod
metadata: {name: probed}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: "strata.io/echo:dev", args: [serve, --http, "8080"], readinessProbe: {httpGet: {port: 8080, path: /}, periodSeconds: 1}}]
YAML
check "probes reach a pod under STRICT" kubectl -n ambient wait pod/probed --for=condition=Ready --timeout=60s

say "replaced, one and the other"
rollout() { kubectl -n istio-system rollout restart "$1" > /dev/null; kubectl -n istio-system rollout status "$1" --timeout=120s > /dev/null; }
traffic_during "rollout of our proxy" ambient $service rollout daemonset/ztunnel
traffic_during "rollout of istio-cni" ambient $service rollout daemonset/istio-cni-node
check "requests are governed as before" governed ambient

say "out of the mesh, and all of it removed"
kubectl -n ambient delete peerauthentication strict > /dev/null
kubectl label namespace ambient istio.io/use-waypoint- > /dev/null
kubectl label namespace ambient istio.io/dataplane-mode- > /dev/null
check "no pod says it is captured" eventually unmarked
check "plaintext is taken again" can stranger "$server"
uninstall() { helm_quiet uninstall ztunnel istio-cni -n istio-system --wait --timeout 120s; }
traffic_during "helm uninstall" ambient $service uninstall
sandbox ambient last:node-b
check "new pods start and are reached" can stranger "$(pod_ip ambient last)"
exit $failures
