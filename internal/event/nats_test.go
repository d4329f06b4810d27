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
	"github.com/nats-io/nats.go/jetstream"

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

// publisher is a NATS with the log that it publishes.
type publisher struct {
	*NATS
	log *Log

	mu   sync.Mutex
	last map[string]uint64
}

// take appends the event to its operation's story.
func (p *publisher) take(t *testing.T, e Event) {
	t.Helper()
	p.mu.Lock()
	last := p.last[e.Operation]
	p.mu.Unlock()
	position, err := p.log.Append(context.Background(), e, last)
	if err != nil {
		t.Error(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last[e.Operation] = position
}

func (p *publisher) waiting() bool {
	_, next, err := p.log.store.Bounds(context.Background())
	return err != nil || p.delivered.Load() < next
}

func openStore(t *testing.T, path string) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), store.Options{StateDir: path, SyncInterval: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// run starts publishing from a log that is new, unless the options name one. stop ends it and waits.
func run(t *testing.T, o Options) (p *publisher, stop func()) {
	t.Helper()
	if o.Log == nil {
		s := openStore(t, t.TempDir())
		o.Log, o.Cursor = s.Log(), s.Cursor("test")
	}
	l, err := NewLog(t.Context(), o.Log, NewHub(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	n, err := NewNATS(t.Context(), o)
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
	return &publisher{NATS: n, log: l, last: map[string]uint64{}}, stop
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
	n, _ := run(t, Options{URL: "nats://127.0.0.1:1"})
	for _, id := range []string{"", "a.b", "*", ">", "a b", "a\nb", "ü", strings.Repeat("a", 129)} {
		if _, err := n.log.Append(t.Context(), story(id, 1), 0); !errors.Is(err, problem.InvalidRequest) {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, id := range []string{"a", "A-Z_09", strings.Repeat("a", 128)} {
		emit(t, n, story(id, 1))
	}
}

func TestAnAddressThatCannotBeOneIsRefusedWithoutShowingIt(t *testing.T) {
	for _, address := range []string{"nats://me:secret@", "nats://me:sec\x00ret@host", "nats://me:secret@host:port", "nats://host:4222,"} {
		if _, err := NewNATS(t.Context(), Options{URL: address}); !errors.Is(err, problem.InvalidConfiguration) || strings.Contains(err.Error(), "sec") {
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
	n, stop := run(t, Options{Connect: s.Connect(), DrainTimeout: 20 * time.Second})
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
		for range count {
			emitted++
			emit(t, n, story("op", emitted))
		}
	}
	burst(100) // it must not wait for the network, which comes only later
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
	text := logged.String()
	if strings.Contains(text, "secret") {
		t.Errorf("the log shows the password: %s", text)
	}
	if times := strings.Count(text, "they wait"); times > 4 {
		t.Errorf("4 outages were logged %d times", times)
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
	if !n.waiting() {
		t.Error("what the broker did not take does not wait any more")
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
	if !strings.Contains(logged.String(), "position=2") {
		t.Errorf("log: %s", logged.String())
	}
}

func TestAnEventTooLargeForTheStreamDoesNotHoldUpTheOthers(t *testing.T) {
	_, url := startBroker(t, server.Options{JetStream: true, StoreDir: t.TempDir()})
	nc, err := nats.Connect(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "events", Subjects: []string{Subject("*")}, MaxMsgSize: 4096}); err != nil {
		t.Fatal(err)
	}
	got := listen(t, url, Subject("op"))
	var logged log
	n, _ := run(t, Options{URL: url, Logger: logged.logger()})
	emit(t, n, story("op", 1))
	emit(t, n, Event{Operation: "op", Sequence: 2, Details: strings.Repeat("d", 5000)})
	emit(t, n, story("op", 3))
	eventually(t, "the third arrives", func() bool { return len(got()) > 0 && decode(t, got()[len(got())-1]).Sequence == 3 })
	if !strings.Contains(logged.String(), "position=2") {
		t.Errorf("log: %s", logged.String())
	}
}

func TestEventsThatMayNotBePublishedWaitUntilTheyMay(t *testing.T) {
	t.Parallel()
	options := func(deny ...string) server.Options {
		return server.Options{NoAuthUser: "anybody", Users: []*server.User{
			{Username: "anybody", Password: "x", Permissions: &server.Permissions{Publish: &server.SubjectPermission{Deny: deny}}},
			{Username: "reader", Password: "secret"}}}
	}
	broker, url := startBroker(t, options("meshery.>"))
	got := listen(t, strings.Replace(url, "//", "//reader:secret@", 1), Subject("*"))
	var logged log
	n, _ := run(t, Options{URL: url, Logger: logged.logger()})
	for i := range 300 {
		emit(t, n, Event{Operation: fmt.Sprint("op-", i), Sequence: 1, Summary: "a step"})
	}
	eventually(t, "that is logged", func() bool {
		return strings.Contains(logged.String(), "they wait") && strings.Contains(logged.String(), "ermissions Violation for Publish")
	})
	if n.Published() != 0 || !n.waiting() {
		t.Errorf("%d events count as published", n.Published())
	}
	if lines := strings.Count(logged.String(), "\n"); lines > 10 {
		t.Errorf("%d lines in the log", lines)
	}
	mended := options()
	mended.Host, mended.Port, mended.NoSigs, mended.NoLog = "127.0.0.1", broker.Addr().(*net.TCPAddr).Port, true, true
	if err := broker.ReloadOptions(&mended); err != nil {
		t.Fatal(err)
	}
	eventually(t, "everything is published", func() bool { return !n.waiting() })
	seen := map[string]bool{}
	eventually(t, "everything arrives", func() bool {
		for _, m := range got() {
			seen[m.Subject] = true
		}
		return len(seen) == 300
	})
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
	if text := logged.String(); strings.Contains(text, "secret") || strings.Count(text, "refused something") > 1 {
		t.Errorf("log: %s", text)
	}
}

func TestWhatWasNotTakenIsPublishedAfterARestartAndNothingElseTwice(t *testing.T) {
	t.Parallel()
	_, url := startBroker(t, server.Options{})
	got := listen(t, url, Subject("op"))
	network := newLink(t, url)
	state := t.TempDir()
	emitted := 0
	for round := range 4 {
		s := openStore(t, state)
		n, stop := run(t, Options{URL: "nats://" + network.address, Log: s.Log(), Cursor: s.Cursor("test"), DrainTimeout: 10 * time.Millisecond})
		if _, last, err := n.log.Of(t.Context(), "op"); err != nil {
			t.Fatal(err)
		} else {
			n.last["op"] = last
		}
		if round == 0 {
			eventually(t, "the first event arrives", func() bool { emitted++; emit(t, n, story("op", emitted)); return len(got()) > 0 })
			// What is on its way when the process ends comes again.
			eventually(t, "it is known to have arrived", func() bool { return !n.waiting() })
		}
		if round == 3 {
			network.mend()
			eventually(t, "everything is published", func() bool { return !n.waiting() })
		} else if round > 0 {
			network.cut()
			for range 50 {
				emitted++
				emit(t, n, story("op", emitted))
			}
		}
		stop()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "everything arrives", func() bool { return len(got()) >= emitted })
	inOrder(t, got(), 1, uint64(emitted))
	if len(got()) != emitted {
		t.Errorf("%d events came as %d", emitted, len(got()))
	}
}

func TestAJetStreamThatKeepsTheSubjectAcknowledgesEachEvent(t *testing.T) {
	t.Parallel()
	_, url := startBroker(t, server.Options{JetStream: true, StoreDir: t.TempDir()})
	nc, err := nats.Connect(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "meshery", Subjects: []string{"meshery.>"}})
	if err != nil {
		t.Fatal(err)
	}
	network := newLink(t, url)
	n, _ := run(t, Options{URL: "nats://" + network.address})
	for i := range 300 {
		emit(t, n, story("op", i+1))
		if i%100 == 50 {
			network.cut()
			network.mend()
		}
	}
	eventually(t, "everything is published", func() bool { return !n.waiting() })
	info, err := stream.Info(t.Context())
	if err != nil || info.State.Msgs != 300 {
		t.Fatalf("the stream keeps %d, %v", info.State.Msgs, err)
	}
	for i := range uint64(300) {
		m, err := stream.GetMsg(t.Context(), i+1)
		if err != nil {
			t.Fatal(err)
		}
		if e := decode(t, &nats.Msg{Data: m.Data}); e.Sequence != i+1 {
			t.Fatalf("event %d is kept at %d", e.Sequence, i+1)
		}
	}
}
