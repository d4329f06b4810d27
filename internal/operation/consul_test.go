package operation_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/consultest"
	"github.com/meshery/meshery-filters/internal/consul"
	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
)

// sidecars are what the tests of Consul share: a server, and the service web that calls api, started by the first of them.
type sidecars struct {
	*consultest.Consul
	dir      string
	web, api *consultest.Service
}

var sharedSidecars *sidecars

var startSidecars = sync.OnceValues(func() (*sidecars, error) {
	dir, err := os.MkdirTemp("", "operation")
	if err != nil {
		return nil, err
	}
	ctx := context.Background()
	s := &sidecars{dir: dir}
	if s.Consul, err = consultest.Start(ctx, filepath.Join(dir, "consul"), consultest.Options{ACL: true}); err != nil {
		return nil, err
	}
	sharedSidecars = s
	for _, e := range []map[string]any{
		{"Kind": "proxy-defaults", "Name": "global", "Config": map[string]any{"protocol": "http"}},
		{"Kind": "service-intentions", "Name": "*", "Sources": []any{map[string]any{"Name": "*", "Action": "allow"}}},
	} {
		if err := s.Write(ctx, e); err != nil {
			return nil, err
		}
	}
	if s.api, err = s.Service(ctx, consultest.ServiceOptions{Name: "api"}); err != nil {
		return nil, err
	}
	if s.web, err = s.Service(ctx, consultest.ServiceOptions{Name: "web", Upstreams: []string{"api"}}); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		r, err := s.web.Get(ctx, "api", "/")
		if err == nil && r.Status == http.StatusOK {
			return s, nil
		}
		if time.Now().After(deadline) {
			return nil, err
		}
	}
})

func stopSidecars() {
	if sharedSidecars != nil {
		sharedSidecars.Stop()
		os.RemoveAll(sharedSidecars.dir)
	}
}

// consulCluster is the client as the command line hands it to operations.
type consulCluster struct{ *consul.Client }

func (c consulCluster) Secret(context.Context, string, string, string) (string, error) {
	return hubKey, nil
}

func (c consulCluster) Target(ctx context.Context, mesh string, t filter.Target) (operation.ClusterTarget, error) {
	return c.Client.Target(ctx, mesh, t)
}

func (c consulCluster) Targets(ctx context.Context) (operation.ClusterTargets, error) {
	t, err := c.Client.Targets(ctx)
	return consulTargets{t}, err
}

type consulTargets struct{ *consul.Targets }

func (t consulTargets) Target(mesh string, of filter.Target) operation.ClusterTarget {
	return t.Targets.Target(mesh, of)
}

// consulRig is a Runner with the tests' Consul for its own.
type consulRig struct {
	*rig
	*sidecars
	folder string
}

func newConsulRig(t *testing.T, change ...func(*consul.Options)) *consulRig {
	t.Helper()
	if testing.Short() {
		t.Skip("starts Consul and Envoys")
	}
	s, err := startSidecars()
	if err != nil {
		t.Fatal(err)
	}
	o := consul.Options{Addr: s.Addr, Token: func() (string, error) { return consultest.Management, nil }, Folder: t.TempDir(), Log: slog.New(slog.DiscardHandler),
		Admin: []string{s.api.Envoy.AdminAddr(), s.web.Envoy.AdminAddr()}}
	if err := os.Chmod(o.Folder, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range change {
		c(&o)
	}
	client, err := consul.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	r := newRig(t, func(o *operation.Options) { o.Consul = consulCluster{client} })
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("Consul's log ends:\n%s", s.Log())
		}
	})
	return &consulRig{r, s, o.Folder}
}

// onAPI is a document for the service api.
func onAPI(name string, spec ...string) string {
	return doc(name, append([]string{"mesh: consul", "target: {kind: Service, name: api}"}, spec...)...)
}

// header is what api answers with, called through the two sidecars.
func (r *consulRig) header(name string) string {
	r.t.Helper()
	got, err := r.web.Get(r.t.Context(), "api", "/")
	if err != nil || got.Status != http.StatusOK {
		r.t.Fatalf("%+v %v", got, err)
	}
	return strings.Join(got.Header.Values(name), ",")
}

// entry is what Consul keeps of a kind and name, in a form that can be compared.
func (r *consulRig) entry(kind, name string) string {
	r.t.Helper()
	e, err := r.Entry(r.t.Context(), kind, name)
	if err != nil {
		r.t.Fatal(err)
	}
	if e == nil {
		return ""
	}
	data, err := json.Marshal(e)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(data)
}

// user writes an entry of the user's, and takes it away when the test ends.
func (r *consulRig) user(e map[string]any) {
	r.t.Helper()
	if err := r.Write(r.t.Context(), e); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := r.Delete(context.Background(), e["Kind"].(string), e["Name"].(string)); err != nil {
			r.t.Error(err)
		}
	})
}

// calm does something under load, in which no request may fail.
func (r *consulRig) calm(do func()) {
	r.t.Helper()
	load := r.web.Load(r.t.Context(), "api")
	do()
	if n, failed := load.End(); n == 0 || len(failed) > 0 {
		r.t.Errorf("%d of %d requests failed: %v", len(failed), n, failed)
	}
}

// warned says whether a story has a warning of that kind.
func warned(events []event.Event, kind *problem.Kind) bool {
	return slices.ContainsFunc(events, func(e event.Event) bool { return e.Code == kind.Code })
}

func TestConsulsSidecarsRunAFilterWhileTheyServe(t *testing.T) {
	r := newConsulRig(t)
	r.calm(func() {
		events := r.ok(apply(onAPI("hello")))
		if last := events[len(events)-1]; !strings.Contains(last.Summary, "1 of 1 proxy") || !strings.Contains(last.Summary, "in Consul 127.0.0.1:") ||
			!strings.Contains(last.Details, "seen in each proxy itself") || warned(events, problem.NotVerified) {
			t.Errorf("%v", texts(events))
		}
		if h := r.header("x-hello"); h != "there" {
			t.Errorf("the header is %q", h)
		}
		r.ok(apply(onAPI("hello", "config: {response: {x-hello: again}}")))
		if h := r.header("x-hello"); h != "again" {
			t.Errorf("the header is %q", h)
		}
		if events := r.ok(apply(onAPI("hello", "config: {response: {x-hello: again}}"))); !strings.Contains(texts(events)[len(events)-1], "is unchanged") {
			t.Errorf("%v", texts(events))
		}
		// Each filter adds to the header, so that its value tells the order: responses meet the last filter first.
		r.ok(apply(onAPI("second", "config: {response: {x-hello: second}}", "priority: 7")))
		r.ok(apply(onAPI("second", "config: {response: {x-second: there}}", "priority: -7")))
		if h := r.header("x-hello") + r.header("x-second"); h != "againthere" {
			t.Errorf("the headers are %q", h)
		}
		r.ok(remove(doc("hello", "mesh: consul")))
		if h := r.header("x-hello") + r.header("x-second"); h != "there" {
			t.Errorf("the headers are %q", h)
		}
		r.ok(remove(doc("second"))) // wherever it is
		if h := r.header("x-second"); h != "" {
			t.Errorf("the header is %q", h)
		}
	})
	if e := r.entry("service-defaults", "api"); e != "" {
		t.Errorf("an entry that was not there is left: %s", e)
	}
	var keys []string
	if err := r.Send(t.Context(), http.MethodGet, "/v1/kv/meshery-filters/?keys=true", nil, &keys); err == nil {
		t.Errorf("inventories are left: %v", keys)
	}
}
