package proof

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/meshery/meshery-filters/internal/meshery"
)

// mesheryREST plays what of Meshery Server's REST API the adapter uses, as the newest servers have it.
type mesheryREST struct {
	t      *testing.T
	addr   string
	server *http.Server
	ended  chan struct{}

	mu         sync.Mutex
	components map[string]int // kind and version
	hosts      map[string]bool
	events     []postedEvent
	// answered hears of each event once its answer is on its way.
	answered func(number int)
}

type postedEvent struct {
	ID, Description, Severity, ActedUpon string
	Metadata                             struct {
		Operation string
		Sequence  uint64
	}
}

func (e postedEvent) String() string {
	return fmt.Sprintf("%s %d", e.Metadata.Operation, e.Metadata.Sequence)
}

func newMesheryREST(t *testing.T) *mesheryREST {
	return &mesheryREST{t: t, addr: fixedAddr(t), components: map[string]int{}, hosts: map[string]bool{}}
}

// token is a file with a token, as mesheryctl writes it.
func (m *mesheryREST) token() string {
	file := filepath.Join(m.t.TempDir(), "auth.json")
	if err := os.WriteFile(file, []byte(`{"meshery-provider":"Meshery","token":"token-of-the-proof"}`), 0o600); err != nil {
		m.t.Fatal(err)
	}
	return file
}

func (m *mesheryREST) start() {
	m.t.Helper()
	l, err := net.Listen("tcp", m.addr)
	if err != nil {
		m.t.Fatal(err)
	}
	m.server, m.ended = &http.Server{Handler: m}, make(chan struct{})
	go func() {
		defer close(m.ended)
		m.server.Serve(l)
	}()
	m.t.Cleanup(func() { m.server.Close(); <-m.ended })
}

func (m *mesheryREST) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	token, err := r.Cookie("token")
	provider, err2 := r.Cookie("meshery-provider")
	if err != nil || err2 != nil || token.Value != "token-of-the-proof" || provider.Value != "Meshery" {
		http.Redirect(w, r, "/provider", http.StatusFound)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch r.Method + " " + r.URL.Path {
	case "POST /api/meshmodels/components":
		var b struct {
			Connection struct {
				Metadata struct {
					HostName string `json:"host_name"`
					Port     int
				}
			}
			Entity []byte
		}
		var e struct {
			Component struct{ Kind, Schema string }
			Model     struct{ Name, Version string }
		}
		if err = json.Unmarshal(body, &b); err == nil {
			err = json.Unmarshal(b.Entity, &e)
		}
		if err != nil || !json.Valid([]byte(e.Component.Schema)) {
			http.Error(w, fmt.Sprint(err), http.StatusBadRequest)
			return
		}
		m.components[e.Model.Name+" "+e.Model.Version+" "+e.Component.Kind]++
		m.hosts[fmt.Sprint(b.Connection.Metadata)] = true
	case "GET /api/meshmodels/models/meshery-filters":
		models := []map[string]string{}
		for c := range m.components {
			name, rest, _ := strings.Cut(c, " ")
			version, _, _ := strings.Cut(rest, " ")
			models = append(models, map[string]string{"name": name, "version": version})
		}
		json.NewEncoder(w).Encode(map[string]any{"models": models})
	case "POST /api/system/events":
		var e postedEvent
		if err := json.Unmarshal(body, &e); err != nil || e.ActedUpon == "" || e.Severity == "" {
			http.Error(w, fmt.Sprint(err), http.StatusBadRequest)
			return
		}
		m.events = append(m.events, e)
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		w.WriteHeader(http.StatusCreated)
		w.Write(body)
		http.NewResponseController(w).Flush()
		if m.answered != nil {
			m.answered(len(m.events))
		}
	default:
		http.NotFound(w, r)
	}
}

func (m *mesheryREST) posted() []postedEvent {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]postedEvent{}, m.events...)
}

// expected are the events of operations, one after the other, as the adapter tells them.
func (a *adapter) expected(operations []string) (all []string) {
	a.t.Helper()
	for _, id := range operations {
		events, err := a.story(id)
		if err != nil {
			a.t.Fatal(err)
		}
		for _, e := range events {
			all = append(all, fmt.Sprintf("%s %d", id, e.GetSequence()))
		}
	}
	return all
}

// installs has the adapter run and stop Image Hub, and returns the operations in their order.
func (a *adapter) installs(times int) (operations []string) {
	a.t.Helper()
	for i := range times {
		id, err := a.submit("imagehub", "", i%2 == 1)
		if err != nil {
			a.t.Fatal(err)
		}
		if _, err := a.story(id); err != nil {
			a.t.Fatal(err)
		}
		operations = append(operations, id)
	}
	return operations
}

func TestMesheryIsAwayForWholeOperationsAndMissesNothing(t *testing.T) {
	onRealParts(t)
	m := newMesheryREST(t)
	a := newAdapter(t, "--meshery-server", "http://"+m.addr, "--meshery-events", "--meshery-token-file", m.token(), "--meshery-adapter-addr", "adapter.example:10014")
	operations := a.installs(2)
	m.start()
	want := a.expected(operations)
	eventually(t, "every event arrives", func() error {
		if got := m.posted(); len(got) < len(want) {
			return fmt.Errorf("%d of %d", len(got), len(want))
		}
		return nil
	})
	operations = append(operations, a.installs(1)...)
	want = a.expected(operations)
	eventually(t, "the adapter is registered, and all events are there", func() error {
		_, text := a.scrape()
		for _, line := range []string{"meshery_filters_meshery_registered 1", "meshery_filters_meshery_connected 1",
			fmt.Sprintf(`meshery_filters_events_delivered_total{broker="meshery"} %d`, len(want)), `meshery_filters_events_backlog{broker="meshery"} 0`} {
			if !strings.Contains(text, line+"\n") {
				return fmt.Errorf("the metrics lack %s", line)
			}
		}
		return nil
	})
	if got := fmt.Sprint(m.posted()); got != fmt.Sprint(want) {
		t.Errorf("there arrived\n%s, and it told\n%s", got, want)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.components) != 6 || m.components["meshery-filters 1.40.0 WASMFilter"] != 1 || m.components["meshery-filters 1.39.0 ImageHub"] != 1 {
		t.Errorf("registered are %v", m.components)
	}
	if len(m.hosts) != 1 || !m.hosts["{adapter.example 10014}"] {
		t.Errorf("it is to be reached at %v", m.hosts)
	}
	if strings.Contains(a.log.String(), "token-of-the-proof") {
		t.Error("the token is in the log")
	}
}

func TestAnAdapterKilledBetweenMesherysAnswerAndItsNoteRepeatsAtMostThatOne(t *testing.T) {
	onRealParts(t)
	m := newMesheryREST(t)
	a := newAdapter(t, append(fixedPorts(t), "--meshery-server", "http://"+m.addr, "--meshery-events", "--meshery-token-file", m.token())...)
	operations := a.installs(4)
	want := a.expected(operations)
	const kills = 3
	killed := make(chan postedEvent, kills)
	at, left := 2, kills
	m.answered = func(number int) { // m.mu is held
		if left == 0 || number < at {
			return
		}
		killed <- m.events[len(m.events)-1]
		at, left = number+1, left-1
		_ = a.cmd.Process.Signal(syscall.SIGKILL)
	}
	m.start()
	var endedAt []postedEvent
	for range kills {
		endedAt = append(endedAt, <-killed)
		a.wait(t, patience)
		a.disconnect()
		m.mu.Lock() // the handler reads which process it is
		a.start()
		m.mu.Unlock()
	}
	eventually(t, "the last event arrives", func() error {
		got := m.posted()
		if last := got[len(got)-1].String(); last != want[len(want)-1] {
			return fmt.Errorf("the last is %s", last)
		}
		return nil
	})
	var once []string
	repeated := map[string]int{}
	for _, e := range m.posted() {
		if e.ID != meshery.EventID(e.Metadata.Operation, e.Metadata.Sequence) {
			t.Errorf("%s has the id %s", e, e.ID)
		}
		if len(once) > 0 && once[len(once)-1] == e.String() {
			repeated[e.String()]++
			continue
		}
		once = append(once, e.String())
	}
	if fmt.Sprint(once) != fmt.Sprint(want) {
		t.Errorf("there arrived\n%s, and it told\n%s", once, want)
	}
	for _, e := range endedAt {
		repeated[e.String()]--
	}
	for e, n := range repeated {
		if n > 0 {
			t.Errorf("%s was repeated, and no kill came after it", e)
		}
	}
	t.Logf("%d events, %d requests", len(want), len(m.posted()))
}
