# What the scripts that end in checks check alike. Sourced after env.sh.
# shellcheck shell=bash
chart=$repository/manifests/charts/strata
failures=0
# check WHAT COMMAND...: says whether COMMAND succeeds, and counts.
check() { if "${@:2}" > /dev/null; then note "ok: $1"; else printf '    FAILED: %s\n' "$1" >&2; failures=$((failures + 1)); fi; }
# eventually COMMAND...: repeats COMMAND for half a minute, until it succeeds.
eventually() { wait_for 30 "$*" "$@"; }
helm_quiet() { helm "$@" > "$run/helm.log" 2>&1 || { cat "$run/helm.log" >&2; return 1; }; }

# sandbox NAMESPACE NAME:NODE...: pods that serve HTTP on 8080 and can call; returns when they are Ready. A namespace of the name is
# made if there is none.
sandbox() {
  local namespace=$1 pair
  shift
  kubectl get namespace "$namespace" > /dev/null 2>&1 || kubectl create namespace "$namespace" > /dev/null
  # Without it pods are refused. A controller-manager looks for an API server that was away (scene 14) at longer and longer intervals.
  wait_for 120 "the namespace's service account" kubectl -n "$namespace" get serviceaccount default
  for pair; do
    kubectl -n "$namespace" apply -f - > /dev/null <<YAML
apiVersion: v1
kind: Pod
metadata: {name: ${pair%:*}, labels: {app: ${pair%:*}}}
spec:
  nodeName: ${pair#*:}
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: "strata.io/echo:dev", args: [serve, --http, "8080"]}]
YAML
  done
  kubectl -n "$namespace" wait pod --all --for=condition=Ready --timeout=60s > /dev/null
}

pod_ip() { kubectl -n "$1" get pod "$2" -o 'jsonpath={.status.podIP}'; }

# can CLIENT-NAMESPACE HOST: whether the namespace's pod `client` is answered by what serves there.
can() { timeout 20 kubectl -n "$1" exec client -- strata-echo call "http://$2:8080/" --new-connection --timeout 3s > "$run/can.json" && answered 1 "$run/can.json"; }
cannot() { ! can "$@"; }

# captured NAMESPACE: every pod of it says that it is.
captured() {
  local said
  said=$(kubectl -n "$1" get pods -o 'jsonpath={range .items[*]}{.metadata.name}={.metadata.annotations.ambient\.istio\.io/redirection}{"\n"}{end}') &&
    [ -n "$said" ] && ! grep -qv '=enabled$' <<< "$said"
}

# into_the_mesh NAMESPACE SERVER: its pods join as they run, then one more starts beside another CNI's plugin. SERVER is one's address;
# `client` of namespace `stranger` stays outside.
into_the_mesh() {
  local later
  kubectl label namespace "$1" istio.io/dataplane-mode=ambient > /dev/null
  check "pods say that they are captured" eventually captured "$1"
  strict "$1"
  check "STRICT: plaintext is refused" eventually cannot stranger "$2"
  check "STRICT: mTLS between nodes" can "$1" "$2"
  sandbox "$1" later:node-a
  later=$(pod_ip "$1" later)
  check "a new pod is in the mesh" can "$1" "$later"
  check "and only there" cannot stranger "$later"
  check "a pod ends as it should" kubectl -n "$1" delete pod later --wait --timeout=60s
}

# strict NAMESPACE: mutual TLS alone.
strict() {
  kubectl -n "$1" apply -f - > /dev/null <<'YAML'
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict}
spec: {mtls: {mode: STRICT}}
YAML
}

# waypoint NAMESPACE: its Services are behind one.
waypoint() {
  kubectl label namespace "$1" istio.io/use-waypoint=waypoint > /dev/null
  kubectl -n "$1" apply -f - > /dev/null <<'YAML'
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, labels: {istio.io/waypoint-for: service}}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
YAML
}

# govern NAMESPACE: its Service `server` answers one path by a rule that only a waypoint carries out.
govern() {
  kubectl -n "$1" apply -f - > /dev/null <<'YAML'
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: server}
spec:
  hosts: [server]
  http: [{match: [{uri: {exact: /governed}}], directResponse: {status: 418}}, {route: [{destination: {host: server}}]}]
YAML
}
governed() { timeout 20 kubectl -n "$1" exec client -- strata-echo call "http://server.$1:8080/governed" --timeout 3s | grep -q '"418": *1'; }

# meshed NAMESPACE NAME:NODE...: the same in the mesh, mutual TLS alone, the first pod as a Service behind a waypoint of its own.
meshed() {
  local namespace=$1 server=${2%:*}
  sandbox "$@"
  kubectl -n "$namespace" expose pod "$server" --port 8080 > /dev/null
  kubectl label namespace "$namespace" istio.io/dataplane-mode=ambient > /dev/null
  waypoint "$namespace"
  strict "$namespace"
}

# answered LEAST FILE: in this report of strata-echo every request was answered, and there were at least LEAST.
answered() {
  python3 - "$1" "$2" <<'PYTHON'
import json, sys
report = json.load(open(sys.argv[2]))
sys.exit(not (report["sent"] >= int(sys.argv[1]) and report["ok"] == report["sent"]))
PYTHON
}

# told FILE: how many requests of this report were answered, and if some were not: why, and when they began.
told() {
  python3 - "$1" <<'PYTHON'
import datetime, json, sys
report = json.load(open(sys.argv[1]))
failed = [datetime.datetime.fromtimestamp(began / 1000).strftime("%T.%f")[:-3] for began, status, *_ in report["samples"] if not status]
print(report["ok"], "of", report["sent"], "answered", *([report["errors"], f"from {failed[0]} to {failed[-1]}"] if failed else []))
PYTHON
}

# traffic_during WHAT NAMESPACE SERVER COMMAND...: no request of the namespace's pod `client` to SERVER fails while COMMAND runs and a
# little longer: fifty a second, each on a new connection. If one does, the warnings of the agents and node proxies that ran before are shown.
traffic_during() {
  local what=$1 namespace=$2 server=$3 report=$run/traffic.json client logs
  shift 3
  kubectl -n istio-system logs -f -l 'app.kubernetes.io/name in (strata-agent, ztunnel)' --prefix --since=1s --max-log-requests=20 > "$run/traffic.log" 2>&1 &
  logs=$!
  timeout 300 kubectl -n "$namespace" exec client -- sh -c 'echo $$ > /tmp/pid; exec strata-echo call "http://$0:8080/" --count 0 --rate 50 --new-connection --timeout 2s --samples' "$server" > "$report" &
  client=$!
  sleep 2
  "$@"
  sleep 5
  timeout 20 kubectl -n "$namespace" exec client -- sh -c 'kill -TERM $(cat /tmp/pid)'
  wait $client
  kill $logs 2> /dev/null || true
  note "$what: $(told "$report")"
  check "$what: no request fails" answered 100 "$report"
  answered 100 "$report" || grep -E 'WARN|ERROR|error' "$run/traffic.log" | tail -20 >&2 || true
}

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

# The agents end a little after Helm says so: they take everything back while they end.
agents_gone() { kubectl -n istio-system wait pod -l app.kubernetes.io/name=strata-agent --for=delete --timeout=60s > /dev/null; }
gone() { [ -z "$("$here/on-node.sh" "$1" sh -c "ls -d $2 2>/dev/null")" ]; }
unmarked() { [ -z "$(kubectl get pods -A -o 'jsonpath={range .items[*]}{.metadata.annotations.ambient\.istio\.io/redirection}{end}')" ]; }
untranslated() { ! "$here/on-node.sh" "$1" nft list table inet strata > /dev/null 2>&1; }

# left_nothing: after an uninstall nothing of Strata is on the nodes, and no pod says that it is captured.
left_nothing() {
  local n path
  for n in $NODES; do
    for path in '/etc/cni/net.d/*strata*' /opt/cni/bin/strata-cni /sys/fs/bpf/strata '/run/strata/*'; do
      check "node-$n: $path is gone" gone "$n" "$path"
    done
    check "node-$n: the table inet strata is gone" untranslated "$n"
  done
  check "no pod says it is captured" unmarked
}
