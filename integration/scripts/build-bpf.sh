#!/bin/sh
# Builds the kernel programs (bpf/programs) to one ELF object: target/bpf/strata.bpf.o, or $STRATA_BPF_OBJECT.
# Skips when the object is newer than every source; FORCE=1 builds anyway.
#
# Needs bpf-linker and the sources of core. Two toolchains do:
#   Debian's:  /usr/bin/cargo, /usr/bin/rustc and rust-src below /usr/lib/rustlib/src (package rust-web-src or rust-src)
#   rustup's:  a nightly toolchain with the component rust-src
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
object=${STRATA_BPF_OBJECT:-$root/target/bpf/strata.bpf.o}
programs=$root/bpf/programs

if [ -z "${FORCE:-}" ] && [ -s "$object" ] && [ -f "$object.stamp" ]; then
    newer=$(find "$root/bpf" -path '*/target' -prune -o \( -name '*.rs' -o -name '*.toml' -o -name 'Cargo.lock' \) \
        -newer "$object.stamp" -print | grep -v '/tests/' | head -n 1)
    if [ -z "$newer" ]; then
        exit 0
    fi
fi

PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
export PATH
if ! command -v bpf-linker >/dev/null; then
    echo "build-bpf: bpf-linker is missing. Install LLVM's development files, then for example:" >&2
    echo "  LLVM_PREFIX=/usr/lib/llvm-22 LIBRARY_PATH=/usr/lib/llvm-22/lib cargo install bpf-linker --no-default-features --features llvm-22" >&2
    exit 1
fi

# The environment of an outer cargo (a test, a build script) must not leak into this one.
unset RUSTFLAGS CARGO_TARGET_DIR CARGO_BUILD_TARGET CARGO_ENCODED_RUSTFLAGS RUSTUP_TOOLCHAIN RUSTC_WRAPPER RUSTC CARGO
cd "$programs"
if [ -x /usr/bin/cargo ] && [ -x /usr/bin/rustc ] && [ -f "$(/usr/bin/rustc --print sysroot)/lib/rustlib/src/rust/library/core/src/lib.rs" ]; then
    RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 /usr/bin/cargo build --release --locked
elif command -v rustup >/dev/null && rustup component list --toolchain nightly 2>/dev/null | grep -q 'rust-src (installed)'; then
    rustup run nightly cargo build --release --locked
else
    echo "build-bpf: no toolchain with the sources of core: install Debian's rustc and rust-src packages, or" >&2
    echo "  rustup toolchain install nightly --component rust-src" >&2
    exit 1
fi

mkdir -p "$(dirname "$object")"
built=$programs/target/bpfel-unknown-none/release/strata-bpf
# Only replaced when it differs, so that what embeds it is not rebuilt for nothing; the stamp is what
# the check above looks at.
if ! cmp -s "$built" "$object"; then
    cp "$built" "$object.new"
    mv "$object.new" "$object"
fi
touch "$object.stamp"
