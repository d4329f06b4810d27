#!/bin/sh
# Runs a demo, and then sabotages it in every way that it knows: it must notice each time. Its output is shown only
# when something is wrong.
#
# Usage: build/testdemo.sh COMMAND…
# Environment: SABOTAGE              (default: digest nofilter nack)
set -eu

temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
trap 'exit 1' HUP INT TERM

fail() {
	cat "$temp/out"
	echo "testdemo.sh: $1" >&2
	exit 1
}

"$@" --report "$temp/report.json" >"$temp/out" 2>&1 || fail "the demo failed"
grep -q '^  *"ok": true' "$temp/report.json" || fail "the demo says that it works, and its report does not"
echo "$*: every step held"

for sabotage in ${SABOTAGE-digest nofilter nack}; do
	rm -f "$temp/report.json"
	if "$@" --break "$sabotage" --report "$temp/report.json" >"$temp/out" 2>&1; then
		fail "the demo did not notice --break $sabotage"
	fi
	# A demo that cannot even start fails too, but writes no report about a step.
	grep -q "\"break\": \"$sabotage\"" "$temp/report.json" || fail "the demo with --break $sabotage has no report"
	grep -q '"problem": ' "$temp/report.json" || fail "the report of --break $sabotage names no step"
	echo "$* --break $sabotage: noticed"
done
