package meshery

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

const component = "0b0f2c4e-6d8a-4c1e-9f3b-5a7d9e1c3b5f"

// someDefinitions are small ones of two kinds in two versions, and a trait.
func someDefinitions(addr string) []Definition {
	var all []Definition
	for _, version := range []string{"1.40.0", "1.39.3"} {
		for _, kind := range []string{"WASMFilter", "ImageHub"} {
			d := Definition{Kind: kind, Version: version, Entity: json.RawMessage(fmt.Sprintf(
				`{"kind":%q,"component":{"kind":%[1]q,"schema":"{}"},"model":{"name":"meshery-filters","version":%q,"registrant":{"name":%q}}}`, kind, version, addr))}
			if version == "1.40.0" {
				d.Workload = json.RawMessage(fmt.Sprintf(`{"kind":"WorkloadDefinition","metadata":{"name":%q}}`, kind))
				d.Schema = `{"type":"object"}`
			}
			all = append(all, d)
		}
	}
	return append(all, Definition{Kind: "WASMFilterPlacement", Trait: json.RawMessage(`{"kind":"TraitDefinition","metadata":{"name":"WASMFilterPlacement"}}`), Schema: `{"type":"object"}`})
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

type registering struct {
	*Registrar
	log  *journal
	stop func()
}

// register runs a Registrar that is in a hurry.
func register(t *testing.T, server string, records store.Records, change ...func(*RegistrarOptions)) registering {
	t.Helper()
	j := &journal{}
	o := RegistrarOptions{Client: client(t, Options{Server: server, TokenFile: writeFile(t, "the-token"), Timeout: time.Second}),
		Name: "meshery-filters", Component: component, Addr: "adapter.test:10014", Records: records, Check: 20 * time.Millisecond,
		MinRetry: 5 * time.Millisecond, MaxRetry: 20 * time.Millisecond, Log: slog.New(slog.NewTextHandler(j, nil))}
	for _, c := range change {
		c(&o)
	}
	o.Definitions = someDefinitions(o.Addr)
	r, err := NewRegistrar(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); r.Run(ctx) }()
	stop := func() {
		cancel()
		<-ended
		if strings.Contains(j.String(), "the-token") {
			t.Errorf("the token is in the log: %s", j)
		}
	}
	t.Cleanup(stop)
	return registering{r, j, stop}
}

func TestEveryGenerationIsRegisteredAsItTakesIt(t *testing.T) {
	for generation, c := range map[string]struct {
		path   string
		each   int // requests
		traits string
	}{
		"newest":    {"/api/meshmodels/components", 4, ""},
		"v0.6-v0.8": {"/api/meshmodel/components/register", 4, ""},
		"v0.5":      {"/api/oam/workload", 2, "/api/oam/trait"},
		"2021":      {"/api/experimental/oam/workload", 2, "/api/experimental/oam/trait"},
	} {
		s := newStandIn(t, generation)
		r := register(t, s.url(), openStore(t, t.TempDir()).Records())
		eventually(t, generation+" knows the adapter", r.Registered)
		eventually(t, generation+" is asked whether it still does", func() bool {
			return s.count("GET /api/meshmodels/models/meshery-filters")+s.count("GET "+c.path) > 3
		})
		r.stop()
		if n := s.count("POST " + c.path); n != c.each {
			t.Errorf("%s was registered %d times, not %d: %v", generation, n, c.each, s)
		}
		if done, failed := r.Registrations(); done != 1 || failed != 0 {
			t.Errorf("%s: registered %d times, failed %d times", generation, done, failed)
		}
		for _, r := range s.requests { // nothing is taken back at the end
			if !strings.HasPrefix(r, "POST ") && !strings.HasPrefix(r, "GET ") {
				t.Errorf("%s was asked for %s", generation, r)
			}
		}
		golden(t, "register-"+generation, s.bodies[c.path])
		if n := s.count("POST " + c.traits); c.traits != "" && n != 1 {
			t.Errorf("%s was told of the trait %d times: %v", generation, n, s)
		}
		if c.traits != "" {
			golden(t, "trait-"+generation, s.bodies[c.traits])
		} else if len(s.traits) > 0 {
			t.Errorf("%s was told of traits: %v", generation, s)
		}
	}
}

func TestAServerThatForgotTheAdapterIsToldAgainAndOneThatKnowsItIsNot(t *testing.T) {
	for _, generation := range []string{"newest", "v0.6-v0.8", "v0.5", "2021"} {
		records := openStore(t, t.TempDir())
		s := newStandIn(t, generation)
		r := register(t, s.url(), records.Records())
		eventually(t, "it is registered", r.Registered)
		s.stop()
		s.forget()
		eventually(t, "the outage is noticed", func() bool { return !r.Registered() })
		s.start()
		eventually(t, "it is registered again", func() bool { n, _ := r.Registrations(); return n == 2 })
		r.stop()

		again := register(t, s.url(), records.Records())
		eventually(t, "a restarted adapter is known", again.Registered)
		again.stop()
		if n, _ := again.Registrations(); n != 0 {
			t.Errorf("%s: a restart of the adapter has registered it %d times", generation, n)
		}
		moved := register(t, s.url(), records.Records(), func(o *RegistrarOptions) { o.Addr = "adapter.test:20014" })
		eventually(t, "an adapter that has moved is registered", moved.Registered)
		if n, _ := moved.Registrations(); n != 1 {
			t.Errorf("%s: an adapter that has moved was registered %d times", generation, n)
		}
		for version, at := range s.models {
			if at != "adapter.test 20014" {
				t.Errorf("%s: the server has %s of an adapter that has moved at %s", generation, version, at)
			}
		}
		moved.stop()
	}
}

func TestARegistrationGoesOnWhereItWasBrokenOff(t *testing.T) {
	records := openStore(t, t.TempDir())
	s := newStandIn(t, "newest")
	var posts atomic.Int32
	s.refuse(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPost {
			return false
		}
		switch posts.Add(1) {
		case 1, 2: // down for a while, and overloaded
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		case 3: // slower than we wait
			<-r.Context().Done()
			return true
		case 5:
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		}
		return false
	})
	r := register(t, s.url(), records.Records())
	eventually(t, "it is registered", r.Registered)
	r.stop()
	if n := posts.Load(); n != 8 { // four that failed, and each definition once
		t.Errorf("%d requests: %v", n, s)
	}
	if n := s.count("POST /api/meshmodel/components/register"); n != 0 {
		t.Errorf("a failing server was taken for an older one: %v", s)
	}
}

func TestWhoHasToSignInIsToldSoOnce(t *testing.T) {
	records := openStore(t, t.TempDir())
	s := newStandIn(t, "newest")
	s.token = "another-token"
	r := register(t, s.url(), records.Records())
	eventually(t, "it is tried again and again", func() bool { _, failed := r.Registrations(); return failed > 5 })
	if text := r.log.String(); r.Registered() || strings.Count(text, problem.MesheryUnauthorized.Summary) != 1 {
		t.Errorf("the log says %s", text)
	}
	s.mu.Lock()
	s.token = "the-token"
	s.mu.Unlock()
	eventually(t, "it is registered", r.Registered)
}

func TestWhatNoGenerationTakesIsRefused(t *testing.T) {
	records := openStore(t, t.TempDir())
	s := newStandIn(t, "newest")
	s.refuse(func(w http.ResponseWriter, r *http.Request) bool {
		http.Error(w, "the body is of another version", http.StatusBadRequest)
		return true
	})
	r := register(t, s.url(), records.Records())
	eventually(t, "it is tried again", func() bool { return s.count("POST /api/experimental/oam/workload") > 1 })
	eventually(t, "the server's words are logged", func() bool { return strings.Contains(r.log.String(), "the body is of another version") })
	// The newest refuses the body, and the generation before takes it.
	s.mu.Lock()
	s.generation = "v0.6-v0.8"
	s.fail = func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/api/meshmodels/components" {
			http.Error(w, "the body is of another version", http.StatusBadRequest)
		}
		return r.URL.Path == "/api/meshmodels/components"
	}
	s.mu.Unlock()
	eventually(t, "it is registered", r.Registered)
}

func TestAServerThatListsNothingIsNotToldEverythingForEver(t *testing.T) {
	records := openStore(t, t.TempDir())
	s := newStandIn(t, "newest")
	s.refuse(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet {
			fmt.Fprint(w, `{"models":[]}`)
		}
		return r.Method == http.MethodGet
	})
	r := register(t, s.url(), records.Records())
	eventually(t, "it counts as registered", r.Registered)
	asked := s.count("GET /api/meshmodels/models/meshery-filters")
	eventually(t, "it is asked now and then", func() bool { return s.count("GET /api/meshmodels/models/meshery-filters") > asked+3 })
	if n, _ := r.Registrations(); n != 1 || !strings.Contains(r.log.String(), "does not list") {
		t.Errorf("registered %d times; %s", n, r.log)
	}
}

func TestAnAddressThatNoServerCanReachIsRefused(t *testing.T) {
	for _, addr := range []string{"", "host", ":10014", "host:port"} {
		_, err := NewRegistrar(RegistrarOptions{Client: client(t, Options{Server: "http://127.0.0.1:1"}), Addr: addr})
		if !errors.Is(err, problem.InvalidConfiguration) {
			t.Errorf("%q: %v", addr, err)
		}
	}
}
