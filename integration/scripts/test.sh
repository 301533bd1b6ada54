#!/usr/bin/env bash
# test.sh [ARGS...]: every test, or those that these arguments of `cargo test` choose. What failed is told again at the end, shortly in the last lines, which is what CI keeps of a log.
# With STRATA_TEST_AGAIN=1, as in .ci/run, a target that failed is played once more, alone, and called UNSTEADY if it passes then:
# machines of CI stop for seconds. A target that fails twice fails the run.
set -uo pipefail
cd "$(dirname "$0")/../.."

log=target/test.log
run() { cargo test --no-fail-fast "$@" 2>&1 | tee "$log"; }
failures() { awk '/^failures:$/ { inside = 1 } inside { print } /^test result: FAILED/ { inside = 0 }' "$log"; }
# "  `-p l4-agent --test agent`" as arguments; with --workspace, as one package alone would be built with other features.
targets() { sed -nE 's/^ +`(.*)`$/\1/p' "$log" | sed -E 's/^-p [^ ]+ --test/--workspace --test/'; }
shortly() { grep -A1 'panicked at' | cut -c1-250 | head -8; }

run --workspace "$@" && exit
first=$(failures)
mapfile -t failed < <(targets)
outcome=failed
if [ "${STRATA_TEST_AGAIN:-}" = 1 ] && [ ${#failed[@]} -gt 0 ] && [ ${#failed[@]} -le 2 ]; then
  outcome=unsteady
  for target in "${failed[@]}"; do
    # shellcheck disable=SC2086  # The target's arguments.
    run $target "$@" || outcome=failed
  done
fi
printf '\n==== what failed ====\n%s\n==== shortly ====\n' "$first"
shortly <<<"$first"
printf 'failed: cargo test %s\n' "${failed[@]}"
[ $outcome = unsteady ] || exit 1
echo "UNSTEADY: passed when played again"
