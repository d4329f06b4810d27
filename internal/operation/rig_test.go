package operation_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"go.uber.org/goleak"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
	"github.com/meshery/meshery-filters/internal/xds"
	"github.com/meshery/meshery-filters/templates"
)

func TestMain(m *testing.M) {
	code := m.Run()
	stopServer()
	stopSidecars()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// rig is a Runner on the real backend of plain Envoy, with proxies that are simulated so that they can misbehave.
type rig struct {
	t      *testing.T
	dir    *store.Store
	hub    *event.Hub
	events *event.Log
	envoys *xds.Backend
	runner *operation.Runner
	addr   string
	app    *hubApp
	stop   func() error
}

const hubKey = "a key of Image Hub that nobody may ever read"

// hubApp stands for the application, whose real one the command line starts.
type hubApp struct {
	mu      sync.Mutex
	running bool
	fail    error
}

func (a *hubApp) Start(context.Context) (string, bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	started := !a.running && a.fail == nil
	a.running = a.running || started
	return "127.0.0.1:1", started, a.fail
}

func (a *hubApp) Addr() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.running {
		return ""
	}
	return "127.0.0.1:1"
}

func (a *hubApp) Stop(context.Context) (bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	was := a.running
	a.running = false
	return was, nil
}

func newRig(t *testing.T, change ...func(*operation.Options)) *rig {
	t.Helper()
	return startRig(t, t.TempDir(), change...)
}

// startRig starts everything on a state directory, as a restart of the adapter does.
func startRig(t *testing.T, state string, change ...func(*operation.Options)) *rig {
	t.Helper()
	return startRigOn(t, store.Options{StateDir: state, SyncInterval: time.Hour, Queue: 100}, change...)
}

func startRigOn(t *testing.T, kept store.Options, change ...func(*operation.Options)) *rig {
	t.Helper()
	dir, err := store.Open(t.Context(), kept)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: dir, hub: event.NewHub(0, 0), app: &hubApp{}}
	r.events, err = event.NewLog(t.Context(), dir.Log(), r.hub)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	r.envoys, err = xds.New(context.Background(), xds.Options{Records: dir.Records(), Shared: dir.Shared(), Modules: dir.Blobs(), Log: log,
		OnLateRejection: func(l xds.LateRejection) {
			r.runner.Rejected(context.Background(), l.Target, l.Proxy, l.Text)
		}})
	if err != nil {
		t.Fatal(err)
	}
	seal, err := store.NewSeal("the key of the tests' seal")
	if err != nil {
		t.Fatal(err)
	}
	limiter, _ := templates.ImageHubLimiter("envoy")
	o := operation.Options{
		Backends:    map[string]operation.Backend{"envoy": r.envoys},
		Modules:     module.New(module.Options{Blobs: dir.Blobs(), Builtin: filters.Builtin, BuiltinNames: filters.Names(), Log: log}),
		ModuleNames: filters.Names(), ImageHub: r.app, Limiter: limiter,
		Secret: func(name, key string) (string, error) {
			if name == "imagehub" && key == "token-key" {
				return hubKey, nil
			}
			return "", problem.SecretMissing.New("%s/%s", name, key)
		},
		Records: dir.Records(), Queue: dir.Queue(), Events: r.events, Seal: seal, Component: "5b5e1d3f-9f0c-4a57-9a54-5a2b7f4e1a00", Workers: 4, Grace: 5 * time.Second, Log: log,
	}
	for _, c := range change {
		c(&o)
	}
	if r.runner, err = operation.NewRunner(o); err != nil {
		t.Fatal(err)
	}
	if err := r.runner.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.addr = l.Addr().String()
	server := grpc.NewServer(xds.ServerOptions()...)
	r.envoys.Register(server)
	go server.Serve(l)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 2)
	go func() { ran <- r.runner.Run(ctx) }()
	following, leave := context.WithCancel(context.Background())
	go func() { ran <- r.events.Run(following) }()
	r.stop = sync.OnceValue(func() error {
		cancel()
		err := <-ran
		leave()
		err = errors.Join(err, <-ran)
		r.envoys.Close()
		server.Stop()
		r.hub.Close()
		return errors.Join(err, dir.Close())
	})
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// story is the whole story of an operation, until its last event.
func (r *rig) story(id string) []event.Event {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 30*time.Second)
	defer cancel()
	sub := r.hub.Subscribe(r.hub.Oldest(), id)
	var events []event.Event
	for {
		e, err := sub.Next(ctx)
		if err != nil {
			r.t.Fatalf("operation %s has no end: %v; so far %v", id, err, texts(events))
		}
		if want := uint64(len(events) + 1); e.Sequence != want {
			r.t.Fatalf("event %d of %s comes where %d should: %v", e.Sequence, id, want, texts(events))
		}
		events = append(events, e)
		if e.Last {
			return events
		}
	}
}

func texts(events []event.Event) (lines []string) {
	for _, e := range events {
		lines = append(lines, strings.TrimSpace(e.Code+" "+e.Summary+" | "+e.Details))
	}
	return lines
}

// run submits an operation and returns its story.
func (r *rig) run(q operation.Request) []event.Event {
	r.t.Helper()
	id, err := r.runner.Submit(r.t.Context(), q)
	if err != nil {
		r.t.Fatalf("%s was not accepted: %v", q.Operation, err)
	}
	return r.story(id)
}

// ok runs an operation that must not fail.
func (r *rig) ok(q operation.Request) []event.Event {
	r.t.Helper()
	events := r.run(q)
	if last := events[len(events)-1]; last.Type == event.Error {
		r.t.Fatalf("%s failed: %v", q.Operation, texts(events))
	}
	return events
}

// fails runs an operation that must fail as that kind, and returns its last event.
func (r *rig) fails(kind *problem.Kind, q operation.Request) event.Event {
	r.t.Helper()
	events := r.run(q)
	last := events[len(events)-1]
	if last.Type != event.Error || last.Code != kind.Code || last.Cause == "" || last.Remedy == "" {
		r.t.Fatalf("want a failure with %s, got %v", kind.Code, texts(events))
	}
	return last
}

// order lists what stands on a group, as the backend has committed it.
func (r *rig) order(group string) string {
	r.t.Helper()
	statuses, err := r.runner.List(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, s := range statuses {
		if s.Chain.Target.Name == group {
			return strings.Join(s.Chain.Names(), " ")
		}
	}
	return ""
}

// doc is a document of the builtin headers; spec is more of it, one field a line.
func doc(name string, spec ...string) string {
	head := "apiVersion: filters.meshery.io/v1alpha1\nkind: Filter\nmetadata: {name: " + name + "}\nspec:\n"
	if !slices.ContainsFunc(spec, func(s string) bool { return strings.HasPrefix(s, "module:") }) {
		spec = append(spec, "module: {builtin: headers}")
	}
	if !slices.ContainsFunc(spec, func(s string) bool { return strings.HasPrefix(s, "config:") }) {
		spec = append(spec, "config: {response: {x-"+name+": there}}")
	}
	return head + "  " + strings.Join(spec, "\n  ") + "\n"
}

func apply(body string) operation.Request {
	return operation.Request{Operation: "apply_filter", Body: body}
}
func remove(body string) operation.Request {
	return operation.Request{Operation: "remove_filter", Body: body}
}

// answer is what a simulated proxy does with a response that it was sent.
type answer int

const (
	accept answer = iota
	refuse
	ignore
	quote // refuses, and quotes a secret of the configuration as Envoy may
)

const refusal = "Unable to create Wasm plugin: no"

// proxy joins the group and answers as decide says, given how many responses came before. The first chain, which every
// proxy gets when it connects, is always accepted. It leaves when leave is called or the test ends.
func (r *rig) proxy(id, group string, decide func(nth int) answer) (leave func()) {
	return r.versionedProxy(id, group, 40, decide)
}

func (r *rig) versionedProxy(id, group string, minor uint32, decide func(nth int) answer) (leave func()) {
	r.t.Helper()
	conn, err := grpc.NewClient(r.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	const url = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
	node := &core.Node{Id: id, Cluster: group, UserAgentName: "envoy", UserAgentVersionType: &core.Node_UserAgentBuildVersion{
		UserAgentBuildVersion: &core.BuildVersion{Version: &typev3.SemanticVersion{MajorNumber: 1, MinorNumber: minor}}}}
	request := &discovery.DiscoveryRequest{Node: node, TypeUrl: url, ResourceNames: []string{"meshery.filters"}}
	if err := stream.Send(request); err != nil {
		r.t.Fatal(err)
	}
	joined, gone := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(gone)
		version := ""
		for nth := 0; ; nth++ {
			m, err := stream.Recv()
			if err != nil {
				return
			}
			a := accept
			if nth > 0 {
				a = decide(nth)
			}
			q := &discovery.DiscoveryRequest{TypeUrl: url, ResourceNames: request.ResourceNames, ResponseNonce: m.GetNonce()}
			switch a {
			case accept:
				version = m.GetVersionInfo()
			case refuse:
				q.ErrorDetail = &rpcstatus.Status{Message: refusal}
			case quote:
				q.ErrorDetail = &rpcstatus.Status{Message: refusal + ": " + hubKey}
			}
			q.VersionInfo = version
			if a != ignore && stream.Send(q) != nil {
				return
			}
			if nth == 0 {
				close(joined)
			}
		}
	}()
	leave = sync.OnceFunc(func() {
		cancel()
		conn.Close()
		<-gone
	})
	r.t.Cleanup(leave)
	select {
	case <-joined:
	case <-time.After(10 * time.Second):
		r.t.Fatalf("proxy %s got no first chain", id)
	}
	return leave
}

func always(a answer) func(int) answer { return func(int) answer { return a } }

func probe(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile("../../build/testfilters/probe.wasm")
	if err != nil {
		t.Fatal(err)
	}
	return b
}
