#!/usr/bin/env python3
"""crd-fields.py CACHE: the fields of Istio's and the Gateway API's CRDs that concern a mesh of this kind, one a line: path, type and,
where there are, the allowed values. CACHE is where `make cluster` keeps the modules (~/.cache/strata-cluster). The result is
istio-compat/translate/tests/data/crd-fields.txt, from which docs/istio-compatibility.md is made."""
import glob
import sys

import yaml

KINDS = {
    "networking.istio.io": ["VirtualService", "DestinationRule", "ServiceEntry", "WorkloadEntry"],
    "security.istio.io": ["AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication"],
    "telemetry.istio.io": ["Telemetry"],
    "gateway.networking.k8s.io": ["Gateway", "HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute", "ReferenceGrant"],
}
# The same again, deeper.
REPEATED = (
    "spec.subsets[].trafficPolicy.",
    "spec.trafficPolicy.portLevelSettings[].",
    "spec.rules[].backendRefs[].filters[].",
)


def leaves(schema, path):
    kind = schema.get("type")
    if schema.get("x-kubernetes-int-or-string"):
        kind = "int-or-string"
    if kind == "object" and schema.get("properties"):
        for name, inner in schema["properties"].items():
            yield from leaves(inner, f"{path}.{name}")
    elif kind == "array":
        yield from leaves(schema["items"], path + "[]")
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        yield from leaves(schema["additionalProperties"], path + ".*")
    else:
        values = [value for value in schema.get("enum", []) if value != ""]
        yield " ".join([path, kind or "any", *map(str, values)])


def main(cache):
    files = [cache + "/istio/manifests/charts/base/files/crd-all.gen.yaml"]
    files += glob.glob(cache + "/gateway-api/config/crd/experimental/gateway.networking.k8s.io_*.yaml")
    found = {}
    for file in files:
        for document in yaml.safe_load_all(open(file)):
            if not document or document.get("kind") != "CustomResourceDefinition":
                continue
            group, kind = document["spec"]["group"], document["spec"]["names"]["kind"]
            if kind not in KINDS.get(group, []):
                continue
            versions = document["spec"]["versions"]
            version = next((v for v in versions if v["name"] == "v1"), versions[-1])
            spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
            fields = [line for line in leaves(spec, "spec") if not line.startswith(REPEATED)]
            found[kind] = [f"{kind} {group}/{version['name']}", *("  " + line for line in fields)]
    for kinds in KINDS.values():
        for kind in kinds:
            print("\n".join(found[kind]))


main(sys.argv[1])
