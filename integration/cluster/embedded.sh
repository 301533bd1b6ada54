#!/usr/bin/env bash
# embedded.sh: the chart's embedded profile on a cluster of its own (not beside one that runs), without istiod: strata-control vouches by
# the API server's word, gives every namespace the root, deploys waypoints, tells in each object's status what became of it, and may be
# replaced at any time.
set -euo pipefail
export CONTROL=embedded
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
# shellcheck source=checks.sh
. "$here/checks.sh"
"$here/cluster.sh"

say "what became of objects"
meshed embedded server:node-b client:node-a
kubectl -n embedded apply -f - > /dev/null <<'YAML'
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: server}
spec:
  parentRefs: [{group: "", kind: Service, name: server, port: 8080}]
  rules:
  - {matches: [{path: {value: /moved}}], filters: [{type: RequestRedirect, requestRedirect: {hostname: elsewhere, statusCode: 302}}]}
  - {backendRefs: [{name: server, port: 8080}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: astray}
spec:
  parentRefs: [{group: "", kind: Service, name: server, port: 8080}]
  rules: [{matches: [{path: {value: /astray}}], backendRefs: [{name: nowhere, port: 80}]}]
YAML
# Somebody who is in no mesh.
sandbox embedded-outside partner:node-b
kubectl -n embedded apply -f - > /dev/null <<YAML
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: partner}
spec:
  hosts: [partner.example]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP}]
  endpoints: [{address: $(kubectl -n embedded-outside get pod partner -o 'jsonpath={.status.podIP}'), ports: {http: 8080}}]
YAML
check "the Gateway is Programmed" kubectl -n embedded wait gateway/waypoint --for=condition=Programmed --timeout=60s
# of_route NAME TYPE: status and message of a condition.
of_route() { kubectl -n embedded get httproute "$1" -o "jsonpath={range .status.parents[*].conditions[?(@.type==\"$2\")]}{.status} {.message}{end}"; }
route_says() { [[ "$(of_route "$1" "$2")" == $3 ]]; }
check "a good route is accepted" eventually route_says server Accepted 'True *'
check "a route that leads nowhere says so" eventually route_says astray ResolvedRefs 'False *nowhere*'
moved() { timeout 20 kubectl -n embedded exec "$1" -- strata-echo call http://server.embedded:8080/moved --timeout 3s | grep -q '"302": *1'; }
check "the waypoint answers for the service" eventually moved client
address() { kubectl -n embedded get serviceentry partner -o 'jsonpath={.status.addresses[0].value}'; }
given() { [[ "$(address)" == 240.240.* ]]; }
check "a ServiceEntry without an address is given one" eventually given
named() { timeout 20 kubectl -n embedded exec client -- strata-echo call http://partner.example/ --timeout 3s | grep -q '"200": *1'; }
check "and is found by its name" eventually named

say "strata-control is replaced"
root() { kubectl -n embedded get configmap istio-ca-root-cert -o 'jsonpath={.data.root-cert\.pem}'; }
before=$(root) drawn=$(address)
restart() { kubectl -n istio-system rollout restart deployment/strata-control > /dev/null; kubectl -n istio-system rollout status deployment/strata-control --timeout=60s > /dev/null; }
traffic_during "rollout of strata-control" embedded server.embedded.svc.cluster.local restart
same_root() { [ "$(root)" = "$before" ]; }
check "the root is the same" same_root
same_address() { [ "$(address)" = "$drawn" ]; }
check "the ServiceEntry's address is the same" same_address
sandbox embedded later:node-b
check "a pod that starts afterwards gets its identity" eventually moved later

say "the mesh gets a new root"
# trusted N: every identity on both nodes, and the waypoint's, knows N roots.
trusted() {
  local agent
  for agent in $(kubectl -n istio-system get pods -l app.kubernetes.io/name=strata-agent -o name); do
    kubectl -n istio-system exec "$agent" -c agent -- strata --run-dir /run/strata get proxy /config_dump
  done > "$run/certificates.json"
  kubectl -n embedded exec deployment/waypoint -- pilot-agent request GET config_dump/strata >> "$run/certificates.json"
  python3 - "$1" "$run/certificates.json" <<'PYTHON'
import json, sys
text, at, found = open(sys.argv[2]).read(), 0, []
while text[at:].strip():
    at += len(text[at:]) - len(text[at:].lstrip())
    dump, at = json.JSONDecoder().raw_decode(text, at)
    found += [len(identity["rootCerts"]) for identity in dump["certificates"]]
sys.exit(not (found and set(found) == {int(sys.argv[1])}))
PYTHON
}
signed() { [ "$(kubectl -n istio-system logs deployment/strata-control | grep -c 'signed by another CA')" -ge "$1" ]; }
new_root() {
  "$here/ca.sh" adopt
  check "the CA is the user's" eventually signed 1
  "$here/ca.sh" add
  check "both roots are trusted" wait_for 120 "both roots" trusted 2
  "$here/ca.sh" switch
  check "the next CA signs" eventually signed 3
  kubectl -n istio-system rollout restart daemonset/ztunnel > /dev/null
  kubectl -n istio-system rollout status daemonset/ztunnel --timeout=120s > /dev/null
  kubectl -n embedded rollout restart deployment/waypoint > /dev/null
  kubectl -n embedded rollout status deployment/waypoint --timeout=120s > /dev/null
  "$here/ca.sh" drop
  check "the old one is trusted no more" wait_for 120 "the new root" trusted 1
}
traffic_during "a new root" embedded server.embedded.svc.cluster.local new_root
check "requests are governed as before" eventually moved client
kubectl delete namespace embedded embedded-outside --wait=false > /dev/null

say "scenes"
# What scene 20 asks for: with istiod it is among the values it is installed with.
kubectl -n istio-system create configmap istio --from-literal=mesh='extensionProviders:
- {name: otel, opentelemetry: {service: otel.shop.svc.cluster.local, port: 4317}}
- {name: zipkin, zipkin: {service: otel.shop.svc.cluster.local, port: 9411}}' > /dev/null
for scene in 3 4 7 17 19 20; do
  check "scene $scene" "${STRATA_BIN:-$repository/target/debug}/strata" demo --cluster --scene "$scene"
done
exit $failures
