package server_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait of these tests.
const patience = 20 * time.Second

const component = "0b0f2c4e-6d8a-4c1e-9f3b-5a7d9e1c3b5f"

// operations records requests and answers what the test says.
type operations struct {
	submit func(context.Context, operation.Request) (string, error)
	list   func(context.Context) ([]operation.Status, error)
	plan   func(context.Context, operation.Request) ([]operation.Preview, error)
	rows   func() []operation.Row

	mu   sync.Mutex
	seen []operation.Request
}

func (o *operations) Submit(ctx context.Context, r operation.Request) (string, error) {
	o.mu.Lock()
	o.seen = append(o.seen, r)
	o.mu.Unlock()
	if o.submit != nil {
		return o.submit(ctx, r)
	}
	if r.Operation != "apply_filter" {
		return "", problem.UnknownOperation.New("%q", r.Operation)
	}
	return r.ID, nil
}

func (o *operations) Catalogue() []operation.Row {
	if o.rows != nil {
		return o.rows()
	}
	return []operation.Row{
		{Key: "meshery-filters", Description: "Image Hub with its rate limit filter", Category: operation.Install},
		{Key: "apply_filter", Description: "Apply Wasm filters", Category: operation.Custom},
	}
}

func (o *operations) List(ctx context.Context) ([]operation.Status, error) {
	if o.list != nil {
		return o.list(ctx)
	}
	return nil, nil
}

func (o *operations) Survey(context.Context) (operation.Survey, error) {
	return operation.Survey{Orphans: []plan.Orphan{{Proxy: "api at 127.0.0.1:19000", WasmFilter: plan.WasmFilter{Name: "f", SHA256: "a", Source: "inline"}}},
		Proxies: 3, Looked: 2, Missed: "one is silent", Files: []string{"/opt/a.wasm"}}, nil
}

func (o *operations) Plan(ctx context.Context, r operation.Request) ([]operation.Preview, error) {
	o.mu.Lock()
	o.seen = append(o.seen, r)
	o.mu.Unlock()
	if o.plan != nil {
		return o.plan(ctx, r)
	}
	return nil, nil
}

func (o *operations) History(_ context.Context, namespace, name string) ([]operation.Revision, error) {
	if name == "none" {
		return nil, problem.FilterNotFound.New("%s/%s", namespace, name)
	}
	return []operation.Revision{{Number: 7, Time: time.Unix(1, 0), Change: operation.Changed, Filter: filter.Filter{
		Key: filter.Key{Namespace: namespace, Name: name}, Spec: filter.Spec{Target: filter.Target{Kind: filter.ProxyGroup, Name: "edge"}, Priority: 3}}}}, nil
}

// last returns the request that came last.
func (o *operations) last(t *testing.T) operation.Request {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.seen) == 0 {
		t.Fatal("no request came through")
	}
	return o.seen[len(o.seen)-1]
}

func (o *operations) requests() []operation.Request {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]operation.Request{}, o.seen...)
}

// buffer is a log that many may write.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// fixture is a running server.
type fixture struct {
	*server.Server
	addr string
	ops  *operations
	hub  *event.Hub
	log  *buffer
	conn *grpc.ClientConn
	// stop begins the shutdown; stopped gets what Serve returned.
	stop    context.CancelFunc
	stopped chan error
}

func start(t *testing.T, change ...func(*server.Options)) *fixture {
	t.Helper()
	return startFrom(t, nil, change...)
}

// startFrom starts a server whose clients seem to be at an address, unless it is nil.
func startFrom(t *testing.T, from net.Addr, change ...func(*server.Options)) *fixture {
	t.Helper()
	f := &fixture{ops: &operations{}, hub: event.NewHub(0, 0), log: &buffer{}, stopped: make(chan error, 1)}
	o := server.Options{
		Operations:      f.ops,
		Events:          f.hub,
		Log:             slog.New(slog.NewTextHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Version:         "v0.1.0",
		GitSHA:          "abc1234",
		Component:       component,
		EnvoyVersions:   []string{"1.40", "1.39"},
		ShutdownTimeout: patience,
	}
	for _, c := range change {
		c(&o)
	}
	f.Server = server.New(o)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.addr = l.Addr().String()
	if from != nil {
		l = elsewhere{l, from}
	}
	ctx, stop := context.WithCancel(context.Background())
	f.stop = stop
	go func() { f.stopped <- f.Serve(ctx, l) }()
	t.Cleanup(func() {
		f.stop()
		if err := f.end(t); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	f.conn = dial(t, f.addr)
	return f
}

// end waits for Serve to return. It may be called more than once.
func (f *fixture) end(t *testing.T) error {
	t.Helper()
	select {
	case err := <-f.stopped:
		f.stopped <- err
		return err
	case <-time.After(patience):
		t.Fatal("Serve did not return")
		return nil
	}
}

func dial(t *testing.T, addr string, more ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(addr, append(more, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func limited(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

const (
	meshService   = "/meshes.MeshService/"
	filterService = "/meshery.filters.v1.FilterService/"
)

// call sends bytes and returns bytes.
func call(t *testing.T, conn *grpc.ClientConn, method string, fields ...raw) (raw, error) {
	t.Helper()
	req, resp := join(fields...), raw{}
	err := conn.Invoke(limited(t), method, &req, &resp)
	return resp, err
}

func mustCall(t *testing.T, conn *grpc.ClientConn, method string, req ...raw) fields {
	t.Helper()
	resp, err := call(t, conn, method, req...)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	return decode(t, resp)
}

// stream is an open server stream of bytes.
type stream struct {
	grpc.ClientStream
	close context.CancelFunc
}

// open begins a stream without waiting for its headers.
func open(t *testing.T, conn *grpc.ClientConn, method string, fields ...raw) stream {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		t.Fatal(err)
	}
	req := join(fields...)
	if err := s.SendMsg(&req); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	return stream{s, cancel}
}

// follow opens a stream and waits until it misses nothing.
func follow(t *testing.T, conn *grpc.ClientConn, method string, fields ...raw) stream {
	t.Helper()
	s := open(t, conn, method, fields...)
	if _, err := s.Header(); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s stream) next(t *testing.T) fields {
	t.Helper()
	var resp raw
	if err := s.RecvMsg(&resp); err != nil {
		t.Fatalf("receive: %v", err)
	}
	return decode(t, resp)
}

// fails returns the error that a stream ends with.
func (s stream) fails(t *testing.T) error {
	t.Helper()
	var resp raw
	err := s.RecvMsg(&resp)
	if err == nil {
		t.Fatalf("received %v where the stream should end", decode(t, resp))
	}
	return err
}

// emitting gives each event a position of its own, as the log does.
var emitting sync.Mutex

func emit(t *testing.T, hub *event.Hub, e event.Event) {
	t.Helper()
	e.Component, e.Name = component, operation.ComponentName
	emitting.Lock()
	defer emitting.Unlock()
	hub.Put(hub.Cursor(), e)
}

// until polls a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

func numbered(prefix string, n int) string { return fmt.Sprintf("%s-%d", prefix, n) }

// wire is a TCP connection through which one client talks to the server, and that can fail.
type wire struct {
	addr string

	mu     sync.Mutex
	frozen bool
	ends   []*net.TCPConn
}

func newWire(t *testing.T, to string) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{addr: l.Addr().String()}
	var copying sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		w.reset()
		copying.Wait()
	})
	copying.Go(func() {
		client, err := l.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", to)
		if err != nil {
			client.Close()
			return
		}
		a, b := client.(*net.TCPConn), server.(*net.TCPConn)
		w.mu.Lock()
		w.ends = []*net.TCPConn{a, b}
		w.mu.Unlock()
		copying.Go(func() { w.copy(a, b) })
		copying.Go(func() { w.copy(b, a) })
	})
	return w
}

func (w *wire) copy(to, from *net.TCPConn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		w.mu.Lock()
		if n > 0 && !w.frozen {
			_, _ = to.Write(buf[:n])
		}
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// freeze loses everything that is sent from now on, and neither end learns of it.
func (w *wire) freeze() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.frozen = true
}

// reset breaks the connection as a machine does that has forgotten it.
func (w *wire) reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.ends {
		_ = c.SetLinger(0)
		c.Close()
	}
}
