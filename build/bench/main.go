// Command bench measures what filters cost on this machine, and prints every figure beside what it is to be compared
// with from the same run: changes of a running Envoy's filter through the adapter and as a bare xDS push, CPU per
// request with and without a filter, and what the adapter and a loaded module take in time and memory.
//
// It reads /proc, so it needs Linux. A figure that misses its bar is said and is no failure; only what does not work is.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/meshery/meshery-filters/internal/envoy"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// sizes say how much is measured.
type sizes struct {
	starts   int           // of the adapter
	settle   time.Duration // before memory is read
	pairs    int           // of changes through the adapter and as a bare push, for each size of group
	rounds   int           // of the same requests to each kind of Envoy
	requests int           // in one round
	tokens   int           // in use when every request has another one; the limiter remembers 1024
}

var (
	full  = sizes{starts: 7, settle: 2 * time.Second, pairs: 9, rounds: 9, requests: 20_000, tokens: 8192}
	quick = sizes{starts: 1, settle: 100 * time.Millisecond, pairs: 1, rounds: 1, requests: 2_000, tokens: 2_000}
)

// bench is one run.
type bench struct {
	sizes
	dir      string // of its own, removed at the end
	program  string // the adapter
	envoy    envoy.Binary
	progress io.Writer
	report   report
}

func run(ctx context.Context, args []string, out, progress io.Writer) (err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(progress)
	small := flags.Bool("quick", false, "measure each thing about once: tells that the bench works, not what the figures are")
	envoyPath := flags.String("envoy", "", "`path` of an Envoy, "+envoy.MinVersion+" or later (default: $ENVOY, PATH, the cache)")
	program := flags.String("binary", "", "`path` of the adapter's program (default: built for the run)")
	jsonPath := flags.String("json", "", "also write the figures to this `file`")
	if err := flags.Parse(args); err != nil {
		return err
	}
	b := &bench{sizes: full, progress: progress}
	if *small {
		b.sizes = quick
	}
	if b.envoy, err = envoy.Find(ctx, *envoyPath); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "meshery-filters-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	if b.program, err = b.build(ctx, *program); err != nil {
		return err
	}
	b.report.Machine = machine{runtime.NumCPU(), runtime.GOOS + "/" + runtime.GOARCH, b.envoy.Version, runtime.Version(), load(), ""}
	if err := b.measure(ctx); err != nil {
		return err
	}
	b.report.Machine.LoadAfter = load()
	if err := b.report.print(out); err != nil {
		return err
	}
	if *jsonPath == "" {
		return nil
	}
	data, err := json.MarshalIndent(b.report, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*jsonPath, append(data, '\n'), 0o644)
}

// build makes the program that is measured, unless there is one.
func (b *bench) build(ctx context.Context, program string) (string, error) {
	if program != "" {
		return filepath.Abs(program)
	}
	program = filepath.Join(b.dir, "meshery-filters")
	b.say("building the adapter")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "github.com/meshery/meshery-filters")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the adapter: %w\n%s", err, text)
	}
	return program, nil
}

func (b *bench) measure(ctx context.Context) (err error) {
	if err := b.measureStart(ctx); err != nil {
		return fmt.Errorf("start the adapter: %w", err)
	}
	adapter, _, err := startAdapter(ctx, b.program, filepath.Join(b.dir, "state"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, adapter.stop()) }()
	// An Envoy that answers at once is the least upstream there is, and its CPU is not in any figure.
	upstream, err := b.startEnvoy(ctx, static("", byEnvoy, "127.0.0.1:1"))
	if err != nil {
		return fmt.Errorf("start the upstream: %w", err)
	}
	defer func() { err = errors.Join(err, stopAll([]*proxy{upstream})) }()
	if err := b.measureChanges(ctx, adapter, upstream.listener); err != nil {
		return fmt.Errorf("change filters: %w", err)
	}
	for _, w := range []way{byEnvoy, byUpstream} {
		if err := b.measureRequests(ctx, adapter, upstream.listener, w); err != nil {
			return fmt.Errorf("send requests: %w", err)
		}
	}
	b.note("the limiter remembers 1024 verified tokens in each worker; another token each time has it check every signature")
	return nil
}

// measureStart starts the adapter on empty state again and again.
func (b *bench) measureStart(ctx context.Context) error {
	info, err := os.Stat(b.program)
	if err != nil {
		return err
	}
	var took, rss, pss []float64
	for i := range b.starts {
		b.say("start %d of %d", i+1, b.starts)
		a, t, err := startAdapter(ctx, b.program, filepath.Join(b.dir, fmt.Sprintf("state-%d", i)))
		if err != nil {
			return err
		}
		took = append(took, ms(t))
		if err := pause(ctx, b.settle); err != nil {
			return errors.Join(err, a.stop())
		}
		r, p, err := resident(a.pid())
		if err := errors.Join(err, a.stop()); err != nil {
			return err
		}
		rss, pss = append(rss, r), append(pss, p)
	}
	s := section{Title: "The adapter, with empty state", Columns: []string{"", "figure"}}
	s.add("start, from exec until addresses.json is there and /readyz answers ok", figureOf("ms", took))
	s.add(fmt.Sprintf("idle memory after %s, RSS", b.settle), figureOf("MiB", rss))
	s.add("the same, PSS", figureOf("MiB", pss))
	s.add("size of the program", figureOf("MiB", []float64{float64(info.Size()) / (1 << 20)}))
	b.report.Sections = append(b.report.Sections, s)
	return nil
}

func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.progress, "bench: "+format+"\n", args...)
}

func (b *bench) note(format string, args ...any) {
	b.report.Notes = append(b.report.Notes, fmt.Sprintf(format, args...))
}

// pause lets something settle before its memory is read.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
