package xds

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	extension "github.com/envoyproxy/go-control-plane/envoy/service/extension/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/limit"
	"github.com/meshery/meshery-filters/internal/plan"
)

func asking(id string) *discovery.DiscoveryRequest {
	return &discovery.DiscoveryRequest{Node: node(id), TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}}
}

// flood opens streams over so many connections, and returns how many were answered and how many refused once that is
// known of each. They end with leave.
func (r *rig) flood(conns, each int) (answered, refused int, leave func()) {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	var known, over sync.WaitGroup
	var mu sync.Mutex
	var all []*grpc.ClientConn
	for c := range conns {
		conn, err := grpc.NewClient(r.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			r.t.Fatal(err)
		}
		all = append(all, conn)
		for n := range each {
			known.Add(1)
			over.Go(func() {
				stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
				if err == nil {
					_ = stream.Send(asking(fmt.Sprintf("flood-%d-%d", c, n)))
					_, err = stream.Recv()
				}
				mu.Lock()
				switch {
				case err == nil:
					answered++
				case status.Code(err) == codes.ResourceExhausted && hinted(err):
					refused++
				default:
					r.t.Errorf("a stream ends with %v", err)
				}
				mu.Unlock()
				known.Done()
				for err == nil {
					_, err = stream.Recv()
				}
			})
		}
	}
	known.Wait()
	return answered, refused, func() {
		cancel()
		over.Wait()
		for _, c := range all {
			c.Close()
		}
	}
}

// hinted says whether an error tells when to try again.
func hinted(err error) bool {
	return slices.ContainsFunc(status.Convert(err).Details(), func(d any) bool {
		info, ok := d.(*errdetails.RetryInfo)
		return ok && info.GetRetryDelay().AsDuration() > 0
	})
}

func TestAFloodOfDiscoveryStreamsIsRefusedBeyondTheBoundsAndLeavesNothing(t *testing.T) {
	for _, c := range []struct {
		why    string
		bounds limit.Bounds
		most   int
	}{
		{"of one client", limit.Bounds{PerClient: 300, Total: 5000}, 300},
		{"of all", limit.Bounds{PerClient: 5000, Total: 500}, 500},
	} {
		r := newRig(t, func(o *Options) { o.Streams = c.bounds })
		calm := r.joinAndAck("calm")
		before := runtime.NumGoroutine()
		answered, refused, leave := r.flood(5, 400)
		if answered != c.most-1 || refused != 2000-answered {
			t.Errorf("%s: %d streams of 2000 were answered and %d refused, while there may be %d", c.why, answered, refused, c.most)
		}
		if n := strings.Count(r.log.String(), "discovery streams are refused"); n < 1 || n > 20 {
			t.Errorf("%s: %d lines in the log tell of %d refusals", c.why, n, refused)
		}
		calm.want(r.put(r.plan(all, c.why[:2])))
		leave()
		eventually(t, "the streams are gone", func() bool { return r.b.streams.Total() == 1 })
		eventually(t, "no goroutine is left of it", func() bool { return runtime.NumGoroutine() <= before })
		r.join("later")
	}
}

func TestAProxyThatAsksTooOftenLosesItsStreamAndTheOthersDoNot(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(o *Options) { o.ProxyRate = 20 })
	calm := r.joinAndAck("calm")
	wild := r.open(r.conn())
	for range 1000 {
		if wild.stream.Send(asking("wild")) != nil {
			break // it has ended
		}
	}
	select {
	case <-wild.ended:
	case <-time.After(patience):
		t.Fatal("a proxy that sent 1000 requests keeps its stream")
	}
	if status.Code(wild.err) != codes.ResourceExhausted || !hinted(wild.err) || !strings.Contains(wild.err.Error(), "20 discovery requests a second") {
		t.Errorf("it ends with %v", wild.err)
	}
	calm.want(r.put(r.plan(all, "a")))
}

func TestTheRequestsOfAllProxiesTogetherAreBoundedToo(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(o *Options) { o.Rate = 50 }) // and 100 at once
	answered, refused, leave := r.flood(2, 500)
	leave()
	if answered < 100 || refused == 0 || answered+refused != 1000 {
		t.Errorf("%d streams were answered, and %d refused", answered, refused)
	}
}

func TestWhatProxiesSendIsNotKept(t *testing.T) {
	r := newRig(t)
	large := strings.Repeat("x", 9<<10)
	names := slices.Repeat([]string{large}, maxNames-1)
	const proxies = 20
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	r.put(r.plan(all, "a"))
	before := heap()
	for i := range proxies {
		s := r.open(r.conn())
		q := asking(fmt.Sprintf("large-%d", i))
		q.ResourceNames = append(slices.Clone(names), Slot)
		s.send(q)
		m := s.next()
		for n := range maxTypes - 1 {
			s.send(&discovery.DiscoveryRequest{TypeUrl: fmt.Sprint("another-", n), ResourceNames: names})
		}
		s.nack(m, strings.Repeat(large, 100))
		r.stats("edge", uint64(i)+1, map[plan.ProxyState]int{plan.Rejected: i + 1})
	}
	eventually(t, "what proxies sent is let go of", func() bool { return heap() < before+proxies<<20 })
}

func TestARequestOfUnusualSizeEndsTheStream(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	large := strings.Repeat("x", maxText+1)
	for _, change := range []func(*discovery.DiscoveryRequest){
		func(q *discovery.DiscoveryRequest) { q.TypeUrl = large },
		func(q *discovery.DiscoveryRequest) { q.VersionInfo = large },
		func(q *discovery.DiscoveryRequest) { q.ResponseNonce = large },
	} {
		s := r.open(r.conn())
		q := asking("a")
		change(q)
		s.send(q)
		select {
		case <-s.ended:
		case <-time.After(patience):
			t.Fatal("it goes on")
		}
		if status.Code(s.err) != codes.InvalidArgument {
			t.Errorf("it ends with %v", s.err)
		}
	}
}

func TestACallThatSendsNoRequestIsAnsweredAllTheSame(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, method := range []string{extension.ExtensionConfigDiscoveryService_FetchExtensionConfigs_FullMethodName,
		extension.ExtensionConfigDiscoveryService_DeltaExtensionConfigs_FullMethodName} {
		s, err := r.conn().NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(&discovery.DiscoveryResponse{}); status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "api_type GRPC") {
			t.Errorf("%s ends with %v", method, err)
		}
	}
}

func TestAStreamWithLargeHeadersIsNotTaken(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ctx := metadata.AppendToOutgoingContext(t.Context(), "x", strings.Repeat("x", 1<<20))
	s, err := discovery.NewAggregatedDiscoveryServiceClient(r.conn()).StreamAggregatedResources(ctx)
	if err == nil {
		_ = s.Send(asking("a"))
		_, err = s.Recv()
	}
	if err == nil {
		t.Error("it is answered")
	}
}

func TestProxiesThatRejectDoNotPushEverythingElseOutOfTheEvents(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.put(r.plan(all, "a"))
	conn := r.conn()
	const proxies = 300
	for i := range proxies {
		s := r.open(conn)
		s.send(asking(fmt.Sprint("p-", i)))
		s.nack(s.next(), "no")
	}
	r.stats("edge", proxies, map[plan.ProxyState]int{plan.Rejected: proxies})
	lines := strings.Count(r.log.String(), "proxy rejected a chain")
	if told := len(r.lateRejections()); told < 100 || told > 200 || lines < 100 || lines > 200 {
		t.Errorf("%d proxies have rejected a chain: %d were told of, and %d are in the log", proxies, told, lines)
	}
}

// A deployment whose bootstrap has a fixed node id.
func TestThousandsOfProxiesMayHaveOneNodeID(t *testing.T) {
	r := newRig(t)
	r.b.mu.Lock()
	defer r.b.mu.Unlock()
	g := r.b.group("edge")
	const proxies = 20_000
	all := make([]*proxy, proxies)
	begun := time.Now()
	for i := range all {
		all[i] = &proxy{nodeID: "same"}
		g.join(all[i])
	}
	if took := time.Since(begun); took > 5*time.Second || all[0].ID != "same" || all[proxies-1].ID != "same#20000" {
		t.Errorf("they have joined in %s, from %s to %s", took, all[0].ID, all[proxies-1].ID)
	}
	for _, p := range []int{77, 5, 0} {
		g.leave(all[p])
	}
	for _, want := range []string{"same", "same#6", "same#78", "same#20001"} {
		p := &proxy{nodeID: "same"}
		if g.join(p); p.ID != want {
			t.Errorf("the next one is %s, not %s", p.ID, want)
		}
		all = append(all, p)
	}
	for _, p := range all {
		if p.group != nil {
			g.leave(p)
		}
	}
	if len(g.proxies)+len(g.free) > 0 {
		t.Errorf("%d proxies and %d numbers are left", len(g.proxies), len(g.free))
	}
}
