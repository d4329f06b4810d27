package proof

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/meshery/meshery-filters/internal/meshery"
	"github.com/meshery/meshery-filters/oam"
)

// generationREST plays the registry of one generation's server. It reads of a body what that generation reads, and knows of
// the adapter no more than that.
type generationREST struct {
	t    *testing.T
	name string
	url  string

	mu       sync.Mutex
	requests []string // as a transcript has them
	bodies   [][]byte // of those that were taken
	models   []string // versions of the model
	kinds    []string
	loads    []json.RawMessage
	addr     string // where the adapter is
	listed   bool   // after all that
}

func newGenerationREST(t *testing.T, name string) *generationREST {
	g := &generationREST{t: t, name: name}
	s := httptest.NewServer(g)
	t.Cleanup(s.Close)
	g.url = s.URL
	return g
}

var (
	entityForm = regexp.MustCompile(`"entity":"[^"]*"`)
	schemaForm = regexp.MustCompile(`"oam_ref_schema":"(\\.|[^"\\])*"`)
	portForm   = regexp.MustCompile(`"([pP])ort":\d+`)
	uuidField  = regexp.MustCompile(`"(id|Metadata)":"[0-9a-f-]{36}"`)
)

func (g *generationREST) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	said := r.Method + " " + r.URL.RequestURI()
	if r.Method == http.MethodGet {
		g.listed = true
		switch {
		case g.name != "2021" && r.URL.Path == "/api/meshmodels/models/meshery-filters":
			models := []map[string]string{}
			for _, v := range g.models {
				models = append(models, map[string]string{"name": "meshery-filters", "version": v})
			}
			json.NewEncoder(w).Encode(map[string]any{"models": models})
		case g.name == "2021" && r.URL.Path == "/api/experimental/oam/workload":
			json.NewEncoder(w).Encode(g.loads)
		default:
			g.t.Errorf("%s is asked for", said)
			http.NotFound(w, r)
		}
		g.requests = append(g.requests, said)
		return
	}
	read := map[string]func([]byte) (string, error){
		"newest /api/meshmodels/components":            g.connection,
		"v0.6-v0.8 /api/meshmodel/components/register": g.host,
		"2021 /api/experimental/oam/workload":          g.workload,
		"2021 /api/experimental/oam/trait":             g.trait,
	}[g.name+" "+r.URL.Path]
	if read == nil {
		http.Error(w, "405 method not allowed", http.StatusMethodNotAllowed)
		g.requests = append(g.requests, said+" is not known")
		return
	}
	what, err := read(body)
	if err != nil {
		g.t.Errorf("%s: %v: %.500s", said, err, body)
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	g.bodies, g.listed = append(g.bodies, body), false
	text := entityForm.ReplaceAllString(string(body), `"entity":"(`+what+`)"`)
	text = schemaForm.ReplaceAllString(text, `"oam_ref_schema":"(its form)"`)
	text = portForm.ReplaceAllString(uuidField.ReplaceAllString(text, `"$1":"COMPONENT"`), `"${1}ort":PORT`)
	g.requests = append(g.requests, said, text)
}

// at notes where a part of the adapter is, which has to be the same for all.
func (g *generationREST) at(host string, port any) error {
	addr := fmt.Sprintf("%s:%v", host, port)
	if g.addr != "" && g.addr != addr {
		return fmt.Errorf("the adapter is at %s and at %s", g.addr, addr)
	}
	g.addr = addr
	return nil
}

// component notes one of the model's.
func (g *generationREST) component(kind, schema, model, version string) (string, error) {
	if kind == "" || model != "meshery-filters" || version == "" || !json.Valid([]byte(schema)) {
		return "", fmt.Errorf("%q of %q in version %q has the form %.100q", kind, model, version, schema)
	}
	if !slices.Contains(g.models, version) {
		g.models = append(g.models, version)
	}
	if !slices.Contains(g.kinds, kind) {
		g.kinds = append(g.kinds, kind)
	}
	return kind + " " + version, nil
}

func (g *generationREST) connection(body []byte) (string, error) {
	var b struct {
		Connection struct {
			Kind, Status string
			Metadata     struct {
				HostName string `json:"host_name"`
				Port     int
			}
		}
		EntityType string
		Entity     []byte
	}
	var e struct {
		DisplayName string
		Component   struct{ Kind, Schema string }
		Model       struct{ Name, Version string }
	}
	if err := errors.Join(json.Unmarshal(body, &b), json.Unmarshal(b.Entity, &e)); err != nil {
		return "", err
	}
	if b.EntityType != "component" || e.DisplayName == "" || b.Connection.Kind == "" || b.Connection.Status != "registered" {
		return "", errors.New("it is no component of a connection")
	}
	what, err := g.component(e.Component.Kind, e.Component.Schema, e.Model.Name, e.Model.Version)
	return what, errors.Join(err, g.at(b.Connection.Metadata.HostName, b.Connection.Metadata.Port))
}

func (g *generationREST) host(body []byte) (string, error) {
	var b struct {
		Host struct {
			Hostname string
			Port     int
		}
		EntityType string
		Entity     []byte
	}
	var e struct {
		Kind, APIVersion, Schema string
		Model                    struct{ Name, Version string }
	}
	if err := errors.Join(json.Unmarshal(body, &b), json.Unmarshal(b.Entity, &e)); err != nil {
		return "", err
	}
	if b.EntityType != "component" || e.APIVersion == "" {
		return "", errors.New("it is no component")
	}
	what, err := g.component(e.Kind, e.Schema, e.Model.Name, e.Model.Version)
	return what, errors.Join(err, g.at(b.Host.Hostname, b.Host.Port))
}

func (g *generationREST) workload(body []byte) (string, error) {
	name, err := g.definition(body, "WorkloadDefinition")
	if err != nil {
		return "", err
	}
	g.loads, g.kinds = append(g.loads, body), append(g.kinds, name)
	return name, nil
}

func (g *generationREST) trait(body []byte) (string, error) {
	return g.definition(body, "TraitDefinition")
}

func (g *generationREST) definition(body []byte, kind string) (string, error) {
	var b struct {
		Host       string
		Schema     string `json:"oam_ref_schema"`
		Definition struct {
			Kind, APIVersion string
			Metadata         struct{ Name string }
		} `json:"oam_definition"`
	}
	if err := json.Unmarshal(body, &b); err != nil {
		return "", err
	}
	if b.Definition.Kind != kind || b.Definition.APIVersion != "core.oam.dev/v1alpha1" || b.Definition.Metadata.Name == "" || !json.Valid([]byte(b.Schema)) {
		return "", fmt.Errorf("it is no %s", kind)
	}
	host, port, _ := strings.Cut(b.Host, ":")
	return b.Definition.Metadata.Name, g.at(host, port)
}

// registered waits until the adapter has registered everything and seen that, and gives what it has sent.
func (g *generationREST) registered() []string {
	g.t.Helper()
	eventually(g.t, "the adapter is registered", func() error {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.addr == "" || !g.listed {
			return fmt.Errorf("so far it has sent %d requests", len(g.requests))
		}
		return nil
	})
	g.mu.Lock()
	defer g.mu.Unlock()
	g.exact()
	return slices.Clone(g.requests)
}

// exact compares what a transcript has in short with what is to be registered.
func (g *generationREST) exact() {
	versions := g.models
	if len(versions) == 0 {
		versions = []string{"1.40.0"} // of which OAM has one
	}
	all, err := oam.Definitions(versions, g.addr)
	if err != nil {
		g.t.Fatal(err)
	}
	all = slices.DeleteFunc(all, func(d meshery.Definition) bool {
		if g.name == "2021" {
			return d.Workload == nil && d.Trait == nil
		}
		return d.Entity == nil
	})
	if len(all) != len(g.bodies) {
		g.t.Fatalf("%d definitions are registered, and there are %d", len(g.bodies), len(all))
	}
	for i, d := range all {
		var b struct {
			Entity []byte
			Schema string `json:"oam_ref_schema"`
		}
		if err := json.Unmarshal(g.bodies[i], &b); err != nil {
			g.t.Fatal(err)
		}
		if g.name == "2021" && b.Schema != d.Schema || g.name != "2021" && string(b.Entity) != string(d.Entity) {
			g.t.Errorf("%s %s is registered as\n%.2000s", d.Kind, d.Version, g.bodies[i])
		}
	}
}

// sends fails where a server of the generation would not send a call: its page lets nobody submit an operation without a
// version of the model, and designs go where their components were registered from.
func (g *generationREST) sends(t *testing.T, method string) {
	t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	switch method {
	case "ApplyOperation":
		if g.name != "2021" && len(g.models) == 0 {
			t.Fatal("the page has no version to choose, and submits no operation")
		}
	case "ProcessOAM", "Provision":
		if !slices.Contains(g.kinds, "WASMFilter") || !slices.Contains(g.kinds, "ImageHub") {
			t.Fatalf("the server has %v and deploys no design with more", g.kinds)
		}
	}
}
