#!/usr/bin/env bash
# down.sh [--wipe]: ends everything that up.sh started and takes back what it made: processes, namespaces, cgroups, devices, routes.
# The cluster's state and the nodes' disks stay (up.sh then boots the same cluster again) unless --wipe is given. What build.sh
# made always stays.
# down.sh PART...: ends only that much: apiserver, controller-manager, scheduler, etcd, or a node (node-a). up.sh starts it again.
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
wrong=0

# shellcheck disable=SC2317
dead() { ! alive "$1"; }   # FILE
# end SIGNAL FILE: ends the process in FILE, if it is still ours, and waits for it.
end() {
  [ -f "$2" ] || return 0
  if alive "$2"; then
    kill "-$1" "$(process "$2")" 2>/dev/null || true
    wait_for 15 "the end of $2" dead "$2" || wrong=1
  fi
  rm -f "$2"
}

# An API server asked kindly drains for a minute; etcd is asked, so that its files are whole.
end_control() { case $1 in etcd) end TERM "$run/etcd.pid" ;; *) end KILL "$run/$1.pid" ;; esac; }
# A node's init takes its whole PID namespace along.
end_node() { end KILL "$cluster/node/$1/init.pid"; end KILL "$cluster/node/$1/unshare.pid"; }

if [ $# -gt 0 ] && [ "$1" != --wipe ]; then
  for part; do
    case $part in
      apiserver | controller-manager | scheduler | etcd) end_control "$part" ;;
      node-*) [ -d "$cluster/node/${part#node-}" ] || die "no node $part"; end_node "${part#node-}" ;;
      *) die "no part $part; see the head of $0" ;;
    esac
  done
  exit $wrong
fi

nodes=$(ls "$cluster/node" 2>/dev/null || true)
for n in $nodes; do end_node "$n"; done
for part in scheduler controller-manager apiserver etcd; do end_control "$part"; done
rm -f "$run/api-ready"
for n in $nodes; do
  if [ -f "$cluster/node/$n/cgroups" ]; then remove_cgroups "$cluster/node/$n/cgroups" || wrong=1; fi
  ip netns del "node-$n" 2>/dev/null || true
  ip link del "stv-$n" 2>/dev/null || true
done
ip link del $bridge 2>/dev/null || true
for range in $service_cidr $pod_cidr; do ip route del blackhole "$range" metric 9999 2>/dev/null || true; done
for range in $service_cidr6 $pod_cidr6; do ip -6 route del blackhole "$range" metric 9999 2>/dev/null || true; done
if [ "${1:-}" = --wipe ]; then rm -rf "$run" "$cluster/node"; fi
exit $wrong
