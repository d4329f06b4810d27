#!/bin/sh
# Makes sure that there is a Chromium to test the pages in, and the ChromeDriver that goes with it: the ones on PATH, or
# Debian's packages, which are installed when this runs as root.
set -eu

there() { command -v chromium >/dev/null && command -v chromedriver >/dev/null; }

if there; then
	echo "Chromium: $(command -v chromium), $(command -v chromedriver) (on PATH)"
	exit 0
fi
packages="chromium chromium-driver"
if ! command -v apt-get >/dev/null; then
	echo "chromium.sh: the pages' tests need chromium and chromedriver on PATH; install both with this system's package manager" >&2
	exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
	echo "chromium.sh: the pages' tests need chromium and chromedriver on PATH: sudo apt-get install $packages" >&2
	exit 1
fi
# apt-get does not wait for another one.
if command -v flock >/dev/null; then
	mkdir -p "$HOME/.cache/meshery-filters"
	exec 9>"$HOME/.cache/meshery-filters/chromium.lock"
	flock 9
	! there || exit 0
fi
echo "Chromium: installing the packages $packages with apt-get (about 400 MB)"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'exit 1' HUP INT TERM
# shellcheck disable=SC2086 # two words
{ apt-get update -q && apt-get install -q -y --no-install-recommends $packages; } >"$log" 2>&1 9>&- || { cat "$log" >&2; exit 1; }
there || { echo "chromium.sh: after the installation they are still not on PATH" >&2; exit 1; }
