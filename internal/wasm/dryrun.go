package wasm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/experimental"
	"github.com/tetratelabs/wazero/sys"

	"github.com/meshery/meshery-filters/internal/problem"
)

// Defaults of Options.
const (
	DefaultTimeout     = 10 * time.Second
	DefaultMemoryLimit = 2048 // pages: 128 MiB
)

// Options say how a module is run.
type Options struct {
	RootID          string            // what the module reads as its plugin_root_id
	Configuration   []byte            // of the plugin
	VMConfiguration []byte            // of the VM
	Environment     map[string]string // the VM's variables; there are no others

	// Beside is what runs in the VM already: filters of the same module that share it, and what this one was configured with
	// before.
	Beside []Plugin

	// Connections says that the module is to see connections (protocol tcp) and not requests, so it is given one.
	Connections bool

	// Timeout is how long the module itself may run, DefaultTimeout if zero. Reading it comes before and
	// cannot be interrupted; it takes about 0.1 s per MB.
	Timeout time.Duration
	// MemoryLimit is in pages of 64 KiB; DefaultMemoryLimit if zero. Envoy's own limit is 16384 (1 GiB).
	MemoryLimit uint32

	// Redact holds secret values. They are replaced by "[redacted]" in every text that is returned, also
	// where they stand as JSON or base64 and where several lines hold one in pieces. Values of less than
	// four bytes are left alone. A filter that transforms a secret in another way gets it through.
	Redact []string
}

// Plugin is one configuration of a module in a VM.
type Plugin struct {
	RootID        string
	Configuration []byte
}

// Outcome is what a run showed.
type Outcome struct {
	Logs     []Log         `json:"logs"` // the last 200 lines, each of at most 4 KiB
	Duration time.Duration `json:"duration"`
}

// Log is a line that the filter wrote.
type Log struct {
	Level string `json:"level"` // trace, debug, info, warn, error, critical; stdout is info and stderr error
	Text  string `json:"text"`
}

// DryRun starts and configures a module as Envoy does, in a sandbox without network and files:
// _initialize or _start, proxy_on_context_create, proxy_on_vm_start, proxy_on_configure. With Connections one is opened
// behind that: proxy_on_context_create, proxy_on_new_connection. A module that traps there before it has asked anything of
// the connection would end every one of them. One that has asked is not judged: here there is nothing to answer with.
//
// Envoy judges by a sandbox that it throws away, and then makes one for each of its threads, with the same shared data; one
// that runs already gets a new configuration in a root context of its own. When that fails, Envoy has accepted long since,
// and lets requests pass the filter by, whatever its failure policy. So it is tried, too: in a second sandbox, behind what is
// Beside.
//
// A module that Envoy would not load gives problem.ModuleInvalid. One that refuses its configuration gives
// problem.ConfigRefused with the filter's own last words in the details. One that traps, runs into the timeout
// or wants more memory than it may have gives problem.ModuleMisbehaved, and one that does any of this only in the second
// sandbox problem.SandboxSpoiled. A ctx that ends first gives ctx's error. The Outcome is valid in all cases.
//
// Calls to other services are accepted and never answered; the foreign functions for signatures and
// compression answer that they are not implemented. The module is interpreted: its calls may nest 2000 deep, and
// long computations take many times as long as in Envoy.
func DryRun(ctx context.Context, module []byte, o Options) (Outcome, error) {
	begin := time.Now()
	if o.Timeout <= 0 {
		o.Timeout = DefaultTimeout
	}
	if o.MemoryLimit == 0 {
		o.MemoryLimit = DefaultMemoryLimit
	}
	_, l, err := examine(module)
	if err != nil {
		return Outcome{Logs: []Log{}}, err
	}
	h := newHost(o, abiOf(l))
	err = h.run(ctx, l)
	logs := h.lines()
	if err != nil {
		err = h.explain(ctx, err, logs)
	}
	return Outcome{Logs: logs, Duration: time.Since(begin)}, err
}

// refusal is a callback that answered false.
type refusal struct{ step string }

func (r refusal) Error() string { return r.step + " answered false" }

// spoiled is what went wrong in the second sandbox only.
type spoiled struct {
	err  error
	used bool // there were others in it
}

func (s spoiled) Error() string { return s.err.Error() }

var errTooLittleMemory = errors.New("not enough memory")

// failure is a callback that did not come to its end.
type failure struct {
	step string
	err  error
}

func (f failure) Error() string { return f.step + ": " + f.err.Error() }
func (f failure) Unwrap() error { return f.err }

func (h *host) run(ctx context.Context, l *layout) (err error) {
	if l.memoryMin > h.options.MemoryLimit {
		h.wanted = uint64(l.memoryMin) << 16
		return failure{"its start", errTooLittleMemory}
	}
	p, done, err := compile(ctx, l)
	defer done()
	if err != nil {
		return err
	}
	if err := h.link(ctx, p.runtime, l); err != nil {
		return fmt.Errorf("link the module: %w", err)
	}
	own := Plugin{h.options.RootID, h.options.Configuration}
	if err := h.live(ctx, l, p, h.options.Connections, own); err != nil {
		return err
	}
	said := h.logs[:len(h.logs):len(h.logs)]
	err = h.live(ctx, l, p, false, append(slices.Clone(h.options.Beside), own)...)
	if err == nil || h.roots <= len(h.options.Beside) { // what the others do is not this one's fault
		h.logs = said
		return nil
	}
	return spoiled{err, len(h.options.Beside) > 0}
}

// live starts a sandbox and configures the plugins in it, one after another; with connect it opens a connection to the last.
func (h *host) live(ctx context.Context, l *layout, p prepared, connect bool, plugins ...Plugin) (err error) {
	h.phase, h.roots, h.allocates, h.asked, h.wanted = initializing, 0, false, false, 0
	ctx, cancel := context.WithTimeout(ctx, h.options.Timeout)
	defer cancel()
	ctx = experimental.WithMemoryAllocator(ctx, h)
	step := "its start"
	defer func() {
		if r := recover(); r != nil {
			err = failure{step, fmt.Errorf("the sandbox failed: %v", r)}
		}
	}()
	instance, err := p.runtime.InstantiateModule(ctx, p.module, wazero.NewModuleConfig().WithName("").WithStartFunctions())
	if err != nil {
		return failure{step, err}
	}
	defer func() { _ = instance.Close(context.WithoutCancel(ctx)) }() // only close hooks fail, and there are none
	call := func(name string, args ...uint64) (uint64, error) {
		step = name
		results, err := instance.ExportedFunction(name).Call(ctx, args...)
		if err != nil {
			return 0, failure{name, err}
		}
		if len(results) == 0 {
			return 0, nil
		}
		return uint64(uint32(results[0])), nil
	}
	has := func(name string) bool { _, ok := l.export(name); return ok }

	if has("_initialize") {
		if _, err := call("_initialize"); err != nil {
			return err
		}
		if has("main") {
			_, err = call("main", 0, 0)
		} else if has("__main_void") {
			_, err = call("__main_void")
		}
	} else if has("_start") {
		_, err = call("_start")
	}
	if err != nil {
		return err
	}

	h.phase = running
	for _, plugin := range plugins {
		h.roots++
		h.options.RootID, h.options.Configuration = plugin.RootID, plugin.Configuration
		if has("proxy_on_context_create") {
			h.plugin = true
			_, err := call("proxy_on_context_create", uint64(h.roots), 0)
			h.plugin = false
			if err != nil {
				return err
			}
		}
		if has("proxy_on_vm_start") {
			ok, err := call("proxy_on_vm_start", uint64(h.roots), uint64(len(h.options.VMConfiguration)))
			if err == nil && ok == 0 {
				err = refusal{"proxy_on_vm_start"}
			}
			if err != nil {
				return err
			}
		}
		if has("proxy_on_configure") {
			h.plugin = true
			ok, err := call("proxy_on_configure", uint64(h.roots), uint64(len(h.options.Configuration)))
			h.plugin = false
			if err == nil && ok == 0 {
				err = refusal{"proxy_on_configure"}
			}
			if err != nil {
				return err
			}
		}
	}
	if !connect {
		return nil
	}
	h.phase = connecting
	if has("proxy_on_context_create") {
		_, err = call("proxy_on_context_create", connectionContext, uint64(h.roots))
	}
	if err == nil && has("proxy_on_new_connection") {
		_, err = call("proxy_on_new_connection", connectionContext)
	}
	var failed failure
	if errors.As(err, &failed) {
		if h.asked && ctx.Err() == nil {
			return nil
		}
		failed.step += " for a connection"
		return failed
	}
	return nil
}

// link offers the module those host functions that it imports.
func (h *host) link(ctx context.Context, runtime wazero.Runtime, l *layout) error {
	builders := map[string]wazero.HostModuleBuilder{}
	for _, e := range l.imports {
		f, _ := offered(e.module, e.name)
		b := builders[e.module]
		if b == nil {
			b = runtime.NewHostModuleBuilder(e.module)
			builders[e.module] = b
		}
		params, results, _ := strings.Cut(f.signature, ":")
		b.NewFunctionBuilder().WithGoModuleFunction(h.guard(e.String(), f), valueTypes(params), valueTypes(results)).Export(e.name)
	}
	for _, b := range builders {
		if _, err := b.Instantiate(ctx); err != nil {
			return err
		}
	}
	return nil
}

func valueTypes(letters string) []api.ValueType {
	types := make([]api.ValueType, len(letters))
	for i, c := range letters {
		types[i] = api.ValueTypeI32
		if c == 'I' {
			types[i] = api.ValueTypeI64
		}
	}
	return types
}

// explain makes a problem of what ended a run.
func (h *host) explain(ctx context.Context, err error, logs []Log) error {
	var p *problem.Problem
	var again spoiled
	var refused refusal
	var failed failure
	switch {
	case errors.As(err, &p): // of compiling, which saw no secret
		return err
	case ctx.Err() != nil:
		return fmt.Errorf("dry run: %w", context.Cause(ctx))
	case errors.As(err, &again):
		where := "in a second sandbox"
		if again.used {
			where = "in a sandbox that runs another configuration"
		}
		return problem.SandboxSpoiled.New("%s: %s", where, problem.Of(h.explain(ctx, again.err, logs)).Details)
	case errors.As(err, &refused):
		what := ""
		if refused.step == "proxy_on_vm_start" {
			what = "its VM configuration was refused; "
		}
		return problem.ConfigRefused.New("%s%s", what, lastWords(logs))
	case errors.As(err, &failed):
		return problem.ModuleMisbehaved.New("%s; %s", h.reason(failed), lastWords(logs))
	}
	return fmt.Errorf("dry run: %w", err)
}

func (h *host) reason(f failure) string {
	refused := ""
	if h.wanted > 0 {
		refused = fmt.Sprintf(" after it was refused %.4g MiB of memory (it may use %.4g MiB)",
			float64(h.wanted)/(1<<20), float64(h.options.MemoryLimit)/16)
	}
	var exit *sys.ExitError
	switch {
	case errors.As(f.err, &exit) && exit.ExitCode() == sys.ExitCodeDeadlineExceeded:
		return fmt.Sprintf("%s did not come to an end within %s%s", f.step, h.options.Timeout, refused)
	case errors.Is(f.err, errTooLittleMemory):
		return f.step + " failed" + refused
	}
	reason, trace, _ := strings.Cut(f.err.Error(), "\n")
	reason = strings.TrimSuffix(strings.TrimPrefix(reason, "wasm error: "), " (recovered by wazero)")
	text := fmt.Sprintf("%s trapped: %s", f.step, reason)
	if where := innermost(trace); where != "" {
		text += ", in " + where
	}
	text += refused
	if h.phase == connecting {
		text += "; the protocol is tcp: is the module made for requests, protocol http?"
	}
	return clip(h.redactor.text(text), 1024)
}

// innermost finds the first of the module's own functions in a stack trace that has a name.
func innermost(trace string) string {
	for line := range strings.Lines(trace) {
		name, own := strings.CutPrefix(strings.TrimSpace(line), ".") // a host function has its module before the dot
		name, _, called := strings.Cut(name, "(")
		if own && called && name != "" && name[0] != '$' {
			return name
		}
	}
	return ""
}

// lastWords quotes the filter's last warnings and errors, from its last panic on if there was one. Of a filter
// that gave none it quotes the last line.
func lastWords(logs []Log) string {
	const most = 3
	var words, last []string
	for _, l := range logs {
		if strings.TrimSpace(l.Text) == "" {
			continue
		}
		word := `"` + clip(l.Text, 1024) + `"`
		last = []string{word}
		switch l.Level {
		case "warn", "error", "critical":
			if strings.Contains(l.Text, "panic") {
				words = nil
			} else if len(words) == most && !strings.Contains(words[0], "panic") {
				words = words[1:]
			}
			if len(words) < most {
				words = append(words, word)
			}
		}
	}
	if len(words) == 0 {
		words = last
	}
	if len(words) == 0 {
		return "the filter said nothing"
	}
	return "the filter said: " + strings.Join(words, ", ")
}
