#!/usr/bin/env bash
# on-node.sh N COMMAND...: runs COMMAND inside node N (a, or node-a): its namespaces and its cgroups, as over ssh. The working folder is /.
set -euo pipefail
# shellcheck source=env.sh
. "$(dirname "$0")/env.sh"
[ $# -ge 2 ] || die "usage: on-node.sh N COMMAND..."
n=${1##*-}; node=$cluster/node/$n; shift
alive "$node/init.pid" || die "node-$n does not run: up.sh"
while read -r folder; do echo $$ > "$folder/cgroup.procs"; done < "$node/cgroups"
exec nsenter -t "$(process "$node/init.pid")" -m -u -i -n -p -C -- "$@"
