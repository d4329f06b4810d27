package proof

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// session is what one life of a server got of StreamEvents.
type session struct {
	cable *cable
	conn  *grpc.ClientConn
	stop  context.CancelFunc
	ended chan struct{}

	mu    sync.Mutex
	keys  []string
	times []time.Time
}

func startSession(t *testing.T, adapter string) *session {
	t.Helper()
	s := &session{cable: newCable(t, adapter), ended: make(chan struct{})}
	s.conn = dialAs(t, s.cable.addr)
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	stream, err := streamAs(ctx, s.conn)
	if err != nil {
		stop()
		t.Fatal(err)
	}
	go func() {
		defer close(s.ended)
		for {
			var e message
			if stream.RecvMsg(&e) != nil {
				return
			}
			key, err := eventKey(e)
			if err != nil {
				key = err.Error()
			}
			s.mu.Lock()
			s.keys, s.times = append(s.keys, key), append(s.times, time.Now())
			s.mu.Unlock()
		}
	}()
	t.Cleanup(func() { stop(); <-s.ended })
	return s
}

// eventKey is operation, type, summary and details.
func eventKey(e message) (string, error) {
	fields, err := e.fields()
	if err != nil {
		return "", err
	}
	var kind uint64
	text := map[int]string{}
	for _, f := range fields {
		if f.number == 1 {
			kind = f.varint
		}
		text[int(f.number)] = string(f.bytes)
	}
	return fmt.Sprintf("%s %d %s | %s", text[4], kind, text[2], text[3]), nil
}

func (s *session) received() ([]string, []time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.keys), slices.Clone(s.times)
}

// A server dials for every request while another part of it listens to events, and is started again every few seconds,
// or loses its connection in one way or another.
func TestAServerThatComesAndGoesMissesNothing(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	a := newAdapter(t, fixedPorts(t)...)
	addr := a.addresses.GRPC
	p := startProxy(t, proxyOptions{id: "edge-1", group: "default", upstream: upstream(t), xds: a.addresses.XDS})

	sessions := []*session{startSession(t, addr)}
	ctx, stop := context.WithCancel(t.Context())
	load := &dialler{t: t, addr: addr, run: fmt.Sprint(time.Now().UnixNano()), holds: map[string]string{}}
	asking := make(chan error, 1)
	go func() { asking <- load.ask(ctx) }()
	defer func() { stop(); <-asking }()

	const life = 2500 * time.Millisecond
	// sure is how long ago something must have been received for it not to come again.
	const sure = 1200 * time.Millisecond
	type end struct {
		how  string
		when time.Time // what was received before did not come again; never zero when that is known
	}
	var ends []end
	for _, leave := range []struct {
		how string
		do  func(*session)
		// polite is one whose client was heard of at its end.
		polite bool
	}{
		{"it is stopped", func(s *session) { s.stop(); s.conn.Close() }, true},
		{"its connection is reset", func(s *session) { s.cable.reset() }, false},
		{"its connection is half closed", func(s *session) { s.cable.halfClose() }, true},
		{"its machine is gone", func(s *session) { s.cable.freeze() }, false},
		{"the adapter is killed", func(*session) { a.stopWith(syscall.SIGKILL); a.start() }, false},
		{"it is stopped again", func(s *session) { s.stop(); s.conn.Close() }, true},
	} {
		time.Sleep(life)
		s := sessions[len(sessions)-1]
		e := end{how: leave.how}
		if leave.polite {
			e.when = time.Now().Add(-sure)
			if _, err := callAs(t.Context(), s.conn, "MeshName", nil); err != nil {
				t.Fatal(err)
			}
		}
		leave.do(s)
		time.Sleep(time.Second / 2) // it takes a moment to start
		ends = append(ends, e)
		sessions = append(sessions, startSession(t, addr))
	}
	time.Sleep(life)
	stop()
	if err := <-asking; err != nil {
		t.Fatal(err)
	}
	asking <- nil

	truth := a.told(load.accepted)
	place := map[string]int{}
	for i, key := range truth {
		if _, twice := place[key]; twice {
			t.Errorf("told twice: %s", key)
		}
		place[key] = i
	}
	last := sessions[len(sessions)-1]
	eventually(t, "the server has everything", func() error {
		if keys, _ := last.received(); len(keys) == 0 || keys[len(keys)-1] != truth[len(truth)-1] {
			return fmt.Errorf("it has %d events of this life", len(keys))
		}
		return nil
	})
	next, again := 0, 0 // next is where what was received ends
	for i, s := range sessions {
		keys, times := s.received()
		at := -1
		for j, key := range keys {
			now, known := place[key]
			switch {
			case !known:
				t.Fatalf("life %d got what nobody told: %s", i, key)
			case j == 0 && i == 0:
			case j == 0 && now > next:
				t.Errorf("after %q, it missed %d events, the first: %s", ends[i-1].how, now-next, truth[next])
			case j > 0 && now != at+1:
				t.Errorf("life %d: event %d comes after %d", i, now, at)
			}
			if now < next {
				again++
				before, when := sessions[i-1].received()
				if k := slices.Index(before, key); k >= 0 && !ends[i-1].when.IsZero() && when[k].Before(ends[i-1].when) {
					t.Errorf("after %q, it got again what it had received %s before: %s", ends[i-1].how, ends[i-1].when.Sub(when[k])+sure, key)
				}
			}
			at = now
		}
		if len(times) == 0 {
			t.Errorf("life %d got nothing", i)
			continue
		}
		next = max(next, at+1)
	}
	t.Logf("%d operations, %d events, %d of them came again to a server that had been away %d times", len(load.accepted), len(truth), again, len(ends))

	_, h := p.answer("/", nil)
	for name, value := range load.holds {
		if got := h.Get("x-" + name); got != value {
			t.Errorf("the proxy answers with x-%s %q, want %q", name, got, value)
		}
	}
}

// told is everything that the adapter has told, in order, once those operations have ended.
func (a *adapter) told(operations []string) (keys []string) {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(a.t.Context(), patience)
	defer cancel()
	watch, err := a.filters.Watch(ctx, &filterspb.WatchRequest{})
	if err != nil {
		a.t.Fatal(err)
	}
	running := map[string]bool{}
	for _, id := range operations {
		running[id] = true
	}
	for len(running) > 0 {
		r, err := watch.Recv()
		if err != nil {
			a.t.Fatalf("%d operations have not ended: %v", len(running), err)
		}
		e := r.GetEvent()
		keys = append(keys, fmt.Sprintf("%s %d %s | %s", e.GetOperationId(), e.GetType(), e.GetSummary(), e.GetDetails()))
		if e.GetLast() {
			delete(running, e.GetOperationId())
		}
	}
	return keys
}

// dialler asks for operations as the server of 2021 does.
type dialler struct {
	t         *testing.T
	addr, run string

	accepted []string
	holds    map[string]string // header value by filter; empty once it is removed
}

func (d *dialler) ask(ctx context.Context) error {
	for i := 0; ctx.Err() == nil; i++ {
		name := fmt.Sprintf("filter-%d", i%3)
		id, value := fmt.Sprintf("%s-%d", d.run, i), fmt.Sprint(i)
		text := fmt.Sprintf("1: \"custom\", 2: \"default\", 3: \"meshery\", 4: %q, 6: %q", document(name, map[string]any{
			"module": map[string]any{"builtin": "headers"}, "config": map[string]any{"response": map[string]any{"x-" + name: value}}}), id)
		if d.holds[name] != "" && i%5 == 4 {
			text, value = text+", 5: 1", ""
		}
		request, err := parseMessage(text)
		if err != nil {
			return err
		}
		for {
			err := d.dial(request, i%2 == 0)
			if err == nil {
				break
			}
			if status.Code(err) != codes.Unavailable { // but while the adapter is away
				return err
			}
			time.Sleep(20 * time.Millisecond)
		}
		d.accepted, d.holds[name] = append(d.accepted, id), value
		time.Sleep(50 * time.Millisecond)
	}
	return nil
}

// dial sends a request on a connection of its own, which the server does not always close.
func (d *dialler) dial(request message, closes bool) error {
	conn := dialAs(d.t, d.addr)
	if closes {
		defer conn.Close()
	}
	instance, err := parseMessage(`1: "apiVersion: v1\nkind: Config\n", 2: "fake"`)
	if err != nil {
		return err
	}
	for _, c := range []struct {
		method  string
		request message
	}{{"CreateMeshInstance", instance}, {"ApplyOperation", request}} {
		if _, err := callAs(d.t.Context(), conn, c.method, c.request); err != nil {
			return err
		}
	}
	return nil
}
