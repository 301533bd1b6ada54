#!/usr/bin/env bash
# lifecycle.sh: Strata is upgraded, rolled back, removed and installed again on the running cluster, as an administrator does it with
# Helm, while a pod outside the mesh asks another on the other node fifty times a second. No request may fail, and after the
# removal nothing of Strata may be left on the nodes but the devices and routes of the pods that still run.
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
chart=$repository/manifests/charts/strata
failures=0
check() { if "${@:2}"; then note "ok: $1"; else printf '    FAILED: %s\n' "$1" >&2; failures=$((failures + 1)); fi; }

kubectl delete namespace lifecycle --ignore-not-found --timeout=60s > /dev/null
kubectl create namespace lifecycle > /dev/null
for pair in server:node-b client:node-a; do
  kubectl -n lifecycle apply -f - > /dev/null <<YAML
apiVersion: v1
kind: Pod
metadata: {name: ${pair%:*}}
spec:
  nodeName: ${pair#*:}
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: "strata.io/echo:dev", args: [serve, --http, "8080"]}]
YAML
done
kubectl -n lifecycle wait pod --all --for=condition=Ready --timeout=60s > /dev/null
server=$(kubectl -n lifecycle get pod server -o 'jsonpath={.status.podIP}')

# traffic_during WHAT COMMAND...: no request of the client fails while COMMAND runs and a little longer.
traffic_during() {
  local what=$1 report=$run/lifecycle.json
  shift
  kubectl -n lifecycle exec client -- sh -c 'echo $$ > /tmp/pid; exec strata-echo call "http://$0:8080/" --count 0 --rate 50 --new-connection --timeout 2s' "$server" > "$report" &
  local client=$!
  sleep 2
  "$@"
  sleep 5
  kubectl -n lifecycle exec client -- sh -c 'kill -TERM $(cat /tmp/pid)'
  wait $client
  note "$what: $(python3 -c 'import json,sys; r=json.load(open(sys.argv[1])); print(r["ok"], "of", r["sent"], "answered", r["errors"] or "")' "$report")"
  check "$what: no request outside the mesh fails" python3 -c 'import json,sys; r=json.load(open(sys.argv[1])); sys.exit(not (r["sent"] > 100 and r["ok"] == r["sent"]))' "$report"
}
helm_quiet() { helm "$@" > "$run/helm.log" 2>&1 || { cat "$run/helm.log" >&2; return 1; }; }
upgrade() { helm_quiet upgrade strata "$chart" -n istio-system -f "$here/values.yaml" --set log.level=debug --wait --timeout 180s; }
rollback() { helm_quiet rollback strata -n istio-system --wait --timeout 180s; }
# The pods end a little after Helm says so: the agents take everything back while they end.
uninstall() {
  helm_quiet uninstall strata -n istio-system --wait --timeout 120s
  kubectl -n istio-system wait pod -l app.kubernetes.io/name=strata-agent --for=delete --timeout=60s > /dev/null
}

say "upgrade"
traffic_during "helm upgrade" upgrade
say "rollback"
traffic_during "helm rollback" rollback
say "uninstall"
traffic_during "helm uninstall" uninstall
gone() { [ -z "$("$here/on-node.sh" "$1" sh -c "ls -d $2 2>/dev/null")" ]; }
for n in $NODES; do
  for path in /etc/cni/net.d/05-strata.conflist /opt/cni/bin/strata-cni /sys/fs/bpf/strata '/run/strata/*'; do
    check "node-$n: $path is gone" gone "$n" "$path"
  done
done
unmarked() { [ -z "$(kubectl get pods -A -o 'jsonpath={range .items[*]}{.metadata.annotations.ambient\.istio\.io/redirection}{end}')" ]; }
check "no pod says it is captured" unmarked
say "installed again"
helm_quiet install strata "$chart" -n istio-system -f "$here/values.yaml" --wait --timeout 180s
kubectl wait --for=condition=Ready node --all --timeout=120s > /dev/null
note "nodes are Ready"
kubectl delete namespace lifecycle --wait=false > /dev/null
exit $failures
