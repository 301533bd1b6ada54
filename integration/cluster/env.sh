# Settings and small functions that every script here shares. `source integration/cluster/env.sh` in your own shell gives it
# KUBECONFIG and a PATH with this cluster's kubectl, helm and istioctl.
# shellcheck shell=bash disable=SC2034

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
# shellcheck source=versions.sh
. "$here/versions.sh"

cluster=${STRATA_CLUSTER_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/strata-cluster}   # everything built and every state; nothing is elsewhere
run=$cluster/run              # control plane: keys, etcd's data, process ids, logs
debian=$cluster/debian        # unpacked Debian packages

NODES=${NODES:-a b}           # one letter a node: a is 10.99.0.11, b is 10.99.0.12 …
CNI=${CNI:-}                  # empty: nodes are NotReady until somebody (Strata's agent) writes a CNI configuration; ptp: Debian's plugin
SERVICES=${SERVICES:-}          # empty: nobody answers at Services until Strata does; kube-proxy: Kubernetes' own, by nftables
CONTROL=${CONTROL:-istiod}    # who configures the mesh: istiod, or embedded: strata-control, installed with Strata's chart
bridge=strata0
host_ip=10.99.0.1             # of the bridge: the API server, etcd and this machine as the nodes see it
api_port=7443
# Dual-stack; the service ranges are kubeadm's own, in which the sample's fixed addresses are.
pod_cidr=10.88.0.0/16         # each node gets a /24 of it
pod_cidr6=fd00:88::/48        # and a /64 of this
service_cidr=10.96.0.0/16
service_cidr6=fd00:96::/112
dns_ip=10.96.0.10
node_ip() { printf '10.99.0.%d' $((10 + $(printf '%d' "'$1") - 96)); }
node_ip6() { printf 'fd00:99::%d' $((10 + $(printf '%d' "'$1") - 96)); }
host_ip6=fd00:99::1
# Until somebody serves Services, pods that need the API server are told where it really is.
unserved() { [ "$CNI" = ptp ] && [ -z "$SERVICES" ]; }

export KUBECONFIG=$run/admin.kubeconfig
export PATH=$cluster/bin:$PATH:$HOME/.cargo/bin

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
note() { printf '    %s\n' "$*"; }
die() { printf 'cluster: %s\n' "$*" >&2; exit 1; }

# wait_for SECONDS WHAT COMMAND...: repeats COMMAND, ten times a second, until it succeeds.
wait_for() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { printf 'cluster: waited in vain for %s\n' "$what" >&2; return 1; }
    sleep 0.1
  done
}

# Process ids are kept together with the process's start time, so that a number used again is never taken for ours.
started() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
remember() { printf '%s %s\n' "$2" "$(started "$2")" > "$1"; }      # FILE PID
alive() {                                                           # FILE
  local pid start
  read -r pid start 2>/dev/null < "$1" || return 1
  [ -n "$start" ] && [ "$(started "$pid")" = "$start" ] && ! grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null
}
process() { cut -d' ' -f1 "$1"; }                                   # FILE: the process id in it

# remove_cgroups FILE: ends what still runs in the cgroups that FILE lists, and removes them with all below.
remove_cgroups() {
  local folder left
  for _ in $(seq 50); do
    left=
    while read -r folder; do
      [ -d "$folder" ] || continue
      left=$folder
      find "$folder" -name cgroup.procs -exec xargs -r -a {} kill -9 \; 2>/dev/null || true
      find "$folder" -depth -type d -exec rmdir {} + 2>/dev/null || true
    done < "$1"
    [ -n "$left" ] || return 0
    sleep 0.1
  done
  printf 'cluster: cgroups are left: %s\n' "$left" >&2
  return 1
}
