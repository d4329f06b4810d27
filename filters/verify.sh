#!/bin/sh
# Rebuilds every filter from two different directories and compares the bytes with the
# committed modules and digests. Exits 1 and names each module that differs.
#
# Usage: filters/verify.sh
set -eu

here=$(cd "$(dirname "$0")" && pwd -P)
root=$(dirname "$here")
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT INT TERM
fault=0

check() { # name, file it was built to, committed file
	if ! cmp -s "$2" "$3"; then
		echo "verify.sh: $1 differs from what its sources build:" >&2
		sha256sum "$3" "$2" >&2
		echo "verify.sh: run filters/build.sh and commit the result" >&2
		fault=1
	fi
}

for place in "$temp/a" "$temp/another/place"; do
	mkdir -p "$place"
	tar -C "$root" --exclude=target --exclude='*.wasm' -cf - filters build/testfilters | tar -C "$place" -xf -
	CARGO_TARGET_DIR=$place/target "$place/filters/build.sh" >/dev/null
	for name in ratelimit headers; do
		check "filters/$name.wasm" "$place/filters/$name.wasm" "$here/$name.wasm"
		check "filters/$name.wasm.sha256" "$place/filters/$name.wasm.sha256" "$here/$name.wasm.sha256"
	done
	probe=build/testfilters/probe.wasm
	check "$probe" "$place/$probe" "$root/$probe"
	check "$probe.sha256" "$place/$probe.sha256" "$root/$probe.sha256"
	rm -rf "$place/target"
done

[ $fault -eq 0 ] || exit 1
echo "verify.sh: two builds from two directories, the same bytes as committed"
