# Keys, certificates and kubeconfigs, as kubeadm lays them out: one CA; the API server's serving certificate; client certificates for
# the administrator, controller-manager, scheduler, kube-proxy and kubelets; serving certificates of the kubelets. Sourced by up.sh.
# shellcheck shell=bash
# shellcheck disable=SC2154

pki=$run/pki

# sign NAME SUBJECT [SAN]: a key and a certificate by the cluster's CA, unless they are there.
sign() {
  [ ! -f "$pki/$1.crt" ] || return 0
  openssl ecparam -name prime256v1 -genkey -noout -out "$pki/$1.key"
  printf 'extendedKeyUsage=serverAuth,clientAuth\n%s\n' "${3:+subjectAltName=$3}" > "$pki/$1.ext"
  openssl req -new -key "$pki/$1.key" -subj "$2" |
    openssl x509 -req -CA "$pki/ca.crt" -CAkey "$pki/ca.key" -CAcreateserial -days 3650 -extfile "$pki/$1.ext" -out "$pki/$1.crt" 2>/dev/null
  rm "$pki/$1.ext"
}

# kubeconfig FILE NAME: a client configuration with certificate NAME.
kubeconfig() {
  cat > "$1" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: strata, cluster: {server: "https://$host_ip:$api_port", certificate-authority: $pki/ca.crt}}]
users: [{name: $2, user: {client-certificate: $pki/$2.crt, client-key: $pki/$2.key}}]
contexts: [{name: strata, context: {cluster: strata, user: $2}}]
current-context: strata
YAML
}

make_pki() {
  mkdir -p "$pki"
  if [ ! -f "$pki/ca.crt" ]; then
    openssl ecparam -name prime256v1 -genkey -noout -out "$pki/ca.key"
    openssl req -x509 -new -key "$pki/ca.key" -days 3650 -subj /CN=strata-cluster -out "$pki/ca.crt"
  fi
  # Service account tokens are signed with RSA, as kubeadm has it: every verifier knows it.
  [ -f "$pki/sa.key" ] || openssl genrsa -out "$pki/sa.key" 2048 2>/dev/null
  openssl rsa -in "$pki/sa.key" -pubout -out "$pki/sa.pub" 2>/dev/null
  local names=DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local
  sign apiserver /CN=kube-apiserver "$names,IP:$host_ip,IP:127.0.0.1,IP:${service_cidr%.*.*}.0.1"
  sign kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client
  sign admin /O=system:masters/CN=admin
  sign controller-manager /CN=system:kube-controller-manager
  sign scheduler /CN=system:kube-scheduler
  sign kube-proxy /CN=system:kube-proxy
  kubeconfig "$KUBECONFIG" admin
  kubeconfig "$run/controller-manager.kubeconfig" controller-manager
  kubeconfig "$run/scheduler.kubeconfig" scheduler
  kubeconfig "$run/kube-proxy.kubeconfig" kube-proxy
  local n
  for n in $NODES; do
    sign "node-$n" "/O=system:nodes/CN=system:node:node-$n" "IP:$(node_ip "$n"),DNS:node-$n"
    kubeconfig "$run/node-$n.kubeconfig" "node-$n"
  done
}
