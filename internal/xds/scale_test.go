package xds

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

// crowd connects n proxies over few connections, each of which answers all it gets by what refuse says.
func (r *rig) crowd(n int, refuse func(id int, version string) bool) {
	r.t.Helper()
	const perConn = 250
	var conn *grpc.ClientConn
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(r.t.Context())
	r.t.Cleanup(func() { cancel(); wg.Wait() })
	for i := range n {
		if i%perConn == 0 {
			conn = r.conn()
		}
		stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
		if err != nil {
			r.t.Fatal(err)
		}
		if err := stream.Send(&discovery.DiscoveryRequest{Node: node(fmt.Sprintf("proxy-%05d", i)),
			TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}}); err != nil {
			r.t.Fatal(err)
		}
		wg.Go(func() {
			good := ""
			for {
				m, err := stream.Recv()
				if err != nil {
					return
				}
				q := &discovery.DiscoveryRequest{TypeUrl: m.GetTypeUrl(), ResourceNames: []string{Slot}, ResponseNonce: m.GetNonce()}
				if refuse(i, m.GetVersionInfo()) {
					q.ErrorDetail = status.New(codes.Internal, "refused").Proto()
				} else {
					good = m.GetVersionInfo()
				}
				q.VersionInfo = good
				if stream.Send(q) != nil {
					return
				}
			}
		})
	}
}

func (r *rig) awaitRunning(p plan.Plan, n int) {
	r.t.Helper()
	r.awaitFunc(p, fmt.Sprintf("%d running", n), func(l plan.Loaded) bool {
		return l.Count(plan.Running) == n && l.Expected() == n
	})
}

func TestTwoThousandProxiesInOneGroup(t *testing.T) {
	const n = 2000
	r := newRig(t)
	var mu sync.Mutex
	bad := ""
	refusals := 0
	r.crowd(n, func(_ int, version string) bool {
		mu.Lock()
		defer mu.Unlock()
		if version == bad {
			refusals++
		}
		return version == bad
	})
	eventually(t, "all are there", func() bool { g := r.b.Groups(); return len(g) == 1 && len(g[0].Proxies) == n })
	empty := r.plan(all)
	r.awaitRunning(empty, n)

	p := r.plan(canary, "one")
	began := time.Now()
	r.apply(p)
	r.awaitRunning(p, n)
	took := time.Since(began)
	r.commit(p)

	q := r.plan(canary, "one", "bad")
	mu.Lock()
	bad = q.Version
	mu.Unlock()
	r.apply(q)
	l := r.awaitFunc(q, "one rejected", func(l plan.Loaded) bool { return l.Count(plan.Rejected) == 1 })
	if held := l.Count(plan.Held); held != n-1 {
		t.Fatalf("%d of the others are held", held)
	}
	r.apply(p)
	r.awaitRunning(p, n)
	last := r.put(r.plan(all))
	r.awaitRunning(last, n)
	mu.Lock()
	defer mu.Unlock()
	if refusals != 1 {
		t.Fatalf("the bad chain was sent %d times", refusals)
	}
	t.Logf("%d proxies over canary and all: %v", n, took)
}

// TestChaosConverges lets proxies come, go, refuse and be slow while offers follow each other, and then wants all of
// them on the last committed chain. Its worth is in the race detector and in ending.
func TestChaosConverges(t *testing.T) {
	t.Parallel()
	const proxies, rounds = 12, 60
	r := newRig(t)
	plans := []plan.Plan{r.plan(all, "a"), r.plan(canary, "b"), r.plan(canary, "c"), r.plan(all)}
	chaos, calm := context.WithCancel(t.Context())
	var comers sync.WaitGroup
	for i := range proxies {
		comers.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			conn := r.conn()
			for chaos.Err() == nil {
				s := r.open(conn)
				err := s.stream.Send(&discovery.DiscoveryRequest{Node: node(fmt.Sprint("p", i)), TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}})
				for stay := 1 + rng.IntN(20); err == nil && stay > 0 && chaos.Err() == nil; stay-- {
					select {
					case m := <-s.got:
						switch rng.IntN(8) {
						case 0:
							s.nack(m, "no")
						case 1: // never answered
						default:
							s.ack(m)
						}
					case <-time.After(5 * time.Millisecond):
					}
				}
				s.leave()
			}
		})
	}
	for i := range rounds {
		p := plans[i%len(plans)]
		if i%9 == 8 {
			p.Rollout = all
		}
		r.apply(p)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		for l, err := range r.b.Loaded(ctx, p) {
			if err != nil {
				t.Fatal(err)
			}
			if l.Count(plan.Rejected) > 0 {
				break
			}
		}
		cancel()
		if i%3 > 0 {
			r.commit(p)
		}
	}
	calm()
	comers.Wait()
	eventually(t, "all chaotic proxies left", func() bool {
		g := r.b.Groups()
		return len(g) == 0 || len(g[0].Proxies) == 0
	})
	r.crowd(proxies, func(int, string) bool { return false })
	eventually(t, "all are there", func() bool { g := r.b.Groups(); return len(g) == 1 && len(g[0].Proxies) == proxies })
	last := r.put(r.plan(canary, "last"))
	r.awaitRunning(last, proxies)
	if g := r.b.Groups(); g[0].Version != last.Version || g[0].Offered != "" {
		t.Fatalf("%+v", g[0])
	}
}

func TestTheCodecWritesWhatProtobufReads(t *testing.T) {
	c := codec{encoding.GetCodecV2("proto")}
	r := newRig(t)
	for name, m := range map[string]*discovery.DiscoveryResponse{
		"empty":         {},
		"no resource":   {VersionInfo: "v", TypeUrl: "t", Nonce: "1"},
		"one":           {VersionInfo: "v", TypeUrl: "t", Nonce: "1", Resources: []*anypb.Any{{TypeUrl: "x", Value: []byte("value")}}},
		"two":           {VersionInfo: "v", Nonce: "1", Resources: []*anypb.Any{{TypeUrl: "x", Value: []byte("value")}, {TypeUrl: "y", Value: []byte{1}}}},
		"empty value":   {Resources: []*anypb.Any{{TypeUrl: "x"}}},
		"another field": {VersionInfo: "v", Canary: true, Resources: []*anypb.Any{{TypeUrl: "x", Value: []byte("value")}}},
		"a chain":       {VersionInfo: "v", Nonce: "1", Resources: r.plan(all, "one", "two", "three").Resources},
		"no filter":     {VersionInfo: "v", Nonce: "1", Resources: r.plan(all).Resources},
	} {
		t.Run(name, func(t *testing.T) {
			var s shelf
			head := proto.CloneOf(m)
			head.Resources = nil
			data, err := c.Marshal(&message{head, s.divide(m.GetResources())})
			if err != nil {
				t.Fatal(err)
			}
			var got discovery.DiscoveryResponse
			if err := proto.Unmarshal(data.Materialize(), &got); err != nil || !proto.Equal(&got, m) {
				t.Fatalf("%v: %v", err, &got)
			}
		})
	}
}

// TestAModuleIsInMemoryOnceHoweverManyGroupsHaveIt has each group get the module twice.
func TestAModuleIsInMemoryOnceHoweverManyGroupsHaveIt(t *testing.T) {
	const n, size = 16, 4 << 20
	r := newRig(t)
	digest, err := r.dir.Blobs().Put(t.Context(), make([]byte, size))
	if err != nil {
		t.Fatal(err)
	}
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	target := func(i int) filter.Target {
		return filter.Target{Kind: filter.ProxyGroup, Name: fmt.Sprint("group-", i)}
	}
	before := heap()
	for i := range n {
		c := r.chain(target(i), "one", "two")
		c.Filters[0].Spec.Module.SHA256, c.Filters[1].Spec.Module.SHA256 = digest, digest
		r.put(r.planOf(c, filter.RolloutAll))
	}
	grown := heap() - before
	t.Logf("%d groups with a module of %d MiB: the heap grew by %d MiB", n, size>>20, grown>>20)
	if grown > 3*size {
		t.Errorf("the heap grew by %d MiB", grown>>20)
	}
	for i := range n {
		r.put(r.planOf(r.chain(target(i)), filter.RolloutAll))
	}
	eventually(t, "a module that nobody has any more is let go", func() bool {
		runtime.GC()
		r.b.shelf.mu.Lock()
		defer r.b.shelf.mu.Unlock()
		return len(r.b.shelf.modules) == 0
	})
}

// TestABigChainIsInMemoryOnce has proxies that never read, so that every response is on its way at once.
func TestABigChainIsInMemoryOnce(t *testing.T) {
	const n, size = 40, 8 << 20
	r := newRig(t)
	conn := r.conn()
	for i := range n {
		// Nobody receives on these streams, and the flow control of HTTP/2 stops the server after 64 KiB each.
		stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&discovery.DiscoveryRequest{Node: node(fmt.Sprint(i)), TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all are there", func() bool { g := r.b.Groups(); return len(g) == 1 && len(g[0].Proxies) == n })
	module := make([]byte, size)
	digest, err := r.dir.Blobs().Put(t.Context(), module)
	if err != nil {
		t.Fatal(err)
	}
	c := r.chain(edge, "big")
	c.Filters[0].Spec.Module.SHA256 = digest
	p := r.planOf(c, filter.RolloutAll)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	r.apply(p)
	eventually(t, "all responses are on their way", func() bool {
		r.b.mu.Lock()
		defer r.b.mu.Unlock()
		for _, px := range r.b.groups[edge.Name].proxies {
			if px.sent != p.Version {
				return false
			}
		}
		return true
	})
	// What a stream needs to write a response comes and goes, and buffers that are pooled take a second collection to go.
	var grown int64
	eventually(t, "the heap has grown by a few copies at most", func() bool {
		runtime.GC()
		runtime.ReadMemStats(&after)
		grown = int64(after.HeapAlloc) - int64(before.HeapAlloc)
		return grown <= 6*size
	})
	t.Logf("%d responses of %d MiB: heap grew by %d MiB", n, size>>20, grown>>20)
}
