#!/bin/sh
# Builds what tests run against, each stack from its own Go module, into ~/.cache/meshery-filters/controlplanes, unless it
# is there. Cold that takes some 24 minutes of CPU and up to 3 GB of memory, so it is built with low priority, one after
# the other.
#
#   build.sh [STACK…]      build what is missing; default: kubernetes istio consul
#   build.sh path STACK    print the folder of its programs, whether they were built or not
set -eu
cd "$(dirname "$0")"

# describe STACK sets what it is called, its version and what it is linked with. Every program of a module is built with
# the same flags, so that they share the packages that they have in common.
describe() {
	name=$1 files=
	case $name in
	kubernetes)
		title=Kubernetes
		version=$(sed -n 's|^	k8s.io/kubernetes v\([0-9.]*\)$|\1|p' kubernetes/go.mod)
		programs=kubernetes
		major=${version%%.*} minor=${version#*.} minor=${minor%%.*}
		base=k8s.io/component-base/version
		ldflags="-s -w -X $base.gitVersion=v$version -X $base.gitMajor=$major -X $base.gitMinor=$minor" ;;
	istio)
		title=Istio
		version=$(sed -n 's|^.*istio.io/istio v[^ ]*-\([0-9a-f]*\).*$|\1|p' istio/go.mod)
		programs="pilot-discovery pilot-agent" files=gateway-api.yaml
		ldflags="-s -w" ;;
	consul)
		title=Consul
		version=$(sed -n 's|^.*github.com/hashicorp/consul v\([0-9.]*\).*$|\1|p' consul/go.mod)
		programs=consul
		ldflags="-s -w" ;;
	*) echo "build.sh: there is no stack $name" >&2; exit 2 ;;
	esac
	# What it is made of names it, so that another version never passes for this one.
	key=$({ go env GOVERSION GOOS GOARCH; echo "$ldflags"; printf %s "$files"; cat "$name/go.mod" "$name/go.sum"; find "$name" -name '*.go' -exec cat {} +; } | sha256sum | cut -c1-16)
	place=$HOME/.cache/meshery-filters/controlplanes/$name-$version-$key
}

# with PROGRAM COMMAND… runs a command of the go tool on a program's package, with the tags that it is built with.
with() {
	program=$1
	shift
	tags=disable_pgv,grpcnotrace,retrynotrace,vtprotobuf # Istio's own; those of the agent would take too much from istiod
	case $program in
	kubernetes) nice -n 19 go -C kubernetes "$@" . ;;
	pilot-discovery) nice -n 19 go -C istio "$@" -tags "$tags" istio.io/istio/pilot/cmd/pilot-discovery ;;
	pilot-agent) nice -n 19 go -C istio "$@" -tags "agent,$tags" istio.io/istio/pilot/cmd/pilot-agent ;;
	consul) nice -n 19 go -C consul "$@" github.com/hashicorp/consul ;;
	esac
}

# finish adds what tests want besides the programs, and runs each of these once.
finish() {
	case $name in
	kubernetes)
		"$new/kubernetes" kube-apiserver --version
		for part in etcd kube-apiserver kube-controller-manager; do
			ln -s kubernetes "$new/$part" # KUBEBUILDER_ASSETS may point here
		done ;;
	istio)
		"$new/pilot-discovery" version 2>&1 && "$new/pilot-agent" version 2>&1
		source=$(go -C istio list -m -f '{{.Dir}}' istio.io/istio)
		cp "$source/manifests/charts/base/files/crd-all.gen.yaml" "$new/crds.yaml"
		cp "$source/tools/packaging/common/envoy_bootstrap.json" "$new/envoy_bootstrap.json"
		source=$(go -C istio list -m -f '{{.Dir}}' sigs.k8s.io/gateway-api)
		for crd in "$source"/config/crd/standard/gateway.networking.k8s.io_*s.yaml; do
			case $crd in *_vap_*) continue ;; esac # a policy against older ones
			cat "$crd"
			echo ---
		done >"$new/$files" ;;
	consul) "$new/consul" version ;;
	esac
}

# lock waits until nobody else builds, and deletes what killed ones have left.
lock() {
	[ -z "${locked:-}" ] || return 0
	mkdir -p "${place%/*}"
	command -v flock >/dev/null || return 0
	exec 9>"${place%/*}/.lock"
	flock -n 9 || { echo "$title $version: waiting for another build.sh"; flock 9; }
	locked=1
	rm -rf "${place%/*}"/*.??????
}

build() {
	if [ -e "$place" ]; then
		echo "$title $version: $place (in the cache)"
		return
	fi
	lock
	if [ -e "$place" ]; then
		echo "$title $version: $place (built meanwhile)"
		return
	fi
	echo "$title $version: downloading and building $programs (minutes of CPU, once)"
	new=$(mktemp -d "$place.XXXXXX")
	go -C "$name" mod download
	total=$(for p in $programs; do with "$p" list -deps; done | sort -u | wc -l)
	start=$(date +%s)
	for p in $programs; do
		CGO_ENABLED=0 with "$p" build -v -trimpath -buildvcs=false -ldflags "$ldflags" -o "$new/$p" 2>&1 || touch "$new/failed"
	done |
		while read -r line; do
			case $line in
			*[:\ ]*) echo "$line" >&2 ;;
			*) n=$((${n:-0} + 1))
				[ $((n % 200)) -ne 0 ] || echo "$title: $n of at most $total packages after $(($(date +%s) - start)) s" ;;
			esac
		done
	[ ! -e "$new/failed" ] || { echo "build.sh: $title could not be built" >&2; exit 1; }
	finish >/dev/null || { echo "build.sh: what was built does not run here" >&2; exit 1; }
	chmod -R u=rwX,go=rX "$new"
	# Renamed into place, so that nobody meets half of it. Whoever comes second finds the place taken, by the same.
	[ -e "$place" ] || mv "$new" "$place" 2>/dev/null || true
	[ -e "$place" ] || { echo "build.sh: $place cannot be written" >&2; exit 1; }
	rm -rf "$new"
	echo "$title $version: built in $(($(date +%s) - start)) s: $place"
}

if [ "${1:-}" = path ]; then
	describe "${2:-}"
	echo "$place"
	exit
fi
[ $# -gt 0 ] || set -- kubernetes istio consul
new=
trap 'rm -rf "$new"' EXIT
trap 'exit 1' HUP INT TERM
for stack in "$@"; do
	describe "$stack"
	build
done
