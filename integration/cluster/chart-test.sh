#!/bin/bash
# chart-test.sh: the Helm chart, without a cluster: lint, every profile rendered and examined (privileges, host folders,
# RBAC, documentation, flags that exist), contradictory values refused by name. Where the file KUBECONFIG is, the API server is
# asked as well (server-side dry run of every profile). Exit code 1 and a list if anything is wrong.
set -euo pipefail
cd "$(dirname "$0")/../.."
CHART=manifests/charts/strata
BIN=${STRATA_BIN:-target/debug}
HELM=${STRATA_CLUSTER_DIR:-$HOME/.cache/strata-cluster}/bin/helm
[ -x "$HELM" ] || HELM=$(command -v helm) || { echo "helm is missing: make cluster builds it" >&2; exit 2; }
# helm from `go install` does not know which Kubernetes it is for.
KUBE_VERSION=${KUBE_VERSION:-1.36.3}
OUT=$(mktemp -d); trap 'rm -rf "$OUT"' EXIT
wrong=0
fault() { echo "chart: $*" >&2; wrong=1; }

# render CHART FILE [ARGS]: the objects into FILE.
render() { "$HELM" template strata "$1" -n istio-system --kube-version "$KUBE_VERSION" "${@:3}" > "$2"; }
ALL_ON=(--set k8sServiceHost=10.99.0.1,k8sServicePort=7443,monitoring.podMonitor.enabled=true,monitoring.dashboards.enabled=true
  --set resourceQuota.enabled=true,log.format=json,mesh.network=n1 --set 'imagePullSecrets={pull}')
OUTSIDE=(--set 'outside.masqueradeExcept={192.0.2.0/24,2001:db8::/32}')

for profile in "$CHART"/profiles/*.yaml; do
  name=$(basename "$profile" .yaml)
  "$HELM" lint --strict --quiet -n istio-system --kube-version "$KUBE_VERSION" "$CHART" -f "$profile" > "$OUT/lint" || { cat "$OUT/lint"; fault "lint of $name"; }
  render "$CHART" "$OUT/$name.yaml" -f "$profile" || fault "profile $name does not render"
  render "$CHART" "$OUT/$name-all.yaml" -f "$profile" "${ALL_ON[@]}" || fault "profile $name does not render with everything on"
done
render "$CHART" "$OUT/crl-all.yaml" "${ALL_ON[@]}" "${OUTSIDE[@]}" --set mesh.crl.enabled=true,mesh.shortcut=off
render "$CHART" "$OUT/embedded-secrets.yaml" -f "$CHART/profiles/own-cni-embedded.yaml" --set 'control.secretNamespaces={shop,bank}'
render "$CHART" "$OUT/embedded-secrets-all.yaml" -f "$CHART/profiles/own-cni-embedded.yaml" --set 'control.secretNamespaces={shop,*}'
# Only the chart's own version differs: no pod may be replaced for it.
cp -r "$CHART" "$OUT/next"; sed -i 's/^version: .*/version: 99.0.0/' "$OUT/next/Chart.yaml"
render "$CHART" "$OUT/before"; render "$OUT/next" "$OUT/after"

# refused MESSAGE ARGS: rendering with ARGS fails and says MESSAGE.
refused() {
  local message=$1; shift
  if render "$CHART" /dev/null "$@" 2> "$OUT/refusal"; then fault "accepted: $*"
  elif ! grep -qF -- "$message" "$OUT/refusal"; then fault "$* is refused without saying \"$message\": $(cat "$OUT/refusal")"; fi
}
refused "profile.controlPlane is none and layers.application is true" --set profile.controlPlane=none
refused "layers.application is false and profile.controlPlane is istiod" --set layers.application=false
refused "name another control plane" --set profile.controlPlane=embedded,mesh.xdsAddress=https://a:15012
refused "name another control plane" --set profile.controlPlane=embedded,mesh.revision=canary
refused "layers.application is false and profile.controlPlane is embedded" --set profile.controlPlane=embedded,layers.application=false
refused "/control/replicas" --set control.replicas=0
refused "/control/secretNamespaces/0" --set 'control.secretNamespaces={Shop}'
refused "k8sServiceHost and k8sServicePort go together" --set k8sServiceHost=10.0.0.1
refused "k8sServiceHost and k8sServicePort go together" --set k8sServicePort=6443
refused "a Service: it must be reachable before Services work" --set k8sServiceHost=kubernetes.default.svc,k8sServicePort=443
refused "without scheme or path" --set k8sServiceHost=https://10.0.0.1,k8sServicePort=443
refused "mesh.trustedNamespace is istio-system" --namespace default
refused "mesh.revision only makes up the default address" --set mesh.revision=canary,mesh.xdsAddress=https://a:15012
refused "the token must not travel in plaintext" --set mesh.xdsAddress=http://istiod:15010
refused "nodeProxy.terminationGracePeriodSeconds is 30 and nodeProxy.drainSeconds is 30" --set nodeProxy.drainSeconds=30
refused "maxSurge and maxUnavailable are both 0" --set nodeProxy.updateStrategy.maxSurge=0
refused "agent.updateStrategy.maxUnavailable is 0" --set agent.updateStrategy.maxUnavailable=0
refused "agent.adminPort and agent.metricsPort are both 9965" --set agent.adminPort=9965
refused "additional properties 'agnet' not allowed" --set agnet.metricsPort=1
refused "/cni/mode" --set cni.mode=bridge
refused "outside.masquerade is true and cni.mode is chained" --set cni.mode=chained
refused "outside.masqueradeExcept is given and outside.masquerade is false" --set 'outside.masquerade=false,outside.masqueradeExcept={192.0.2.0/24}'
refused "/outside/masqueradeExcept/0" --set 'outside.masqueradeExcept={everywhere}'
refused "/mesh/shortcut" --set mesh.shortcut=maybe
refused "/agent/metricsPort" --set agent.metricsPort=70000
refused "/cni/confDir" --set cni.confDir=etc/cni
refused "/log/format" --set log.format=xml
refused "/agent/extraEnv/0" --set 'agent.extraEnv[0].nmae=A'
refused "missing property 'localhostProfile'" --set agent.appArmorProfile.type=Localhost

python3 - "$OUT" "$CHART" "$BIN" <<'X' || wrong=1
import glob, json, os, re, subprocess, sys, yaml
out, chart, binaries = sys.argv[1:]
faults = []
CAPABILITIES = {"strata-agent": {"BPF", "NET_ADMIN", "SYS_ADMIN"}, "ztunnel": {"NET_ADMIN", "SYS_ADMIN"}}
HOST_PATHS = {
    "strata-agent": {"/run/strata", "/sys/fs/bpf", "/run/netns", "/var/run/netns", "/sys/fs/cgroup", "/proc/sys/net",
                     "/etc/cni/net.d", "/opt/cni/bin", "/var/lib/cni/results"},
    "ztunnel": {"/run/strata"},
}
# Ends the agents before Helm takes their permissions: a Job of its own, with permissions of its own.
UNINSTALL = "strata-agent-uninstall"
CLUSTERWIDE = {("", "pods"), ("", "nodes"), ("", "namespaces"), ("", "services"), ("discovery.k8s.io", "endpointslices"),
               ("networking.k8s.io", "networkpolicies"), ("events.k8s.io", "events")}
# In istiod's place: what it reads, and what it writes besides.
CONTROL = "strata-control"
# Only where the administrator says so, and bound there alone.
SECRETS = f"{CONTROL}-secrets"
SECRETS_BOUND = {"embedded-secrets-all.yaml": [("ClusterRoleBinding", None)],
                 "embedded-secrets.yaml": [("RoleBinding", "bank"), ("RoleBinding", "shop")]}
READ = {"get", "list", "watch"}
CONTROL_READS = {
    "": {"namespaces", "nodes", "pods", "services", "serviceaccounts", "configmaps"},
    "discovery.k8s.io": {"endpointslices"},
    "gateway.networking.k8s.io": {"gatewayclasses", "gateways", "httproutes", "grpcroutes", "tcproutes", "tlsroutes",
                                  "referencegrants", "backendtlspolicies"},
    "networking.istio.io": {"serviceentries", "workloadentries", "virtualservices", "destinationrules", "sidecars", "envoyfilters"},
    "security.istio.io": {"authorizationpolicies", "requestauthentications", "peerauthentications"},
    "telemetry.istio.io": {"telemetries", "wasmplugins"}, "extensions.istio.io": {"telemetries", "wasmplugins"},
}
CONTROL_WRITES = [
    ({"authentication.k8s.io"}, {"tokenreviews"}, None, {"create"}),
    ({"authorization.k8s.io"}, {"subjectaccessreviews"}, None, {"create"}),
    ({""}, {"configmaps"}, {"istio-ca-root-cert"}, {"create", "patch"}),
    ({""}, {"secrets"}, {"cacerts", "istio-ca-secret"}, {"get"}),
    ({""}, {"secrets"}, None, {"create"}),
    ({"gateway.networking.k8s.io"}, {"gatewayclasses"}, {"istio-waypoint"}, {"create", "patch"}),
    ({"apps"}, {"deployments"}, None, READ | {"create", "patch"}),
    ({"autoscaling"}, {"horizontalpodautoscalers"}, None, READ | {"create", "patch"}),
    ({"policy"}, {"poddisruptionbudgets"}, None, READ | {"create", "patch"}),
    ({""}, {"services", "serviceaccounts"}, None, {"create", "patch"}),
]

def load(path):
    documents = [d for d in yaml.safe_load_all(open(path)) if d]
    seen = [(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents]
    if len(seen) != len(set(seen)):
        faults.append(f"{path}: an object twice")
    for d in documents:
        if d["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") != "strata":
            faults.append(f"{path}: {d['kind']}/{d['metadata']['name']} has not the labels of all")
        hook = d["metadata"].get("annotations", {}).get("helm.sh/hook")
        if hook != ("pre-delete" if d["metadata"]["name"] == UNINSTALL else None):
            faults.append(f"{path}: {d['kind']}/{d['metadata']['name']}: hook {hook}")
    return documents

def check_pod(where, name, spec):
    agent = name == "strata-agent"
    for field in ("hostNetwork", "hostPID"):
        if spec.get(field, False) != agent:
            faults.append(f"{where}: {field} is {spec.get(field, False)}")
    if spec.get("hostIPC") or spec.get("shareProcessNamespace"):
        faults.append(f"{where}: shares more of the node than it needs")
    if not agent and spec.get("automountServiceAccountToken") is not False:
        faults.append(f"{where}: gets a token for the API server")
    paths = {v["hostPath"]["path"] for v in spec["volumes"] if "hostPath" in v}
    if paths != HOST_PATHS[name]:
        faults.append(f"{where}: host folders {sorted(paths)}")
    mounted = {m["name"] for c in spec["containers"] for m in c["volumeMounts"]}
    if mounted != {v["name"] for v in spec["volumes"]}:
        faults.append(f"{where}: volumes and mounts differ")
    if spec["priorityClassName"] != "system-node-critical" or {"operator": "Exists"} not in spec["tolerations"]:
        faults.append(f"{where}: may be evicted or kept from a tainted node")
    for container in spec["containers"] + spec.get("initContainers", []):
        context = container["securityContext"]
        if context["privileged"] or not context["readOnlyRootFilesystem"] or context["seccompProfile"]["type"] != "RuntimeDefault":
            faults.append(f"{where}: security context {context}")
        if context["capabilities"]["drop"] != ["ALL"] or set(context["capabilities"]["add"]) != CAPABILITIES[name]:
            faults.append(f"{where}: capabilities {context['capabilities']}")
        # Kubernetes admits it for privileged containers only.
        if any(m.get("mountPropagation") == "Bidirectional" for m in container["volumeMounts"]):
            faults.append(f"{where}: Bidirectional mount")

def check_control_rule(where, rule):
    groups, resources, verbs = (set(rule[name]) for name in ("apiGroups", "resources", "verbs"))
    names = set(rule["resourceNames"]) if "resourceNames" in rule else None
    reads = verbs <= READ and all(resources <= CONTROL_READS.get(group, set()) for group in groups)
    status = verbs == {"patch"} and all(resource.endswith("/status") for resource in resources)
    if not reads and not status and (groups, resources, names, verbs) not in CONTROL_WRITES:
        faults.append(f"{where}: {CONTROL} may {sorted(verbs)} {sorted(resources)} of {sorted(groups)}")

def check_control(where, documents):
    """The control plane is an ordinary pod that may nothing on the node."""
    found = [d for d in documents if d["kind"] == "Deployment"]
    if [d["metadata"]["name"] for d in found] != ([CONTROL] if "embedded" in where else []):
        faults.append(f"{where}: Deployments {[d['metadata']['name'] for d in found]}")
    for deployment in found:
        template = deployment["spec"]["template"]
        pod, container = template["spec"], template["spec"]["containers"][0]
        context = container["securityContext"]
        if not context["runAsNonRoot"] or not context["readOnlyRootFilesystem"] or context["capabilities"] != {"drop": ["ALL"]}:
            faults.append(f"{where}: {CONTROL} security context {context}")
        if pod.get("hostNetwork") or any("emptyDir" not in volume for volume in pod["volumes"]):
            faults.append(f"{where}: {CONTROL} gets at the node")
        if not deployment["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items():
            faults.append(f"{where}: {CONTROL}: selector and labels differ")
        check_flags(f"{where}: {CONTROL}", container)

def check_rbac(where, documents):
    for role in documents:
        if role["kind"] not in ("ClusterRole", "Role"):
            continue
        if role["metadata"]["name"] == SECRETS:
            if role["rules"] != [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "list", "watch"]}]:
                faults.append(f"{where}: {SECRETS} may {role['rules']}")
            bound = sorted((b["kind"], b["metadata"].get("namespace")) for b in documents if b.get("roleRef", {}).get("name") == SECRETS)
            if bound != SECRETS_BOUND.get(where):
                faults.append(f"{where}: {SECRETS} is bound {bound}")
            continue
        if role["metadata"]["name"] == CONTROL:
            for rule in role["rules"]:
                check_control_rule(where, rule)
            continue
        for rule in role["rules"]:
            pairs = {(group, resource) for group in rule["apiGroups"] for resource in rule["resources"]}
            if role["kind"] == "ClusterRole" and not pairs <= CLUSTERWIDE:
                faults.append(f"{where}: ClusterRole {role['metadata']['name']} may reach {pairs - CLUSTERWIDE}")
            verbs = {"get", "delete"} if role["metadata"]["name"] == UNINSTALL else {"get", "watch", "create", "patch"}
            if not set(rule["verbs"]) <= verbs | {"list"}:
                faults.append(f"{where}: {role['kind']} {role['metadata']['name']} verbs {rule['verbs']}")
            listing = role["metadata"]["name"] == UNINSTALL and rule["verbs"] == ["list"]
            if role["kind"] == "Role" and not listing and rule.get("resourceNames") != ["strata-agent"]:
                faults.append(f"{where}: Role {role['metadata']['name']} is not bound to a name")
    for binding in documents:
        if binding["kind"].endswith("Binding") and "subjects" in binding:
            if [s["name"] for s in binding["subjects"]] != [binding["metadata"]["name"].removesuffix("-secrets")]:
                faults.append(f"{where}: {binding['kind']} {binding['metadata']['name']} is for {binding['subjects']}")

def check_flags(where, container):
    """Flags and variables are those of the built processes."""
    process = {"agent": "strata-agent", "uninstall": "strata-agent", "istio-proxy": "strata-proxy", "control": "strata-control"}[container["name"]]
    path = os.path.join(binaries, process)
    if not os.path.exists(path):
        faults.append(f"{path} is missing: make build")
        return
    helped = subprocess.run([path, "--help"], capture_output=True, text=True).stdout
    for flag in (a.split("=")[0] for a in container["args"] if a.startswith("--")):
        if not re.search(rf"{flag}\b", helped):
            faults.append(f"{where}: {process} has no {flag}")

files = sorted(glob.glob(f"{out}/*.yaml"))
for path in files:
    where, documents = os.path.basename(path), load(path)
    sets = {d["metadata"]["name"]: d for d in documents if d["kind"] == "DaemonSet"}
    wanted = {"strata-agent"} if where.startswith("lower-layer") else {"strata-agent", "ztunnel"}
    if set(sets) != wanted:
        faults.append(f"{where}: DaemonSets {sorted(sets)}")
    for name, daemonset in sets.items():
        template = daemonset["spec"]["template"]
        check_pod(f"{where}: {name}", name, template["spec"])
        check_flags(f"{where}: {name}", template["spec"]["containers"][0])
        if not daemonset["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items():
            faults.append(f"{where}: {name}: selector and labels differ")
        if template["metadata"]["labels"].get("istio.io/dataplane-mode") != "none":
            faults.append(f"{where}: {name} could be enrolled")
    chained = "--cni-chain" in sets["strata-agent"]["spec"]["template"]["spec"]["containers"][0]["args"]
    if chained != where.startswith("chained"):
        faults.append(f"{where}: chained is {chained}")
    check_rbac(where, documents)
    check_control(where, documents)
    job = next(d for d in documents if d["kind"] == "Job")["spec"]["template"]["spec"]
    check_flags(f"{where}: {UNINSTALL}", job["containers"][0])
    context = job["containers"][0]["securityContext"]
    if not context["runAsNonRoot"] or context["capabilities"] != {"drop": ["ALL"]} or "volumes" in job:
        faults.append(f"{where}: {UNINSTALL} has more rights than it needs")
if len(files) != 2 * len(glob.glob(f"{chart}/profiles/*.yaml")) + 3:
    faults.append(f"only {len(files)} renderings")

templates = lambda path: {d["metadata"]["name"]: d["spec"]["template"] for d in load(path) if d["kind"] == "DaemonSet"}
if templates(f"{out}/before") != templates(f"{out}/after"):
    faults.append("a new chart version alone replaces pods")

# Every capability and mount says why it is there.
for path in glob.glob(f"{chart}/templates/*/daemonset.yaml"):
    lines = open(path).read().split("\n")
    begin = next(i for i, line in enumerate(lines) if line.strip() == "add:")
    for line in lines[begin + 1:]:
        if not line.strip().startswith("- "):
            break
        if not re.search(r"- [A-Z_]+ # \w", line):
            faults.append(f"{path}: no reason: {line.strip()}")
    begin, end = (next(i for i, line in enumerate(lines) if line.strip() == word) for word in ("volumeMounts:", "volumes:"))
    for i in range(begin, end):
        # Two names of one folder share a comment.
        if lines[i].strip().startswith("- name:") and "#" not in lines[i - 1] and "var-netns" not in lines[i]:
            faults.append(f"{path}: no reason: {lines[i].strip()}")

# values.yaml documents every value, and nothing else.
text = open(f"{chart}/values.yaml").read()
documented = set(re.findall(r"^## @param (\S+)", text, re.M))
def leaves(value, path=""):
    if isinstance(value, dict) and value and path not in documented:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}".lstrip("."))
    else:
        yield path
values = yaml.safe_load(text)
faults += [f"values.yaml does not document {leaf}" for leaf in leaves(values) if leaf not in documented]
for path in documented:
    value = values
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        faults.append(f"values.yaml documents {path}, which is not there")

# The dashboard asks for metrics that exist in the source.
source = subprocess.run(["grep", "-rhoE", '"[a-z0-9_]+"', "--include=*.rs", "l4-datapath", "l7-waypoint", "xds"], capture_output=True, text=True).stdout
known = set(source.replace('"', "").split())
for path in glob.glob(f"{chart}/dashboards/*.json"):
    queries = [t["expr"] for p in json.load(open(path))["panels"] for t in p.get("targets", [])]
    names = {n for q in queries for n in re.findall(r"\b(?:istio|hubble|strata)_[a-z_]+", q)}
    for name in names:
        base = re.sub(r"_(total|bucket)$", "", name)
        # The xDS client's are registered below the prefix `istio`.
        if base not in known and base.removeprefix("istio_") not in known:
            faults.append(f"{path}: nobody counts {name}")
    if len(names) < 10:
        faults.append(f"{path}: only {len(names)} metrics")

for fault in dict.fromkeys(faults):
    print("chart:", fault, file=sys.stderr)
sys.exit(1 if faults else 0)
X

if [ -f "${KUBECONFIG:-}" ]; then
  for profile in "$CHART"/profiles/*.yaml; do
    "$HELM" template strata "$CHART" -n istio-system --kube-version "$KUBE_VERSION" -f "$profile" --set resourceQuota.enabled=true,monitoring.dashboards.enabled=true \
      | kubectl apply --server-side --force-conflicts --dry-run=server -f - > "$OUT/server" 2>&1 || { cat "$OUT/server" >&2; fault "the API server refuses profile $(basename "$profile" .yaml)"; }
  done
fi
[ $wrong = 0 ] && echo "chart: $(ls "$CHART"/profiles | wc -l) profiles, all well"
exit $wrong
