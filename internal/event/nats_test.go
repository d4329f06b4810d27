package event

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshery/meshkit/broker"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

func startServer(t *testing.T, listen string) *store.Server {
	t.Helper()
	s, err := store.StartServer(store.ServerOptions{Listen: listen, Readable: []string{SubjectPrefix + ">"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	return s
}

// run starts the sink. stop ends it and waits.
func run(t *testing.T, o Options) (n *NATS, stop func()) {
	t.Helper()
	n, err := NewNATS(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return n, stop
}

// listen subscribes as any other program does and returns what was received so far.
func listen(t *testing.T, url, subject string) func() []*nats.Msg {
	t.Helper()
	nc, err := nats.Connect(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	var mu sync.Mutex
	var got []*nats.Msg
	if _, err := nc.Subscribe(subject, func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		got = append(got, m)
	}); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return func() []*nats.Msg {
		mu.Lock()
		defer mu.Unlock()
		return got
	}
}

func decode(t *testing.T, m *nats.Msg) Event {
	t.Helper()
	var e Event
	if err := json.Unmarshal(m.Data, &broker.Message{Object: &e}); err != nil {
		t.Fatal(err)
	}
	return e
}

// inOrder checks that the messages are events 1, 2, … of the operation, repeated stretches apart.
func inOrder(t *testing.T, messages []*nats.Msg, from, to uint64) {
	t.Helper()
	want := from
	for _, m := range messages {
		switch sequence := decode(t, m).Sequence; {
		case sequence == want:
			want++
		case sequence > want:
			t.Fatalf("event %d came before %d", sequence, want)
		}
	}
	if want != to+1 {
		t.Errorf("%d was the last, not %d", want-1, to)
	}
}

func TestAnEventIsPublishedInMesherysEnvelope(t *testing.T) {
	s := startServer(t, "127.0.0.1:0")
	got := listen(t, s.ClientURL(), "meshery.adapters.filters.events.*")
	n, _ := run(t, Options{Connect: s.Connect()})
	emit(t, n, Event{Operation: "op_1-x", Sequence: 1, Time: time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC), Type: Error,
		Summary: "failed <here>", Details: "d", Code: "meshery-filters-1016", Cause: "c", Remedy: "r", Component: "u", Name: "n", Last: true})
	eventually(t, "the event arrives", func() bool { return len(got()) == 1 })
	m := got()[0]
	if m.Subject != "meshery.adapters.filters.events.op_1-x" {
		t.Errorf("subject %s", m.Subject)
	}
	const want = `{"ObjectType":"adapter-event","EventType":"ADDED","Request":null,"Object":{"operation_id":"op_1-x",` +
		`"sequence":1,"time":"2026-01-02T03:04:05.000006Z","event_type":2,"summary":"failed \u003chere\u003e","details":"d",` +
		`"error_code":"meshery-filters-1016","probable_cause":"c","suggested_remediation":"r","component":"u",` +
		`"component_name":"n","last":true}}`
	if string(m.Data) != want {
		t.Errorf("got  %s\nwant %s", m.Data, want)
	}
}

func TestAnOperationWhoseIDIsNoSubjectTokenIsRefused(t *testing.T) {
	n, err := NewNATS(Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"", "a.b", "*", ">", "a b", "a\nb", "ü", strings.Repeat("a", 129)} {
		if err := n.Emit(t.Context(), story(id, 1)); !errors.Is(err, problem.InvalidRequest) {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, id := range []string{"a", "A-Z_09", strings.Repeat("a", 128)} {
		emit(t, n, story(id, 1))
	}
}

func TestAnAddressThatCannotBeOneIsRefusedWithoutShowingIt(t *testing.T) {
	for _, address := range []string{"nats://me:secret@", "nats://me:sec\x00ret@host", "nats://me:secret@host:port", "nats://host:4222,"} {
		if _, err := NewNATS(Options{URL: address}); !errors.Is(err, problem.InvalidConfiguration) || strings.Contains(err.Error(), "sec") {
			t.Errorf("%q: %v", address, err)
		}
	}
}

func TestEveryListenerGetsEveryOperationInOrder(t *testing.T) {
	t.Parallel()
	const listeners, operations, events = 50, 8, 200
	s := startServer(t, "127.0.0.1:0")
	var got []func() []*nats.Msg
	for i := range listeners {
		got = append(got, listen(t, s.ClientURL(), Subject(fmt.Sprint("op", i%operations))))
	}
	n, stop := run(t, Options{Connect: s.Connect()})
	var writers sync.WaitGroup
	for o := range operations {
		writers.Go(func() {
			for i := range events {
				emit(t, n, story(fmt.Sprint("op", o), i+1))
			}
		})
	}
	writers.Wait()
	stop() // publishes what still waits
	for _, messages := range got {
		eventually(t, "all events arrive", func() bool { return len(messages()) >= events })
		inOrder(t, messages(), 1, events)
		if len(messages()) != events {
			t.Errorf("%d events came as %d", events, len(messages()))
		}
	}
	if n.Dropped() != 0 {
		t.Errorf("%d dropped", n.Dropped())
	}
	if err := n.Emit(t.Context(), story("op0", 1)); !errors.Is(err, problem.ShuttingDown) {
		t.Errorf("after the end: %v", err)
	}
}

// startBroker starts a NATS server that anybody may publish to, as Meshery's is.
func startBroker(t *testing.T, o server.Options) (s *server.Server, url string) {
	t.Helper()
	o.Host, o.Port, o.NoSigs, o.NoLog = "127.0.0.1", server.RANDOM_PORT, true, true
	s, err := server.NewServer(&o)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(10 * time.Second) {
		t.Fatal("the broker does not start")
	}
	return s, s.ClientURL()
}

// link is the network between the sink and the broker. It can be cut, and can hold everything back.
type link struct {
	t        *testing.T
	to       string
	address  string
	group    sync.WaitGroup
	mu       sync.Mutex
	listener net.Listener
	conns    []net.Conn
	held     chan struct{} // closed when bytes flow
}

func newLink(t *testing.T, url string) *link {
	l := &link{t: t, to: strings.TrimPrefix(url, "nats://"), address: "127.0.0.1:0", held: make(chan struct{})}
	close(l.held)
	l.mend()
	l.address = l.listener.Addr().String()
	t.Cleanup(func() { l.release(); l.cut(); l.group.Wait() })
	return l
}

func (l *link) mend() {
	l.t.Helper()
	listener, err := net.Listen("tcp", l.address)
	if err != nil {
		l.t.Fatal(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.listener = listener
	l.group.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", l.to)
			if err != nil {
				near.Close()
				continue
			}
			l.mu.Lock()
			l.conns = append(l.conns, near, far)
			if l.listener != listener { // cut meanwhile
				near.Close()
				far.Close()
			}
			l.mu.Unlock()
			l.group.Go(func() { l.copy(near, far) })
			l.group.Go(func() { l.copy(far, near) })
		}
	})
}

func (l *link) copy(from, to net.Conn) {
	defer from.Close()
	defer to.Close()
	buffer := make([]byte, 1024)
	for {
		n, err := from.Read(buffer)
		l.mu.Lock()
		held := l.held
		l.mu.Unlock()
		<-held
		if err != nil {
			return
		}
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.listener != nil {
		l.listener.Close()
		l.listener = nil
	}
	for _, c := range l.conns {
		c.Close()
	}
	l.conns = nil
}

func (l *link) hold() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held = make(chan struct{})
}

func (l *link) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.held:
	default:
		close(l.held)
	}
}

// log is what was logged, safe to read while it is written.
type log struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *log) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func TestEventsWaitForTheBrokerAndOutlastItsOutages(t *testing.T) {
	t.Parallel()
	_, url := startBroker(t, server.Options{})
	got := listen(t, url, Subject("op"))
	network := newLink(t, url)
	network.cut()

	var logged log
	n, stop := run(t, Options{URL: "nats://me:secret@" + network.address, Logger: logged.logger()})
	emitted := 0
	burst := func(count int) {
		t.Helper()
		began := time.Now()
		for range count {
			emitted++
			emit(t, n, story("op", emitted))
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("emitting waited %v for the network", took)
		}
	}
	burst(100)
	eventually(t, "the outage is logged", func() bool { return strings.Contains(logged.String(), "they wait") })
	if n.Connected() {
		t.Fatal("connected over a cut link")
	}
	for range 3 {
		network.mend()
		eventually(t, "it connects", n.Connected)
		burst(1000)
		network.cut() // in the middle of that
		burst(100)
	}
	network.mend()
	eventually(t, "everything is published", func() bool { return !n.waiting() })
	stop()
	eventually(t, "the last event arrives", func() bool {
		return len(got()) > 0 && decode(t, got()[len(got())-1]).Sequence == uint64(emitted)
	})
	inOrder(t, got(), 1, uint64(emitted))
	if n.Dropped() != 0 {
		t.Errorf("%d dropped", n.Dropped())
	}
	text := logged.String()
	if strings.Contains(text, "secret") {
		t.Errorf("the log shows the password: %s", text)
	}
	if times := strings.Count(text, "they wait"); times > 4 {
		t.Errorf("4 outages were logged %d times", times)
	}
}

func TestPastTheBoundTheOldestAreDroppedCountedAndLoggedOnce(t *testing.T) {
	t.Parallel()
	_, url := startBroker(t, server.Options{})
	got := listen(t, url, Subject("op"))
	network := newLink(t, url)
	network.cut()
	var logged log
	n, _ := run(t, Options{URL: "nats://" + network.address, MaxEvents: 50, Logger: logged.logger()})
	for i := range 200 {
		emit(t, n, story("op", i+1))
		if i == 0 {
			eventually(t, "the outage is logged", func() bool { return strings.Contains(logged.String(), "they wait") })
		}
	}
	if n.Dropped() != 150 {
		t.Errorf("%d dropped", n.Dropped())
	}
	network.mend()
	eventually(t, "the rest arrives", func() bool { return len(got()) >= 50 })
	inOrder(t, got(), 151, 200)
	eventually(t, "the end of the outage is logged", func() bool { return strings.Contains(logged.String(), "takes events again") })
	if times := strings.Count(logged.String(), "dropping the oldest"); times != 1 {
		t.Errorf("logged %d times: %s", times, logged.String())
	}
	if n.Dropped() != 150 {
		t.Errorf("%d dropped in the end", n.Dropped())
	}
}

func TestStoppingIsBoundedWhenTheBrokerHangs(t *testing.T) {
	_, url := startBroker(t, server.Options{})
	network := newLink(t, url)
	var logged log
	n, stop := run(t, Options{URL: "nats://" + network.address, DrainTimeout: 100 * time.Millisecond, Logger: logged.logger()})
	eventually(t, "it connects", n.Connected)
	network.hold()
	for i := range 2000 {
		emit(t, n, Event{Operation: "op", Sequence: uint64(i + 1), Details: strings.Repeat("d", 5000)})
	}
	began := time.Now()
	stop()
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("stopping took %v", took)
	}
	if n.Dropped() != 2000 || !strings.Contains(logged.String(), "lost=2000") {
		t.Errorf("%d dropped, log: %s", n.Dropped(), logged.String())
	}
}

func TestABrokerThatHungGetsEverythingWhenItGoesOn(t *testing.T) {
	t.Parallel()
	_, url := startBroker(t, server.Options{})
	got := listen(t, url, Subject("op"))
	network := newLink(t, url)
	var logged log
	n, _ := run(t, Options{URL: "nats://" + network.address, Logger: logged.logger()})
	eventually(t, "it connects", n.Connected)
	network.hold()
	for i := range 20 {
		emit(t, n, story("op", i+1))
	}
	eventually(t, "the outage is logged", func() bool { return strings.Contains(logged.String(), "they wait") })
	network.release()
	eventually(t, "everything is published", func() bool { return !n.waiting() })
	eventually(t, "everything arrives", func() bool { return len(got()) >= 20 })
	inOrder(t, got(), 1, 20)
}

func TestAnEventTooLargeForTheBrokerDoesNotHoldUpTheOthers(t *testing.T) {
	_, url := startBroker(t, server.Options{MaxPayload: 4096, MaxPending: 1 << 20})
	got := listen(t, url, Subject("op"))
	var logged log
	n, _ := run(t, Options{URL: url, Logger: logged.logger()})
	emit(t, n, story("op", 1))
	emit(t, n, Event{Operation: "op", Sequence: 2, Details: strings.Repeat("d", 5000)})
	emit(t, n, story("op", 3))
	eventually(t, "the third arrives", func() bool { return len(got()) == 2 })
	if e := decode(t, got()[1]); e.Sequence != 3 {
		t.Errorf("got %d", e.Sequence)
	}
	eventually(t, "the second is counted", func() bool { return n.Dropped() == 1 })
	if !strings.Contains(logged.String(), "sequence=2") {
		t.Errorf("log: %s", logged.String())
	}
}

func TestTheLargestEventFitsTheUsualBroker(t *testing.T) {
	_, url := startBroker(t, server.Options{})
	got := listen(t, url, Subject("op"))
	n, _ := run(t, Options{URL: url})
	worst := strings.Repeat("\x01", 1<<20)
	emit(t, n, Event{Operation: "op", Summary: worst, Details: worst, Cause: worst, Remedy: worst})
	eventually(t, "it arrives", func() bool { return len(got()) == 1 })
}

func TestTheSinkComesInWhenItsPasswordIsMendedAtTheBroker(t *testing.T) {
	t.Parallel()
	broker, url := startBroker(t, server.Options{Username: "me", Password: "other"})
	var logged log
	n, _ := run(t, Options{URL: strings.Replace(url, "//", "//me:secret@", 1), Logger: logged.logger()})
	emit(t, n, story("op", 1))
	// The client library gives up after the second refusal unless it is told not to.
	eventually(t, "it was refused several times", func() bool {
		v, err := broker.Varz(nil)
		return err == nil && v.TotalConnections > 3
	})
	mended := server.Options{Host: "127.0.0.1", Port: broker.Addr().(*net.TCPAddr).Port, NoSigs: true, NoLog: true,
		Username: "me", Password: "secret"}
	if err := broker.ReloadOptions(&mended); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the event is published", func() bool { return !n.waiting() })
	if text := logged.String(); n.Dropped() != 0 || strings.Contains(text, "secret") || strings.Count(text, "refused something") > 1 {
		t.Errorf("%d dropped, log: %s", n.Dropped(), text)
	}
}
