package meshery

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/store"
)

const anOperation = "d4c1862f-2f49-4ae2-854e-8d410b319c05"

// story appends events from..to of an operation.
func story(t *testing.T, l *event.Log, operation string, from, to uint64) {
	t.Helper()
	_, last, err := l.Of(t.Context(), operation)
	if err != nil {
		t.Fatal(err)
	}
	for i := from; i <= to; i++ {
		if last, err = l.Append(t.Context(), event.Event{Operation: operation, Sequence: i, Time: time.Unix(int64(i), 0).UTC(),
			Summary: fmt.Sprint("step ", i), Component: component, Name: "meshery-filters"}, last); err != nil {
			t.Fatal(err)
		}
	}
}

func newLog(t *testing.T, s *store.Store) *event.Log {
	t.Helper()
	l, err := event.NewLog(t.Context(), s.Log(), event.NewHub(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

type sending struct {
	*Sink
	log  *journal
	stop func()
}

func send(t *testing.T, server string, s *store.Store, cursor store.Cursor) sending {
	t.Helper()
	return sendWith(t, server, s, cursor, 0)
}

func sendWith(t *testing.T, server string, s *store.Store, cursor store.Cursor, faulty time.Duration) sending {
	t.Helper()
	j := &journal{}
	sink, err := NewSink(t.Context(), SinkOptions{Client: client(t, Options{Server: server, TokenFile: writeFile(t, "the-token"), Timeout: 2 * time.Second}),
		Events: s.Log(), Cursor: cursor, MinRetry: 5 * time.Millisecond, MaxRetry: 20 * time.Millisecond, Faulty: faulty, Log: slog.New(slog.NewTextHandler(j, nil))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); sink.Run(ctx) }()
	stop := func() {
		cancel()
		<-ended
		if strings.Contains(j.String(), "the-token") {
			t.Errorf("the token is in the log: %s", j)
		}
	}
	t.Cleanup(stop)
	eventually(t, "it knows where it is", func() bool { return sink.Position() > 0 })
	return sending{sink, j, stop}
}

// arrived are the sequences of an operation's events that the server has taken, in their order.
func (s *standIn) arrived(operation string) (sequences []uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.events {
		m := e["metadata"].(map[string]any)
		if m["operation"] == operation {
			sequences = append(sequences, uint64(m["sequence"].(float64)))
		}
		if e["id"] != m["id"] || e["id"] != EventID(m["operation"].(string), uint64(m["sequence"].(float64))) {
			s.t.Errorf("event %v has the id %v", m, e["id"])
		}
	}
	return sequences
}

func upTo(n uint64) string {
	var all []uint64
	for i := uint64(1); i <= n; i++ {
		all = append(all, i)
	}
	return fmt.Sprint(all)
}

func TestAnEventIsSentAsMesheryTakesIt(t *testing.T) {
	for name, e := range map[string]event.Event{
		"event-progress": {Operation: anOperation, Sequence: 2, Time: time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC), Summary: "Module of shop/limit accepted its configuration in a dry run",
			Details: "sha256 3f2a", Component: component, Name: "meshery-filters"},
		"event-removed": {Operation: "by-hand_1", Sequence: 3, Time: time.Unix(1, 0).UTC(), Summary: "shop/limit removed from ProxyGroup edge", Component: component,
			Name: "meshery-filters", Last: true},
		"event-failure": {Operation: anOperation, Sequence: 4, Time: time.Unix(2, 0).UTC(), Type: event.Error, Summary: "failed <here>", Details: "d", Code: "meshery-filters-1016",
			Cause: "c", Remedy: "r", Component: component, Name: "meshery-filters", Last: true},
		"event-warning": {Operation: anOperation, Sequence: 1, Time: time.Unix(3, 0).UTC(), Type: event.Warn, Summary: "no proxy is connected", Component: component, Name: "meshery-filters"},
	} {
		data, err := json.Marshal(posted(e))
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name, data)
	}
}

func TestEveryEventArrivesOnceAndInOrderWhateverTheServerDoes(t *testing.T) {
	s := openStore(t, t.TempDir())
	l := newLog(t, s)
	story(t, l, "before", 1, 3) // nobody was there to send these
	server := newStandIn(t, "newest")
	k := send(t, server.url(), s, s.Cursor("meshery"))
	story(t, l, anOperation, 1, 5)
	eventually(t, "the first are answered", func() bool { return k.Published() == 5 })

	server.stop() // for the whole of another operation
	story(t, l, "away", 1, 20)
	eventually(t, "the outage is noticed", func() bool { return !k.Connected() })
	server.start()
	eventually(t, "all that waited arrive", func() bool { return len(server.arrived("away")) == 20 })

	var n atomic.Int32
	server.refuse(func(w http.ResponseWriter, _ *http.Request) bool { // 500, 401, the sign-in page, another server's 404, and busy
		codes := []int{500, 401, 302, 404, 503, 429, 400}
		i := int(n.Add(1)) - 1
		if i%2 == 0 && i/2 < len(codes) {
			w.WriteHeader(codes[i/2])
			return true
		}
		return false
	})
	story(t, l, anOperation, 6, 20)
	eventually(t, "the rest arrive", func() bool { return len(server.arrived(anOperation)) == 20 })
	for operation, want := range map[string]string{anOperation: upTo(20), "away": upTo(20), "before": "[]"} {
		if got := fmt.Sprint(server.arrived(operation)); got != want {
			t.Errorf("of %s arrived %s", operation, got)
		}
	}
	eventually(t, "all are counted", func() bool { return k.Published() == 40 })
	if text := k.log.String(); strings.Count(text, "takes events again") < 2 {
		t.Errorf("the log says %s", text)
	}
}

func TestAnAdapterThatComesBackGoesOnWhereItWas(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	server := newStandIn(t, "newest")
	k := send(t, server.url(), s, s.Cursor("meshery"))
	story(t, newLog(t, s), anOperation, 1, 10)
	eventually(t, "some arrive", func() bool { return len(server.arrived(anOperation)) >= 3 })
	k.stop()
	story(t, newLog(t, s), anOperation, 11, 15)
	s.Close()
	s = openStore(t, path)
	send(t, server.url(), s, s.Cursor("meshery"))
	eventually(t, "the rest arrive", func() bool { return len(server.arrived(anOperation)) >= 15 })
	if got := fmt.Sprint(server.arrived(anOperation)); got != upTo(15) {
		t.Errorf("there arrived %s", got)
	}
}

// forgetful loses what it is told, as if the adapter had been killed before it was written.
type forgetful struct {
	store.Cursor
	after uint64
}

func (f *forgetful) Save(ctx context.Context, position uint64) error {
	if f.after > 0 && position >= f.after {
		return context.DeadlineExceeded
	}
	return f.Cursor.Save(ctx, position)
}

func TestWhatWasAnsweredIsNotSentAgainWhenItCouldNotBeNoted(t *testing.T) {
	s := openStore(t, t.TempDir())
	server := newStandIn(t, "newest")
	f := &forgetful{Cursor: s.Cursor("meshery")}
	k := send(t, server.url(), s, f)
	k.stop()
	f.after = k.Position() + 1 // it can be claimed, and not be moved
	k = send(t, server.url(), s, f)
	story(t, newLog(t, s), anOperation, 1, 1)
	eventually(t, "it arrives", func() bool { return len(server.arrived(anOperation)) == 1 })
	eventually(t, "the failure is told", func() bool { return strings.Contains(k.log.String(), "deadline") })
	eventually(t, "it goes on behind it", func() bool { return k.Position() == f.after })
	k.stop() // the note is lost with it
	f.after = 0
	send(t, server.url(), s, s.Cursor("meshery"))
	story(t, newLog(t, s), anOperation, 2, 3)
	eventually(t, "the rest arrive", func() bool { return len(server.arrived(anOperation)) >= 4 })
	if got := fmt.Sprint(server.arrived(anOperation)); got != "[1 1 2 3]" {
		t.Errorf("there arrived %s: after a crash the one that was not noted comes once more", got)
	}
}

func TestAnEventThatIsTooLargeDoesNotHoldTheOthersUp(t *testing.T) {
	s := openStore(t, t.TempDir())
	server := newStandIn(t, "newest")
	server.refuse(func(w http.ResponseWriter, _ *http.Request) bool {
		if strings.Contains(string(server.bodies[eventsPath]), `"description":"step 2"`) {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return true
		}
		return false
	})
	k := send(t, server.url(), s, s.Cursor("meshery"))
	story(t, newLog(t, s), anOperation, 1, 3)
	eventually(t, "the others arrive", func() bool { return len(server.arrived(anOperation)) == 2 })
	eventually(t, "it is told", func() bool { return strings.Contains(k.log.String(), "of this size") && k.Refused() == 1 })
}

func TestTheLongestEventIsSentOnce(t *testing.T) {
	s := openStore(t, t.TempDir())
	server := newStandIn(t, "newest")
	k := send(t, server.url(), s, s.Cursor("meshery"))
	if _, err := newLog(t, s).Append(t.Context(), event.Event{Operation: anOperation, Sequence: 1, Type: event.Error, Summary: "s", Details: strings.Repeat("<", 1<<20),
		Cause: strings.Repeat("<", 1<<20), Remedy: strings.Repeat("<", 1<<20), Code: "c", Component: component, Name: "meshery-filters"}, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is taken", func() bool { return k.Published() == 1 })
	if got := fmt.Sprint(server.arrived(anOperation)); got != "[1]" {
		t.Errorf("there arrived %s", got)
	}
}

func TestAnEventThatIsRefusedForWhatItSaysDoesNotHoldTheOthersUp(t *testing.T) {
	s := openStore(t, t.TempDir())
	server := newStandIn(t, "newest")
	var broken atomic.Bool
	tries := map[string]int{}
	refuse := func(steps ...string) {
		server.refuse(func(w http.ResponseWriter, _ *http.Request) bool {
			server.mu.Lock()
			defer server.mu.Unlock()
			var e struct{ Description string }
			if err := json.Unmarshal(server.bodies[eventsPath], &e); err != nil {
				t.Error(err)
			}
			tries[e.Description]++
			if broken.Load() || slices.Contains(steps, e.Description) {
				w.WriteHeader(http.StatusBadRequest)
				return true
			}
			return false
		})
	}
	refuse("step 2", "step 3", "step 6")
	k := send(t, server.url(), s, s.Cursor("meshery"))
	l := newLog(t, s)
	story(t, l, anOperation, 1, 6)
	eventually(t, "the others arrive", func() bool { return len(server.arrived(anOperation)) == 3 })
	eventually(t, "that is told", func() bool { return strings.Count(k.log.String(), "not sent again") == 2 })
	if text := k.log.String(); !strings.Contains(text, "event 2 of operation "+anOperation) || k.Refused() != 2 {
		t.Errorf("%d are counted, and the log says %s", k.Refused(), text)
	}
	server.mu.Lock()
	if tries["step 2"] < maxRefusals || tries["step 4"] != 1 {
		t.Errorf("they were tried %v", tries)
	}
	server.mu.Unlock()

	// The last waits for one behind it, and is tried again before that.
	eventually(t, "the last is tried often", func() bool { server.mu.Lock(); defer server.mu.Unlock(); return tries["step 6"] > maxRefusals })
	refuse()
	story(t, l, anOperation, 7, 7)
	eventually(t, "both arrive", func() bool { return len(server.arrived(anOperation)) == 5 })

	// What takes no event at all, such as another server at that address, loses none.
	broken.Store(true)
	story(t, l, anOperation, 8, 40)
	eventually(t, "all are tried that are tried at a time", func() bool {
		server.mu.Lock()
		defer server.mu.Unlock()
		return tries[fmt.Sprint("step ", 8+maxAside-1)] > 2
	})
	if n := tries[fmt.Sprint("step ", 8+maxAside)]; n != 0 {
		t.Errorf("one more was tried %d times", n)
	}
	broken.Store(false)
	eventually(t, "all arrive", func() bool { return len(server.arrived(anOperation)) >= 38 })
	got := server.arrived(anOperation)
	slices.Sort(got) // one that is refused just before the server gets well comes late
	if want := "[1 4 5 6 " + strings.TrimPrefix(upTo(40), "[1 2 3 4 5 6 "); fmt.Sprint(got) != want {
		t.Errorf("there arrived %v, want %s", got, want)
	}
}

func TestAnEventThatTheServerFailsWithAloneDoesNotHoldTheOthersUp(t *testing.T) {
	s := openStore(t, t.TempDir())
	server := newStandIn(t, "newest")
	var mu sync.Mutex
	tries := map[string]int{}
	down, broken, poison := true, false, "step 2" // broken: whatever comes
	server.refuse(func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		if r.URL.Path == versionPath {
			if down {
				w.WriteHeader(http.StatusInternalServerError)
			}
			tries[versionPath]++
			return down
		}
		server.mu.Lock()
		defer server.mu.Unlock()
		var e struct{ Description string }
		if err := json.Unmarshal(server.bodies[eventsPath], &e); err != nil {
			t.Error(err)
		}
		tries[e.Description]++
		if broken || e.Description == poison {
			http.Error(w, "database: constraint failed", http.StatusInternalServerError)
			return true
		}
		return false
	})
	set := func(change func()) { mu.Lock(); defer mu.Unlock(); change() }
	tried := func(what string) int { mu.Lock(); defer mu.Unlock(); return tries[what] }
	const faulty = 100 * time.Millisecond
	k := sendWith(t, server.url(), s, s.Cursor("meshery"), faulty)
	l := newLog(t, s)
	story(t, l, anOperation, 1, 4)
	// A server that is not well otherwise has an outage: what comes behind is not tried, however long that takes.
	eventually(t, "its version is asked for again and again", func() bool { return tried(versionPath) >= 3 })
	if got := fmt.Sprint(server.arrived(anOperation)); got != "[1]" || tried("step 3") > 0 {
		t.Errorf("of an outage there arrived %s, and what is behind was tried %d times", got, tried("step 3"))
	}
	set(func() { down = false })
	eventually(t, "those behind it arrive", func() bool { return len(server.arrived(anOperation)) == 3 })
	eventually(t, "it is told and counted", func() bool { return strings.Contains(k.log.String(), "not sent again") && k.Refused() == 1 })
	if text := k.log.String(); !strings.Contains(text, "event 2 of operation "+anOperation) || !strings.Contains(text, "constraint failed") {
		t.Errorf("the log says %s", text)
	}
	if got := fmt.Sprint(server.arrived(anOperation)); got != "[1 3 4]" {
		t.Errorf("there arrived %s", got)
	}

	// One that fails with every event loses none, even if it is well otherwise.
	set(func() { broken, poison = true, "" })
	story(t, l, anOperation, 5, 40)
	eventually(t, "some behind it are tried", func() bool { return tried(fmt.Sprint("step ", 5+maxAside-1)) > 0 })
	if n := tried(fmt.Sprint("step ", 5+maxAside)); n != 0 {
		t.Errorf("one more was tried %d times", n)
	}
	set(func() { broken = false })
	eventually(t, "all arrive", func() bool { return len(server.arrived(anOperation)) >= 39 })
	got := server.arrived(anOperation)
	slices.Sort(got) // one that fails just before the server gets well comes late
	if want := "[1 3 " + strings.TrimPrefix(upTo(40), "[1 2 3 "); fmt.Sprint(got) != want || k.Refused() != 1 {
		t.Errorf("%d are counted as refused, and there arrived %v, want %s", k.Refused(), got, want)
	}
}

func TestAnOutageThatIsAnsweredWith500KeepsTheOrder(t *testing.T) {
	s := openStore(t, t.TempDir())
	server := newStandIn(t, "newest")
	var n atomic.Int32
	server.refuse(func(w http.ResponseWriter, r *http.Request) bool { // whatever it is asked
		n.Add(1)
		w.WriteHeader(http.StatusInternalServerError)
		return true
	})
	k := sendWith(t, server.url(), s, s.Cursor("meshery"), time.Millisecond)
	story(t, newLog(t, s), anOperation, 1, 20)
	eventually(t, "it is tried often", func() bool { return n.Load() > 20 })
	server.refuse(nil)
	eventually(t, "all arrive", func() bool { return len(server.arrived(anOperation)) >= 20 })
	if got := fmt.Sprint(server.arrived(anOperation)); got != upTo(20) || k.Refused() != 0 {
		t.Errorf("%d are counted as refused, and there arrived %s", k.Refused(), got)
	}
}

func TestOfAdaptersThatShareAStoreOneSends(t *testing.T) {
	keeper, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true, JetStream: true, StoreDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	keeper.Start()
	t.Cleanup(func() { keeper.Shutdown(); keeper.WaitForShutdown() })
	if !keeper.ReadyForConnections(patience) {
		t.Fatal("NATS does not start")
	}
	const lease = 1500 * time.Millisecond
	open := func() *store.Store {
		s, err := store.Open(t.Context(), store.Options{StateDir: t.TempDir(), URL: keeper.ClientURL(), Lease: lease})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	rest := newStandIn(t, "newest")
	one, other := open(), open()
	first := send(t, rest.url(), one, one.Cursor("meshery"))
	l := newLog(t, one)
	story(t, l, anOperation, 1, 2)
	eventually(t, "the first sends", func() bool { return first.Published() == 2 })
	second := send(t, rest.url(), other, other.Cursor("meshery")) // once the first has been idle for the lease
	story(t, l, anOperation, 3, 30)
	eventually(t, "one of them sends the rest", func() bool { return first.Published()+second.Published() == 30 })
	if second.Published() == 0 {
		t.Error("the other has not taken over, so that this test shows nothing")
	}
	second.stop()
	story(t, l, anOperation, 31, 40)
	eventually(t, "the first takes over again", func() bool { return first.Published()+second.Published() == 40 })
	if got := fmt.Sprint(rest.arrived(anOperation)); got != upTo(40) {
		t.Errorf("there arrived %s", got)
	}
}
