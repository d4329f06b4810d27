package server_test

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/limit"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server"
)

// tooMuch says whether a call was refused as one too many, with when to try it again.
func tooMuch(err error) bool {
	var retry, code bool
	for _, d := range status.Convert(err).Details() {
		switch d := d.(type) {
		case *errdetails.RetryInfo:
			retry = d.GetRetryDelay().AsDuration() > 0
		case *errdetails.ErrorInfo:
			code = d.GetReason() == problem.TooMuch.Code
		}
	}
	return status.Code(err) == codes.ResourceExhausted && retry && code && strings.Contains(err.Error(), "Try it again")
}

// base is how many goroutines and bytes there are when nothing happens.
func base() (goroutines int, heap uint64) {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return runtime.NumGoroutine(), m.HeapAlloc
}

// back waits until there is no more than before.
func back(t *testing.T, goroutines int, heap uint64) {
	t.Helper()
	until(t, "goroutines return to their base", func() bool { return runtime.NumGoroutine() <= goroutines })
	until(t, "the heap returns to its base", func() bool { _, now := base(); return now < heap+16<<20 })
}

func TestAFloodOfStreamsIsRefusedBeyondTheBoundsAndLeavesNothing(t *testing.T) {
	for _, c := range []struct {
		why     string
		bounds  limit.Bounds
		streams int64
	}{
		{"of one client", limit.Bounds{PerClient: 200, Total: 10_000}, 2000},
		{"of all", limit.Bounds{PerClient: 10_000, Total: 200}, 1000},
	} {
		f := start(t, func(o *server.Options) { o.Streams = c.bounds })
		mustCall(t, f.conn, meshService+"MeshName")
		goroutines, heap := base()
		ctx, cancel := context.WithCancel(context.Background())
		conns := make([]*grpc.ClientConn, 6)
		for i := range conns {
			conns[i] = dial(t, f.addr)
		}
		var known, over sync.WaitGroup
		var answered, refused atomic.Int64
		for i := range c.streams {
			known.Add(1)
			over.Go(func() {
				method := meshService + "StreamEvents"
				if i%2 == 1 {
					method = filterService + "Watch"
				}
				s, err := conns[i%int64(len(conns))].NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
				if err == nil {
					_ = s.SendMsg(&raw{}) // what it ends with is received
					_ = s.CloseSend()
					var resp raw
					err = s.RecvMsg(&resp)
				}
				switch {
				case err == nil:
					answered.Add(1)
				case tooMuch(err):
					refused.Add(1)
				default:
					t.Errorf("%s: %s ends with %v", c.why, method, err)
				}
				known.Done()
				for resp := (raw{}); err == nil; {
					err = s.RecvMsg(&resp)
				}
			})
		}
		// Those that are open hear of what happens, until every stream has heard or was refused.
		done := make(chan struct{})
		go func() { known.Wait(); close(done) }()
		for n := uint64(1); ; n++ {
			emit(t, f.hub, event.Event{Operation: "op", Sequence: n, Summary: "something happened"})
			select {
			case <-done:
			case <-time.After(100 * time.Millisecond):
				continue
			}
			break
		}
		if answered.Load() != 200 || refused.Load() != c.streams-200 {
			t.Errorf("%s: %d of %d streams are open and %d were refused, while there may be 200", c.why, answered.Load(), c.streams, refused.Load())
		}
		mustCall(t, f.conn, meshService+"MeshName") // which is no stream
		cancel()
		over.Wait()
		for _, conn := range conns {
			conn.Close()
		}
		back(t, goroutines, heap)
		follow(t, f.conn, meshService+"StreamEvents").close()
	}
}

func TestAFloodOfCallsIsRefusedBeyondTheBoundsAndLeavesNothing(t *testing.T) {
	f := start(t, func(o *server.Options) { o.Calls = limit.Bounds{PerClient: 50, Total: 1000} })
	finish := make(chan struct{})
	var running, most atomic.Int64
	f.ops.submit = func(_ context.Context, r operation.Request) (string, error) {
		n := running.Add(1)
		defer running.Add(-1)
		for {
			m := most.Load()
			if n <= m || most.CompareAndSwap(m, n) {
				break
			}
		}
		<-finish
		return r.ID, nil
	}
	mustCall(t, f.conn, meshService+"MeshName")
	goroutines, heap := base()
	conns := make([]*grpc.ClientConn, 4)
	for i := range conns {
		conns[i] = dial(t, f.addr)
	}
	const calls = 2000
	results := make(chan error, calls)
	body := text(4, strings.Repeat("x", 64<<10))
	for i := range calls {
		go func() {
			var resp raw
			req := join(text(1, "apply_filter"), body)
			results <- conns[i%len(conns)].Invoke(limited(t), meshService+"ApplyOperation", &req, &resp)
		}()
	}
	for range calls - 50 {
		if err := <-results; !tooMuch(err) {
			t.Errorf("a call too many ends with %v", err)
		}
	}
	if _, err := call(t, f.conn, meshService+"MeshName"); !tooMuch(err) {
		t.Errorf("one more call of the client: %v", err)
	}
	follow(t, f.conn, meshService+"StreamEvents").close() // which is no call
	until(t, "those that were let in run", func() bool { return running.Load() == 50 })
	close(finish)
	for range 50 {
		if err := <-results; err != nil {
			t.Errorf("a call that was let in ends with %v", err)
		}
	}
	if most.Load() != 50 {
		t.Errorf("%d calls ran at once, while there may be 50", most.Load())
	}
	for _, conn := range conns {
		conn.Close()
	}
	back(t, goroutines, heap)
	until(t, "what has ended counts no more", func() bool { _, err := call(t, f.conn, meshService+"MeshName"); return err == nil })
	mustCall(t, f.conn, meshService+"ApplyOperation", text(1, "apply_filter"))
}

func TestACallCountsUntilItHasEndedEvenWhenItsClientHasHungUp(t *testing.T) {
	f := start(t, func(o *server.Options) { o.Calls = limit.Bounds{PerClient: 2} })
	finish := make(chan struct{})
	var running atomic.Int64
	f.ops.submit = func(_ context.Context, r operation.Request) (string, error) {
		running.Add(1)
		defer running.Add(-1)
		<-finish
		return r.ID, nil
	}
	hangUp := func() error {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		answer := make(chan error, 1)
		before := running.Load()
		go func() {
			req, resp := text(1, "apply_filter"), raw{}
			answer <- f.conn.Invoke(ctx, meshService+"ApplyOperation", &req, &resp)
		}()
		for deadline := time.Now().Add(patience); running.Load() == before && time.Now().Before(deadline); {
			select {
			case err := <-answer:
				return err
			case <-time.After(time.Millisecond):
			}
		}
		cancel()
		return <-answer
	}
	for range 2 {
		if err := hangUp(); status.Code(err) != codes.Canceled {
			t.Fatal(err)
		}
	}
	for range 20 {
		if err := hangUp(); !tooMuch(err) {
			t.Errorf("%d calls of a client run at once, while it may have 2: %v", running.Load(), err)
		}
	}
	close(finish)
	until(t, "what has ended counts no more", func() bool { _, err := call(t, f.conn, meshService+"MeshName"); return err == nil })
}

func TestAStreamWithLargeHeadersIsNotTaken(t *testing.T) {
	f := start(t)
	for size, taken := range map[int]bool{16 << 10: true, 1 << 20: false} {
		ctx := metadata.AppendToOutgoingContext(limited(t), "x", strings.Repeat("x", size))
		s, err := f.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, meshService+"StreamEvents")
		if err == nil {
			_ = s.SendMsg(&raw{}) // what it ends with is received
			_, err = s.Header()
		}
		if (err == nil) != taken {
			t.Errorf("with headers of %d bytes: %v", size, err)
		}
	}
}

func TestAClientThatCallsTooOftenIsRefusedAndAnotherIsNot(t *testing.T) {
	a := newAuthority(t)
	f := start(t, a.serving, func(o *server.Options) { o.Calls = limit.Bounds{Rate: 20} })
	raw := grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{}))
	eager, calm := a.dial(f.addr, a.issue("operators-eager"), raw), a.dial(f.addr, a.issue("operators-calm"), raw)
	var given, refused atomic.Int64
	var wg sync.WaitGroup
	for range 1000 {
		wg.Go(func() {
			switch _, err := call(t, eager, meshService+"MeshName"); {
			case err == nil:
				given.Add(1)
			case tooMuch(err) && strings.Contains(err.Error(), "20 calls a second") && strings.Contains(err.Error(), "operators-eager"):
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if given.Load() < 40 || refused.Load() == 0 {
		t.Errorf("%d of 1000 calls were answered and %d refused", given.Load(), refused.Load())
	}
	for range 40 {
		mustCall(t, calm, meshService+"MeshName")
	}
}

// Meshery opens a connection for every call, and some of its versions never close one.
func TestADialPerCallIsServedWithinTheDefaultBounds(t *testing.T) {
	f := start(t, func(o *server.Options) {
		o.Calls = limit.Bounds{Rate: 1000, PerClient: 1000, Total: 2000}
		o.Streams = limit.Bounds{Rate: 1000, PerClient: 2000, Total: 4000}
	})
	var wg sync.WaitGroup
	for i := range 300 {
		wg.Go(func() {
			conn := dial(t, f.addr)
			mustCall(t, conn, meshService+"MeshName")
			mustCall(t, conn, meshService+"ApplyOperation", text(1, "apply_filter"), text(6, fmt.Sprint(i)))
			s := follow(t, conn, meshService+"StreamEvents")
			if i%2 == 0 {
				s.close()
			}
		})
	}
	wg.Wait()
}

func TestAFullQueueSaysWhenToTryAgain(t *testing.T) {
	f := start(t)
	f.ops.submit = func(context.Context, operation.Request) (string, error) {
		return "", problem.QueueFull.New("1000 operations are waiting or running, the most that the adapter takes")
	}
	_, err := call(t, f.conn, meshService+"ApplyOperation")
	var retry time.Duration
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.RetryInfo); ok {
			retry = info.GetRetryDelay().AsDuration()
		}
	}
	if status.Code(err) != codes.ResourceExhausted || retry <= 0 {
		t.Errorf("%v, to be tried again in %s", err, retry)
	}
}
