package operation_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

// external starts a JetStream that several adapters share.
func external(t *testing.T) (url string) {
	t.Helper()
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: t.TempDir(), NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(10 * time.Second) {
		t.Fatal("the external JetStream does not start")
	}
	return s.ClientURL()
}

func TestAdaptersThatShareAStoreShareTheirWorkAndItsResult(t *testing.T) {
	url := external(t)
	rigs := []*rig{}
	for range 3 {
		rigs = append(rigs, startRigOn(t, store.Options{StateDir: t.TempDir(), URL: url}))
	}
	const each = 20
	var sending sync.WaitGroup
	for n, r := range rigs {
		sending.Go(func() {
			for i := range each {
				q := apply(doc(fmt.Sprintf("f-%d", i%4), fmt.Sprintf("priority: %d", n*each+i), "target: {kind: ProxyGroup, name: "+[]string{"one", "two"}[i%2]+"}"))
				if i%7 == 6 {
					q = remove(doc(fmt.Sprintf("f-%d", i%4)))
				}
				q.ID = fmt.Sprintf("op-%d-%d", n, i)
				if _, err := r.runner.Submit(t.Context(), q); err != nil {
					t.Error(err)
				}
			}
		})
	}
	sending.Wait()
	for n := range rigs {
		for i := range each {
			story := rigs[(n+1)%3].story(fmt.Sprintf("op-%d-%d", n, i)) // told by another than the one that was asked
			if last := story[len(story)-1]; last.Type == event.Error && !strings.Contains(last.Summary, "no such filter") {
				t.Errorf("op-%d-%d: %v", n, i, texts(story))
			}
		}
	}
	want := ""
	for i, r := range rigs {
		if err := r.runner.CatchUp(t.Context()); err != nil {
			t.Fatal(err)
		}
		list, err := r.runner.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, s := range list {
			got += fmt.Sprint(s.Version, s.Chain.Names())
		}
		if i == 0 {
			want = got
		} else if got != want {
			t.Errorf("adapter %d keeps %s, and adapter 0 %s", i, got, want)
		}
	}
}

// unread is a backend that cannot see a few times what other adapters have done, as when the store elects a leader.
type unread struct {
	operation.Backend
	times atomic.Int32
}

func (b *unread) Behind(ctx context.Context) ([]filter.Chain, error) {
	if b.times.Add(-1) >= 0 {
		return nil, problem.StoreAway.New("tested: %w", store.ErrAway)
	}
	return b.Backend.Behind(ctx)
}

func TestTheLastChangeOfAnotherAdapterIsTakenOverThoughTheStoreWasAway(t *testing.T) {
	url := external(t)
	b := &unread{}
	r := startRigOn(t, store.Options{StateDir: t.TempDir(), URL: url}, func(o *operation.Options) {
		b.Backend = o.Backends["envoy"]
		o.Backends = map[string]operation.Backend{"envoy": b}
		o.Queue = idle{o.Queue, make(chan struct{})}
	})
	other := startRigOn(t, store.Options{StateDir: t.TempDir(), URL: url})
	b.times.Store(2)
	other.ok(apply(doc("x")))
	if _, err := r.dir.Records().All(t.Context()); err != nil { // as the sweep of modules reads them
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	followed := make(chan error)
	go func() { followed <- r.runner.Follow(ctx) }()
	defer func() {
		cancel()
		if err := <-followed; err != nil {
			t.Error(err)
		}
	}()
	for deadline := time.Now().Add(30 * time.Second); r.order("default") != "default/x"; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it holds %q", r.order("default"))
		}
	}
	if b.times.Load() >= 0 {
		t.Error("the store was not away")
	}
}

// The operation has claimed where its filter stood when it was accepted, and one before it has moved the filter since.
func TestATargetThatAnotherAdapterChangesMeanwhileIsChangedAgain(t *testing.T) {
	url := external(t)
	r := startRigOn(t, store.Options{StateDir: t.TempDir(), URL: url}, func(o *operation.Options) { o.Workers = 1 })
	on := func(name, group string) operation.Request {
		return apply(doc(name, "target: {kind: ProxyGroup, name: "+group+"}"))
	}
	r.ok(on("f", "one"))
	asked, goes := make(chan int, 10), make(chan struct{}, 10)
	r.proxy("a", "two", func(nth int) answer {
		if nth > 2 {
			return accept
		}
		asked <- nth
		select {
		case <-goes:
		case <-t.Context().Done():
		}
		return accept
	})
	wait := func() {
		t.Helper()
		select {
		case <-asked:
		case <-time.After(30 * time.Second):
			t.Fatal("the proxy is not asked")
		}
	}
	there, err := r.runner.Submit(t.Context(), on("f", "two"))
	if err != nil {
		t.Fatal(err)
	}
	wait()
	back, err := r.runner.Submit(t.Context(), on("f", "one"))
	if err != nil {
		t.Fatal(err)
	}
	goes <- struct{}{}
	wait() // whether the filter may go
	other := startRigOn(t, store.Options{StateDir: t.TempDir(), URL: url})
	other.ok(on("g", "two"))
	goes <- struct{}{}
	for _, id := range []string{there, back} {
		story := r.story(id)
		if last := story[len(story)-1]; last.Type == event.Error {
			t.Errorf("%v", texts(story))
		}
	}
	if err := other.runner.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	for who, r := range map[string]*rig{"the one": r, "the other": other} {
		if one, two := r.order("one"), r.order("two"); one != "default/f" || two != "default/g" {
			t.Errorf("%s holds %q and %q", who, one, two)
		}
	}
}

// sleepy is a queue whose claims tell when their effects are about to happen, and let the test hold them up.
type sleepy struct {
	store.Queue
	asked   chan string
	goes    chan struct{}
	results chan error
}

type sleepyClaim struct {
	store.Claim
	q *sleepy
}

func (q *sleepy) Next(ctx context.Context) (store.Claim, error) {
	c, err := q.Queue.Next(ctx)
	if err != nil {
		return nil, err
	}
	return sleepyClaim{c, q}, nil
}

func (c sleepyClaim) Hold(ctx context.Context) error {
	c.q.asked <- c.Entry().ID
	<-c.q.goes
	err := c.Claim.Hold(ctx)
	c.q.results <- err
	return err
}

// link is a network to a server that can be cut and mended.
func link(t *testing.T, url string) (near string, cut, mend func()) {
	t.Helper()
	var (
		mu       sync.Mutex
		listener net.Listener
		conns    []net.Conn
		all      sync.WaitGroup
		addr     = "127.0.0.1:0"
	)
	mend = func() {
		t.Helper()
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		listener, addr = l, l.Addr().String()
		mu.Unlock()
		all.Go(func() {
			for {
				a, err := l.Accept()
				if err != nil {
					return
				}
				b, err := net.Dial("tcp", strings.TrimPrefix(url, "nats://"))
				if err != nil {
					a.Close()
					continue
				}
				mu.Lock()
				conns = append(conns, a, b)
				mu.Unlock()
				for _, c := range [][2]net.Conn{{a, b}, {b, a}} {
					all.Go(func() { _, _ = io.Copy(c[0], c[1]); a.Close(); b.Close() })
				}
			}
		})
	}
	cut = func() {
		mu.Lock()
		defer mu.Unlock()
		listener.Close()
		for _, c := range conns {
			c.Close()
		}
		conns = nil
	}
	mend()
	t.Cleanup(func() { cut(); all.Wait() })
	return "nats://" + addr, cut, mend
}

// The worker is cut off before its first effect, for so long that another adapter does its work.
func TestAWorkerThatWakesUpLateNeitherWritesNorAcknowledges(t *testing.T) {
	url := external(t)
	q := &sleepy{asked: make(chan string, 100), goes: make(chan struct{}), results: make(chan error, 100)}
	lease := 300 * time.Millisecond
	near, cut, mend := link(t, url)
	late := startRigOn(t, store.Options{StateDir: t.TempDir(), URL: near, Lease: lease}, func(o *operation.Options) {
		q.Queue, o.Queue = o.Queue, q
	})
	id, err := late.runner.Submit(t.Context(), apply(doc("x")))
	if err != nil {
		t.Fatal(err)
	}
	if asked := <-q.asked; asked != id {
		t.Fatal(asked)
	}
	cut()
	other := startRigOn(t, store.Options{StateDir: t.TempDir(), URL: url, Lease: lease})
	story := other.story(id)
	if last := story[len(story)-1]; last.Type == event.Error {
		t.Fatalf("%v", texts(story))
	}
	other.ok(remove(doc("x")))
	mend()
	close(q.goes)
	if err := <-q.results; !errors.Is(err, store.ErrLost) {
		t.Errorf("the late worker may write: %v", err)
	}
	if err := late.stop(); err != nil {
		t.Error(err)
	}
	again, _, err := other.events.Of(t.Context(), id)
	if err != nil || len(again) != len(story) {
		t.Errorf("the story has grown from %v to %v, %v", texts(story), texts(again), err)
	}
	if got := other.order("default"); got != "" {
		t.Errorf("the late worker has put back %q", got)
	}
}

func TestAnOperationWhoseClaimRanOutIsBegunAgainIfNobodyElseDoes(t *testing.T) {
	q := &sleepy{asked: make(chan string, 100), goes: make(chan struct{}), results: make(chan error, 100)}
	near, cut, mend := link(t, external(t))
	r := startRigOn(t, store.Options{StateDir: t.TempDir(), URL: near, Lease: 300 * time.Millisecond}, func(o *operation.Options) {
		q.Queue, o.Queue = o.Queue, q
	})
	id, err := r.runner.Submit(t.Context(), apply(doc("x")))
	if err != nil {
		t.Fatal(err)
	}
	<-q.asked
	cut()
	time.Sleep(time.Second) // several times the lease
	mend()
	close(q.goes)
	if err := <-q.results; !errors.Is(err, store.ErrLost) {
		t.Errorf("the worker whose claim ran out may write: %v", err)
	}
	story := r.story(id)
	if last := story[len(story)-1]; last.Type == event.Error || r.order("default") != "default/x" {
		t.Errorf("%v", texts(story))
	}
}

// unkept is a queue whose claims cannot be made sure of for a few times, as when the store is away.
type unkept struct {
	store.Queue
	times atomic.Int32
}

type unkeptClaim struct {
	store.Claim
	q *unkept
}

func (q *unkept) Next(ctx context.Context) (store.Claim, error) {
	c, err := q.Queue.Next(ctx)
	if err != nil {
		return nil, err
	}
	return unkeptClaim{c, q}, nil
}

func (c unkeptClaim) Hold(ctx context.Context) error {
	if c.q.times.Add(-1) >= 0 {
		return problem.StoreAway.New("tested: %w", store.ErrAway)
	}
	return c.Claim.Hold(ctx)
}

// It may be away more often than an operation is begun whose adapter ends each time.
func TestAnOperationWaitsForAStoreThatIsAway(t *testing.T) {
	q := &unkept{}
	r := newRig(t, func(o *operation.Options) { q.Queue, o.Queue = o.Queue, q })
	r.proxy("a", "default", func(int) answer { return accept })
	q.times.Store(4)
	story := r.ok(apply(doc("x")))
	if q.times.Load() >= 0 {
		t.Error("the store was not away")
	}
	ends := 0
	for _, e := range story {
		if e.Last {
			ends++
		}
	}
	if ends != 1 || r.order("default") != "default/x" {
		t.Errorf("%v", texts(story))
	}
}
