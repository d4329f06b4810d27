package proof

import (
	"bytes"
	"context"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/layer5io/meshery-adapter-library/meshes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// How many there are of each. Every client sends one operation after the other; the listeners of StreamEvents come and
// go, but for the slow ones, which stay; the watchers come back with their cursor.
const (
	scaleClients   = 50
	scaleListeners = 200
	scaleSlow      = 20 // of the listeners
	scaleShared    = 10 // connections that the others mostly use, which costs the machine less than one for each
	scaleWatchers  = 20
	scaleCrowds    = 24 // groups of simulated proxies
	scaleCrowd     = 3  // proxies in each of them
)

const (
	scaleEdge = "edge" // the group of the real Envoys
	// scaleRefusal in a filter's configuration has simulated proxies refuse it.
	scaleRefusal = "proxies-refuse-this"
)

// TestManyClientsAndListenersGetEverythingOnceAndLeaveNothingBehind sends 1,000 operations; `make torture` sends as many
// again and again.
func TestManyClientsAndListenersGetEverythingOnceAndLeaveNothingBehind(t *testing.T) {
	onRealParts(t)
	a := newAdapter(t)
	proxies := a.startProxies(2, scaleEdge, upstream(t), 1)
	a.apply(probe(t, "first", scaleEdge, stamp("first"), nil))
	a.allRun(scaleEdge, len(proxies))
	x := &scale{t: t, a: a, want: map[string]int32{"default/first": 0}}
	x.round(scaleClients) // so that the base is that of an adapter that has worked
	base := a.settled()
	t.Logf("the adapter has %s", base)
	base.heap += 24 << 20 // for events, which it keeps within bounds for those who come back
	for range rounds(t, 1) {
		x.round(20 * scaleClients)
		eventually(t, "nothing of the load is left", func() error {
			if now := a.usage(); now.files > base.files || now.goroutines > base.goroutines || now.heap > base.heap {
				return fmt.Errorf("the adapter has %s, and may have %s", now, base)
			}
			return nil
		})
		t.Logf("the adapter has %s", a.usage())
	}
	for _, p := range proxies {
		p.holds(x.order(scaleEdge)...)
	}
}

// usage is what an adapter has of what a load could leave behind.
type usage struct{ files, goroutines, heap int }

func (u usage) String() string {
	return fmt.Sprintf("%d open files, %d goroutines and %.1f MiB on the heap", u.files, u.goroutines, float64(u.heap)/(1<<20))
}

// usage looks until the garbage was collected once more.
func (a *adapter) usage() usage {
	const collected = "go_memstats_last_gc_time_seconds{}"
	first, _ := a.scrape()
	for {
		now, _ := a.scrape()
		if now[collected] > first[collected] {
			return usage{int(now["process_open_fds{}"]), int(now["go_goroutines{}"]), int(now["go_memstats_heap_alloc_bytes{}"])}
		}
	}
}

// settled is what the adapter has when that has been so for a moment.
func (a *adapter) settled() usage {
	last := a.usage()
	for same := 0; same < 5; same++ {
		now := a.usage()
		if now.files != last.files || now.goroutines != last.goroutines {
			same = 0
		}
		last = now
	}
	return last
}

// scale is an adapter under load, and what is known of it.
type scale struct {
	t    *testing.T
	a    *adapter
	next atomic.Int32

	mu   sync.Mutex
	want map[string]int32 // priority by filter
	ids  []string         // of the operations of this round
}

// round sends operations while listeners and watchers come and go, and looks at what each of them was told.
func (x *scale) round(operations int) {
	t := x.t
	t.Helper()
	x.ids = nil
	began := time.Now()
	proxies, leave := x.crowds()
	witness := &watcher{x: x, stays: true}
	watchers := []*watcher{witness}
	for range scaleWatchers {
		watchers = append(watchers, &watcher{x: x})
	}
	var listeners []*listener
	var shared []*grpc.ClientConn
	for range scaleShared {
		shared = append(shared, x.dial())
	}
	for i := range scaleListeners {
		l := &listener{x: x, witness: witness, slow: i < scaleSlow, live: i%10 != 0}
		if !l.slow {
			l.shared = shared[i%len(shared)]
		}
		listeners = append(listeners, l)
	}
	listening, stop := context.WithCancel(t.Context())
	var audience sync.WaitGroup
	defer func() {
		stop()
		audience.Wait()
		leave()
		for _, c := range shared {
			c.Close()
		}
	}()
	for _, w := range watchers {
		w.begun = make(chan struct{})
		audience.Go(func() { w.run(listening) })
	}
	for _, w := range watchers {
		<-w.begun
	}
	for _, l := range listeners {
		l.begun = make(chan struct{})
		audience.Go(func() { l.run(listening) })
	}
	for _, l := range listeners {
		<-l.begun
	}

	var clients sync.WaitGroup
	for c := range scaleClients {
		clients.Go(func() { x.client(c, operations/scaleClients) })
	}
	clients.Wait()
	took := time.Since(began)
	if t.Failed() {
		t.FailNow()
	}
	var all []*filterspb.Event
	eventually(t, "the witness sees each operation's end", func() error {
		all = witness.seen()
		ended := 0
		for _, e := range all {
			if e.GetLast() {
				ended++
			}
		}
		if ended < len(x.ids) {
			return fmt.Errorf("%d of %d", ended, len(x.ids))
		}
		return nil
	})
	last := toldOf(all[len(all)-1])
	for _, l := range listeners {
		l.hurry.Store(true)
	}
	eventually(t, "whoever is there sees the last event", func() error {
		for i, w := range watchers {
			if seen := w.seen(); len(seen) < len(all) {
				return fmt.Errorf("watcher %d has seen %d of %d", i, len(seen), len(all))
			}
		}
		for i, l := range listeners {
			if l.slow && l.newest.Load() != uint64(last) {
				return fmt.Errorf("slow listener %d has not", i)
			}
		}
		return nil
	})
	stop()
	audience.Wait()

	x.stories(all)
	for i, w := range watchers[1:] {
		if !slices.EqualFunc(w.seen(), all, func(a, b *filterspb.Event) bool {
			return a.GetOperationId() == b.GetOperationId() && a.GetSequence() == b.GetSequence() && toldOf(a) == toldOf(b)
		}) {
			t.Errorf("watcher %d, which came %d times, was not told the same as the one that stayed", i, w.came)
		}
	}
	visits, events := x.visits(all, listeners)
	came := 0
	for _, w := range watchers {
		came += w.came
	}
	x.chains(proxies)
	t.Logf("%d operations in %s; %d events, told %d times in %d visits of StreamEvents, and to %d watchers that came %d times; %d refusals by proxies",
		len(x.ids), took.Round(time.Millisecond), len(all), events, visits, len(watchers), came, refusals(proxies))
}

// client sends operations, each when the one before has ended.
func (x *scale) client(c, operations int) {
	conn := x.dial()
	defer conn.Close()
	own := *x.a
	own.meshes, own.filters = meshes.NewMeshServiceClient(conn), filterspb.NewFilterServiceClient(conn)
	name, group := fmt.Sprintf("filter-%d", c), scaleEdge
	if g := c % (scaleCrowds + 1); g < scaleCrowds {
		group = fmt.Sprintf("crowd-%d", g)
	}
	for range operations {
		n := x.next.Add(1)
		x.mu.Lock()
		_, there := x.want["default/"+name]
		x.mu.Unlock()
		key, value, refused, remove := "apply_filter", strconv.Itoa(int(n)), rand.IntN(8) == 0, there && rand.IntN(8) == 0
		spec := map[string]any{"target": target(group), "module": map[string]any{"builtin": "headers"}, "priority": n, "wait": map[string]any{"timeout": "2m"}}
		switch {
		case remove:
			key, spec, refused = "remove_filter", nil, false
		case refused && group == scaleEdge:
			spec["delivery"] = map[string]any{"mode": "local", "localPath": x.a.state} // no module, for it is a folder
		case refused:
			value = scaleRefusal
		}
		if spec != nil {
			spec["config"] = map[string]any{"response": map[string]any{"x-" + name: value}}
		}
		id, err := own.submit(key, document(name, spec), false)
		if err != nil {
			x.t.Errorf("%s of %s is refused: %v", key, name, err)
			return
		}
		events, err := own.story(id)
		if err != nil || len(events) == 0 || !events[len(events)-1].GetLast() {
			x.t.Errorf("the story of %s: %v, %v", id, events, err)
			return
		}
		last := events[len(events)-1]
		if failed := last.GetType() == filterspb.Event_ERROR; failed != refused {
			x.t.Errorf("%s of %s (refused by proxies: %t) ends with: %s\n%s", key, name, refused, last.GetSummary(), last.GetDetails())
			return
		}
		x.mu.Lock()
		x.ids = append(x.ids, id)
		switch {
		case remove:
			delete(x.want, "default/"+name)
		case !refused:
			x.want["default/"+name] = n
		}
		x.mu.Unlock()
	}
}

// stories wants each operation to have one, numbered from 1 without gaps, that ends once.
func (x *scale) stories(all []*filterspb.Event) {
	x.t.Helper()
	count, ended, seen := map[string]uint64{}, map[string]bool{}, map[told]bool{}
	for _, e := range all {
		id := e.GetOperationId()
		if count[id]++; e.GetSequence() != count[id] || ended[id] {
			x.t.Errorf("event %d of %s comes as number %d, after its end: %t", e.GetSequence(), id, count[id], ended[id])
		}
		ended[id] = e.GetLast()
		if seen[toldOf(e)] {
			x.t.Errorf("%s tells twice: %s", id, e.GetSummary())
		}
		seen[toldOf(e)] = true
	}
	for _, id := range x.ids {
		if !ended[id] {
			x.t.Errorf("operation %s has not ended", id)
		}
		delete(ended, id)
	}
	if len(ended) > 0 {
		x.t.Errorf("there are events of %d operations that nobody sent", len(ended))
	}
}

// chains wants the adapter to keep what was asked for, and the simulated proxies to run it.
func (x *scale) chains(proxies []*simulated) {
	x.t.Helper()
	eventually(x.t, "the proxies run the chains that the adapter keeps", func() error {
		list, err := x.a.filters.List(x.t.Context(), &filterspb.ListRequest{})
		if err != nil {
			return err
		}
		have, versions := map[string]int32{}, map[string]string{}
		for _, c := range list.GetChains() {
			versions[c.GetTarget().GetName()] = c.GetVersion()
			for _, f := range c.GetFilters() {
				have[f.GetNamespace()+"/"+f.GetName()] = f.GetPriority()
			}
		}
		if fmt.Sprint(have) != fmt.Sprint(x.want) {
			x.t.Fatalf("the adapter keeps %v, want %v", have, x.want)
		}
		for _, p := range proxies {
			// Behind a ~ the adapter keeps its bytes of a version apart.
			if v := versions[p.group]; v != "" && p.runs() != v && !strings.HasPrefix(p.runs(), v+"~") {
				return fmt.Errorf("%s of %s runs %s, and the chain has version %s", p.id, p.group, p.runs(), v)
			}
		}
		return nil
	})
}

// order is the names of a group's filters in the order that requests meet them.
func (x *scale) order(group string) (names []string) {
	x.t.Helper()
	c, err := x.a.chain(group)
	if err != nil {
		x.t.Fatal(err)
	}
	for _, f := range c.GetFilters() {
		names = append(names, f.GetNamespace()+"/"+f.GetName())
	}
	return names
}

func (x *scale) dial() *grpc.ClientConn {
	conn, err := grpc.NewClient("passthrough:///"+x.a.addresses.GRPC, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		panic(err) // only options can be wrong
	}
	return conn
}

// told is an event as far as Watch and StreamEvents tell the same of it.
type told uint64

var tellSeed = maphash.MakeSeed()

func toldOf(e interface {
	GetOperationId() string
	GetSummary() string
	GetDetails() string
	GetErrorCode() string
}) told {
	return told(maphash.Comparable(tellSeed, [...]string{e.GetOperationId(), e.GetSummary(), e.GetDetails(), e.GetErrorCode()}))
}

// watcher follows all events, and when it has left it goes on at its cursor.
type watcher struct {
	x     *scale
	stays bool
	begun chan struct{}
	came  int

	mu     sync.Mutex
	events []*filterspb.Event
}

func (w *watcher) seen() []*filterspb.Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.events[:len(w.events):len(w.events)]
}

func (w *watcher) run(ctx context.Context) {
	q := &filterspb.WatchRequest{FromNow: true}
	for begin := sync.OnceFunc(func() { close(w.begun) }); ctx.Err() == nil; {
		w.came++
		if err := w.visit(ctx, q, begin); err != nil && ctx.Err() == nil {
			w.x.t.Errorf("Watch: %v", err)
			begin()
			return
		}
		stay(ctx, time.Duration(rand.IntN(1000))*time.Millisecond)
	}
}

func (w *watcher) visit(ctx context.Context, q *filterspb.WatchRequest, begin func()) error {
	conn := w.x.dial()
	defer conn.Close()
	here, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := filterspb.NewFilterServiceClient(conn).Watch(here, q)
	if err == nil {
		_, err = stream.Header()
	}
	if err != nil {
		return err
	}
	begin()
	until := time.Now().Add(time.Duration(rand.IntN(1500)) * time.Millisecond)
	for {
		r, err := stream.Recv()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		w.mu.Lock()
		w.events = append(w.events, r.GetEvent())
		w.mu.Unlock()
		q.FromNow, q.Cursor = false, r.GetCursor()
		if !w.stays && time.Now().After(until) {
			return nil
		}
	}
}

// listener follows StreamEvents as Meshery does, again and again, or slowly.
type listener struct {
	x       *scale
	witness *watcher
	slow    bool
	live    bool             // asks for nothing of what happened before
	shared  *grpc.ClientConn // nil to dial for each visit
	begun   chan struct{}
	hurry   atomic.Bool   // no longer slow
	newest  atomic.Uint64 // the event that it was told last
	visits  []*visit
}

// visit is what a listener was told while it was there.
type visit struct {
	after  int       // events that the witness had seen before
	from   time.Time // when the adapter had answered
	events []told
}

func (l *listener) run(ctx context.Context) {
	for begin := sync.OnceFunc(func() { close(l.begun) }); ctx.Err() == nil; {
		if err := l.visit(ctx, begin); err != nil {
			l.x.t.Errorf("StreamEvents: %v", err)
			begin()
			return
		}
		stay(ctx, time.Duration(rand.IntN(4000))*time.Millisecond)
	}
}

func (l *listener) visit(ctx context.Context, begin func()) error {
	v := &visit{after: len(l.witness.seen())}
	conn := l.shared
	if own := conn == nil || rand.IntN(4) == 0; own {
		conn = l.x.dial()
		defer conn.Close()
	}
	here, cancel := context.WithCancel(ctx)
	defer cancel()
	asked := here
	if l.live {
		asked = metadata.AppendToOutgoingContext(here, "meshery-filters-live-only", "true")
	}
	stream, err := meshes.NewMeshServiceClient(conn).StreamEvents(asked, &meshes.EventsRequest{})
	if err == nil {
		_, err = stream.Header()
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	v.from = time.Now()
	l.visits = append(l.visits, v)
	begin()
	if !l.slow {
		defer time.AfterFunc(time.Duration(rand.IntN(2000))*time.Millisecond, cancel).Stop()
	}
	for {
		e, err := stream.Recv()
		if here.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		v.events = append(v.events, toldOf(e))
		l.newest.Store(uint64(toldOf(e)))
		if l.slow && !l.hurry.Load() {
			stay(ctx, 30*time.Millisecond)
		}
	}
}

// visits wants every listener to have been told each event of its time once and in order.
func (x *scale) visits(all []*filterspb.Event, listeners []*listener) (visits, events int) {
	x.t.Helper()
	index := make(map[told]int, len(all))
	for i, e := range all {
		index[toldOf(e)] = i
	}
	for i, l := range listeners {
		for _, v := range l.visits {
			visits, events = visits+1, events+len(v.events)
			heard := v.events
			for !l.live && len(heard) > 0 { // what may not have reached another comes again, also from before this round
				if _, known := index[heard[0]]; known {
					break
				}
				heard = heard[1:]
			}
			if len(heard) == 0 {
				continue
			}
			first, known := index[heard[0]]
			if !known || l.live && first < v.after {
				x.t.Errorf("listener %d is told event %d (known: %t) first; %d were over before it came", i, first, known, v.after)
				continue
			}
			for j, e := range all[:first] {
				if e.GetTime().AsTime().After(v.from) {
					x.t.Errorf("listener %d came before event %d, and event %d is the first that it is told", i, j, first)
					break
				}
			}
			for j, e := range heard {
				if got, known := index[e]; !known || got != first+j {
					x.t.Errorf("listener %d is told event %d (known: %t) where %d comes", i, got, known, first+j)
					break
				}
			}
		}
	}
	return visits, events
}

// simulated is a proxy that answers as Envoy does: a chain that it refuses it names an error for, and the version that
// it still has. It connects again when its stream ends.
type simulated struct {
	id, group string

	mu      sync.Mutex
	version string
	refused int
}

func (p *simulated) runs() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.version
}

func refusals(proxies []*simulated) (n int) {
	for _, p := range proxies {
		n += p.refused
	}
	return n
}

// crowds connects the simulated proxies, and returns when all of them run what the adapter has for them.
func (x *scale) crowds() (all []*simulated, leave func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(x.t.Context()))
	var wg sync.WaitGroup
	leave = func() { cancel(); wg.Wait() }
	for g := range scaleCrowds {
		conn := dialOften(x.t, x.a.addresses.XDS)
		context.AfterFunc(ctx, func() { conn.Close() })
		for i := range scaleCrowd {
			p := &simulated{id: fmt.Sprintf("crowd-%d-%d", g, i), group: fmt.Sprintf("crowd-%d", g)}
			all = append(all, p)
			wg.Go(func() {
				for ctx.Err() == nil {
					p.follow(ctx, conn)
					stay(ctx, 20*time.Millisecond)
				}
			})
		}
	}
	eventually(x.t, "the simulated proxies have their chains", func() error {
		for _, p := range all {
			if p.runs() == "" {
				return fmt.Errorf("%s has not", p.id)
			}
		}
		return nil
	})
	return all, leave
}

func (p *simulated) follow(ctx context.Context, conn *grpc.ClientConn) {
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
	if err != nil {
		return
	}
	node := &core.Node{Id: p.id, Cluster: p.group, UserAgentName: "envoy", UserAgentVersionType: &core.Node_UserAgentBuildVersion{
		UserAgentBuildVersion: &core.BuildVersion{Version: &typev3.SemanticVersion{MajorNumber: 1, MinorNumber: 40}}}}
	q := &discovery.DiscoveryRequest{Node: node, TypeUrl: "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig", ResourceNames: []string{"meshery.filters"},
		VersionInfo: p.runs()}
	for stream.Send(q) == nil {
		m, err := stream.Recv()
		if err != nil {
			return
		}
		q = &discovery.DiscoveryRequest{TypeUrl: q.TypeUrl, ResourceNames: q.ResourceNames, ResponseNonce: m.GetNonce()}
		p.mu.Lock()
		if slices.ContainsFunc(m.GetResources(), func(r *anypb.Any) bool { return bytes.Contains(r.GetValue(), []byte(scaleRefusal)) }) {
			p.refused++
			q.ErrorDetail = status.New(codes.Internal, "it holds "+scaleRefusal).Proto()
		} else {
			p.version = m.GetVersionInfo()
		}
		q.VersionInfo = p.version
		p.mu.Unlock()
	}
}

// stay waits, but not after ctx has ended.
func stay(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
