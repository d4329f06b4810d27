package wasm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/meshery/meshery-filters/internal/problem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	headers   = "../../filters/headers.wasm"
	rateLimit = "../../filters/ratelimit.wasm"
	probe     = "../../build/testfilters/probe.wasm"
)

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestInspectTellsWhatTheShippedModulesAre(t *testing.T) {
	for _, path := range []string{headers, rateLimit, probe} {
		module := read(t, path)
		r, err := Inspect(t.Context(), module)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		sum, _, _ := strings.Cut(string(read(t, path+".sha256")), " ")
		if r.SHA256 != strings.TrimSpace(sum) || r.Size != len(module) {
			t.Errorf("%s: digest %s and size %d are not those of the file", path, r.SHA256, r.Size)
		}
		if r.ABI != "0.2.1" || r.Language != "Rust" || r.MemoryPages == 0 || len(r.Missing) > 0 {
			t.Errorf("%s: report is %+v", path, r)
		}
		if !slices.Contains(r.Imports, "env.proxy_log") || !slices.Contains(r.Exports, "proxy_on_configure") ||
			!slices.IsSorted(r.Imports) || !slices.IsSorted(r.Exports) || !slices.Contains(r.Sections, "code") {
			t.Errorf("%s: report is %+v", path, r)
		}
	}
}

func TestAnEmptyReportHasListsInJSON(t *testing.T) {
	r, err := Inspect(t.Context(), nil)
	if err == nil {
		t.Fatal("an empty file was accepted")
	}
	b, _ := json.Marshal(r)
	if bytes.Contains(b, []byte("null")) {
		t.Errorf("the report is %s", b)
	}
}

func TestInspectNamesTheLanguage(t *testing.T) {
	with := func(change func(*source)) []byte {
		m := fit()
		change(&m)
		return m.bytes()
	}
	producer := func(s string) []byte {
		return with(func(m *source) { m.custom = map[string]string{"producers": s} })
	}
	for want, module := range map[string][]byte{
		"":       fit().bytes(),
		"TinyGo": producer("\x01\x0cprocessed-by\x01\x06TinyGo\x060.37.0"),
		"Go":     producer("\x02\x08language\x01\x02Go\x061.26.0\x0cprocessed-by\x01\x0eGo cmd/compile\x081.26.0"),
		"C++":    producer("\x01\x08language\x01\x0eC_plus_plus_14\x00"),
		"Rust": with(func(m *source) {
			m.data = "/rustc/4a4ef493e3a1488c6e321570238084b38948f6db/library/core/src/fmt/mod.rs"
		}),
		"AssemblyScript": with(func(m *source) { m.data = "~\x00l\x00i\x00b\x00/\x00r\x00t\x00" }),
	} {
		if r, err := Inspect(t.Context(), module); err != nil || r.Language != want {
			t.Errorf("want %q, got %q, %v", want, r.Language, err)
		}
	}
}

// unfit are modules that Envoy cannot run, by the reason that must be given.
func unfit(t testing.TB) map[string][]byte {
	good := read(t, headers)
	with := func(change func(*source)) []byte {
		m := fit(function{export: "proxy_on_configure", signature: "ii:i", code: i32(1)})
		change(&m)
		return m.bytes()
	}
	vector := func(id byte, count int) []byte { // announces more than it has
		body := uvarint(count)
		return join(good[:8], []byte{id}, uvarint(len(body)), body)
	}
	many := fit(function{signature: ":", locals: maxLocals + 1}).bytes()
	return map[string][]byte{
		"does not begin with the four bytes": []byte("#!/bin/sh\n"),
		"cut off within":                     good[:6],
		"component":                          []byte("\x00asm\x0d\x00\x01\x00"),
		"version 0x2":                        []byte("\x00asm\x02\x00\x00\x00"),
		"cut off: it ends too early":         good[:len(good)/2],
		"more than the 20 MiB":               append(good[:8:8], make([]byte, maxModule)...),
		"no section of number 99":            join(good[:8], []byte{99, 0}),
		"section type: it announces":         vector(1, 1<<31),
		"section import: it announces":       vector(2, 1<<31),
		"section function: it announces":     vector(3, 1<<31),
		"section table: it announces":        vector(4, 1<<31),
		"section global: it announces":       vector(6, 1<<31),
		"section export: it announces":       vector(7, 1<<31),
		"section element: it announces":      vector(9, 1<<31),
		"section code: it announces":         vector(10, 1<<31),
		"section data: it announces":         vector(11, 1<<31),
		"10001 local variables":              many,
		"tables have more than":              join(good[:8], section(4, 1, []byte{0x70, 0, 0x80, 0x80, 0x80, 0x80, 0x04})),
		"64-bit memories":                    join(good[:8], section(5, 1, []byte{4, 1})),
		"shared between threads":             join(good[:8], section(5, 1, []byte{3, 1, 2})),
		"invalid function":                   with(func(m *source) { m.functions[2].code = nil }),
		"no proxy-wasm ABI marker":           with(func(m *source) { m.functions[0].export = "proxy_abi_version_9_9_9" }),
		"does not export its memory":         with(func(m *source) { m.hidden = true }),
		"neither proxy_on_memory_allocate":   with(func(m *source) { m.functions[1].export = "" }),
		"does not offer what it imports: env.proxy_bogus, wasi_unstable.fd_bogus": with(func(m *source) {
			m.imports = []external{{module: "wasi_unstable", name: "fd_bogus", signature: ":"}, {module: "env", name: "proxy_bogus", signature: ":"}}
		}),
		"does not offer what it imports: env.proxy_log": with(func(m *source) {
			m.imports = []external{{module: "env", name: "proxy_log", kind: kindGlobal}}
		}),
		"does not offer what it imports: env.proxy_continue_request": with(func(m *source) { // ABI 0.1.0 only
			m.imports = []external{{module: "env", name: "proxy_continue_request", signature: ":i"}}
		}),
		"imports env.proxy_log as (i32, i64) -> (i32), and Envoy offers it as (i32, i32, i32) -> (i32)": with(func(m *source) {
			m.imports = []external{{module: "env", name: "proxy_log", signature: "iI:i"}}
		}),
		"exports proxy_on_configure as (i32, i32, i32) -> (i32), and Envoy calls it as (i32, i32) -> (i32)": with(func(m *source) {
			m.functions[2].signature = "iii:i"
		}),
	}
}

func TestAModuleThatEnvoyCannotRunIsRefusedWithTheReason(t *testing.T) {
	for reason, module := range unfit(t) {
		_, err := Inspect(t.Context(), module)
		if !errors.Is(err, problem.ModuleInvalid) || !strings.Contains(err.Error(), reason) {
			t.Errorf("want %q, got: %v", reason, err)
		}
		if _, err2 := DryRun(t.Context(), module, Options{}); err2 == nil || err2.Error() != err.Error() {
			t.Errorf("%s: DryRun says something else: %v", reason, err2)
		}
	}
}

func TestARefusedModuleIsStillReported(t *testing.T) {
	m := fit()
	m.imports = []external{{module: "env", name: "proxy_bogus", signature: ":"}, {module: "env", name: "proxy_bogus", signature: ":"}}
	r, _ := Inspect(t.Context(), m.bytes())
	if r.ABI != "0.2.1" || !slices.Equal(r.Missing, []string{"env.proxy_bogus"}) {
		t.Errorf("report is %+v", r)
	}
}

func TestInspectStopsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Inspect(ctx, read(t, headers)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestEveryTruncationIsRefused(t *testing.T) {
	module := read(t, headers)
	for n := 0; n < len(module); n += 97 {
		if _, _, err := examine(module[:n]); !errors.Is(err, problem.ModuleInvalid) {
			t.Fatalf("%d of %d bytes: %v", n, len(module), err)
		}
	}
}

func FuzzInspect(f *testing.F) {
	for _, path := range []string{headers, rateLimit, probe} {
		f.Add(read(f, path))
	}
	for _, module := range unfit(f) {
		if len(module) < 1<<20 {
			f.Add(module)
		}
	}
	f.Add(fit().bytes())
	f.Fuzz(func(t *testing.T, module []byte) {
		r, err := Inspect(context.Background(), module)
		if err != nil && !errors.Is(err, problem.ModuleInvalid) {
			t.Fatalf("not a refusal: %v", err)
		}
		if err != nil && len(err.Error()) > 64<<10 {
			t.Fatalf("a refusal of %d bytes", len(err.Error()))
		}
		if err == nil && (r.ABI == "" || len(r.Missing) > 0) {
			t.Fatalf("accepted: %+v", r)
		}
	})
}
