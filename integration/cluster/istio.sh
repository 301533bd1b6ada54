#!/usr/bin/env bash
# istio.sh [--wait]: the Gateway API's CRDs (experimental channel) and Istio's own charts `base` and `istiod`, unmodified, profile
# ambient, with istiod as a pod. No istio-cni and no ztunnel: their places are Strata's. With --wait it returns when istiod is
# Ready, which takes a network for pods (Strata, or CNI=ptp). With CONTROL=embedded the CRDs alone.
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
charts=$cluster/istio/manifests/charts
[ -d "$charts" ] || die "Istio's module is missing: run build.sh"

say "Gateway API $GATEWAY_API_VERSION, Istio $ISTIO_VERSION"
for file in "$cluster"/gateway-api/config/crd/experimental/gateway.*.yaml; do printf -- '---\n'; cat "$file"; done |
  kubectl apply --server-side --force-conflicts -f - > /dev/null

options=(--namespace istio-system --create-namespace --set profile=ambient)
[ "${1:-}" != --wait ] || options+=(--wait --timeout 120s)
direct=()
if unserved; then direct=(--set-string "env.KUBERNETES_SERVICE_HOST=$host_ip,env.KUBERNETES_SERVICE_PORT=$api_port"); fi
# install RELEASE CHART OPTIONS...: shows Helm's complaints, not its notes.
install() {
  note "$1"
  helm upgrade --install "$1" "$charts/$2" "${options[@]}" "${@:3}" > "$run/helm.log" 2>&1 || { cat "$run/helm.log" >&2; exit 1; }
}
if [ "$CONTROL" = embedded ]; then
  # No default revision: its webhook would ask an istiod that is not there.
  install istio-base base --set defaultRevision=
  exit 0
fi
"$here/ca.sh"
install istio-base base
install istiod istio-control/istio-discovery -f "$here/config/istiod.yaml" "${direct[@]}"
