// Command bench measures what filters cost on this machine, and prints every figure beside what it is to be compared
// with from the same run: changes of a running Envoy's filter through the adapter and as a bare xDS push, those of a real
// Istio's sidecar through the adapter and by server-side apply, those of a real Consul's sidecars through the adapter and by
// writing the entry, CPU per request with and without a filter, what the adapter takes in time and memory for many clients,
// targets and proxies, and what the adapter library's runtime takes where it can do the same.
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
	"slices"
	"syscall"
	"time"

	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/store"
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
	starts   int           // of a program
	settle   time.Duration // before memory is read
	pairs    int           // of changes through the adapter and as a bare push, for each size of group
	rounds   int           // of the same requests to each kind of Envoy
	requests int           // in one round
	tokens   int           // in use when every request has another one; the limiter remembers 1024

	oldEvents     int   // that are kept already at a start
	audiences     []int // numbers of clients that events are told to
	told          int   // events in a round
	repeats       int   // of rounds with events, or with operations
	comers        int   // clients that leave again
	changes       int   // of the same filters, in a round of operations and of a large group
	targets       int   // with a filter each
	targetProxies int   // over those
	groupProxies  int   // in one group

	clusterTargets int // of a cluster, with a filter each
}

var (
	full = sizes{starts: 7, settle: 2 * time.Second, pairs: 9, rounds: 9, requests: 20_000, tokens: 8192, oldEvents: 10_000,
		audiences: []int{1, 100, 1000}, told: 100, repeats: 5, comers: 50, changes: 5, targets: 1000, targetProxies: 200, groupProxies: 10_000, clusterTargets: 100}
	quick = sizes{starts: 1, settle: 100 * time.Millisecond, pairs: 1, rounds: 1, requests: 2_000, tokens: 2_000, oldEvents: 100,
		audiences: []int{1, 10}, told: 10, repeats: 1, comers: 5, changes: 1, targets: 20, targetProxies: 10, groupProxies: 100, clusterTargets: 3}
)

// bench is one run.
type bench struct {
	sizes
	dir      string // of its own, removed at the end
	program  string // the adapter
	library  string // an adapter that the adapter library makes; empty to leave it out
	states   int    // state directories that were made up
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
	only := flags.String("only", "", "measure one `part` of it: adapter, envoy, istio or consul (default: all)")
	beside := flags.Bool("library", false, "build an adapter of the adapter library's runtime too, and measure it beside; building it takes minutes the first time")
	jsonPath := flags.String("json", "", "also write the figures to this `file`")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if !slices.Contains([]string{"", "adapter", "envoy", "istio", "consul"}, *only) {
		return fmt.Errorf("-only %s: there are adapter, envoy, istio and consul", *only)
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
	if *beside {
		if b.library, err = b.buildLibrary(ctx); err != nil {
			return err
		}
	}
	b.report.Machine = machine{runtime.NumCPU(), runtime.GOOS + "/" + runtime.GOARCH, b.envoy.Version, runtime.Version(), load(), ""}
	if err := b.measure(ctx, *only); err != nil {
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

func (b *bench) measure(ctx context.Context, only string) error {
	for _, m := range []struct {
		part, what string
		do         func(context.Context) error
	}{
		{"adapter", "start the adapter", b.measureStart},
		{"adapter", "tell events", b.measureEvents},
		{"adapter", "let clients come and go", b.measureLeaving},
		{"adapter", "send operations", b.measureOperations},
		{"adapter", "change many targets", b.measureTargets},
		{"adapter", "change a large group", b.measureGroup},
		{"envoy", "run Envoys", b.measureEnvoys},
		{"istio", "change filters on Istio", b.measureIstio},
		{"consul", "change filters on Consul", b.measureConsul},
	} {
		if only != "" && only != m.part {
			continue
		}
		if err := m.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", m.what, err)
		}
	}
	return nil
}

// measureEnvoys changes filters of running Envoys, and sends requests through them.
func (b *bench) measureEnvoys(ctx context.Context) (err error) {
	adapter, _, err := startAdapter(ctx, b.program, b.state())
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

// measureStart starts the adapter again and again: on empty state, on old events, and beside it what the library makes.
func (b *bench) measureStart(ctx context.Context) error {
	old := b.state()
	b.say("writing %d events", b.oldEvents)
	if err := writeEvents(ctx, old, b.oldEvents); err != nil {
		return fmt.Errorf("write old events: %w", err)
	}
	s := section{Title: "Start until it answers, and memory when it has nothing to do", Columns: []string{"", "start", fmt.Sprintf("RSS after %s", b.settle), "PSS"}}
	kinds := []struct {
		name  string
		start func() (runs, time.Duration, error)
	}{
		{"the adapter, with empty state", func() (runs, time.Duration, error) { return startAdapter(ctx, b.program, b.state()) }},
		{fmt.Sprintf("the adapter, with %d events", b.oldEvents), func() (runs, time.Duration, error) { return startAdapter(ctx, b.program, old) }},
		{"the library's adapter, which keeps nothing", func() (runs, time.Duration, error) { return startLibrary(ctx, b.library, b.state()+".log") }},
	}
	if b.library == "" {
		kinds = kinds[:2]
	}
	for _, k := range kinds {
		var took, rss, pss []float64
		for i := range b.starts {
			b.say("start %d of %d of %s", i+1, b.starts, k.name)
			a, t, err := k.start()
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
		s.add(k.name, figureOf("ms", took), figureOf("MiB", rss), figureOf("MiB", pss))
	}
	b.report.Sections = append(b.report.Sections, s)
	b.verdict("start with empty state", s.Lines[0].Cells[0], startBar)
	b.verdict("memory with empty state", s.Lines[0].Cells[1], idleBar)
	b.verdict(fmt.Sprintf("start with %d events", b.oldEvents), s.Lines[1].Cells[0], oldBar)

	sizes := section{Title: "Size of the program, stripped", Columns: []string{"", "figure"}}
	for _, p := range []struct{ name, path string }{{"the adapter", b.program}, {"the library's adapter", b.library}} {
		if p.path == "" {
			continue
		}
		info, err := os.Stat(p.path)
		if err != nil {
			return err
		}
		sizes.add(p.name, figureOf("MiB", []float64{float64(info.Size()) / (1 << 20)}))
	}
	b.report.Sections = append(b.report.Sections, sizes)
	return nil
}

// runs is a program that was started.
type runs interface {
	pid() int
	stop() error
}

// writeEvents fills a state directory with operations of five events each, as an adapter keeps them.
func writeEvents(ctx context.Context, state string, n int) (err error) {
	kept, err := store.Open(ctx, store.Options{StateDir: state, SyncInterval: time.Minute})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, kept.Close()) }()
	log, err := event.NewLog(ctx, kept.Log(), event.NewHub(0, 0))
	if err != nil {
		return err
	}
	var after uint64
	for i := range n {
		if i%burst == 0 {
			after = 0
		}
		e := event.Event{Operation: fmt.Sprintf("old-%d", i/burst), Sequence: uint64(i%burst + 1), Time: time.Now(), Last: i%burst == burst-1,
			Summary: fmt.Sprintf("%d of 200 proxies run default/filter-%d (sha256 9805f1b18a94…)", i%200, i), Details: "on ProxyGroup edge, chain version 0123456789abcdef",
			Component: "6f1c4a52-0000-4000-8000-000000000000", Name: operation.ComponentName}
		if after, err = log.Append(ctx, e, after); err != nil {
			return err
		}
	}
	return nil
}

// state is a state directory that nothing is in.
func (b *bench) state() string {
	b.states++
	return filepath.Join(b.dir, fmt.Sprintf("state-%d", b.states))
}

// verdict says whether a figure is within its bar.
func (b *bench) verdict(what string, f figure, bar float64) {
	holds := "holds"
	if f.Median > bar {
		holds = "does not hold"
	}
	b.note("bar: %s at most %g %s. It is %.1f %s: the bar %s", what, bar, f.Unit, f.Median, f.Unit, holds)
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
