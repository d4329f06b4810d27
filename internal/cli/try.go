package cli

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
	"github.com/meshery/meshery-filters/internal/xds"
)

// newTry makes `try`.
func newTry(a *app) *cobra.Command {
	t := &trial{app: a}
	cmd := &cobra.Command{
		Use:   "try FILE.wasm",
		Short: "Run a module in an Envoy of its own, and reload it whenever it is saved",
		Long: `Run a module in an Envoy of its own, in front of an upstream that answers with the request as it arrived there.

The module takes the way of "apply": it is run in a sandbox with its configuration first, then loaded into the running
Envoy. With --watch it is loaded again whenever it, or the configuration's file, is saved; a build that is refused
changes nothing, and the one before serves on. With --path requests are sent after each load.

It prints the address to send requests to, the filter's log lines as they come and, at its end, Envoy's statistics.
It runs until interrupted, or with --once until the requests of --path were answered.`,
		Example: `  meshery-filters try audit.wasm --config '{"level": "all"}' --watch
  meshery-filters try audit.wasm --config-file audit.json --path /orders -H 'x-user: ann' --once`,
		Args: oneArg("say which module to try: FILE.wasm"),
		RunE: func(cmd *cobra.Command, args []string) error {
			t.file = args[0]
			return t.run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.StringVar(&t.config, "config", "", "configuration, handed to the filter as this `text`")
	f.StringVar(&t.configFile, "config-file", "", "`file` with the configuration, handed to the filter as it is")
	f.StringVar(&t.rootID, "root-id", "", "`id` of the one to run of several filters in the module")
	f.StringVar(&t.policy, "failure-policy", "closed", "what happens to requests after a crash: closed, open or reload")
	f.BoolVar(&t.watch, "watch", false, "load it again whenever it is saved")
	f.StringArrayVar(&t.paths, "path", nil, "send a request to this `path` after each load, and print what came back; repeat it for several")
	f.StringArrayVarP(&t.headers, "header", "H", nil, "`header` of those requests, as 'name: value'; repeat it for several")
	f.BoolVar(&t.once, "once", false, "end after those requests")
	f.StringVar(&t.listen, "listen", "127.0.0.1:0", "IP `address` and port of the Envoy; port 0 takes a free one")
	f.StringVar(&t.logLevel, "log-level", "info", "lowest `level` of the filter's log lines: trace, debug, info, warning, error or critical")
	f.StringVar(&t.envoy, "envoy", "", "`path` of an Envoy (default: $ENVOY, envoy on PATH, the one that `make envoy` installs)")
	return cmd
}

const (
	tryGroup  = "try"
	saveCheck = 250 * time.Millisecond // between two looks at the files of --watch

	tryStart    = 60 * time.Second // of an Envoy
	tryRequest  = 15 * time.Second // of one of --path
	tryShutdown = 10 * time.Second
	maxResponse = 4 << 10 // bytes of a response that are printed
	maxLogLine  = 64 << 10
	maxConfig   = 1 << 20 // bytes of --config-file
)

// trial is one run of try: an adapter in small, with one Envoy.
type trial struct {
	*app
	file                     string
	config, configFile       string
	rootID, policy, logLevel string
	watch, once              bool
	paths, headers           []string
	listen, envoy            string

	key    filter.Key
	runner *operation.Runner
	hub    *event.Hub
	screen screen
}

// screen is standard output, which the filter's log and everything else share line by line.
type screen struct {
	mu  sync.Mutex
	out io.Writer
}

func (s *screen) printf(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintf(s.out, format, args...)
}

func (t *trial) run(ctx context.Context) (err error) {
	switch {
	case t.config != "" && t.configFile != "":
		return usage("--config and --config-file do not go together")
	case t.once && t.watch:
		return usage("--once and --watch do not go together")
	case !slices.Contains([]string{"trace", "debug", "info", "warning", "error", "critical"}, t.logLevel):
		return usage("--log-level: write trace, debug, info, warning, error or critical")
	}
	for _, h := range t.headers {
		if name, _, ok := strings.Cut(h, ":"); !ok || strings.TrimSpace(name) == "" {
			return usage("--header %q: write 'name: value'", h)
		}
	}
	t.key = filter.Key{Namespace: tryGroup, Name: labelOf(t.file)}
	t.screen.out = t.Out
	if _, err := t.document(); err != nil { // before anything is started
		return err
	}
	binary, err := envoy.Find(ctx, t.envoy)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "meshery-filters-try-")
	if err != nil {
		return fmt.Errorf("make a folder for the Envoy: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	state, err := store.Open(ctx, store.Options{StateDir: filepath.Join(dir, "state"), SyncInterval: time.Hour})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, state.Close()) }()

	// What serves the Envoy outlives ctx until the Envoy is gone.
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	g, serving := errgroup.WithContext(serving)
	defer func() {
		stop()
		if werr := g.Wait(); werr != nil { // then that is why try ended
			err = werr
		}
	}()
	upstream, discovery, err := t.serve(serving, g, state)
	if err != nil {
		return err
	}
	process, addr, err := t.startEnvoy(ctx, binary, upstream, discovery, filepath.Join(dir, "envoy"))
	if err != nil {
		return err
	}
	defer func() {
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), tryShutdown)
		defer cancel()
		err = errors.Join(err, process.Stop(bounded))
	}()
	t.screen.printf("Envoy %s listens at http://%s\n", binary.Version, addr)
	defer func() { t.statistics(context.WithoutCancel(ctx), process) }()
	err = t.use(ctx, serving, process, addr)
	if ctx.Err() != nil {
		return nil // interrupting it is how it ends
	}
	return err
}

// serve starts everything that the Envoy needs, on addresses of its own.
func (t *trial) serve(ctx context.Context, g *errgroup.Group, state *store.Store) (upstream, discovery string, err error) {
	quiet := slog.New(slog.DiscardHandler)
	backend, err := xds.New(ctx, xds.Options{Records: state.Records(), Modules: state.Blobs(), Log: quiet})
	if err != nil {
		return "", "", err
	}
	t.hub = event.NewHub(0, 0)
	events, err := event.NewLog(ctx, state.Log(), t.hub)
	if err != nil {
		return "", "", err
	}
	t.runner, err = operation.NewRunner(operation.Options{
		Backends: map[string]operation.Backend{"envoy": backend},
		Modules:  module.New(module.Options{Blobs: state.Blobs()}),
		Secret: func(name, key string) (string, error) {
			return "", problem.SecretMissing.New("%s/%s: try has no secrets", name, key)
		},
		Queue: state.Queue(), Events: events, Workers: 1, Grace: tryShutdown, Log: quiet,
	})
	if err != nil {
		return "", "", err
	}
	var lc net.ListenConfig
	echoes, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", "", fmt.Errorf("listen for the upstream: %w", err)
	}
	streams, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", "", errors.Join(fmt.Errorf("listen for xDS: %w", err), echoes.Close())
	}
	server := grpc.NewServer(xds.ServerOptions()...)
	backend.Register(server)
	web := &http.Server{Handler: http.HandlerFunc(echo), ReadHeaderTimeout: tryRequest, ErrorLog: slog.NewLogLogger(quiet.Handler(), slog.LevelWarn)}
	g.Go(func() error { return t.runner.Run(ctx) })
	g.Go(func() error { return events.Run(ctx) })
	g.Go(func() error {
		if err := ignoreStopped(server.Serve(streams)); err != nil {
			return fmt.Errorf("serve xDS: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		if err := web.Serve(echoes); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve the upstream: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		backend.Close()
		server.Stop()
		return web.Close()
	})
	return echoes.Addr().String(), streams.Addr().String(), nil
}

func (t *trial) startEnvoy(ctx context.Context, b envoy.Binary, upstream, discovery, dir string) (p *envoy.Process, addr string, err error) {
	bootstrap, err := envoy.Bootstrap{Group: tryGroup, NodeID: tryGroup, XDSAddr: discovery, Listen: t.listen, Upstream: upstream,
		Admin: "127.0.0.1:0"}.YAML()
	if err != nil {
		return nil, "", err
	}
	// So that statistics are those of the moment they are asked for, and not of the last five seconds' mark.
	bootstrap = append(bootstrap, "\nstats_flush_on_admin: true\n"...)
	ctx, cancel := context.WithTimeout(ctx, tryStart)
	defer cancel()
	p, err = envoy.Start(ctx, b, envoy.ProcessOptions{Bootstrap: bootstrap, Dir: dir, Concurrency: 1, LogLevel: "error",
		Log:  &filterLog{screen: &t.screen, prefix: t.logPrefix()},
		Args: []string{"--component-log-level", "wasm:" + t.logLevel}})
	if err != nil {
		return nil, "", err
	}
	if err = p.Ready(ctx); err == nil {
		addr, err = p.ListenerAddr(ctx, envoy.ListenerName)
	}
	if err != nil {
		return nil, "", errors.Join(err, p.Stop(ctx))
	}
	return p, addr, nil
}

// use loads the module, sends the requests, and with --watch does so again at every save, until ctx ends.
func (t *trial) use(ctx, serving context.Context, p *envoy.Process, addr string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(serving, func() { cancel(errors.New("a part of try ended")) })()
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		select {
		case <-p.Done():
			cancel(p.Err())
		case <-ctx.Done():
		}
	}()
	defer func() { cancel(nil); <-gone }()

	for {
		saved := t.stamp()
		err := t.load(ctx)
		if err == nil {
			err = t.requests(ctx, addr)
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil && !t.watch:
			return err
		case err != nil:
			f := explain(err, true)
			f.print(t.Err)
			fmt.Fprintln(t.Err, "Nothing was changed in the Envoy. Waiting for the next save.")
		case t.once:
			return nil
		}
		if err := t.nextSave(ctx, saved); err != nil {
			return err
		}
	}
}

// stamp tells one state of the files from another.
func (t *trial) stamp() string {
	var b strings.Builder
	for _, name := range []string{t.file, t.configFile} {
		if info, err := os.Stat(name); err == nil {
			fmt.Fprintln(&b, info.Size(), info.ModTime().UnixNano())
		} else {
			fmt.Fprintln(&b, "none")
		}
	}
	return b.String()
}

// nextSave waits until the files differ from what they were and have been left alone for a moment. Without --watch that
// never happens.
func (t *trial) nextSave(ctx context.Context, was string) error {
	tick := time.NewTicker(saveCheck)
	defer tick.Stop()
	for last := was; ; {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
		if !t.watch {
			continue
		}
		now := t.stamp()
		if now != was && now == last && !strings.HasPrefix(now, "none") {
			return nil
		}
		last = now
	}
}

// document is what `apply` would be given.
func (t *trial) document() (string, error) {
	config := t.config
	if t.configFile != "" {
		data, err := readFile(t.configFile, maxConfig)
		if err != nil {
			return "", usage("--config-file: %w", err)
		}
		config = string(data)
	}
	mod, err := loadModule(stdin, filter.Module{File: t.file})
	if err != nil {
		return "", usageError{err}
	}
	spec := filter.Spec{Mesh: "envoy", Target: filter.Target{Kind: filter.ProxyGroup, Name: tryGroup}, Module: mod,
		RootID: t.rootID, FailurePolicy: filter.FailurePolicy(t.policy)}
	if config != "" {
		spec.Config = filter.Value{V: config}
	}
	body, err := bodyOf([]filter.Document{{APIVersion: filter.APIVersion, Kind: filter.Kind,
		Metadata: filter.Metadata{Namespace: t.key.Namespace, Name: t.key.Name}, Spec: spec}})
	if err != nil {
		return "", err
	}
	_, err = filter.Read([]byte(body), "")
	return body, err
}

// load applies the module and tells the operation's events.
func (t *trial) load(ctx context.Context) error {
	begun := time.Now()
	body, err := t.document()
	if err != nil {
		return err
	}
	id := rand.Text()
	events := t.hub.Subscribe(t.hub.Cursor(), id)
	if _, err := t.runner.Submit(ctx, operation.Request{Operation: "apply_filter", ID: id, Body: body}); err != nil {
		return err
	}
	for {
		e, err := events.Next(ctx)
		if err != nil {
			return err
		}
		v := viewOf(e)
		switch {
		case v.Last && v.Type == typeError:
			return v.outcome()
		case v.Last:
			t.screen.printf("%s is loaded (%d ms)\n", t.file, time.Since(begun).Milliseconds())
			return nil
		case v.Type != typeInfo:
			v.say(t.Err)
		}
	}
}

func viewOf(e event.Event) eventView {
	return eventView{Operation: e.Operation, Sequence: e.Sequence, Time: e.Time, Summary: e.Summary, Details: e.Details,
		Type: map[event.Type]string{event.Info: typeInfo, event.Warn: typeWarning, event.Error: typeError}[e.Type],
		Code: e.Code, Cause: e.Cause, Remedy: e.Remedy, Last: e.Last}
}

// requests sends the requests of --path and prints the answers.
func (t *trial) requests(ctx context.Context, addr string) error {
	transport := &http.Transport{DisableCompression: true}
	defer transport.CloseIdleConnections()
	for _, path := range t.paths {
		if err := t.request(ctx, transport, addr, path); err != nil {
			return err
		}
	}
	return nil
}

func (t *trial) request(ctx context.Context, transport *http.Transport, addr, path string) error {
	ctx, cancel := context.WithTimeout(ctx, tryRequest)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/"+strings.TrimPrefix(path, "/"), nil)
	if err != nil {
		return usage("--path %q: %w", path, err)
	}
	for _, h := range t.headers {
		name, value, _ := strings.Cut(h, ":")
		if name, value = strings.TrimSpace(name), strings.TrimSpace(value); strings.EqualFold(name, "host") {
			req.Host = value
		} else {
			req.Header.Add(name, value)
		}
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("send a request to %s: %w", path, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxResponse))
	if err != nil {
		return fmt.Errorf("read the response of %s: %w", path, err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "GET %s: %s\n", path, resp.Status)
	for _, name := range slices.Sorted(maps.Keys(resp.Header)) {
		fmt.Fprintf(&b, "  %s: %s\n", strings.ToLower(name), strings.Join(resp.Header[name], ", "))
	}
	for _, l := range lines(string(body)) {
		fmt.Fprintf(&b, "  | %s\n", l)
	}
	t.screen.printf("%s", b.String())
	return nil
}

// echo answers with the request as it arrived.
func echo(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxResponse))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintf(w, "%s %s\nhost: %s\n", r.Method, r.RequestURI, r.Host)
	for _, name := range slices.Sorted(maps.Keys(r.Header)) {
		fmt.Fprintf(w, "%s: %s\n", strings.ToLower(name), strings.Join(r.Header[name], ", "))
	}
	if len(body) > 0 {
		fmt.Fprintf(w, "\n%s\n", body)
	}
}

// statistics prints what Envoy counted.
func (t *trial) statistics(ctx context.Context, p *envoy.Process) {
	ctx, cancel := context.WithTimeout(ctx, tryShutdown)
	defer cancel()
	var out bytes.Buffer
	stats, err := p.Admin().Stats(ctx, `^(wasm.*|http\.ingress\.downstream_rq_([1-5]xx|total|rx_reset))$`)
	if err != nil {
		fmt.Fprintf(t.Err, "Envoy's statistics cannot be read: %v\n", err)
		return
	}
	for _, name := range slices.Sorted(maps.Keys(stats)) {
		if stats[name] > 0 {
			fmt.Fprintf(&out, "  %s: %d\n", name, stats[name])
		}
	}
	if stats["http.ingress.downstream_rq_total"] > 0 {
		if latency := latency(ctx, p.AdminAddr()); latency != "" {
			fmt.Fprintf(&out, "  latency in ms: %s\n", latency)
		}
	}
	if out.Len() > 0 {
		t.screen.printf("Statistics:\n%s", out.String())
	}
}

// percentile is one of Envoy's: P50(of the last interval,of all).
var percentile = regexp.MustCompile(`(P[0-9.]+)\([^,)]*,([0-9.]+)\)`)

// latency reads how long requests took, as P50 1.05, P99 2.1; empty when Envoy does not tell. The first answer brings
// Envoy to merge what its workers measured, so a later one has it.
func latency(ctx context.Context, admin string) string {
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); {
		text := get(ctx, "http://"+admin+"/stats?filter="+`^http\.ingress\.downstream_rq_time$`)
		var found []string
		for _, m := range percentile.FindAllStringSubmatch(text, -1) {
			if slices.Contains([]string{"P50", "P90", "P99", "P100"}, m[1]) {
				found = append(found, m[1]+" "+m[2])
			}
		}
		if len(found) > 0 {
			return strings.Join(found, ", ")
		}
		select {
		case <-ctx.Done():
			return ""
		case <-time.After(50 * time.Millisecond):
		}
	}
	return ""
}

func get(ctx context.Context, url string) string {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return ""
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxResponse))
	if err != nil {
		return ""
	}
	return string(body)
}

// logPrefix is what Envoy puts between "wasm log" and a filter's line: the plugin's name, root id and vm id.
func (t *trial) logPrefix() string {
	parts := []string{"wasm log", t.key.String(), t.rootID, t.key.String()}
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), " ") + ": "
}

// filterLog finds in Envoy's log the filter's lines, and what Envoy says when a filter fails.
type filterLog struct {
	screen *screen
	prefix string
	rest   []byte // a line that has not ended
	inside bool   // the line before was printed, and may go on in the next
}

// envoyLine is [time][thread][level][component] [source file] text.
var envoyLine = regexp.MustCompile(`^\[[^\]]*\]\[[^\]]*\]\[([a-z]+)\]\[([a-z_ 0-9]+)\] \[[^\]]*\] (.*)$`)

// Write takes a piece of the log.
func (l *filterLog) Write(b []byte) (int, error) {
	l.rest = append(l.rest, b...)
	for {
		line, rest, ended := bytes.Cut(l.rest, []byte("\n"))
		if !ended {
			if len(l.rest) > maxLogLine {
				l.line(string(l.rest))
				l.rest = nil
			}
			return len(b), nil
		}
		l.line(string(line))
		l.rest = rest
	}
}

func (l *filterLog) line(text string) {
	m := envoyLine.FindStringSubmatch(text)
	switch {
	case m == nil && l.inside:
		l.screen.printf("  %s\n", text)
	case m == nil:
	case strings.HasPrefix(m[3], l.prefix):
		l.inside = true
		l.screen.printf("[%s] %s\n", m[1], strings.TrimPrefix(m[3], l.prefix))
	case m[1] == "error" || m[1] == "critical":
		l.inside = true
		l.screen.printf("[envoy %s] %s\n", m[1], m[3])
	default:
		l.inside = false
	}
}

var notLabel = regexp.MustCompile(`[^a-z0-9]+`)

// labelOf makes a filter's name of a file's.
func labelOf(file string) string {
	name := strings.TrimSuffix(filepath.Base(file), filepath.Ext(file))
	name = notLabel.ReplaceAllString(strings.ToLower(name), "-")
	name = strings.Trim(name[:min(len(name), 63)], "-")
	if name == "" {
		return "filter"
	}
	return name
}
