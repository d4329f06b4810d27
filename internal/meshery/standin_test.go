package meshery

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// standIn plays the REST side of Meshery Server.
type standIn struct {
	t          *testing.T
	generation string // newest, v0.6-v0.8, v0.5 or 2021
	server     *httptest.Server
	addr       string

	mu       sync.Mutex
	token    string // that requests have to bring; anybody may ask when it is empty
	fail     func(w http.ResponseWriter, r *http.Request) bool
	requests []string          // METHOD path
	bodies   map[string][]byte // the newest, by path
	models   map[string]string // where those of a version are, host and port
	ids      map[string]string // of the newest, which take a model of one registrant from one address
	loads    []map[string]any  // workloads
	traits   []map[string]any
	events   []map[string]any
}

func newStandIn(t *testing.T, generation string) *standIn {
	s := &standIn{t: t, generation: generation, addr: "127.0.0.1:0", bodies: map[string][]byte{}}
	s.forget()
	s.start()
	t.Cleanup(s.stop)
	return s
}

func (s *standIn) url() string { return "http://" + s.addr }

// start listens at the address of before.
func (s *standIn) start() {
	s.t.Helper()
	l, err := net.Listen("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.addr = l.Addr().String()
	s.server = &httptest.Server{Listener: l, Config: &http.Server{Handler: s}}
	s.server.Start()
}

func (s *standIn) stop() { s.server.CloseClientConnections(); s.server.Close() }

// forget has the registry be that of a server that has just started.
func (s *standIn) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.models, s.ids, s.loads, s.traits = map[string]string{}, map[string]string{}, nil, nil
}

// refuse has requests answered by f, as long as it says so.
func (s *standIn) refuse(f func(w http.ResponseWriter, r *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = f
}

// count tells how often something was asked for.
func (s *standIn) count(request string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.requests {
		if r == request {
			n++
		}
	}
	return n
}

func (s *standIn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, r.Method+" "+r.URL.Path)
	if r.Method == http.MethodPost {
		s.bodies[r.URL.Path] = body
	}
	if s.fail != nil {
		fail := s.fail
		s.mu.Unlock()
		done := fail(w, r)
		s.mu.Lock()
		if done {
			return
		}
	}
	if r.Method+r.URL.Path == http.MethodGet+versionPath { // which anybody may ask
		io.WriteString(w, `{"build":"v0.8.0","commitsha":"0123456","release_channel":"stable"}`)
		return
	}
	if c, err := r.Cookie(tokenCookie); s.token != "" && (err != nil || c.Value != s.token) {
		http.Redirect(w, r, "/provider", http.StatusFound)
		return
	}
	oamPath := map[string]string{"v0.5": "/api/oam/", "2021": "/api/experimental/oam/"}[s.generation]
	meshmodels := s.generation == "newest" && r.URL.Path == "/api/meshmodels/components" ||
		oamPath == "" && r.URL.Path == "/api/meshmodel/components/register"
	switch {
	case meshmodels && r.Method == http.MethodPost:
		var b struct {
			Connection struct{ Metadata map[string]any }
			Host       struct {
				Hostname string
				Port     int
			}
			EntityType string
			Entity     []byte
		}
		var e struct {
			Kind      string
			Component struct{ Kind, Schema string }
			Model     struct {
				Name, Version string
				Registrant    json.RawMessage
			}
		}
		if json.Unmarshal(body, &b) != nil || json.Unmarshal(b.Entity, &e) != nil || b.EntityType != "component" {
			http.Error(w, "this is no component", http.StatusBadRequest)
			return
		}
		kind, host, port := e.Component.Kind, b.Connection.Metadata["host_name"], b.Connection.Metadata["port"]
		if s.generation != "newest" {
			kind, host, port = e.Kind, b.Host.Hostname, b.Host.Port
		}
		at := fmt.Sprint(host, " ", port)
		if id := string(e.Model.Registrant) + e.Model.Version; s.generation == "newest" && s.ids[id] != "" && s.ids[id] != at {
			return // it answers with success, and has logged that its database does not take it
		} else {
			s.ids[id] = at
		}
		if kind != "" && host == "adapter.test" && e.Model.Name == "meshery-filters" {
			s.models[e.Model.Version] = at
		}
	case oamPath == "" && r.Method == http.MethodGet && r.URL.Path == "/api/meshmodels/models/meshery-filters":
		list := []map[string]any{}
		for v := range s.models {
			list = append(list, map[string]any{"name": "meshery-filters", "version": v})
		}
		json.NewEncoder(w).Encode(map[string]any{"page": 1, "total_count": len(list), "models": list})
	case oamPath != "" && r.Method == http.MethodPost && (r.URL.Path == oamPath+"workload" || r.URL.Path == oamPath+"trait"):
		var load map[string]any
		if json.Unmarshal(body, &load) != nil || load["oam_definition"] == nil {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		if r.URL.Path == oamPath+"trait" {
			s.traits = append(s.traits, load)
			return
		}
		s.loads = append(s.loads, load)
	case oamPath != "" && r.URL.Path == oamPath+"workload":
		json.NewEncoder(w).Encode(s.loads)
	case s.generation == "newest" && r.URL.Path == eventsPath && r.Method == http.MethodPost:
		var e map[string]any
		if json.Unmarshal(body, &e) != nil || e["actedUpon"] == "" || e["action"] == "" || e["category"] == "" || e["severity"] == "" {
			http.Error(w, "invalid event data", http.StatusBadRequest)
			return
		}
		s.events = append(s.events, e)
		w.WriteHeader(http.StatusCreated)
		w.Write(body)
	default:
		http.Error(w, "405 method not allowed", http.StatusMethodNotAllowed)
	}
}

// golden compares JSON with a file.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	var b bytes.Buffer
	if err := json.Indent(&b, got, "", "  "); err != nil {
		t.Fatalf("%s: %v", got, err)
	}
	b.WriteByte('\n')
	path := filepath.Join("testdata", name+".json")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(b.Bytes(), want) {
		t.Errorf("%s differs (%v); if that is meant: go test ./internal/meshery -update\n%s", path, err, b.String())
	}
}

// journal is a log that many write and tests read.
type journal struct {
	mu sync.Mutex
	b  strings.Builder
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.String()
}

func (s *standIn) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Sprint(s.requests)
}
