package wasm

import (
	"bytes"
	"slices"
	"strings"
)

// hostFunction is one function that Envoy offers to modules.
type hostFunction struct {
	signature string // see external.signature
	abi       string // the ABI versions that have it, "" for all
	early     bool   // may be called while the module initializes
	inMalloc  bool   // may be called while the module allocates memory for the host
	call      func(h *host, a args) uint32
}

// offered lists what Envoy 1.39 and later offer, in env, wasi_snapshot_preview1 and wasi_unstable. The
// source is proxy-wasm-cpp-host: include/proxy-wasm/exports.h for names, src/exports.cc for signatures and
// answers, src/wasm.cc (registerCallbacks, startVm) and include/proxy-wasm/wasm.h (allocMemory) for what is
// allowed when. The 88 names occur as strings in the binaries of Envoy 1.39.0 and 1.40.0.
func offered(module, name string) (hostFunction, bool) {
	var f hostFunction
	var ok bool
	switch module {
	case "env":
		f, ok = envFunctions[name]
	case "wasi_snapshot_preview1", "wasi_unstable":
		f, ok = wasiFunctions[name]
	}
	return f, ok
}

func (f hostFunction) in(abi string) bool {
	return f.abi == "" || slices.Contains(strings.Fields(f.abi), abi)
}

// callbacks are the signatures that Envoy insists on for what a module exports. Those that a module leaves
// out are not called.
var callbacks = map[string]string{
	"_initialize": ":", "_start": ":", "main": "ii:i", "__main_void": ":i",
	"malloc": "i:i", "proxy_on_memory_allocate": "i:i",
	"proxy_validate_configuration": "ii:i", "proxy_on_vm_start": "ii:i", "proxy_on_configure": "ii:i",
	"proxy_on_tick": "i:", "proxy_on_context_create": "ii:",
	"proxy_on_new_connection": "i:i", "proxy_on_downstream_data": "iii:i", "proxy_on_upstream_data": "iii:i",
	"proxy_on_downstream_connection_close": "ii:", "proxy_on_upstream_connection_close": "ii:",
	"proxy_on_request_headers": "iii:i", "proxy_on_request_body": "iii:i", "proxy_on_request_trailers": "ii:i",
	"proxy_on_request_metadata": "ii:i", "proxy_on_response_headers": "iii:i", "proxy_on_response_body": "iii:i",
	"proxy_on_response_trailers": "ii:i", "proxy_on_response_metadata": "ii:i",
	"proxy_on_http_call_response": "iiiii:", "proxy_on_grpc_receive": "iii:", "proxy_on_grpc_close": "iii:",
	"proxy_on_grpc_receive_initial_metadata": "iii:", "proxy_on_grpc_receive_trailing_metadata": "iii:",
	"proxy_on_queue_ready": "ii:", "proxy_on_foreign_function": "iii:",
	"proxy_on_done": "i:i", "proxy_on_log": "i:", "proxy_on_delete": "i:",
}

func callback(name, abi string) (signature string, ok bool) {
	if abi == "0.1.0" {
		switch name {
		case "proxy_on_request_headers", "proxy_on_response_headers":
			return "ii:i", true
		case "proxy_on_foreign_function":
			return "", false
		}
	}
	signature, ok = callbacks[name]
	return signature, ok
}

// abiOf finds the ABI version as Envoy does: by the first marker among the exported functions.
func abiOf(l *layout) string {
	for _, e := range l.exports {
		if e.kind == kindFunction {
			switch e.name {
			case "proxy_abi_version_0_1_0":
				return "0.1.0"
			case "proxy_abi_version_0_2_0":
				return "0.2.0"
			case "proxy_abi_version_0_2_1":
				return "0.2.1"
			}
		}
	}
	return ""
}

// languageOf guesses the language a module was written in: by its producers section where there is one, else
// by what each language's runtime leaves in every module.
func languageOf(l *layout, module []byte) string {
	has := func(b []byte, words ...string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return bytes.Contains(b, []byte(w)) })
	}
	switch {
	case has(l.producers, "TinyGo"):
		return "TinyGo"
	case has(l.producers, "Rust", "rustc"):
		return "Rust"
	case has(l.producers, "Go cmd/compile") || slices.Contains(l.sections, "go:buildid"):
		return "Go"
	case has(l.producers, "AssemblyScript") || has(module, "~\x00l\x00i\x00b\x00/\x00"):
		return "AssemblyScript"
	case has(module, "/rustc/", "library/core/src/", "library/std/src/", "library/alloc/src/", "/.cargo/registry/"):
		return "Rust"
	case has(module, "tinygo_"):
		return "TinyGo"
	case has(l.producers, "C_plus_plus", "clang") || has(module, "__cxxabiv1", "emscripten_notify_memory_growth"):
		return "C++"
	}
	return ""
}
