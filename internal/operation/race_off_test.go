//go:build !race

package operation_test

// underRace says that the race detector is on.
const underRace = false
