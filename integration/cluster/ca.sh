#!/usr/bin/env bash
# ca.sh [adopt|add|switch|drop]: the mesh's CA as an administrator plugs it into istiod (Secret istio-system/cacerts), and a new root in its
# three steps: add (the next root is trusted beside the present one), switch (the next one signs; restart what should get new
# certificates at once), drop (the old root is trusted no more). Without an argument: the present one, from then on; adopt: the
# present one is the one that the control plane made itself.
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
cas=$run/pki/mesh
mkdir -p "$cas"
[ -f "$cas/number" ] || echo 1 > "$cas/number"
present=$(cat "$cas/number")
next=$((present + 1))

# make N: root N and the intermediate that signs for it.
make() {
  [ ! -f "$cas/$1-ca.crt" ] || return 0
  openssl ecparam -name prime256v1 -genkey -noout -out "$cas/$1-root.key"
  openssl req -x509 -new -key "$cas/$1-root.key" -days 3650 -subj "/O=strata-cluster/CN=mesh root $1" -out "$cas/$1-root.crt"
  openssl ecparam -name prime256v1 -genkey -noout -out "$cas/$1-ca.key"
  openssl req -new -key "$cas/$1-ca.key" -subj "/O=strata-cluster/CN=mesh CA $1" |
    openssl x509 -req -CA "$cas/$1-root.crt" -CAkey "$cas/$1-root.key" -CAcreateserial -days 3650 \
      -extfile <(printf 'basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,cRLSign\n') -out "$cas/$1-ca.crt" 2>/dev/null
}

# plug SIGNER ROOT...: the Secret.
plug() {
  local signer=$1 roots=()
  shift
  for n; do roots+=("$cas/$n-root.crt"); done
  kubectl get namespace istio-system > /dev/null 2>&1 || kubectl create namespace istio-system > /dev/null
  kubectl -n istio-system create secret generic cacerts --dry-run=client -o yaml \
    --from-file="ca-cert.pem=$cas/$signer-ca.crt" --from-file="ca-key.pem=$cas/$signer-ca.key" \
    --from-file=root-cert.pem=<(cat "${roots[@]}") --from-file=cert-chain.pem=<(cat "$cas/$signer-ca.crt" "$cas/$signer-root.crt") |
    kubectl apply --server-side --force-conflicts -f - > /dev/null
}

# own KEY: of the CA that the control plane made.
own() { kubectl -n istio-system get secret istio-ca-secret -o "jsonpath={.data.$1}" | base64 -d; }
if [ "${1:-}" = adopt ]; then
  own 'ca-key\.pem' > "$cas/$present-ca.key"
  own 'ca-cert\.pem' | tee "$cas/$present-root.crt" > "$cas/$present-ca.crt"
fi
make "$present"
case ${1:-} in
  '' | adopt) plug "$present" "$present" ;;
  add) make $next; plug "$present" "$present" $next ;;
  switch) plug $next "$present" $next ;;
  drop) plug $next $next; echo $next > "$cas/number" ;;
  *) die "ca.sh: adopt, add, switch or drop" ;;
esac
