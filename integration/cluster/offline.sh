#!/usr/bin/env bash
# offline.sh: what needs the programs of the cluster and not the cluster: the chart, the node proxy beside Istio's own node agent, and that
# docs/istio-compatibility.md is about the fields the CRDs have.
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
"$here/build.sh" mesh
"$here/chart-test.sh"
say "the node proxy beside istio-cni"
"$repository/integration/scripts/test.sh" --features l7-proxy/cluster-tests --test istio_cni
say "docs/istio-compatibility.md: the fields are those of the CRDs"
diff <(python3 "$repository/integration/scripts/crd-fields.py" "$cluster") "$repository/istio-compat/translate/tests/data/crd-fields.txt"
