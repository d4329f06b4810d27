#!/bin/sh
# Builds what tests run against, from its own Go module, into ~/.cache/meshery-filters/controlplanes, unless it is there.
# Cold that takes some 10 minutes of CPU and up to 3 GB of memory, so it is built with low priority, one at a time.
#
#   build.sh         build what is missing
#   build.sh path    print where the program is, whether it was built or not
set -eu
cd "$(dirname "$0")"

name=kubernetes
version=$(sed -n 's|^	k8s.io/kubernetes v\([0-9.]*\)$|\1|p' "$name/go.mod")
major=${version%%.*} minor=${version#*.} minor=${minor%%.*}
base=k8s.io/component-base/version
# Every program of a module is built with the same flags, so that they share the packages that they have in common.
ldflags="-s -w -X $base.gitVersion=v$version -X $base.gitMajor=$major -X $base.gitMinor=$minor"

# What it is made of names it, so that another version never passes for this one.
key=$({ go env GOVERSION GOOS GOARCH; echo "$ldflags"; cat "$name/go.mod" "$name/go.sum" "$name/main.go"; } | sha256sum | cut -c1-16)
place=$HOME/.cache/meshery-filters/controlplanes/$name-$version-$key

case "${1:-build}" in
path) echo "$place/$name"; exit 0 ;;
build) ;;
*) echo "build.sh: unknown argument $1" >&2; exit 2 ;;
esac

if [ -x "$place/$name" ]; then
	echo "Kubernetes $version: $place/$name (in the cache)"
	exit 0
fi
echo "Kubernetes $version: building etcd, API server and controller manager (some 10 minutes of CPU, once)"
mkdir -p "${place%/*}"
new=$(mktemp -d "$place.XXXXXX")
trap 'rm -rf "$new"' EXIT
trap 'exit 1' HUP INT TERM
go -C "$name" mod download
total=$(go -C "$name" list -deps . | wc -l)
start=$(date +%s)
{ CGO_ENABLED=0 nice -n 19 go -C "$name" build -v -trimpath -buildvcs=false -ldflags "$ldflags" -o "$new/$name" . 2>&1 || touch "$new/failed"; } |
	while read -r line; do
		case $line in
		*[:\ ]*) echo "$line" >&2 ;;
		*) n=$((${n:-0} + 1))
			[ $((n % 200)) -ne 0 ] || echo "Kubernetes: $n of at most $total packages after $(($(date +%s) - start)) s" ;;
		esac
	done
[ ! -e "$new/failed" ] || { echo "build.sh: Kubernetes could not be built" >&2; exit 1; }
"$new/$name" kube-apiserver --version >/dev/null || { echo "build.sh: what was built does not run here" >&2; exit 1; }
for part in etcd kube-apiserver kube-controller-manager; do
	ln -s "$name" "$new/$part" # KUBEBUILDER_ASSETS may point here
done
chmod 755 "$new"
# Renamed into place, so that nobody meets half of it. Whoever comes second finds the place taken, by the same.
[ -e "$place" ] || mv "$new" "$place" 2>/dev/null || true
[ -x "$place/$name" ] || { echo "build.sh: $place cannot be written" >&2; exit 1; }
echo "Kubernetes $version: built in $(($(date +%s) - start)) s: $place/$name"
