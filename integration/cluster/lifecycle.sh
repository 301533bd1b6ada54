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
  timeout 300 kubectl -n lifecycle exec client -- sh -c 'echo $$ > /tmp/pid; exec strata-echo call "http://$0:8080/" --count 0 --rate 50 --new-connection --timeout 2s' "$server" > "$report" &
  local client=$!
  sleep 2
  "$@"
  sleep 5
  timeout 20 kubectl -n lifecycle exec client -- sh -c 'kill -TERM $(cat /tmp/pid)'
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
say "installed again, over the pods that ran on"
install() {
  helm_quiet install strata "$chart" -n istio-system -f "$here/values.yaml" --wait --timeout 180s
  kubectl wait --for=condition=Ready node --all --timeout=120s > /dev/null
}
traffic_during "helm install" install
# taken_over N: every running pod of node N with a network of its own is the agent's, under the address the API server shows.
taken_over() {
  kubectl get pods -A --field-selector "spec.nodeName=node-$1,status.phase=Running" -o json > "$run/shown.json"
  "$here/on-node.sh" "$1" curl -s --max-time 10 --unix-socket /run/strata/agent.sock http://agent/status > "$run/known.json"
  python3 - "$run/shown.json" "$run/known.json" <<'PYTHON'
import json, sys
shown, known = (json.load(open(path)) for path in sys.argv[1:])
shown = {p["status"]["podIP"] for p in shown["items"] if not p["spec"].get("hostNetwork")}
known = {p["ips"][0] for p in known["pods"]}
sys.exit(0 if shown and shown == known else f"the API server shows {sorted(shown)}, the agent knows {sorted(known)}")
PYTHON
}
for n in $NODES; do check "node-$n: the agent knows every pod that runs" taken_over "$n"; done
# A new pod gets an address of its own, and names resolve (CoreDNS ran through it all).
kubectl -n lifecycle run fresh --image=strata.io/echo:dev --restart=Never --overrides='{"spec":{"nodeName":"node-a"}}' -- serve --http 8080 > /dev/null
kubectl -n lifecycle wait pod fresh --for=condition=Ready --timeout=60s > /dev/null
alone() { [ "$(kubectl get pods -A -o 'jsonpath={range .items[*]}{.status.podIP}{"\n"}{end}' | grep -cFx "$1")" = 1 ]; }
check "a new pod's address is its own" alone "$(kubectl -n lifecycle get pod fresh -o 'jsonpath={.status.podIP}')"
resolves() { timeout 30 kubectl -n lifecycle exec fresh -- strata-echo call "http://istiod.istio-system.svc.cluster.local:15014/version" --timeout 5s > /dev/null; }
check "names resolve and services answer" resolves
kubectl delete namespace lifecycle --wait=false > /dev/null
exit $failures
