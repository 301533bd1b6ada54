#!/usr/bin/env bash
# cluster.sh: from nothing to a cluster with Istio and Strata on it, or whatever part of that is missing. `make cluster` runs it.
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
"$here/build.sh"
"$here/up.sh"
"$here/images.sh"
"$here/istio.sh"

# What an administrator would look at first, when something does not become ready.
diagnose() {
  say "not ready" >&2
  kubectl get pods -A -o wide | awk 'NR == 1 || !($4 == "Running" && split($3, n, "/") && n[1] == n[2])' >&2
  kubectl -n istio-system logs -l app.kubernetes.io/name=strata-agent --tail=5 --prefix >&2 || true
  kubectl -n istio-system logs -l app=ztunnel --tail=5 --prefix >&2 || true
}
trap diagnose ERR

chart=$repository/manifests/charts/strata
if [ -d "$chart" ]; then
  say "Strata"
  mode=(--set "profile.controlPlane=$CONTROL")
  if [ -n "$CNI" ]; then mode+=(--set cni.mode=chained); fi
  helm upgrade --install strata "$chart" -n istio-system --create-namespace -f "$here/values.yaml" "${mode[@]}" > "$run/helm.log" 2>&1 ||
    { cat "$run/helm.log" >&2; die "the chart was not installed"; }

  # The images are called the same whatever is in them: pods of an image that has changed since are replaced.
  plane=deployment/istiod
  [ "$CONTROL" = istiod ] || plane=deployment/strata-control
  digest=$(python3 "$here/mkimage.py" digest "$cluster/images" strata.io/agent:dev strata.io/proxy:dev strata.io/control:dev)
  if [ "$(cat "$run/strata-images" 2>/dev/null)" != "$digest" ]; then
    [ ! -f "$run/strata-images" ] || kubectl -n istio-system rollout restart daemonset/strata-agent daemonset/ztunnel "$plane"
    printf '%s' "$digest" > "$run/strata-images"
  fi
  kubectl wait --for=condition=Ready node --all --timeout=120s
  kubectl -n istio-system rollout status daemonset/strata-agent --timeout=120s
  kubectl -n kube-system rollout status deployment/coredns --timeout=120s
  kubectl -n istio-system rollout status "$plane" --timeout=180s
  kubectl -n istio-system rollout status daemonset/ztunnel --timeout=120s
fi
say "the cluster is up"
cat <<TEXT
    export KUBECONFIG=$KUBECONFIG
    export PATH=$cluster/bin:\$PATH        # kubectl, helm, istioctl
    make cluster-demo plays the scenes, make cluster-down takes everything away.
TEXT
