package server_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server"
)

func TestAnswersEveryCallOfMesherysProtocolByItsFieldNumbers(t *testing.T) {
	f := start(t)
	for _, c := range []struct {
		method  string
		request raw
		want    raw
	}{
		{"MeshName", nil, text(1, "Envoy Filters")},
		{"MeshVersions", nil, join(text(1, "1.40"), text(1, "1.39"))},
		{"ComponentInfo", nil, join(text(1, "adapter"), text(2, "meshery-filters"), text(3, "v0.1.0"), text(4, "abc1234"))},
		{"SupportedOperations", nil, join(
			nested(1, text(1, "meshery-filters"), text(2, "Image Hub with its rate limit filter")), // category 0 is left out
			nested(1, text(1, "apply_filter"), text(2, "Apply Wasm filters"), number(3, 4)))},
		{"CreateMeshInstance", join(text(1, "apiVersion: v1\nkind: Config\n"), text(2, "fake")), nil},
		{"ApplyOperation", join(text(1, "apply_filter"), text(6, "id-1")), text(2, "id-1")},
	} {
		resp, err := call(t, f.conn, meshService+c.method, c.request)
		if err != nil {
			t.Errorf("%s: %v", c.method, err)
			continue
		}
		if !bytes.Equal(resp, c.want) {
			t.Errorf("%s answered %v, want %v", c.method, decode(t, resp), decode(t, c.want))
		}
	}
}

func TestApplyOperationHandsOnEveryFieldUntouched(t *testing.T) {
	f := start(t)
	request := join(text(1, "apply_filter"), text(2, "shop"), text(3, "meshery"), text(4, "kind: Filter\n"), number(5, 1),
		text(6, "d4c1862f-2f49-4ae2-854e-8d410b319c05"), text(7, "config one"), text(7, "config two"), text(8, "1.40"))
	resp := mustCall(t, f.conn, meshService+"ApplyOperation", request)
	if got, want := resp.String(), `2="d4c1862f-2f49-4ae2-854e-8d410b319c05"`; got != want {
		t.Errorf("answered %s, want %s", got, want)
	}
	want := operation.Request{Operation: "apply_filter", ID: "d4c1862f-2f49-4ae2-854e-8d410b319c05", Namespace: "shop",
		Username: "meshery", Body: "kind: Filter\n", Delete: true, Kubeconfigs: []string{"config one", "config two"}}
	got := f.ops.last(t)
	want.Caller = got.Caller // which has a test of its own
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the request is %+v, want %+v", got, want)
	}
}

func TestBytesWrittenByHandAreUnderstood(t *testing.T) {
	f := start(t)
	// opName=1 "apply_filter", namespace=2 "ns", delete_op=5 true, operation_id=6 "x1", one by one.
	request, err := hex.DecodeString("0a0c" + "6170706c795f66696c746572" + "1202" + "6e73" + "2801" + "3202" + "7831")
	if err != nil {
		t.Fatal(err)
	}
	resp, err := call(t, f.conn, meshService+"ApplyOperation", request)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := hex.EncodeToString(resp), "1202"+"7831"; got != want {
		t.Errorf("answered %s, want %s", got, want)
	}
	if got := f.ops.last(t); got.Operation != "apply_filter" || got.Namespace != "ns" || !got.Delete || got.ID != "x1" {
		t.Errorf("the request is %+v", got)
	}
}

// Each line of the capture is a call on a connection of its own, which CreateMeshInstance opens.
func TestTheServerOf2021IsServed(t *testing.T) {
	f := start(t)
	kubeconfig := strings.Repeat("k", 225)
	dialled := func(method string, request ...raw) (fields, error) {
		conn := dial(t, f.addr)
		defer conn.Close()
		if got := mustCall(t, conn, meshService+"CreateMeshInstance", text(1, kubeconfig), text(2, "fake")); len(got) != 0 {
			t.Fatalf("CreateMeshInstance answered %v", got)
		}
		resp, err := call(t, conn, meshService+method, request...)
		return decode(t, resp), err
	}
	operate := func(key, id string, del bool) error {
		request := []raw{text(1, key), text(2, "default"), text(3, "meshery"), text(6, id)}
		if del {
			request = append(request, number(5, 1))
		}
		_, err := dialled("ApplyOperation", request...)
		return err
	}
	for _, discovery := range []string{"SupportedOperations", "ComponentInfo", "MeshName"} {
		if _, err := dialled(discovery); err != nil {
			t.Fatalf("%s: %v", discovery, err)
		}
	}
	events := follow(t, f.conn, meshService+"StreamEvents")
	if err := operate("apply_filter", "d4c1862f-2f49-4ae2-854e-8d410b319c05", false); err != nil {
		t.Fatal(err)
	}
	emit(t, f.hub, event.Event{Operation: "d4c1862f-2f49-4ae2-854e-8d410b319c05", Sequence: 1, Summary: "applied", Details: "all of it"})
	if got, want := events.next(t).String(), `2="applied" 3="all of it" 4="d4c1862f-2f49-4ae2-854e-8d410b319c05" 8="`+component+`" 9="meshery-filters"`; got != want {
		t.Errorf("event %s, want %s", got, want)
	}
	if err := operate("apply_filter", "9b67b18b-95f0-45c7-b65e-215f53236bf4", true); err != nil {
		t.Fatal(err)
	}
	if got := f.ops.last(t); !got.Delete {
		t.Errorf("the request is %+v, want one to delete", got)
	}
	for _, key := range []string{"nope", "smiConformanceTest"} {
		err := operate(key, "092edeef-160a-4f47-9d4d-af1f78c93c22", false)
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), key) {
			t.Errorf("%s: %v", key, err)
		}
	}
	component := `{"kind":"Component","apiVersion":"core.oam.dev/v1alpha2","metadata":{"name":"myfilter","namespace":"default","creationTimestamp":null,"labels":{"resource.pattern.meshery.io/id":"1c9adbd4-c121-4fc0-9690-5bf88f477096"}},"spec":{"type":"WASMFilterLab","settings":{"a":1},"parameters":null}}`
	_, err := dialled("ProcessOAM", text(1, "meshery"), text(3, component), text(4, `{"metadata":{"creationTimestamp":null},"spec":{"Components":null}}`))
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), problem.ForeignComponent.Code) || !strings.Contains(err.Error(), "WASMFilterLab") {
		t.Errorf("ProcessOAM: %v", err)
	}
	if strings.Contains(f.log.String(), kubeconfig) {
		t.Error("the log has the kubeconfig")
	}
}

func TestAKubeconfigOfAConnectionIsForItsOperationsAlone(t *testing.T) {
	f := start(t)
	apply := func(conn *grpc.ClientConn, more ...raw) operation.Request {
		t.Helper()
		mustCall(t, conn, meshService+"ApplyOperation", append([]raw{text(1, "apply_filter"), text(4, "kind: Filter\n")}, more...)...)
		return f.ops.last(t)
	}
	one, other := dial(t, f.addr), dial(t, f.addr)
	mustCall(t, one, meshService+"CreateMeshInstance", text(1, "current-context: a\ncontexts: [{name: a}, {name: b}]\n"), text(2, "b"))
	if q := apply(one); len(q.Kubeconfigs) != 1 || !q.Implied || !strings.Contains(q.Kubeconfigs[0], "current-context: b") {
		t.Errorf("on its connection: %q %v", q.Kubeconfigs, q.Implied)
	}
	if q := apply(one, text(7, "brought")); len(q.Kubeconfigs) != 1 || q.Implied || q.Kubeconfigs[0] != "brought" {
		t.Errorf("beside one that the request brings: %q %v", q.Kubeconfigs, q.Implied)
	}
	if q := apply(other); len(q.Kubeconfigs) != 0 || q.Implied {
		t.Errorf("on another connection: %q %v", q.Kubeconfigs, q.Implied)
	}
	mustCall(t, one, meshService+"CreateMeshInstance", text(1, "{"), text(2, "b"))
	if q := apply(one); len(q.Kubeconfigs) != 1 || q.Kubeconfigs[0] != "{" {
		t.Errorf("the one that came last: %q", q.Kubeconfigs)
	}
	// There is room for 64 of 1 MiB, and again when their connections have ended.
	large := strings.Repeat("k", 1<<20)
	var conns []*grpc.ClientConn
	for range 63 {
		c := dial(t, f.addr)
		conns = append(conns, c)
		mustCall(t, c, meshService+"CreateMeshInstance", text(1, large))
	}
	if _, err := call(t, other, meshService+"CreateMeshInstance", text(1, large)); status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), problem.TooMuch.Code) {
		t.Errorf("too many: %v", err)
	}
	for _, c := range conns {
		c.Close()
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := call(t, other, meshService+"CreateMeshInstance", text(1, large)); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func TestTheNewestServerIsServed(t *testing.T) {
	f := start(t)
	ops := mustCall(t, f.conn, meshService+"SupportedOperations")
	if len(ops[1]) != 2 || ops.text(2) != "" {
		t.Errorf("SupportedOperations answered %v, want two operations and no failure", ops)
	}
	if info := mustCall(t, f.conn, meshService+"ComponentInfo"); info.text(2) != "meshery-filters" {
		t.Errorf("ComponentInfo answered %v", info)
	}
	mustCall(t, f.conn, meshService+"MeshName")
	id := "5cf2f5a4-4a4a-4d0c-8a57-0a5f1d3a7b11"
	mustCall(t, f.conn, meshService+"ApplyOperation", text(1, "apply_filter"), text(2, "default"), text(3, "meshery"), text(6, id), text(7, "kubeconfig"))
	events := follow(t, f.conn, meshService+"StreamEvents")
	emit(t, f.hub, event.Event{Operation: id, Sequence: 1, Type: event.Error, Summary: "s", Details: "d", Code: "c", Cause: "pc", Remedy: "sr", Last: true})
	want := join(number(1, 2), text(2, "s"), text(3, "d"), text(4, id), text(5, "pc"), text(6, "sr"), text(7, "c"), text(8, component), text(9, "meshery-filters"))
	if got := events.next(t); got.String() != decode(t, want).String() {
		t.Errorf("event %v, want %v", got, decode(t, want))
	}
	if _, err := call(t, f.conn, meshService+"Provision", text(1, "meshery"), text(3, "{}"), text(4, "kubeconfig")); status.Code(err) != codes.InvalidArgument {
		t.Errorf("Provision: %v", err)
	}
}

func TestStreamEventsBeginsNowAndKeepsTheOrder(t *testing.T) {
	f := start(t)
	emit(t, f.hub, event.Event{Operation: "before", Summary: "before"})
	events := follow(t, f.conn, meshService+"StreamEvents")
	const n = 500
	for i := range n {
		emit(t, f.hub, event.Event{Operation: "op", Sequence: uint64(i + 1), Summary: numbered("step", i)})
	}
	for i := range n {
		if got := events.next(t).text(2); got != numbered("step", i) {
			t.Fatalf("event %d is %q", i, got)
		}
	}
}

func TestASlowReaderIsWarnedOfWhatItMissedAndGoesOn(t *testing.T) {
	hub := event.NewHub(3, 0)
	f := start(t, func(o *server.Options) { o.Events = hub })
	// A window that does not grow, and far more than it lets the server send unread.
	conn := dial(t, f.addr, grpc.WithInitialWindowSize(64<<10), grpc.WithInitialConnWindowSize(64<<10))
	events := follow(t, conn, meshService+"StreamEvents")
	const n = 200
	for i := range n {
		emit(t, hub, event.Event{Operation: "op", Summary: numbered("step", i), Details: strings.Repeat("x", 60<<10)})
	}
	warned := false
	for {
		e := events.next(t)
		if e.text(7) == problem.EventsMissed.Code {
			warned = true
			if e.number(1) != uint64(event.Warn) || e.text(8) != component || e.text(9) != "meshery-filters" || e.text(6) == "" {
				t.Errorf("the warning is %v", e)
			}
		}
		if e.text(2) == numbered("step", n-1) {
			break
		}
	}
	if !warned {
		t.Error("the reader was not told that it missed events")
	}
}

func TestAHundredClientsComeAndGoAndLeaveNothingBehind(t *testing.T) {
	f := start(t)
	mustCall(t, f.conn, meshService+"MeshName")
	before := runtime.NumGoroutine()
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			conn := dial(t, f.addr)
			defer conn.Close()
			events := follow(t, conn, meshService+"StreamEvents")
			defer events.close()
			// Each waits for an event of its own among all the others', and half leave in the middle of the noise.
			own := numbered("client", i)
			emit(t, f.hub, event.Event{Operation: own, Summary: own})
			for i%2 == 0 && events.next(t).text(4) != own {
			}
		})
	}
	wg.Wait()
	for i := range 200 {
		emit(t, f.hub, event.Event{Operation: "after", Summary: fmt.Sprint(i)})
	}
	until(t, "the goroutines of clients that left are gone", func() bool { return runtime.NumGoroutine() <= before })
}

// place keeps a position as a store does.
type place struct {
	mu    sync.Mutex
	at    uint64
	found bool
}

func (p *place) Load(context.Context) (uint64, bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.at, p.found, nil
}

func (p *place) Save(_ context.Context, at uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at, p.found = at, true
	return nil
}

func (p *place) is(at uint64) func() bool {
	return func() bool { now, _, _ := p.Load(context.Background()); return now == at }
}

// stuck is a place that is not written to before its end.
type stuck struct {
	place
	tried chan struct{}
	end   chan struct{}
}

func (s *stuck) Save(_ context.Context, at uint64) error {
	select {
	case s.tried <- struct{}{}:
	default:
	}
	<-s.end
	return s.place.Save(context.Background(), at)
}

func TestAPlaceThatCannotBeWrittenHoldsUpNoStream(t *testing.T) {
	t.Parallel()
	left := &stuck{tried: make(chan struct{}, 1), end: make(chan struct{})}
	f := start(t, func(o *server.Options) { o.Left = left })
	end := sync.OnceFunc(func() { close(left.end) })
	t.Cleanup(end)
	one, another := follow(t, f.conn, meshService+"StreamEvents"), follow(t, dial(t, f.addr), meshService+"StreamEvents")
	for i := range 10 {
		emit(t, f.hub, event.Event{Operation: numbered("op", i), Sequence: 1})
		if i == 0 {
			select {
			case <-left.tried:
			case <-time.After(patience):
				t.Fatal("nobody has tried to write")
			}
		}
		for _, s := range []stream{one, another} {
			if got := s.next(t).text(4); got != numbered("op", i) {
				t.Fatalf("got %s", got)
			}
		}
	}
	end()
	one.close()
	another.close()
	until(t, "it is written at the end", func() bool { _, found, _ := left.Load(context.Background()); return found })
}

func TestWhoComesBackToStreamEventsGetsWhatHappenedMeanwhile(t *testing.T) {
	t.Parallel()
	left := &place{}
	f := start(t, func(o *server.Options) { o.Left = left })
	tell := func(i int, age time.Duration) {
		emit(t, f.hub, event.Event{Operation: numbered("op", i), Sequence: 1, Time: time.Now().Add(-age)})
	}
	get := func(s stream, want ...int) {
		t.Helper()
		for _, i := range want {
			if got := s.next(t).text(4); got != numbered("op", i) {
				t.Errorf("%s comes where op-%d should", got, i)
			}
		}
	}
	// received waits until the server knows that everything before a position has come: after signs of life, it does.
	received := func(position uint64, conns ...*grpc.ClientConn) {
		t.Helper()
		until(t, "the position is kept", func() bool {
			for _, conn := range conns {
				mustCall(t, conn, meshService+"MeshName")
			}
			return left.is(position)()
		})
	}
	tell(0, 0)
	// Nobody was there before the first, who gets nothing of what was.
	first := dial(t, f.addr)
	s := follow(t, first, meshService+"StreamEvents")
	tell(1, 0)
	get(s, 1)
	received(2, first)
	// Who comes while another listens, and has received everything, is no successor.
	second := dial(t, f.addr)
	other := follow(t, second, meshService+"StreamEvents")
	tell(2, 0)
	get(s, 2)
	get(other, 2)
	received(3, first, second)
	first.Close()
	second.Close()
	until(t, "the position is kept", left.is(3))
	tell(3, 2*time.Hour)
	tell(4, 0)
	tell(5, 0)
	third := dial(t, f.addr)
	get(follow(t, third, meshService+"StreamEvents"), 4, 5)
	received(6, third)
	third.Close()
	for i := range caughtUp + 10 {
		tell(100+i, 0)
	}
	get(follow(t, dial(t, f.addr), meshService+"StreamEvents"), 110, 111)
}

func TestWhatAClientMayNotHaveReceivedComesAgainToTheNext(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		lose func(*wire)
	}{
		{"its connection is still thought to be there", (*wire).freeze},
		{"its connection was reset with events under way", func(w *wire) { w.freeze(); w.reset() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			left := &place{}
			f := start(t, func(o *server.Options) { o.Left = left })
			w := newWire(t, f.addr)
			conn := dial(t, w.addr)
			s := follow(t, conn, meshService+"StreamEvents")
			emit(t, f.hub, event.Event{Operation: "seen"})
			s.next(t)
			until(t, "the position is kept", func() bool {
				mustCall(t, conn, meshService+"MeshName")
				return left.is(1)()
			})
			w.freeze()
			for i := range 3 {
				emit(t, f.hub, event.Event{Operation: numbered("op", i)})
			}
			c.lose(w)
			next := follow(t, f.conn, meshService+"StreamEvents")
			emit(t, f.hub, event.Event{Operation: "new"})
			for _, want := range []string{"op-0", "op-1", "op-2", "new"} {
				if got := next.next(t).text(4); got != want {
					t.Errorf("%s comes where %s should", got, want)
				}
			}
		})
	}
}

const caughtUp = 1000
