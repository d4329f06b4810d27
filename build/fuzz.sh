#!/bin/sh
# Fuzzes every target for a while; a crash leaves its input in testdata/fuzz and ends this.
#
# Usage: build/fuzz.sh DURATION    (such as 10s)
set -eu

grep -rl --include='*_test.go' '^func Fuzz' . | while read -r file; do
	sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file" | while read -r target; do
		package=$(dirname "$file")
		echo "$package $target"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$1" "$package" </dev/null
	done
done
