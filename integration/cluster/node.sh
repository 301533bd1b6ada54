#!/usr/bin/env bash
# node.sh N: starts node N (a letter): writes the configuration of its containerd and kubelet (and kube-proxy, if it is asked for) and runs
# them in namespaces of their own. Also what boots a node again whose init was killed: its disk stays in $STRATA_CLUSTER_DIR/node/N.
#
# A node is a network namespace (made by up.sh) plus mount, UTS, IPC, PID and cgroup namespaces. Its root is an overlay over this
# machine's with /run, /proc, /sys, bpffs and cgroups of its own, so every path in it is the standard one and hostPath, hostPID
# and hostNetwork mean that node. Its processes enter a cgroup node-N in every hierarchy before the cgroup namespace is made: what
# a DaemonSet attaches to the node's root cgroup reaches that node's processes and no other's.
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
n=$1; node=$cluster/node/$n

# The second half, in the namespaces: builds the root, then keeps containerd and the kubelet running for ever.
inside() {
  local root=$node/root controller folder
  mount --make-rprivate /
  mount -t overlay overlay -o "lowerdir=/,upperdir=$node/upper,workdir=$node/work" "$root" ||
    die "cannot mount an overlay in $node: STRATA_CLUSTER_DIR must be on an ordinary disk, not itself on an overlay"
  mkdir -p "$root"/{var/lib/kubelet,var/lib/containerd,var/log/pods,etc/cni/net.d,opt/cni/bin,.old} "$root$cluster"
  mount --bind "$cluster" "$root$cluster"
  mount --bind "$node/kubelet" "$root/var/lib/kubelet"
  mount --bind "$node/containerd" "$root/var/lib/containerd"      # an overlay cannot hold another overlay's upper folder
  mount --rbind /dev "$root/dev"
  mount -t tmpfs tmpfs "$root/run"
  mount -t proc proc "$root/proc"
  mount -t sysfs sysfs "$root/sys"
  mount -t bpf bpf "$root/sys/fs/bpf"
  mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
  for folder in /sys/fs/cgroup/*/; do
    controller=$(basename "$folder"); mkdir "$root/sys/fs/cgroup/$controller"
    case $controller in
      unified) mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup/unified" ;;
      systemd) mount -t cgroup -o none,name=systemd cgroup "$root/sys/fs/cgroup/systemd" ;;
      *) mount -t cgroup -o "$controller" cgroup "$root/sys/fs/cgroup/$controller" ;;
    esac
  done
  cd "$root"; pivot_root . .old; cd /; umount -l /.old
  mount --make-rshared /                                          # mounts made by pods with Bidirectional propagation show

  hostname "node-$n"
  mkdir -p /run/netns /run/lock
  printf '127.0.0.1 localhost\n%s node-%s\n' "$(node_ip "$n")" "$n" > /etc/hosts
  printf 'nameserver %s\n' "$dns_ip" > /etc/resolv.conf
  printf 'node-%s' "$n" | md5sum | cut -c1-32 > /run/machine-id; mount --bind /run/machine-id /etc/machine-id
  sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0 net.ipv6.conf.all.forwarding=1
  cp -u "$debian"/usr/lib/cni/* /opt/cni/bin/                     # as distributions ship them; containerd wants `loopback`

  export PATH=$cluster/bin:$debian/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
  unset KUBECONFIG
  forever containerd containerd --config "$node/containerd.toml" &
  # Started before the API server answers, the kubelet only collects back-off.
  { until [ -S /run/containerd/containerd.sock ] && [ -f "$run/api-ready" ]; do sleep 0.1; done
    forever kubelet kube kubelet --config "$node/kubelet.yaml" --kubeconfig "$run/node-$n.kubeconfig" --hostname-override "node-$n" \
      --node-ip "$(node_ip "$n"),$(node_ip6 "$n")" --root-dir /var/lib/kubelet --cert-dir /var/lib/kubelet/pki; } &
  [ -z "$SERVICES" ] || forever kube-proxy kube kube-proxy --config "$node/kube-proxy.yaml" --hostname-override "node-$n" &
  exec "$debian/usr/bin/tini-static" -- sleep infinity            # init: reaps what the shims leave behind
}

# forever NAME COMMAND...: runs it again whenever it ends.
forever() {
  local name=$1
  shift
  while :; do "$@" >> "$node/log/$name.log" 2>&1 || true; sleep 0.5; done
}

configuration() {
  cat > "$node/containerd.toml" <<TOML
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = "ks.local/pause:1"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true   # without CAP_SYS_RESOURCE nobody may lower a score
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/opt/cni/bin"]
    conf_dir = "/etc/cni/net.d"
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = "runc"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
        SystemdCgroup = false
        BinaryName = "$cluster/bin/strata-runc"
TOML
  # Leave localStorageCapacityIsolation alone: switched off, it breaks the kubelet's disk metrics.
  cat > "$node/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $(node_ip "$n")
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $run/pki/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $run/pki/node-$n.crt
tlsPrivateKeyFile: $run/pki/node-$n.key
makeIPTablesUtilChains: false
clusterDNS: [$dns_ip]
clusterDomain: cluster.local
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
resolvConf: /etc/resolv.conf
syncFrequency: 10s
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
logging: {verbosity: 2}
YAML
  # The numbers for conntrack belong to the whole machine.
  cat > "$node/kube-proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clientConnection: {kubeconfig: $run/kube-proxy.kubeconfig}
clusterCIDR: $pod_cidr,$pod_cidr6
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
metricsBindAddress: $(node_ip "$n"):10249
healthzBindAddress: $(node_ip "$n"):10256
YAML
}

# This shell's own cgroup in every mounted hierarchy, as folders.
own_cgroups() {
  local folder controller path
  for folder in /sys/fs/cgroup/*/; do
    controller=$(basename "$folder")
    case $controller in
      unified) path=$(awk -F: '$1 == 0 { print $3 }' /proc/self/cgroup) ;;
      systemd) path=$(awk -F: '$2 == "name=systemd" { print $3 }' /proc/self/cgroup) ;;
      *) path=$(awk -F: -v c="$controller" '$2 == c { print $3 }' /proc/self/cgroup) ;;
    esac
    printf '%s\n' "${folder%/}${path%/}"
  done
}

# The node's cgroups, one below this shell's own in every hierarchy. Leftovers of a killed node go first: the kubelet's cAdvisor
# waits three seconds for each container cgroup without a process.
make_cgroups() {
  local parent
  if [ -f "$node/cgroups" ]; then remove_cgroups "$node/cgroups"; fi
  : > "$node/cgroups"
  while read -r parent; do
    mkdir -p "$parent/node-$n"
    printf '%s\n' "$parent/node-$n" >> "$node/cgroups"
    if [ -f "$parent/cpuset.cpus" ]; then     # a new v1 cpuset is empty and takes no process
      cat "$parent/cpuset.cpus" > "$parent/node-$n/cpuset.cpus"; cat "$parent/cpuset.mems" > "$parent/node-$n/cpuset.mems"
    fi
  done < <(own_cgroups)
}

# The node's init, as this machine numbers it: the first child in another PID namespace (bash has short-lived ones before).
find_init() {
  local pid space
  for pid in $(pgrep -P "$1"); do
    space=$(readlink "/proc/$pid/ns/pid") || continue
    [ "$space" = "$(readlink /proc/self/ns/pid)" ] || { remember "$node/init.pid" "$pid"; return 0; }
  done
  return 1
}

if [ "${2:-}" = inside ]; then inside; fi
if alive "$node/init.pid"; then exit 0; fi
mountpoint -q /sys/fs/cgroup/unified || die "needs cgroup v1 hierarchies with cgroup v2 at /sys/fs/cgroup/unified (\"hybrid\") on this machine"
mkdir -p "$node"/{upper,work,root,kubelet,containerd,log}
configuration
make_cgroups
# shellcheck disable=SC2016
setsid bash -c 'node=$1; shift
  while read -r folder; do echo $$ > "$folder/cgroup.procs"; done < "$node/cgroups"
  exec nsenter --net="/run/netns/node-$2" unshare --mount --uts --ipc --pid --cgroup --fork --kill-child "$@" inside' \
  - "$node" "$here/node.sh" "$n" > "$node/log/node.log" 2>&1 < /dev/null &
remember "$node/unshare.pid" $!
wait_for 10 "node-$n" find_init "$!" || { cat "$node/log/node.log" >&2; exit 1; }
