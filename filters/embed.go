// Package filters holds the Wasm modules that ship with the program: built from the Rust
// sources beside this file by build.sh, committed, and embedded.
//
// Beside each module lies NAME.wasm.sha256 with its digest, as sha256sum writes it.
package filters

import (
	"embed"
	"strings"
)

//go:embed *.wasm
var modules embed.FS

// suffix ends the file name of every module.
const suffix = ".wasm"

// Builtin returns the shipped module of that name, such as "ratelimit", and whether there
// is one. The bytes are a copy and the caller's to keep.
func Builtin(name string) (wasm []byte, ok bool) {
	wasm, err := modules.ReadFile(name + suffix)
	return wasm, err == nil
}

// Names returns the names of the shipped modules, sorted.
func Names() []string {
	// The root of an embedded file system always reads.
	entries, _ := modules.ReadDir(".")
	names := make([]string, 0, len(entries))
	for _, entry := range entries {
		names = append(names, strings.TrimSuffix(entry.Name(), suffix))
	}
	return names
}
