#!/bin/sh
# Builds the filters and writes each module with its digest: the shipped ones here, the one
# for tests to build/testfilters. The bytes depend on the sources, Cargo.lock and the
# compiler named in rust-toolchain.toml only, not on where the tree lies; verify.sh proves it.
#
# Usage: filters/build.sh [NAME…]    (default: every filter)
# Environment: CARGO_TARGET_DIR      (default: ~/.cache/meshery-filters/cargo-target)
set -eu

here=$(cd "$(dirname "$0")" && pwd -P)
root=$(dirname "$here")
target=wasm32-unknown-unknown
: "${CARGO_TARGET_DIR:=$HOME/.cache/meshery-filters/cargo-target}"
: "${CARGO_HOME:=$HOME/.cargo}"
export CARGO_TARGET_DIR
cd "$here" # rust-toolchain.toml counts from the working directory

if [ ! -d "$(rustc --print sysroot)/lib/rustlib/$target" ]; then
	echo "build.sh: rust target $target is missing: installing it with rustup" >&2
	rustup target add "$target"
fi

# Panic messages name source files; without these the file names would be this machine's.
# Fetched first, since the directory that the sources lie in is named after the registry.
cargo fetch --quiet --locked --target "$target"
sysroot=$(rustc --print sysroot)
commit=$(rustc -vV | sed -n 's/^commit-hash: //p')
flag() { printf '%s\037' "--remap-path-prefix=$1=$2"; }
CARGO_ENCODED_RUSTFLAGS=$(
	flag "$CARGO_TARGET_DIR" /target
	flag "$sysroot/lib/rustlib/src/rust" "/rustc/$commit"
	flag "$CARGO_HOME" /cargo
	for sources in "$CARGO_HOME"/registry/src/*; do
		flag "$sources" /cargo/registry
	done
	flag "$root" /src
)
CARGO_ENCODED_RUSTFLAGS=${CARGO_ENCODED_RUSTFLAGS%?}
export CARGO_ENCODED_RUSTFLAGS
unset RUSTFLAGS

[ $# -gt 0 ] || set -- ratelimit headers probe
for name in "$@"; do
	case $name in
	probe) out=$root/build/testfilters manifest=$out/probe/Cargo.toml ;;
	*) out=$here manifest=$here/Cargo.toml ;;
	esac
	cargo build --quiet --release --locked --target "$target" --manifest-path "$manifest" -p "$name"
	# Written beside and moved, so that a reader never meets half a module.
	cp "$CARGO_TARGET_DIR/$target/release/$name.wasm" "$out/.$name.wasm.new"
	chmod 644 "$out/.$name.wasm.new"
	mv "$out/.$name.wasm.new" "$out/$name.wasm"
	(cd "$out" && sha256sum "$name.wasm" >"$name.wasm.sha256")
	echo "$name: $(wc -c <"$out/$name.wasm") bytes, sha256 $(cut -d' ' -f1 "$out/$name.wasm.sha256")"
done
