package xds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	envoytype "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/store"
)

// patience bounds every wait of a test.
const patience = 20 * time.Second

// rig is a backend with a real state directory, served on a real port.
type rig struct {
	t    *testing.T
	dir  *store.Store
	b    *Backend
	addr string
	log  *lines

	mu   sync.Mutex
	late []LateRejection
	stop func()
}

func newRig(t *testing.T, change ...func(*Options)) *rig {
	t.Helper()
	dir, err := store.Open(t.Context(), store.Options{StateDir: t.TempDir(), SyncInterval: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: dir, addr: "127.0.0.1:0", log: &lines{}}
	t.Cleanup(func() {
		r.stop()
		if err := dir.Close(); err != nil {
			t.Error(err)
		}
	})
	r.start(change...)
	return r
}

// start serves a new backend from the same state, and on the same port if there was one before.
func (r *rig) start(change ...func(*Options)) {
	r.t.Helper()
	o := Options{
		Records: r.dir.Records(), Modules: r.dir.Blobs(),
		Log: slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		OnLateRejection: func(l LateRejection) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.late = append(r.late, l)
		},
	}
	for _, c := range change {
		c(&o)
	}
	b, err := New(r.t.Context(), o)
	if err != nil {
		r.t.Fatal(err)
	}
	l, err := net.Listen("tcp", r.addr)
	if err != nil {
		r.t.Fatal(err)
	}
	s := grpc.NewServer(ServerOptions()...)
	b.Register(s)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	r.b, r.addr = b, l.Addr().String()
	r.stop = sync.OnceFunc(func() {
		b.Close()
		s.GracefulStop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			r.t.Error(err)
		}
	})
}

func (r *rig) lateRejections() []LateRejection {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.late)
}

var edge = filter.Target{Kind: filter.ProxyGroup, Name: "edge"}

// chain makes one of filters with those names, whose module is some bytes: simulated proxies never run it.
func (r *rig) chain(t filter.Target, names ...string) filter.Chain {
	r.t.Helper()
	c := filter.Chain{Mesh: "envoy", Target: t}
	digest, err := r.dir.Blobs().Put(r.t.Context(), []byte("\x00asm\x01\x00\x00\x00"))
	if err != nil {
		r.t.Fatal(err)
	}
	for _, n := range names {
		f := filter.Document{Metadata: filter.Metadata{Name: n}, Spec: filter.Spec{Target: t, Module: filter.Module{Builtin: "headers", SHA256: digest}}}.Filter("shop")
		c = c.With(f)
	}
	return c
}

func (r *rig) plan(rollout filter.Rollout, names ...string) plan.Plan {
	r.t.Helper()
	return r.planOf(r.chain(edge, names...), rollout)
}

func (r *rig) planOf(c filter.Chain, rollout filter.Rollout) plan.Plan {
	r.t.Helper()
	w, err := r.b.World(r.t.Context(), c)
	if err != nil {
		r.t.Fatal(err)
	}
	p, err := mesh.Envoy{}.Plan(c, w)
	if err != nil {
		r.t.Fatal(err)
	}
	p.Rollout = rollout
	return p
}

func (r *rig) apply(p plan.Plan) string {
	r.t.Helper()
	changes, err := r.b.Apply(r.t.Context(), p)
	if err != nil {
		r.t.Fatal(err)
	}
	return fmt.Sprint(changes)
}

func (r *rig) commit(p plan.Plan) {
	r.t.Helper()
	if err := r.b.Commit(r.t.Context(), p); err != nil {
		r.t.Fatal(err)
	}
}

// put applies and commits.
func (r *rig) put(p plan.Plan) plan.Plan {
	r.t.Helper()
	r.apply(p)
	r.commit(p)
	return p
}

// await reads Loaded until it tells want: "a=running (b=held)", with brackets around proxies that are not expected.
func (r *rig) await(p plan.Plan, want string) {
	r.t.Helper()
	r.awaitFunc(p, want, func(l plan.Loaded) bool { return describe(l) == want })
}

func (r *rig) awaitFunc(p plan.Plan, want string, ok func(plan.Loaded) bool) plan.Loaded {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	var last string
	for l, err := range r.b.Loaded(ctx, p) {
		if err != nil {
			r.t.Fatal(err)
		}
		if ok(l) {
			return l
		}
		last = describe(l)
	}
	r.t.Fatalf("proxies stay at  %s\nand do not reach %s", last, want)
	return plan.Loaded{}
}

func describe(l plan.Loaded) string {
	var parts []string
	for _, p := range l.Proxies {
		s := p.ID + "=" + string(p.State)
		if !p.Expected {
			s = "(" + s + ")"
		}
		parts = append(parts, s)
	}
	return strings.Join(parts, " ")
}

// eventually waits for something that nobody announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// lines is a log that a test reads.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// sim is a simulated proxy: it answers only when it is told to.
type sim struct {
	t      *testing.T
	stream discovery.AggregatedDiscoveryService_StreamAggregatedResourcesClient
	got    chan *discovery.DiscoveryResponse
	cancel func()
	ended  chan struct{}
	err    error // of the stream, once ended

	version string // the last one it accepted
	history []string
}

func node(id string) *core.Node {
	return &core.Node{Id: id, Cluster: edge.Name, UserAgentName: "envoy",
		UserAgentVersionType: &core.Node_UserAgentBuildVersion{UserAgentBuildVersion: &core.BuildVersion{
			Version: &envoytype.SemanticVersion{MajorNumber: 1, MinorNumber: 40}}}}
}

func withGroup(n *core.Node, v *structpb.Value) *core.Node {
	n.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{"meshery-filters/group": v}}
	return n
}

func (r *rig) conn() *grpc.ClientConn {
	r.t.Helper()
	c, err := grpc.NewClient(r.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

// open opens a stream without saying anything.
func (r *rig) open(c *grpc.ClientConn) *sim {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(c).StreamAggregatedResources(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	s := &sim{t: r.t, stream: stream, cancel: cancel, got: make(chan *discovery.DiscoveryResponse, 100), ended: make(chan struct{})}
	go func() {
		defer close(s.ended)
		for {
			m, err := stream.Recv()
			if err != nil {
				s.err = err
				return
			}
			s.got <- m
		}
	}()
	r.t.Cleanup(s.leave)
	return s
}

// join connects a proxy that asks for the slot, and waits until the backend knows it.
func (r *rig) join(id string) *sim {
	r.t.Helper()
	s := r.open(r.conn())
	s.send(&discovery.DiscoveryRequest{Node: node(id), TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}})
	r.awaitMember(id, true)
	return s
}

// joinAndAck is join for a proxy that accepts what it gets first.
func (r *rig) joinAndAck(id string) *sim {
	r.t.Helper()
	s := r.join(id)
	s.ack(s.next())
	return s
}

func (r *rig) awaitMember(id string, there bool) {
	r.t.Helper()
	eventually(r.t, fmt.Sprintf("%s there: %v", id, there), func() bool { return r.has(id) == there })
}

func (r *rig) has(id string) bool {
	for _, g := range r.b.Groups() {
		if slices.ContainsFunc(g.Proxies, func(p plan.ProxyStatus) bool { return p.ID == id }) {
			return true
		}
	}
	return false
}

func (s *sim) send(q *discovery.DiscoveryRequest) {
	s.t.Helper()
	if err := s.stream.Send(q); err != nil {
		s.t.Fatal(err)
	}
}

// next waits for the next response.
func (s *sim) next() *discovery.DiscoveryResponse {
	s.t.Helper()
	select {
	case m := <-s.got:
		version, _ := told(m.GetVersionInfo())
		s.history = append(s.history, version)
		if len(m.GetResources()) != 1 {
			s.t.Fatalf("%d resources came", len(m.GetResources()))
		}
		var c core.TypedExtensionConfig
		if err := m.GetResources()[0].UnmarshalTo(&c); err != nil || c.GetName() != Slot {
			s.t.Fatalf("the resource is %q: %v", c.GetName(), err)
		}
		return m
	case <-s.ended:
		s.t.Fatalf("the stream ended: %v", s.err)
	case <-time.After(patience):
		s.t.Fatal("no response came")
	}
	return nil
}

// wantVersion waits for the next response, which must be of the plan's version, in whatever bytes.
func (s *sim) wantVersion(p plan.Plan) *discovery.DiscoveryResponse {
	s.t.Helper()
	m := s.next()
	if version, _ := told(m.GetVersionInfo()); version != p.Version {
		s.t.Fatalf("got version %s, want %s (%v)", m.GetVersionInfo(), p.Version, p.Chain.Names())
	}
	return m
}

// want waits for the next response, which must be the plan's resource.
func (s *sim) want(p plan.Plan) *discovery.DiscoveryResponse {
	s.t.Helper()
	m := s.wantVersion(p)
	if !proto.Equal(m.GetResources()[0], p.Resources[0]) {
		s.t.Fatal("the resource is not the plan's")
	}
	return m
}

// wantOther waits for the next response, which must be of the plan and in other bytes than the ones given.
func (s *sim) wantOther(p plan.Plan, seen ...[]byte) *discovery.DiscoveryResponse {
	s.t.Helper()
	m := s.wantVersion(p)
	for _, bytes := range append(seen, p.Resources[0].Value) {
		if slices.Equal(m.GetResources()[0].GetValue(), bytes) {
			s.t.Fatal("these bytes were rejected before, and Envoy would accept them unseen")
		}
	}
	return m
}

// wantHistory compares all that the proxy ever got. Called after a response that must come last, it proves that
// nothing else came.
func (s *sim) wantHistory(plans ...plan.Plan) {
	s.t.Helper()
	var want []string
	for _, p := range plans {
		want = append(want, p.Version)
	}
	if !slices.Equal(s.history, want) || len(s.got) > 0 {
		s.t.Fatalf("got versions %v and %d more, want %v", s.history, len(s.got), want)
	}
}

func (s *sim) answer(m *discovery.DiscoveryResponse, refusal string) {
	s.t.Helper()
	q := &discovery.DiscoveryRequest{TypeUrl: m.GetTypeUrl(), ResourceNames: []string{Slot}, ResponseNonce: m.GetNonce()}
	if refusal == "" {
		s.version = m.GetVersionInfo()
	} else {
		q.ErrorDetail = status.New(codes.Internal, refusal).Proto()
	}
	q.VersionInfo = s.version
	s.send(q)
}

func (s *sim) ack(m *discovery.DiscoveryResponse)               { s.t.Helper(); s.answer(m, "") }
func (s *sim) nack(m *discovery.DiscoveryResponse, text string) { s.t.Helper(); s.answer(m, text) }

// leave ends the stream.
func (s *sim) leave() {
	s.cancel()
	<-s.ended
}

// committed is the chain of the group edge that the backend holds.
func (r *rig) committed() (filter.Chain, error) {
	p, err := r.b.Committed(r.t.Context(), edge)
	return p.Chain, err
}
