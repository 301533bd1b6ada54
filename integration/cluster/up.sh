#!/usr/bin/env bash
# up.sh: a control plane and one real node (containerd and kubelet) for each letter in $NODES, with CoreDNS as its first workload.
# Needs what build.sh makes. On a running cluster it starts what is missing and leaves the rest alone.
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
# shellcheck source=pki.sh
. "$here/pki.sh"
[ "$(id -u)" = 0 ] || die "needs root: it makes network namespaces and mounts"
[ -x "$cluster/bin/kubectl" ] || die "nothing is built in $cluster: run build.sh (or make cluster)"
case $CNI in '' | ptp) ;; *) die "CNI=$CNI: only ptp, or nothing" ;; esac
case $SERVICES in '' | kube-proxy) ;; *) die "SERVICES=$SERVICES: only kube-proxy, or nothing" ;; esac
mkdir -p "$run"
make_pki

# --- network: a bridge on this machine, a namespace for each node --------------------------------------------------
ip link show $bridge >/dev/null 2>&1 || {
  ip link add $bridge type bridge; ip addr add $host_ip/24 dev $bridge; ip addr add $host_ip6/64 dev $bridge nodad; }
ip link set $bridge up
# Nothing of ours may leave by the machine's default route.
for range in $service_cidr $pod_cidr; do ip route replace blackhole "$range" metric 9999; done
for range in $service_cidr6 $pod_cidr6; do ip -6 route replace blackhole "$range" metric 9999; done
for n in $NODES; do
  [ ! -e "/run/netns/node-$n" ] || continue
  ip netns add "node-$n"
  ip link add "stv-$n" type veth peer name eth0 netns "node-$n"
  ip link set "stv-$n" master $bridge up
  ip -n "node-$n" addr add "$(node_ip "$n")/24" dev eth0
  ip -n "node-$n" addr add "$(node_ip6 "$n")/64" dev eth0 nodad
  ip -n "node-$n" link set lo up
  ip -n "node-$n" link set eth0 up
  ip -n "node-$n" route add default via $host_ip
  ip -n "node-$n" route add default via $host_ip6
done

# --- control plane -------------------------------------------------------------------------------------------------
# serve NAME COMMAND...: in the background, once; its log is $run/NAME.log.
serve() {
  local name=$1
  shift
  if alive "$run/$name.pid"; then return 0; fi
  note "$name"
  (cd "$run" && exec setsid "$@") >> "$run/$name.log" 2>&1 < /dev/null &
  remember "$run/$name.pid" $!
}
say "control plane"
etcd=http://127.0.0.1:23791 peer=http://127.0.0.1:23801
serve etcd etcd --data-dir "$run/etcd" --listen-client-urls $etcd --advertise-client-urls $etcd \
  --listen-peer-urls $peer --initial-advertise-peer-urls $peer --initial-cluster default=$peer
# With aggregator routing webhooks are called at their pods' addresses: this machine has routes to pods, not to services.
serve apiserver "$cluster/bin/kube" kube-apiserver --etcd-servers=$etcd --bind-address=$host_ip --advertise-address=$host_ip --secure-port=$api_port \
  --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" --client-ca-file="$pki/ca.crt" --cert-dir="$pki" \
  --kubelet-client-certificate="$pki/kubelet-client.crt" --kubelet-client-key="$pki/kubelet-client.key" --kubelet-certificate-authority="$pki/ca.crt" \
  --kubelet-preferred-address-types=InternalIP --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
  --service-account-key-file="$pki/sa.pub" --service-account-signing-key-file="$pki/sa.key" --service-account-issuer=https://kubernetes.default.svc \
  --service-cluster-ip-range=$service_cidr,$service_cidr6 --allow-privileged=true --enable-aggregator-routing=true
serve controller-manager "$cluster/bin/kube" kube-controller-manager --kubeconfig="$run/controller-manager.kubeconfig" --root-ca-file="$pki/ca.crt" \
  --service-account-private-key-file="$pki/sa.key" --use-service-account-credentials=true --leader-elect=false --secure-port=0 \
  --allocate-node-cidrs=true --cluster-cidr=$pod_cidr,$pod_cidr6 --node-cidr-mask-size-ipv4=24 --node-cidr-mask-size-ipv6=64 \
  --service-cluster-ip-range=$service_cidr,$service_cidr6
serve scheduler "$cluster/bin/kube" kube-scheduler --kubeconfig="$run/scheduler.kubeconfig" --leader-elect=false --secure-port=0

# --- nodes ---------------------------------------------------------------------------------------------------------
say "nodes: $(for n in $NODES; do printf 'node-%s (%s) ' "$n" "$(node_ip "$n")"; done)"
for n in $NODES; do "$here/node.sh" "$n"; done
wait_for 60 "the API server (see $run/apiserver.log)" kubectl get --raw /readyz || { tail -3 "$run/apiserver.log" >&2; exit 1; }
touch "$run/api-ready"
registered() { [ -n "$(kubectl get node "node-$1" -o 'jsonpath={.spec.podCIDR}')" ]; }
for n in $NODES; do
  wait_for 60 "node-$n to register (see $cluster/node/$n/log)" registered "$n" || { tail -3 "$cluster/node/$n/log/kubelet.log" >&2; exit 1; }
  # The API server reaches webhooks and this machine reaches pods through their nodes.
  ip route replace "$(kubectl get node "node-$n" -o 'jsonpath={.spec.podCIDR}')" via "$(node_ip "$n")"
done
"$here/images.sh" cluster

# --- a CNI of somebody else's, if asked for ------------------------------------------------------------------------
# CNI=ptp: Debian's plugin with static routes between the nodes.
ptp() {
  local m range
  range=$(kubectl get node "node-$1" -o 'jsonpath={.spec.podCIDR}')
  for m in $NODES; do [ "$m" = "$1" ] || ip -n "node-$m" route replace "$range" via "$(node_ip "$1")"; done
  "$here/on-node.sh" "$1" tee /etc/cni/net.d/10-ptp.conflist > /dev/null <<JSON
{"cniVersion": "1.0.0", "name": "ptp", "plugins": [{"type": "ptp", "mtu": 1500, "ipMasq": false,
  "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam", "ranges": [[{"subnet": "$range"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
JSON
}
if [ "$CNI" = ptp ]; then
  for n in $NODES; do ptp "$n"; done
  kubectl wait --for=condition=Ready node --all --timeout=60s > /dev/null
fi

# --- CoreDNS -------------------------------------------------------------------------------------------------------
kubectl apply --server-side --force-conflicts -f "$here/config/coredns.yaml" > /dev/null
if unserved; then kubectl -n kube-system set env deployment/coredns KUBERNETES_SERVICE_HOST=$host_ip KUBERNETES_SERVICE_PORT=$api_port > /dev/null; fi

say "up: $(kubectl get nodes --no-headers | awk '{ printf "%s %s  ", $1, $2 }')"
cat <<TEXT
    export KUBECONFIG=$KUBECONFIG
    export PATH=$cluster/bin:\$PATH        # kubectl, helm, istioctl
TEXT
[ -n "$CNI" ] || kubectl get nodes --no-headers | grep -qw Ready || note "Nodes stay NotReady and pods Pending until Strata (or another CNI) is installed; \`make cluster\` goes on with that."
