// Package wasm tells what can be told about a module before any proxy gets it: Inspect reads it, DryRun
// runs its start and configuration in a sandbox.
//
// Modules are hostile input: whatever they hold, nothing here panics, and sizes, memory and running time are
// bounded. The sandbox has no network, no files and none of the process's environment. What it cannot show
// is how a filter treats requests; only start and configuration run.
package wasm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/experimental"

	"github.com/meshery/meshery-filters/internal/problem"
)

// Report is what can be told about a module without running it.
type Report struct {
	SHA256   string `json:"sha256"`   // of the module's bytes, in hexadecimal
	Size     int    `json:"size"`     // bytes
	ABI      string `json:"abi"`      // the proxy-wasm ABI: 0.1.0, 0.2.0, 0.2.1; "" if there is none
	Language string `json:"language"` // Rust, Go, TinyGo, AssemblyScript, C++; "" when it cannot be told

	Imports []string `json:"imports"` // sorted, as env.proxy_log
	Exports []string `json:"exports"` // sorted
	// Missing holds those imports that Envoy 1.39 and later do not offer to a module of this ABI, sorted.
	Missing []string `json:"missing"`

	MemoryPages    uint32 `json:"memoryPages"`    // at the start; a page is 64 KiB
	MaxMemoryPages uint32 `json:"maxMemoryPages"` // the module's own bound; 0 for none

	Sections []string `json:"sections"` // in the module's order; custom sections by their names
}

// Inspect reads a module and validates its code, without running any of it. A module that Envoy would not
// load gives problem.ModuleInvalid with every reason in its details, and as much of the Report as could be
// told. It takes about 0.1 s per MB, and up
// to 60 times the module's size in memory while it runs.
func Inspect(ctx context.Context, module []byte) (Report, error) {
	report, l, err := examine(module)
	if err != nil {
		return report, err
	}
	_, done, err := compile(ctx, l)
	done()
	return report, err
}

// longestName is how many bytes of a name are shown.
const longestName = 1024

// examine does everything of Inspect that needs no engine.
func examine(module []byte) (Report, *layout, error) {
	sum := sha256.Sum256(module)
	report := Report{
		SHA256: hex.EncodeToString(sum[:]), Size: len(module),
		Imports: []string{}, Exports: []string{}, Missing: []string{}, Sections: []string{},
	}
	l, err := scan(module)
	if err != nil {
		return report, nil, problem.ModuleInvalid.New("%w", err)
	}
	report.ABI, report.Language = abiOf(l), languageOf(l, module)
	report.MemoryPages, report.MaxMemoryPages = l.memoryMin, l.memoryMax
	for _, name := range l.sections {
		report.Sections = append(report.Sections, clip(name, longestName))
	}

	var faults []string
	if report.ABI == "" {
		faults = append(faults, "it has no proxy-wasm ABI marker: none of proxy_abi_version_0_1_0, proxy_abi_version_0_2_0 and proxy_abi_version_0_2_1 is exported")
	}
	for _, e := range l.imports {
		report.Imports = append(report.Imports, clip(e.String(), longestName))
		f, ok := offered(e.module, e.name)
		switch {
		case !ok || e.kind != kindFunction || report.ABI != "" && !f.in(report.ABI):
			report.Missing = append(report.Missing, clip(e.String(), longestName))
		case f.signature != e.signature:
			faults = append(faults, fmt.Sprintf("it imports %s as %s, and Envoy offers it as %s", e, show(e.signature), show(f.signature)))
		}
	}
	for _, e := range l.exports {
		report.Exports = append(report.Exports, clip(e.name, longestName))
		if want, ok := callback(e.name, report.ABI); ok && e.kind == kindFunction && e.signature != want {
			faults = append(faults, fmt.Sprintf("it exports %s as %s, and Envoy calls it as %s", e.name, show(e.signature), show(want)))
		}
	}
	slices.Sort(report.Imports)
	slices.Sort(report.Exports)
	slices.Sort(report.Missing)
	report.Missing = slices.Compact(report.Missing)
	if len(report.Missing) > 0 {
		faults = append(faults, "Envoy does not offer what it imports: "+strings.Join(shorten(report.Missing, 20), ", "))
	}
	if !slices.ContainsFunc(l.exports, func(e external) bool { return e.kind == kindMemory }) {
		faults = append(faults, "it does not export its memory")
	}
	if _, ok := l.export("malloc"); !ok {
		if _, ok := l.export("proxy_on_memory_allocate"); !ok {
			faults = append(faults, "it exports neither proxy_on_memory_allocate nor malloc, so that Envoy cannot hand it anything")
		}
	}
	if len(faults) > 0 {
		return report, l, problem.ModuleInvalid.New("%s", strings.Join(shorten(faults, 20), "; "))
	}
	return report, l, nil
}

// shorten keeps a hostile module from filling an event.
func shorten(words []string, n int) []string {
	words = slices.Clone(words)
	for i, w := range words {
		words[i] = clip(w, 2048)
	}
	if len(words) > n {
		words = append(words[:n], fmt.Sprintf("and %d more", len(words)-n))
	}
	return words
}

// show writes a signature as people write them.
func show(signature string) string {
	params, results, ok := strings.Cut(signature, ":")
	if !ok {
		return "something else"
	}
	names := func(letters string) string {
		var words []string
		for _, c := range letters {
			word, ok := map[rune]string{'i': "i32", 'I': "i64", 'f': "f32", 'F': "f64"}[c]
			if !ok {
				word = "?"
			}
			words = append(words, word)
		}
		return "(" + strings.Join(words, ", ") + ")"
	}
	return names(params) + " -> " + names(results)
}

// compile gives a runtime with the validated module in it. done frees both; it must be called even after an
// error.
//
// Why the interpreter: its preparation takes time in proportion to the module's size. The optimizing compiler
// takes minutes and 17 GB for one function of 400 KB that has many loops, cannot be interrupted, and for
// ordinary modules, too, costs more than it saves in a single start.
func compile(ctx context.Context, l *layout) (p prepared, done func(), err error) {
	// Everything that both V8 and wazero can.
	config := wazero.NewRuntimeConfigInterpreter().
		WithCoreFeatures(api.CoreFeaturesV2 | experimental.CoreFeaturesThreads |
			experimental.CoreFeaturesTailCall | experimental.CoreFeaturesExtendedConst |
			experimental.CoreFeaturesExceptionHandling | experimental.CoreFeaturesTypedFunctionReferences).
		WithCloseOnContextDone(true).WithDebugInfoEnabled(false)
	p.runtime = wazero.NewRuntimeWithConfig(ctx, config)
	done = func() { _ = p.runtime.Close(context.WithoutCancel(ctx)) } // only close hooks fail, and there are none
	// A fault of the engine must cost this module, not the process.
	defer func() {
		if r := recover(); r != nil {
			err = problem.ModuleInvalid.New("the sandbox failed to read it: %s", clip(fmt.Sprint(r), 500))
		}
	}()
	if err := ctx.Err(); err != nil {
		return p, done, fmt.Errorf("compile the module: %w", err)
	}
	ctx = experimental.WithFunctionListenerFactory(ctx, stackGuard{l})
	if p.module, err = p.runtime.CompileModule(ctx, l.code); err != nil {
		return p, done, problem.ModuleInvalid.New("it is malformed: %w", errors.New(clip(err.Error(), 500)))
	}
	return p, done, nil
}

type prepared struct {
	runtime wazero.Runtime
	module  wazero.CompiledModule
}

// stackGuard bounds the memory of a run's call stack. The engine bounds only the number of frames.
type stackGuard struct{ *layout }

const (
	smallFrame = 4096     // slots of 8 bytes; frames up to this size are not counted, as 2000 of them are 64 MiB
	maxStack   = 16 << 20 // slots of 8 bytes in all larger frames together: 128 MiB
)

// slots is the most that a function can have on the stack.
func (g stackGuard) slots(f api.FunctionDefinition) int {
	i := int(f.Index()) - g.importedFunctions
	if i < 0 || i >= len(g.frames) {
		return 0
	}
	return g.frames[i]
}

// NewFunctionListener implements experimental.FunctionListenerFactory.
func (g stackGuard) NewFunctionListener(f api.FunctionDefinition) experimental.FunctionListener {
	if g.slots(f) <= smallFrame {
		return nil
	}
	return experimental.FunctionListenerFunc(func(_ context.Context, _ api.Module, _ api.FunctionDefinition, _ []uint64, stack experimental.StackIterator) {
		sum := 0
		for stack.Next() {
			if n := g.slots(stack.Function().Definition()); n > smallFrame {
				sum += n
			}
		}
		if sum > maxStack {
			panic(errStackTooLarge)
		}
	})
}

var errStackTooLarge = errors.New("its call stack is too large")
