#!/usr/bin/env bash
# images.sh [cluster|strata|e2e]...: builds the images of the test cluster and imports the changed ones into every running node.
# cluster: pause, CoreDNS, istiod, istio-cni. strata: our own, from ${STRATA_BIN:-target/debug}, and Istio's bookinfo sample played by
# strata-echo. e2e: what Kubernetes' network tests run (conformance.sh). Without an argument the first two. After `cargo build` this is what brings new binaries to the nodes; it takes seconds, and
# pods made from then on run them (`kubectl rollout restart` replaces those that run).
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
[ $# -gt 0 ] || set -- cluster strata
store=$cluster/images
stripped=$cluster/stripped
binaries=${STRATA_BIN:-$repository/target/debug}
mkdir -p "$store" "$stripped"

plan=()
# image NAME OPTIONS...: see mkimage.py.
image() { plan+=(--image "$@"); }

# libraries BINARY...: the --file options for the shared libraries (and loader) these need.
libraries() {
  local name
  for name; do ldd "$name"; done | awk '$2 == "=>" { print $3; next } $1 ~ /^\// { print $1 }' | sort -u |
    while read -r name; do printf -- '--file\n%s:%s\n' "$name" "$name"; done
}

cluster_images() {
  local iptables=/usr/sbin/xtables-nft-multi name options
  [ "$cluster/pause" -nt "$here/images/pause.c" ] || gcc -Os -static -s -o "$cluster/pause" "$here/images/pause.c"
  image ks.local/pause:1 --file "$cluster/pause:/pause" --entrypoint /pause
  image ks.local/coredns:1 --file "$cluster/bin/coredns:/coredns" --entrypoint /coredns
  # The roots are for JWT keys that istiod fetches on behalf of its users.
  image ks.local/pilot:1 --file "$cluster/bin/pilot-discovery:/usr/local/bin/pilot-discovery" \
    --file /etc/ssl/certs/ca-certificates.crt:/etc/ssl/certs/ca-certificates.crt:644 --user 1337:1337 --entrypoint /usr/local/bin/pilot-discovery
  # Where Istio's Dockerfile puts its programs, and of a distribution what they run.
  mapfile -t options < <(libraries $iptables)
  for name in $(dpkg -L iptables | grep '/xtables/.*\.so$'); do options+=(--file "$name:$name"); done
  for name in {ip,ip6}tables-nft{,-save,-restore}; do options+=(--link "xtables-nft-multi:/usr/sbin/$name"); done
  image ks.local/install-cni:1 --file "$cluster/bin/install-cni:/usr/local/bin/install-cni" --file "$cluster/bin/istio-cni:/opt/cni/bin/istio-cni" \
    --file "$iptables:$iptables" "${options[@]}" --env PATH=/usr/local/bin:/usr/sbin:/opt/cni/bin --entrypoint /usr/local/bin/install-cni
}

# strip_debug NAME: a copy of a binary without debug information, ten times smaller; only when the binary is another one.
strip_debug() {
  local source=$binaries/$1 target=$stripped/$1
  [ -x "$source" ] || die "$source is missing: cargo build --workspace --bins (make build)"
  if [ -f "$target" ] && [ "$(stat -c '%Y' "$source")" = "$(stat -c '%Y' "$target")" ]; then return 0; fi
  objcopy --strip-debug "$source" "$target.new"
  touch -r "$source" "$target.new"
  mv "$target.new" "$target"
}

# with_libraries BINARY...: the --file options for binaries below /usr/local/bin and the shared libraries (and loader) they need.
with_libraries() {
  local name
  for name; do printf -- '--file\n%s:/usr/local/bin/%s\n' "$stripped/$name" "$name"; done
  libraries "${@/#/$stripped/}"
}

# The CNI plugin is copied to the node and runs there, among libraries nobody knows: it is static, and its own build.
static_plugin() {
  (cd "$repository" && cargo rustc --quiet -p l4-cni --bin strata-cni --target x86_64-unknown-linux-gnu --target-dir target/static -- -C target-feature=+crt-static)
  local plugin=$repository/target/static/x86_64-unknown-linux-gnu/debug/strata-cni
  [ "$plugin" -ot "$stripped/strata-cni" ] || objcopy --strip-debug "$plugin" "$stripped/strata-cni"
}

strata_images() {
  local name options links bookinfo
  static_plugin
  for name in strata-agent strata-proxy strata-control strata-echo strata; do strip_debug $name; done
  # image_of NAME ENTRYPOINT BINARY...
  image_of() {
    mapfile -t options < <(with_libraries "${@:2}")
    # The roots are for services outside that waypoints speak TLS to.
    image "strata.io/$1:dev" "${options[@]}" "${links[@]}" --file /etc/ssl/certs/ca-certificates.crt:/etc/ssl/certs/ca-certificates.crt:644 --entrypoint "/usr/local/bin/$2"
  }
  links=(--file "$stripped/strata-cni:/usr/local/bin/strata-cni")
  # What the agent keeps its table `inet strata` by.
  cp -u /usr/sbin/nft "$stripped/nft"
  image_of agent strata-agent strata nft
  # `kubectl exec POD -- pilot-agent request GET config_dump`, as people do with Istio's image.
  links=(--link strata-proxy:/usr/local/bin/pilot-agent)
  image_of proxy strata-proxy
  links=()
  image_of control strata-control
  # Only the sample application has a shell, for `kubectl exec`.
  links=(--file "$debian/bin/busybox:/bin/busybox")
  for name in $("$debian/bin/busybox" --list); do [ "$name" = busybox ] || links+=(--link "busybox:/bin/$name"); done
  image_of echo strata-echo
  # Istio's own manifest stays as it is: its image names are ours to fill. The names end in NAME-VERSION:TAG.
  mapfile -t options < <(with_libraries strata-echo)
  while read -r bookinfo; do
    name=${bookinfo##*examples-bookinfo-}; name=${name%:*}
    image "$bookinfo" "${options[@]}" "${links[@]}" --env "BOOKINFO_SERVICE=${name%-*}" --env "BOOKINFO_VERSION=${name##*-}" \
      --entrypoint /usr/local/bin/strata-echo --entrypoint bookinfo
  done < <(sed -n 's/^ *image: *//p' "$cluster/istio/samples/bookinfo/platform/kube/bookinfo.yaml")
}

# agnhost and busybox under the names the tests ask for: Kubernetes' own program, and what its image has of a distribution.
e2e_images() {
  local programs=(/usr/bin/{bash,curl,dash,dig,getent,nc.openbsd,ss,wget}) options name
  local registry=registry.k8s.io/e2e-test-images kubernetes
  kubernetes=$(cd "$here/go/e2e" && go list -m -f '{{.Dir}}' k8s.io/kubernetes)
  mapfile -t options < <(libraries "${programs[@]}")
  for name in "${programs[@]}"; do options+=(--file "$name:$name"); done
  options+=(--link ../usr/bin/dash:/bin/sh --file "$cluster/bin/agnhost:/agnhost" --file "$debian/bin/busybox:/bin/busybox" --link nc.openbsd:/usr/bin/nc)
  # Its shell would prefer its own, and its wget crashes.
  for name in $("$debian/bin/busybox" --list | grep -vxE 'busybox|sh|ash|bash|nc|ss|wget'); do options+=(--link "busybox:/bin/$name"); done
  for name in localhost.crt localhost.key; do options+=(--file "$kubernetes/test/images/agnhost/porter/$name:/$name:644"); done
  for name in $(sed -nE 's/.*PromoterE2eRegistry, "(agnhost|glibc-dns-testing)", "([^"]*)".*/\1:\2/p' "$kubernetes/test/utils/image/manifest.go"); do
    image "$registry/$name" "${options[@]}" --entrypoint /agnhost --cmd pause
  done
  for name in $(sed -nE 's/.*PromoterE2eRegistry, "(busybox)", "([^"]*)".*/\1:\2/p' "$kubernetes/test/utils/image/manifest.go"); do
    image "$registry/$name" "${options[@]}" --cmd sh
  done
}

# import N: brings node N what it does not have.
import() {
  local node=$cluster/node/$1 names
  wait_for 30 "containerd on node-$1" "$here/on-node.sh" "$1" test -S /run/containerd/containerd.sock
  names=$(python3 "$here/mkimage.py" import "$store" "$node/images.json" "$here/on-node.sh" "$1" "$cluster/bin/ctr" -n k8s.io images import --local -)
  [ -z "$names" ] || note "node-$1: $names"
}

say "images"
for group; do
  case $group in cluster | strata | e2e) "${group}_images" ;; *) die "images.sh: no group $group; there are: cluster, strata, e2e" ;; esac
done
python3 "$here/mkimage.py" add "$store" "${plan[@]}"
imports=()
for n in $NODES; do
  if alive "$cluster/node/$n/init.pid"; then import "$n" & imports+=($!); else note "node-$n does not run"; fi
done
for job in "${imports[@]}"; do wait "$job"; done
