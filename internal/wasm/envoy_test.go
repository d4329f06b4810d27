package wasm

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	envoybin "github.com/meshery/meshery-filters/internal/envoy"
)

// envoy finds the Envoy that the project uses.
func envoy(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("it runs a real Envoy")
	}
	found, err := envoybin.Find(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	return found.Path
}

const bootstrap = `
static_resources:
  listeners:
  - address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: x
          route_config: {virtual_hosts: [{name: a, domains: ["*"], routes: [{match: {prefix: "/"}, direct_response: {status: 200}}]}]}
          http_filters:
          - name: w
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm
              config:
                name: w
                root_id: root
                vm_config: {runtime: envoy.wasm.runtime.v8, code: {local: {filename: %q}}}
                configuration: {"@type": type.googleapis.com/google.protobuf.StringValue, value: %q}
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
`

// accepts asks a real Envoy, which starts and configures the module for it.
func accepts(t *testing.T, envoy string, module []byte, config string) (bool, string) {
	t.Helper()
	dir := t.TempDir()
	file, boot := filepath.Join(dir, "filter.wasm"), filepath.Join(dir, "envoy.yaml")
	for name, b := range map[string][]byte{file: module, boot: fmt.Appendf(nil, bootstrap, file, config)} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, envoy, "--mode", "validate", "-l", "warning", "-c", boot).CombinedOutput()
	if err == nil {
		// After a trap in malloc Envoy goes on with a filter that fails every request.
		return !strings.Contains(string(out), "Function: malloc failed"), string(out)
	}
	if !strings.Contains(string(out), "Unable to create Wasm plugin") {
		t.Fatalf("envoy: %v: %s", err, out)
	}
	return false, string(out)
}

// everything imports all that is offered to an ABI and exports all that is called.
func everything(abi string) []byte {
	m := source{memory: 1}
	add := func(module, name string, f hostFunction) {
		if f.in(abi) {
			m.imports = append(m.imports, external{module: module, name: name, signature: f.signature})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(envFunctions)) {
		add("env", name, envFunctions[name])
	}
	for _, name := range slices.Sorted(maps.Keys(wasiFunctions)) {
		add("wasi_snapshot_preview1", name, wasiFunctions[name])
		add("wasi_unstable", name, wasiFunctions[name])
	}
	m.functions = []function{{export: "proxy_abi_version_" + strings.ReplaceAll(abi, ".", "_"), signature: ":"}}
	for name := range callbacks {
		signature, ok := callback(name, abi)
		if !ok {
			continue
		}
		f := function{export: name, signature: signature}
		if strings.HasSuffix(signature, "i") {
			f.code = i32(1)
		}
		m.functions = append(m.functions, f)
	}
	return m.bytes()
}

func TestEnvoyAndTheDryRunAgree(t *testing.T) {
	envoy := envoy(t)
	with := func(change func(*source)) []byte {
		m := configured(i32(1))
		change(&m)
		return m.bytes()
	}
	for story, c := range map[string]struct {
		module []byte
		config string
	}{
		"everything of 0.1.0": {module: everything("0.1.0")},
		"everything of 0.2.0": {module: everything("0.2.0")},
		"everything of 0.2.1": {module: everything("0.2.1")},
		"a missing import": {module: with(func(m *source) {
			m.imports = append(m.imports, external{module: "env", name: "proxy_bogus", signature: ":"})
			m.functions[2].code = i32(1)
		})},
		"an import of another ABI": {module: with(func(m *source) {
			m.imports = append(m.imports, external{module: "env", name: "proxy_get_configuration", signature: "ii:i"})
		})},
		"an import of another type":    {module: with(func(m *source) { m.imports[0].signature = "iI:i" })},
		"a callback of another type":   {module: with(func(m *source) { m.functions[2].signature = "iii:i" })},
		"no allocator":                 {module: with(func(m *source) { m.functions[1].export = "" })},
		"no ABI marker":                {module: with(func(m *source) { m.functions[0].export = "" })},
		"a host call too early":        {module: early().bytes()},
		"a host call in the allocator": {module: reentrant().bytes(), config: "x"},
		"a trap":                       {module: configured([]byte{0}).bytes()},
		"a trap in the start":          {module: fit(function{export: "_start", signature: ":", code: []byte{0}}).bytes()},
		"a refusal without a word":     {module: configured(i32(0)).bytes()},
		"a refused VM configuration":   {module: fit(function{export: "proxy_on_vm_start", signature: "ii:i", code: i32(0)}).bytes()},
		"headers, good":                {module: read(t, headers), config: goodHeaders},
		"headers, refused":             {module: read(t, headers), config: `{"no": 1}`},
		"limiter, good":                {module: read(t, rateLimit), config: goodLimiter},
		"limiter, refused":             {module: read(t, rateLimit), config: `{"no": 1}`},
		"probe, good":                  {module: read(t, probe), config: `{}`},
		"probe, refused":               {module: read(t, probe), config: `{"refuse": "no"}`},
	} {
		t.Run(story, func(t *testing.T) {
			accepted, out := accepts(t, envoy, c.module, c.config)
			_, err := DryRun(t.Context(), c.module, Options{RootID: "root", Configuration: []byte(c.config)})
			if accepted != (err == nil) {
				t.Errorf("Envoy: %t, dry run: %v\n%s", accepted, err, out)
			}
		})
	}
}
