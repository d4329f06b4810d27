package cli

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/stats"

	"github.com/meshery/meshery-filters/config"
	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/audit"
	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/limit"
	"github.com/meshery/meshery-filters/internal/meshery"
	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/page"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server"
	"github.com/meshery/meshery-filters/internal/store"
	"github.com/meshery/meshery-filters/internal/telemetry"
	"github.com/meshery/meshery-filters/internal/xds"
	"github.com/meshery/meshery-filters/templates"
)

// envoyVersions are those whose chains were tried; MeshVersions lists them.
var envoyVersions = []string{"1.40.0", "1.39.3", "1.39.0"}

// addressesFile in the state directory tells where a running adapter listens, which matters when ports were free ones.
const addressesFile = "addresses.json"

type addresses struct {
	GRPC string `json:"grpc"`
	XDS  string `json:"xds"`
	HTTP string `json:"http"`
	// Modules and NATS are empty where nothing listens.
	Modules string `json:"modules,omitempty"`
	NATS    string `json:"nats,omitempty"`
}

func newServe(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the adapter: Meshery's gRPC service, and the xDS that proxies connect to",
		Long: `Serve runs the adapter until it is interrupted. Meshery and the other commands talk to its gRPC address, plain Envoys
connect to its xDS address, and its HTTP address shows in a browser what runs where, and answers /healthz, /readyz and
/metrics.

Every key of the configuration can be set in a file (--config), in the environment or by a flag; later ones win.
What it keeps is in the state directory: an adapter that is started again on it goes on where it was.`,
		Example: `  meshery-filters serve
  meshery-filters serve --config adapter.yaml --debug
  MESHERY_FILTERS_GRPC_ADDR=127.0.0.1:20014 meshery-filters serve --state-dir ./state`,
		Args: noArgs,
	}
	load := configFlags(a, cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := load()
		if err != nil {
			return err
		}
		return serve(cmd.Context(), c, a.Env, a.build, a.Out, newLog(a.Err, c))
	}
	return cmd
}

func newLog(w io.Writer, c config.Config) *slog.Logger {
	o := &slog.HandlerOptions{Level: slog.LevelInfo}
	if c.Debug {
		o.Level = slog.LevelDebug
	}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

// serve builds the adapter of its parts and runs it until ctx ends.
func serve(ctx context.Context, c config.Config, env []string, build Build, out io.Writer, log *slog.Logger) (err error) {
	for _, w := range c.Warnings() {
		log.Warn(w)
	}
	this := telemetry.Build{Version: build.Version, Revision: build.Commit}
	metrics := telemetry.New(this)
	// State: operations, events, chains and modules, in a folder that one adapter holds at a time or in a NATS that
	// several share.
	kept, err := openStore(ctx, c, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, kept.Close()) }()
	component, err := kept.ComponentID(ctx)
	if err != nil {
		return err
	}

	traces := telemetry.NewTraces(ctx, env, this, component, metrics, log)
	defer traces.Close()

	// Events: from the log to gRPC streams through the hub, and to NATS: the embedded one where others may read it, and
	// another where one is named.
	hub := event.NewHub(0, 0)
	defer hub.Close()
	events, err := event.NewLog(ctx, kept.Log(), hub)
	if err != nil {
		return err
	}
	embedded := kept.Server()
	deliveries := map[string]event.Options{} // by the name that metrics give them
	if c.NATSListen != "" {
		deliveries["listen"] = event.Options{Connect: embedded.Connect(), Log: kept.Log(), Logger: log}
	}
	if c.NATSURL != "" {
		o := event.Options{URL: c.NATSURL, Log: kept.Log(), Cursor: kept.Cursor("nats " + c.NATSURL), Logger: log}
		if c.NATSCredsFile != "" {
			o.Connect = append(o.Connect, nats.UserCredentials(c.NATSCredsFile))
		}
		deliveries["nats"] = o
	}
	brokers := map[string]*event.NATS{}
	for name, o := range deliveries {
		b, err := event.NewNATS(ctx, o)
		if err != nil {
			return err
		}
		brokers[name] = b
	}

	// Meshery Server: events go there too, one by one, and the adapter is registered once its address is known.
	var sink *meshery.Sink
	if c.Meshery.Events {
		if sink, err = mesherySink(ctx, c, kept, log); err != nil {
			return err
		}
	}

	// Audit: who asked for what, in a file of its own.
	audited, err := openAudit(c, out, log)
	if err != nil {
		return err
	}
	if audited != nil {
		defer func() { err = errors.Join(err, audited.Close()) }()
	}

	// Secrets: from the configuration, and what is kept is sealed with one of them.
	sealKey := ""
	if k := c.SealKey; k.Name != "" {
		sealKey, err = c.Secret(k.Name, k.Key)
	} else {
		sealKey, err = kept.SealKey()
	}
	if err != nil {
		return err
	}
	seal, err := store.NewSeal(sealKey)
	if err != nil {
		return err
	}

	tokenKey, err := hubKey(ctx, c, kept.Records(), seal, component, log)
	if err != nil {
		return err
	}
	secret := func(name, key string) (string, error) {
		if name == hubSecret && key == hubToken {
			return tokenKey, nil
		}
		return c.Secret(name, key)
	}

	// Operations: over modules by digest, the backend of plain Envoy, and clusters.
	var stored func(ctx context.Context, id string, limit int64) ([]byte, error)
	if c.MesheryServer != "" {
		m, err := meshery.New(meshery.Options{Server: c.MesheryServer, TokenFile: c.Meshery.TokenFile, Provider: c.Meshery.Provider, Timeout: c.Limits.ModuleTimeout})
		if err != nil {
			return err
		}
		defer m.Close()
		stored = m.Download
	}
	modules := module.New(module.Options{Blobs: kept.Blobs(), Builtin: filters.Builtin, BuiltinNames: filters.Names(),
		MaxBytes: int64(c.Limits.ModuleBytes), Timeout: c.Limits.ModuleTimeout, AllowLoopback: c.AllowLoopbackModules, ServedAt: c.ModulesURL, Secret: c.Secret, Meshery: stored,
		Log: log, OnFetch: metrics.Fetched})
	var runner *operation.Runner
	xdsTLS, err := c.XDSTLS.Server(log)
	if err != nil {
		return err
	}
	xdsOptions := xds.Options{Records: kept.Records(), Shared: kept.Shared(), Modules: kept.Blobs(), Log: log,
		OnLateRejection: func(l xds.LateRejection) { runner.Rejected(ctx, l.Target, l.Proxy, l.Text) },
		Streams:         limit.Bounds{PerClient: c.Limits.ProxiesPerClient, Total: c.Limits.Proxies},
		ProxyRate:       c.Limits.ProxyRequestRate, Rate: c.Limits.RequestRate}
	if c.XDSTLS.ClientCAFile != "" {
		xdsOptions.Admit = xds.AdmitCertified
	}
	envoys, err := xds.New(context.WithoutCancel(ctx), xdsOptions)
	if err != nil {
		return err
	}
	defer envoys.Close()
	limiter, _ := templates.ImageHubLimiter("envoy")
	hubSidecar := ""
	if c.OnConsul() {
		limiter, _ = templates.ImageHubLimiter("agent")
		hubSidecar = c.ImageHub.SidecarAddr
	}
	prepared, err := readPrepared(c.OperationsDir, log)
	if err != nil {
		return err
	}
	hubApp := &application{addr: c.ImageHub.Addr, key: []byte(tokenKey), records: kept.Records(), record: "imagehub/runs/" + component, log: log}
	defer hubApp.end(context.WithoutCancel(ctx))
	operations := operation.Options{
		Backends: map[string]operation.Backend{"envoy": envoys}, Modules: modules, ModuleNames: filters.Names(), StoredFilters: stored != nil,
		ImageHub: hubApp, Limiter: limiter, HubSidecar: hubSidecar, ImageHubIn: hubIn(c.ImageHub), Prepared: prepared, Secret: secret,
		Records: kept.Records(), Queue: kept.Queue(), Events: events, Seal: seal, Component: component,
		AllowUnauthenticated: c.AllowUnauthenticated, AllowWideTargets: c.AllowWideTargets,
		Workers: c.Limits.Workers, Grace: c.ShutdownTimeout, Log: log, Observer: metrics, Tracer: traces.Tracer(),
	}
	if audited != nil {
		operations.Audit = audited
	}
	leave, err := operateOn(&operations, c)
	if err != nil {
		return err
	}
	defer leave()
	if runner, err = operation.NewRunner(operations); err != nil {
		return err
	}
	grpcTLS, err := c.GRPCTLS.Server(log)
	if err != nil {
		return err
	}
	calls := server.Options{Operations: runner, Events: hub, Story: events.Of, EventsID: kept.ID(), Left: kept.Position("stream-events"), Log: log, Version: build.Version, GitSHA: build.Commit,
		Component: component, EnvoyVersions: envoyVersions, TLS: grpcTLS, Roles: server.Roles{Operate: config.List(c.GRPCRoles.Operate), Read: config.List(c.GRPCRoles.Read)},
		Calls:           limit.Bounds{Rate: c.Limits.CallRate, PerClient: c.Limits.CallsPerClient, Total: c.Limits.Calls},
		Streams:         limit.Bounds{Rate: c.Limits.CallRate, PerClient: c.Limits.StreamsPerClient, Total: c.Limits.Streams},
		ShutdownTimeout: c.ShutdownTimeout, Stats: append(traces.Calls(), metrics.Calls()), OnRefused: metrics.Refused}
	if audited != nil {
		calls.Audit = audited
	}
	api := server.New(calls)

	// Listeners, all of them before anything answers, so that a taken port changes nothing.
	listeners := map[string]net.Listener{} // by the configuration's key
	callers := limit.Bounds{PerClient: c.Limits.ConnectionsPerAddress, Total: c.Limits.Connections}
	// An Envoy that comes back may have a connection that nobody has noticed yet is dead.
	proxies := limit.Bounds{PerClient: 2 * c.Limits.ProxiesPerClient, Total: 2 * c.Limits.Proxies}
	for _, l := range []struct {
		key, addr string
		bounds    limit.Bounds
		tls       config.TLS // where HTTP is spoken
	}{{"grpcAddr", c.GRPCAddr, callers, config.TLS{}}, {"xdsAddr", c.XDSAddr, proxies, config.TLS{}}, {"httpAddr", c.HTTPAddr, callers, c.HTTPTLS},
		{"modulesAddr", c.ModulesAddr, callers, c.ModulesTLS}} {
		if l.addr == "" {
			continue
		}
		conf, err := l.tls.Server(log)
		if err != nil {
			closeAll(listeners)
			return err
		}
		inner, err := net.Listen("tcp", l.addr)
		if err != nil {
			closeAll(listeners)
			return problem.InvalidConfiguration.New("%s: %w; another adapter may run there: stop it, or name another address", l.key, err)
		}
		refusals := rate.Sometimes{First: 1, Interval: 10 * time.Second}
		listeners[l.key] = limit.Listen(inner, l.bounds, func(why error) {
			metrics.Turned(l.key)
			refusals.Do(func() { log.Warn("connections are refused", "listener", l.key, "reason", why) })
		})
		if conf != nil {
			listeners[l.key] = tls.NewListener(listeners[l.key], conf)
		}
	}
	grpcListener, xdsListener, httpListener := listeners["grpcAddr"], listeners["xdsAddr"], listeners["httpAddr"]

	var registrar *meshery.Registrar
	if c.MesheryServer != "" && c.Meshery.Register {
		if registrar, err = mesheryRegistrar(c, grpcListener.Addr(), component, kept.Records(), log); err != nil {
			closeAll(listeners)
			return err
		}
	}

	// The page: what the runner and the backend say, and the hub's events.
	view, err := page.New(page.Options{Groups: func() []page.Group { return pageGroups(envoys.Groups()) }, Chains: runner.List, Events: hub,
		Version: build.Version, Component: component, Loopback: isLoopback(httpListener.Addr()), Log: log})
	if err != nil {
		closeAll(listeners)
		return err
	}

	// Metrics: of what the parts tell when it happens, and of what they are when somebody asks.
	var keys []string
	for _, row := range runner.Catalogue() {
		keys = append(keys, row.Key)
	}
	metrics.Operations(keys)
	metrics.Ask(telemetry.Sources{Queue: kept.Queue().Depth, QueueLimit: c.Limits.Queue, Groups: envoys.Stats, Events: events, Hub: hub,
		Brokers: brokers, Sink: sink, Registrar: registrar, Pages: view.Streams, Store: kept.Sizes})
	view.Handle("GET /metrics", metrics.Handler())

	// What proxies had before, they get again, before the first of them is answered, and what they are in front of runs.
	if err := errors.Join(runner.Restore(ctx), hubApp.Resume(ctx)); err != nil {
		closeAll(listeners)
		return err
	}
	var ready atomic.Bool
	g, running := errgroup.WithContext(ctx)
	// Events outlive operations, which tell of their end, and the connections of gRPC and xDS outlive them too: Envoys
	// acknowledge, and callers hear, until the last operation is through.
	outlive, release := context.WithCancel(context.WithoutCancel(ctx))
	defer release()
	g.Go(func() error {
		defer release()
		defer hub.Close() // streams end when they have sent the last event
		return runner.Run(running)
	})
	g.Go(func() error { return events.Run(outlive) })
	g.Go(func() error {
		runner.SweepModules(running, max(min(c.Limits.ModuleKeep/4, 10*time.Minute), 100*time.Millisecond), kept.Sweep)
		return nil
	})
	if kept.Shared() {
		g.Go(func() error { return runner.Follow(running) })
	}
	for _, b := range brokers {
		g.Go(func() error { return b.Run(outlive) })
	}
	if sink != nil {
		g.Go(func() error { return sink.Run(outlive) })
	}
	if registrar != nil {
		g.Go(func() error { return registrar.Run(running) })
	}
	if audited != nil {
		g.Go(func() error { return audited.Run(outlive) })
	}
	g.Go(func() error { return api.Serve(outlive, grpcListener) })
	g.Go(func() error { return serveXDS(outlive, xdsListener, xdsTLS, envoys, metrics.Calls()) })
	g.Go(func() error { return serveHTTP(outlive, httpListener, front(&ready, view), 10*time.Second, log) })
	where := addresses{GRPC: grpcListener.Addr().String(), XDS: xdsListener.Addr().String(), HTTP: httpListener.Addr().String(), NATS: embedded.ClientURL()}
	if l, ok := listeners["modulesAddr"]; ok {
		where.Modules = l.Addr().String()
		given := module.NewServer(module.ServerOptions{Blobs: kept.Blobs(), Live: runner.LiveModules, Log: log, OnServed: metrics.Served})
		g.Go(func() error { return serveHTTP(outlive, l, given, c.Limits.ModuleTimeout, log) })
	}
	g.Go(func() error {
		// Clients are told when nothing could be kept, and so nothing is accepted.
		tell := func(err error) {
			ready.Store(err == nil)
			api.SetReady(err == nil)
		}
		kept.Watch(running, tell)
		tell(context.Canceled)
		return nil
	})
	if err := writeAddresses(c.StateDir, where); err != nil {
		log.Warn("the addresses are not written down", "err", err)
	}
	defer os.Remove(filepath.Join(c.StateDir, addressesFile))
	ready.Store(true)
	api.SetReady(true)
	log.Info("the adapter is ready", "version", build.Version, "grpc", where.GRPC, "xds", where.XDS, "http", where.HTTP, "modules", where.Modules, "nats", where.NATS, "state", c.StateDir)
	err = g.Wait()
	log.Info("the adapter has stopped")
	return err
}

func openStore(ctx context.Context, c config.Config, log *slog.Logger) (*store.Store, error) {
	o := store.Options{StateDir: c.StateDir, URL: c.StoreURL, Queue: c.Limits.Queue, KeepBlobs: c.Limits.ModuleKeep, Listen: c.NATSListen,
		Insecure: c.NATSTLS.Insecure, Readable: []string{event.SubjectPrefix + ">"}, Logger: log}
	if c.Sync == "interval" {
		o.SyncInterval = syncInterval
	}
	if c.StoreCredsFile != "" {
		o.Connect = append(o.Connect, nats.UserCredentials(c.StoreCredsFile))
	}
	var err error
	if o.TLS, err = c.NATSTLS.Server(log); err != nil {
		return nil, err
	}
	return store.Open(ctx, o)
}

// openAudit opens the audit log; nil when there is to be none.
func openAudit(c config.Config, out io.Writer, log *slog.Logger) (*audit.Log, error) {
	o := audit.Options{File: c.AuditFile, Log: log}
	switch c.AuditFile {
	case "off":
		return nil, nil
	case "-":
		o.Stream = out
	case "":
		o.File = filepath.Join(c.StateDir, "audit.jsonl")
	}
	return audit.Open(o)
}

// syncInterval is how much a power cut can take with `sync: interval`.
const syncInterval = time.Second

func closeAll(listeners map[string]net.Listener) {
	for _, l := range listeners {
		l.Close()
	}
}

// serveXDS answers the proxies' streams.
func serveXDS(ctx context.Context, l net.Listener, t *tls.Config, envoys *xds.Backend, measured stats.Handler) error {
	o := append(xds.ServerOptions(),
		grpc.MaxConcurrentStreams(1000),
		grpc.MaxRecvMsgSize(1<<20), // a discovery request is a node and a few names
		grpc.ConnectionTimeout(20*time.Second),
		grpc.StatsHandler(measured),
	)
	if t != nil {
		o = append(o, grpc.Creds(credentials.NewTLS(t)))
	}
	s := grpc.NewServer(o...)
	envoys.Register(s)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve xDS on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	envoys.Close()
	s.Stop()
	return ignoreStopped(<-served)
}

func ignoreStopped(err error) error {
	if errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	return err
}

// pageGroups hands the backend's groups to the page.
func pageGroups(groups []xds.GroupStatus) []page.Group {
	all := make([]page.Group, len(groups))
	for i, g := range groups {
		all[i] = page.Group{Chain: g.Chain, Version: g.Version, Held: g.Held, Proxies: g.Proxies, Offered: g.Offered, OfferedProxies: g.OfferedProxies}
	}
	return all
}

func isLoopback(a net.Addr) bool {
	tcp, ok := a.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}

// front answers /healthz (the process lives) and /readyz (operations are taken), and shows the page.
func front(ready *atomic.Bool, view http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", view)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !ready.Load() {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// serveHTTP answers requests, each within the time that is given.
func serveHTTP(ctx context.Context, l net.Listener, h http.Handler, within time.Duration, log *slog.Logger) error {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: within,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve HTTP on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	s.Close()
	<-served
	return nil
}

// readPrepared reads the operations folder: every Filter document in it becomes an operation with the filter's name.
func readPrepared(folder string, log *slog.Logger) (map[string]string, error) {
	prepared := map[string]string{}
	if folder == "" {
		return prepared, nil
	}
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, problem.InvalidConfiguration.New("operationsDir: %w", err)
	}
	for _, e := range entries {
		file := filepath.Join(folder, e.Name())
		if strings.HasPrefix(e.Name(), ".") || !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(file)) {
			log.Debug("a file in operationsDir is ignored: documents are in .yaml, .yml and .json", "file", file)
			continue
		}
		body, err := readFile(file, filter.MaxBody)
		if err != nil {
			return nil, problem.InvalidConfiguration.New("operationsDir: %w", err)
		}
		documents, err := filter.Decode(body)
		if err != nil {
			return nil, fmt.Errorf("operationsDir: %s: %w", file, err)
		}
		for _, d := range documents {
			if _, twice := prepared[d.Metadata.Name]; twice {
				return nil, problem.InvalidConfiguration.New("operationsDir: %s: another document has the name %q too", file, d.Metadata.Name)
			}
			text, err := json.Marshal(d) // JSON is YAML
			if err != nil {
				return nil, fmt.Errorf("operationsDir: %s: %w", file, err)
			}
			prepared[d.Metadata.Name] = string(text)
		}
	}
	return prepared, nil
}

// configFlags gives a command a flag for every key of the configuration, and returns what reads all of it.
func configFlags(a *app, cmd *cobra.Command) (load func() (config.Config, error)) {
	file := cmd.Flags().String("config", "", "configuration `file`")
	values := map[string]*configValue{}
	for _, k := range config.Keys() {
		v := configValue{text: k.Default, kind: k.Type}
		values[k.Path] = &v
		f := cmd.Flags().VarPF(&v, k.Flag, "", fmt.Sprintf("%s; $%s", strings.TrimSuffix(k.Doc, "."), k.Env))
		if k.Type == "bool" {
			f.NoOptDefVal = "true"
		}
	}
	return func() (config.Config, error) {
		given := map[string]string{}
		for _, k := range config.Keys() {
			if cmd.Flags().Changed(k.Flag) {
				given[k.Path] = values[k.Path].text
			}
		}
		return config.Load(*file, a.Env, given)
	}
}

// configValue is the flag of one key. Its text is checked where the whole configuration is, so that all mistakes come
// at once.
type configValue struct{ text, kind string }

func (v *configValue) String() string     { return v.text }
func (v *configValue) Set(s string) error { v.text = s; return nil }
func (v *configValue) Type() string       { return v.kind }

// writeAddresses replaces the file at once, so that whoever waits for it never reads half of it.
func writeAddresses(stateDir string, a addresses) error {
	data, err := json.Marshal(a)
	if err != nil {
		return err
	}
	path := filepath.Join(stateDir, addressesFile)
	if err := os.WriteFile(path+".new", append(data, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
