package wasm

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	goodLimiter = `{"auth": {"mode": "unsigned"}}`
	goodHeaders = `{"response": {"x-shop": "demo"}}`
)

func TestAGoodConfigurationPasses(t *testing.T) {
	for path, config := range map[string]string{
		headers:   goodHeaders,
		rateLimit: goodLimiter,
		probe:     `{"stamp": {"header": "x-chain", "value": "1"}}`,
	} {
		best := time.Hour // of three, because other tests run beside this one
		for range 3 {
			o, err := DryRun(t.Context(), read(t, path), Options{Configuration: []byte(config)})
			if err != nil {
				t.Errorf("%s: %v", path, err)
			}
			best = min(best, o.Duration)
		}
		if best <= 0 || best > 500*time.Millisecond {
			t.Errorf("%s: took %s, which is not well under half a second", path, best)
		}
	}
}

func TestARefusedConfigurationIsReportedInTheFiltersOwnWords(t *testing.T) {
	o, err := DryRun(t.Context(), read(t, probe), Options{Configuration: []byte(`{"refuse": "no plan is called Gold"}`)})
	if !errors.Is(err, problem.ConfigRefused) {
		t.Fatal(err)
	}
	if want := `the filter said: "no plan is called Gold"`; problem.Of(err).Details != want {
		t.Errorf("details are %q", problem.Of(err).Details)
	}
	if len(o.Logs) != 1 || o.Logs[0] != (Log{Level: "error", Text: "no plan is called Gold"}) {
		t.Errorf("logs are %+v", o.Logs)
	}
	if _, err := DryRun(t.Context(), read(t, rateLimit), Options{Configuration: []byte(`{"plan": {}}`)}); !errors.Is(err, problem.ConfigRefused) || !strings.Contains(err.Error(), "plan") {
		t.Errorf("the limiter's refusal: %v", err)
	}
}

func TestAnEndlessLoopIsCutOff(t *testing.T) {
	begin := time.Now()
	_, err := DryRun(t.Context(), read(t, probe), Options{Configuration: []byte(`{"spin": true}`), Timeout: 200 * time.Millisecond})
	if !errors.Is(err, problem.ModuleMisbehaved) || !strings.Contains(err.Error(), "proxy_on_configure did not come to an end within 200ms") {
		t.Error(err)
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
}

func TestTheCallersContextEndsARun(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := DryRun(ctx, read(t, probe), Options{Configuration: []byte(`{"spin": true}`)})
	if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, problem.ModuleMisbehaved) {
		t.Error(err)
	}
}

func TestMemoryIsBounded(t *testing.T) {
	_, err := DryRun(t.Context(), read(t, probe), Options{Configuration: []byte(`{"grow": true}`), MemoryLimit: 320})
	if !errors.Is(err, problem.ModuleMisbehaved) || !strings.Contains(err.Error(), "MiB of memory (it may use 20 MiB)") {
		t.Error(err)
	}
	large := fit()
	large.memory = 4096
	if _, err := DryRun(t.Context(), large.bytes(), Options{}); !errors.Is(err, problem.ModuleMisbehaved) || !strings.Contains(err.Error(), "refused 256 MiB of memory (it may use 128 MiB)") {
		t.Error(err)
	}
}

// configured is a module whose proxy_on_configure has this code, with proxy_log as function 0 and
// proxy_get_buffer_bytes as function 1; it is function 4 itself.
func configured(code ...[]byte) source {
	m := fit(function{export: "proxy_on_configure", signature: "ii:i", code: join(code...)})
	m.imports = []external{{module: "env", name: "proxy_log", signature: "iii:i"}, {module: "env", name: "proxy_get_buffer_bytes", signature: "iiiii:i"}}
	return m
}

func say(level, at, size int32) []byte { return join(i32(level), i32(at), i32(size), call(0), drop) }

func TestATrapIsReportedWithItsReason(t *testing.T) {
	for reason, m := range map[string]source{
		"proxy_on_configure trapped: unreachable; the filter said nothing":                        configured([]byte{0x00}),
		"proxy_on_configure trapped: out of bounds memory access":                                 configured(i32(-4), []byte{0x28, 2, 0}),
		"proxy_on_configure trapped: integer divide by zero":                                      configured(i32(1), i32(0), []byte{0x6d}),
		"proxy_on_configure trapped: stack overflow":                                              configured(i32(0), i32(0), call(4)),
		"_start trapped: unreachable":                                                             fit(function{export: "_start", signature: ":", code: []byte{0}}),
		"_initialize trapped: unreachable":                                                        fit(function{export: "_initialize", signature: ":", code: []byte{0}}),
		"main trapped: unreachable":                                                               fit(function{export: "_initialize", signature: ":"}, function{export: "main", signature: "ii:i", code: []byte{0}}),
		"proxy_on_vm_start trapped: unreachable":                                                  fit(function{export: "proxy_on_vm_start", signature: "ii:i", code: []byte{0}}),
		"proxy_on_context_create trapped: unreachable":                                            fit(function{export: "proxy_on_context_create", signature: "ii:", code: []byte{0}}),
		"proxy_on_configure trapped: its call stack is too large":                                 configured(times(i32(0), 400_000), i32(0), i32(0), call(4), []byte{0x00}),
		"_start trapped: it called env.proxy_get_buffer_bytes before its start was over":          early(),
		"proxy_on_configure trapped: it called env.proxy_get_buffer_bytes from its memory alloca": reentrant(),
	} {
		_, err := DryRun(t.Context(), m.bytes(), Options{Configuration: []byte("x")})
		if !errors.Is(err, problem.ModuleMisbehaved) || !strings.Contains(err.Error(), reason) {
			t.Errorf("want %q, got: %v", reason, err)
		}
	}
}

// Envoy accepts all of these, and then lets requests pass them by.
func TestAModuleIsConfiguredAsOftenAsEnvoyDoesIt(t *testing.T) {
	const once = `{"once": "sandbox"}`
	for config, c := range map[string]struct {
		beside []Plugin
		reason string // empty: it is taken
	}{
		`{"once": "shared"}`: {nil, `in a second sandbox: the filter said: "probe: another sandbox was first"`},
		once:                 {[]Plugin{{"", []byte("{}")}}, "in a sandbox that runs another configuration: proxy_on_configure trapped: unreachable"},
		once + " ":           {nil, ""},
		`{}`:                 {[]Plugin{{"", []byte(once)}, {"root", nil}}, ""},
		`{ }`:                {[]Plugin{{"", []byte(`{"refuse": "I am not asked"}`)}}, ""},
	} {
		o, err := DryRun(t.Context(), read(t, probe), Options{Configuration: []byte(config), Beside: c.beside})
		switch {
		case c.reason == "" && (err != nil || len(o.Logs) > 0):
			t.Errorf("%s: %v, %v", config, err, o.Logs)
		case c.reason != "" && (!errors.Is(err, problem.SandboxSpoiled) || !strings.Contains(err.Error(), c.reason)):
			t.Errorf("%s: want %q, got: %v", config, c.reason, err)
		}
	}
}

func TestAModuleThatIsMadeForRequestsAloneIsNotPutBeforeConnections(t *testing.T) {
	connection := func(code ...[]byte) []byte {
		m := configured(i32(1))
		m.functions = append(m.functions, function{export: "proxy_on_new_connection", signature: "i:i", code: join(code...)})
		return m.bytes()
	}
	asks := join(i32(1024), i32(1), i32(0), i32(4), []byte{0x10, 1}, drop)
	property := configured(i32(1))
	property.imports[1] = external{module: "env", name: "proxy_get_property", signature: "iiii:i"}
	property.functions = append(property.functions, function{export: "proxy_on_new_connection", signature: "i:i", code: join(asks, []byte{0})})
	for name, c := range map[string]struct {
		module []byte
		reason string // empty: it is taken
	}{
		"a filter of requests by an SDK":              {read(t, probe), "proxy_on_new_connection for a connection trapped: unreachable"},
		"a trap at once":                              {connection([]byte{0}), "proxy_on_new_connection for a connection trapped: unreachable"},
		"a trap after a line of log":                  {connection(say(2, 0, 1), []byte{0}), "is the module made for requests"},
		"a trap behind a question that has no answer": {property.bytes(), ""},
		"a connection that is taken":                  {connection(i32(0)), ""},
		"nothing for connections":                     {configured(i32(1)).bytes(), ""},
	} {
		_, err := DryRun(t.Context(), c.module, Options{Connections: true})
		switch {
		case c.reason == "" && err != nil, c.reason != "" && (!errors.Is(err, problem.ModuleMisbehaved) || !strings.Contains(err.Error(), c.reason)):
			t.Errorf("%s: want %q, got: %v", name, c.reason, err)
		}
		if _, err := DryRun(t.Context(), c.module, Options{}); err != nil {
			t.Errorf("%s, for requests: %v", name, err)
		}
	}
}

func times(b []byte, n int) []byte { return []byte(strings.Repeat(string(b), n)) }

func buffer(kind int32) []byte { return join(i32(kind), i32(0), i32(1000), i32(0), i32(4), call(1)) }

func early() source {
	m := configured(i32(1))
	m.functions = append(m.functions, function{export: "_start", signature: ":", code: join(buffer(6), drop)})
	return m
}

// reentrant asks the host for a buffer within malloc, which the host calls to hand out a buffer.
func reentrant() source {
	m := configured(buffer(7), drop, i32(1))
	m.functions[1].code = buffer(7)
	return m
}

func TestTheNameOfATrappedFunctionIsGiven(t *testing.T) {
	m := configured(call(5), i32(1))
	m.functions = append(m.functions, function{signature: ":", code: []byte{0}})
	m.custom = map[string]string{"name": "\x01\x08\x01\x05\x05parse"}
	_, err := DryRun(t.Context(), m.bytes(), Options{})
	if err == nil || !strings.Contains(err.Error(), "unreachable, in parse;") {
		t.Error(err)
	}
}

func TestARefusedVMConfigurationIsNamedAsSuch(t *testing.T) {
	m := fit(function{export: "proxy_on_vm_start", signature: "ii:i", code: i32(0)})
	_, err := DryRun(t.Context(), m.bytes(), Options{})
	if !errors.Is(err, problem.ConfigRefused) || !strings.Contains(err.Error(), "VM configuration") {
		t.Error(err)
	}
}

func TestAFilterReadsItsConfigurations(t *testing.T) {
	// Each callback logs what it reads: malloc gives address 8192, and the size lands at address 4.
	logged := join(i32(2), i32(8192), i32(4), []byte{0x28, 2, 0}, call(0), drop)
	m := configured(buffer(7), drop, logged, buffer(6), drop, logged, i32(1))
	m.functions = append(m.functions, function{export: "proxy_on_vm_start", signature: "ii:i", code: join(
		// Envoy does not give the plugin's configuration here: the answer is 1, not found.
		buffer(7), i32(1), []byte{0x46, 0x04, 0x40}, buffer(6), drop, logged, []byte{0x0b}, []byte{0x20, 1})})
	o, err := DryRun(t.Context(), m.bytes(), Options{Configuration: []byte("plugin"), VMConfiguration: []byte("machine")})
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(o.Logs); got != "[{info machine} {info plugin} {info machine}]" {
		t.Errorf("logs are %s", got)
	}
}

func TestAFilterSeesItsEnvironmentAndNoOther(t *testing.T) {
	t.Setenv("MESHERY_FILTERS_TEST_LEAK", "leaked")
	m := fit(function{export: "proxy_on_configure", signature: "ii:i", code: join(
		i32(512), i32(8192), call(1), drop, i32(0), i32(4), call(2), drop,
		i32(2), i32(8192), i32(4), []byte{0x28, 2, 0}, call(0), drop, i32(1))})
	m.imports = []external{{module: "env", name: "proxy_log", signature: "iii:i"},
		{module: "wasi_snapshot_preview1", name: "environ_get", signature: "ii:i"},
		{module: "wasi_unstable", name: "environ_sizes_get", signature: "ii:i"}}
	o, err := DryRun(t.Context(), m.bytes(), Options{Environment: map[string]string{"REGION": "eu", "PLAN": "team"}})
	if err != nil {
		t.Fatal(err)
	}
	if len(o.Logs) != 1 || o.Logs[0].Text != "PLAN=team\uFFFDREGION=eu\uFFFD" {
		t.Errorf("logs are %q", o.Logs)
	}
}

func TestSharedDataKeepsItsPromises(t *testing.T) {
	h := newHost(Options{}, "0.2.1")
	if s := h.setShared("k", "a", 0xffffffff); s != statusOK {
		t.Errorf("a first write with any cas: %d", s)
	}
	if s := h.setShared("k", "b", 0xffffffff); s != statusCasMismatch {
		t.Errorf("a second write with the wrong cas: %d", s)
	}
	if s := h.setShared("k", "b", h.shared["k"].cas); s != statusOK || h.shared["k"].value != "b" {
		t.Errorf("a write with the right cas: %d, %v", s, h.shared)
	}
	if s := h.setShared("large", strings.Repeat("x", maxKept), 0); s != statusInternalFailure {
		t.Errorf("more than may be kept: %d", s)
	}
}

func TestLogsAreBounded(t *testing.T) {
	// 5000 lines of all of the memory, and the last one short.
	m := configured([]byte{0x03, 0x40}, say(2, 0, 2<<16), []byte{0x20, 2}, i32(1), []byte{0x6a, 0x22, 2}, i32(5000), []byte{0x48, 0x0d, 0, 0x0b},
		say(3, 1024, 4), i32(0))
	m.functions[2].locals = 1
	m.data = "last"
	o, err := DryRun(t.Context(), m.bytes(), Options{Redact: []string{"something"}})
	if !errors.Is(err, problem.ConfigRefused) || problem.Of(err).Details != `the filter said: "last"` {
		t.Error(err)
	}
	if len(o.Logs) != maxLines {
		t.Fatalf("%d lines", len(o.Logs))
	}
	for _, l := range o.Logs {
		if len(l.Text) > maxLine+len("…") {
			t.Fatalf("a line of %d bytes", len(l.Text))
		}
	}
}

func TestSecretsAreRedacted(t *testing.T) {
	secret := "s3cr3t-\"key\"-of-shop"
	for story, said := range map[string][]string{
		"as it is":                   {"the key " + secret + " is too short"},
		"in JSON":                    {`{"key":"s3cr3t-\"key\"-of-shop"}`},
		"in base64":                  {"Basic " + base64.StdEncoding.EncodeToString([]byte(secret))},
		"twice":                      {secret + secret},
		"in two lines":               {"starts " + secret[:7], secret[7:] + " ends"},
		"in single characters":       strings.Split(secret, ""),
		"where a line is cut":        {strings.Repeat("x", maxLine-5) + secret},
		"in many pieces after a lot": append(strings.Split(strings.Repeat("x", 300), ""), secret[:5], secret[5:]),
	} {
		m := configured()
		m.memory = 3
		var code []byte
		for _, s := range said {
			code = append(code, say(4, int32(1024+len(m.data)), int32(len(s)))...)
			m.data += s
		}
		m.functions[2].code = join(code, i32(0))
		o, err := DryRun(t.Context(), m.bytes(), Options{Redact: []string{secret, "abc"}})
		if !errors.Is(err, problem.ConfigRefused) {
			t.Fatalf("%s: %v", story, err)
		}
		all := err.Error()
		for _, l := range o.Logs {
			all += l.Text
		}
		if !strings.Contains(all, redacted[:5]) || strings.Contains(all, "s3c") || strings.Contains(all, "of-shop") ||
			strings.Contains(all, base64.RawStdEncoding.EncodeToString([]byte(secret))) {
			t.Errorf("%s: %s", story, all)
		}
	}
}

func TestALineOfASecretWithSeveralLinesIsRedacted(t *testing.T) {
	r := newRedactor([]string{"-----BEGIN KEY-----\nMIIEvQIBADAN\nBgkqhkiG9w0B\n-----END KEY-----\n"})
	if got := r.text("line 2 is BgkqhkiG9w0B"); got != "line 2 is [redacted]" {
		t.Error(got)
	}
}

func TestForeignTextCannotDriveATerminal(t *testing.T) {
	if got := clip("a\x1b[31mb\x00\xffc\n", 100); got != "a\uFFFD[31mb\uFFFD\uFFFDc\n" {
		t.Errorf("%q", got)
	}
}

func TestTheLastWordsBeginWithThePanic(t *testing.T) {
	log := func(level string, texts ...string) (logs []Log) {
		for _, text := range texts {
			logs = append(logs, Log{level, text})
		}
		return logs
	}
	for want, logs := range map[string][]Log{
		"the filter said nothing":                     log("error", " "),
		`the filter said: "b"`:                        log("info", "a", "b"),
		`the filter said: "b", "c", "d"`:              log("warn", "a", "b", "c", "d"),
		`the filter said: "x"`:                        append(log("error", "x"), log("info", "y")...),
		`the filter said: "panic: p", "go 1", "main"`: log("error", "a", "panic: p", "", "go 1", "main", "more"),
	} {
		if got := lastWords(logs); got != want {
			t.Errorf("want %s, got %s", want, got)
		}
	}
}

func TestPiecesOfALineOnStandardErrorAreJoined(t *testing.T) {
	m := fit(function{export: "proxy_on_configure", signature: "ii:i", code: i32(0)})
	m.imports = []external{{module: "wasi_snapshot_preview1", name: "fd_write", signature: "iiii:i"}}
	m.data = "panic: on purpose\n\nmore"
	var code []byte
	for _, piece := range [][2]int32{{0, 7}, {7, 10}, {17, 1}, {18, 1}, {19, 4}} {
		store := func(at, value int32) []byte { return join(i32(at), i32(value), []byte{0x36, 2, 0}) }
		code = join(code, store(0, 1024+piece[0]), store(4, piece[1]), i32(2), i32(0), i32(1), i32(8), call(0), drop)
	}
	m.functions[2].code = join(code, i32(0))
	o, _ := DryRun(t.Context(), m.bytes(), Options{})
	if got := fmt.Sprint(o.Logs); got != "[{error panic: on purpose} {error more}]" {
		t.Error(got)
	}
}

func TestRunsDoNotDisturbEachOther(t *testing.T) {
	module := read(t, probe)
	var g errgroup.Group
	for i := range 8 {
		g.Go(func() error {
			want := fmt.Sprintf("run %d", i)
			_, err := DryRun(t.Context(), module, Options{Configuration: []byte(`{"refuse": "` + want + `"}`)})
			if err == nil || !strings.Contains(err.Error(), want) {
				return fmt.Errorf("want %s: %w", want, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

func FuzzDryRun(f *testing.F) {
	f.Add(read(f, probe), []byte(`{"refuse": "s3cr3t-key"}`))
	f.Add(read(f, rateLimit), []byte(goodLimiter))
	for _, m := range []source{reentrant(), early(), configured(say(4, 0, 100), i32(0))} {
		f.Add(m.bytes(), []byte("x"))
	}
	f.Fuzz(func(t *testing.T, module, config []byte) {
		o, err := DryRun(context.Background(), module, Options{
			Configuration: config, Timeout: 200 * time.Millisecond, MemoryLimit: 64, Redact: []string{"s3cr3t-key"}})
		if err != nil && !errors.Is(err, problem.ModuleInvalid) && !errors.Is(err, problem.ConfigRefused) && !errors.Is(err, problem.ModuleMisbehaved) {
			t.Fatalf("not a refusal: %v", err)
		}
		if err != nil && strings.Contains(err.Error(), "the sandbox failed") {
			t.Fatal(err)
		}
		for _, l := range o.Logs {
			if strings.Contains(l.Text, "s3cr3t-key") {
				t.Fatalf("the secret is in %q", l.Text)
			}
		}
	})
}

func BenchmarkDryRun(b *testing.B) {
	module := read(b, rateLimit)
	for b.Loop() {
		if _, err := DryRun(context.Background(), module, Options{Configuration: []byte(goodLimiter)}); err != nil {
			b.Fatal(err)
		}
	}
}

func TestAFunctionThatIsHardToCompileCostsLittle(t *testing.T) {
	// An optimizing compiler takes minutes for this many loops in one function.
	loop := join([]byte{0x03, 0x40, 0x20, 0}, []byte{0x0d, 0}, []byte{0x20, 1, 0x21, 0, 0x0b})
	nested := join(times([]byte{0x03, 0x40}, 50_000), times([]byte{0x0b}, 50_000))
	m := fit(function{signature: "ii:", code: times(loop, 30_000)}, function{signature: ":", code: nested})
	begin := time.Now()
	if _, err := DryRun(t.Context(), m.bytes(), Options{}); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
}

func TestATableCannotGrowOutOfBounds(t *testing.T) {
	// A table section goes before the memory's; the code grows it by 2^30 entries and expects -1.
	grow := join([]byte{0xd0, 0x70}, i32(1<<30), []byte{0xfc, 15, 0}, i32(-1), []byte{0x46})
	m := configured(grow).bytes()
	at := strings.Index(string(m), string(section(5, 1, []byte{0, 2})))
	m = join(m[:at], section(4, 1, []byte{0x70, 0, 1}), m[at:])
	if _, err := DryRun(t.Context(), m, Options{}); err != nil {
		t.Error(err)
	}
}
