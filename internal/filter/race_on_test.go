//go:build race

package filter

// underRace says that the race detector is on.
const underRace = true
