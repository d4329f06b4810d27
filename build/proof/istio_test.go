package proof

import (
	"crypto/rand"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// onIstio is an adapter beside a real API server and istiod, with two sidecars and a gateway.
type onIstio struct {
	*adapter
	mesh       *istiotest.Mesh
	proxies    []*istiotest.Proxy
	kubeconfig string
}

const meshUser = "proof"

func newOnIstio(t *testing.T) *onIstio {
	t.Helper()
	mesh, err := istiotest.Start(t.Context(), t.TempDir(), istiotest.Options{Users: []string{meshUser}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("istiod's log ends:\n%s", mesh.Log())
		}
		mesh.Stop()
	})
	for _, role := range []string{"base", "proof"} {
		if err := mesh.Grant(t.Context(), role, meshUser); err != nil {
			t.Fatal(err)
		}
	}
	o := &onIstio{adapter: newAdapter(t), mesh: mesh, kubeconfig: string(mesh.Kubeconfig(mesh.Token(meshUser)))}
	backend := upstream(t)
	for _, p := range []istiotest.ProxyOptions{
		{Pod: "api-1", Labels: map[string]string{"app": "api"}},
		{Pod: "api-2", Labels: map[string]string{"app": "api"}},
		{Pod: "edge-1", Labels: map[string]string{"app": "edge"}, Gateway: true},
	} {
		p.Namespace, p.Upstream = "shop", backend
		proxy, err := mesh.Proxy(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		o.proxies = append(o.proxies, proxy)
	}
	return o
}

// filter is a document of the probe, at the sidecars or the gateway.
func (o *onIstio) filter(name, app string, config map[string]any, more map[string]any) string {
	o.t.Helper()
	kind := "Workload"
	if app == "edge" {
		kind = "Gateway"
	}
	spec := map[string]any{"mesh": "istio", "target": map[string]any{"kind": kind, "labels": map[string]any{"app": app}}}
	maps.Copy(spec, more)
	return probe(o.t, name, "", config, spec)
}

// begin sends an operation with the kubeconfig.
func (o *onIstio) begin(key, body string) (id string) {
	o.t.Helper()
	id = rand.Text()
	if _, err := o.meshes.ApplyOperation(o.t.Context(), &meshes.ApplyRuleRequest{OpName: key, Username: "proof", Namespace: "shop",
		CustomBody: body, OperationId: id, KubeConfigs: []string{o.kubeconfig}}); err != nil {
		o.t.Fatalf("%s is refused: %v", key, err)
	}
	return id
}

// finish is the last event of an operation. Only one that is meant to fail may.
func (o *onIstio) finish(id string, fails bool) *filterspb.Event {
	o.t.Helper()
	events, err := o.story(id)
	if err != nil || len(events) == 0 || !events[len(events)-1].GetLast() {
		o.t.Fatalf("the story of %s: %v, %v", id, events, err)
	}
	last := events[len(events)-1]
	if (last.GetType() == filterspb.Event_ERROR) != fails {
		o.t.Fatalf("it ends with %s [%s]\n%s", last.GetSummary(), last.GetErrorCode(), last.GetDetails())
	}
	return last
}

// stamps are what a new connection's answer is marked with, by app.
type stamps map[string]string

// judge wants of an answer on a connection of its own a status of 200 and the mark that stood when it was asked for, or
// during the change that overtook it. A connection that is kept stays on the chain that it began with.
type stampJudge struct {
	apps map[string]string // by address
	states
}

func (s *stampJudge) allowed(from time.Time, all ...stamps) {
	var now []state
	for _, m := range all {
		for app, stamp := range m {
			now = append(now, state{name: app + " " + stamp, stamp: stamp, status: map[string]int{app: http.StatusOK}})
		}
	}
	s.allow(from, now...)
}

func (s *stampJudge) judge(a Answer) error {
	a.Request.Path, a.Request.Header = s.apps[a.Request.Addr], nil
	if !a.Request.Fresh {
		a.Sent = time.Time{}
	}
	return s.states.judge(a)
}

// TestNoRequestFailsWhileChainsOnIstioChangeUnderLoad also kills the adapter in the middle of its operations. It takes
// about 25 seconds.
func TestNoRequestFailsWhileChainsOnIstioChangeUnderLoad(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	const linger = 5 * time.Second // as with plain Envoys
	o := newOnIstio(t)
	s := &stampJudge{apps: map[string]string{}}
	var all []Request
	for _, p := range o.proxies {
		addr := strings.TrimPrefix(p.URL, "http://")
		s.apps[addr], _, _ = strings.Cut(p.Pod, "-")
		for _, fresh := range []bool{true, false} {
			all = append(all, Request{Addr: addr, Path: "/", Fresh: fresh})
		}
	}
	now := stamps{"api": "", "edge": ""}
	s.allowed(time.Time{}, now)
	load := Load{Rate: 1000, Judge: s.judge, Requests: all}.Start(t.Context())
	defer load.Stop()
	change := func(what, app, stamp string, do func()) {
		t.Helper()
		next := maps.Clone(now)
		next[app] = stamp
		s.allowed(time.Now(), now, next)
		from := load.Since()
		do()
		s.allowed(time.Now().Add(linger), next)
		t.Logf("%-40s took %s", what, (load.Since() - from).Round(time.Millisecond))
		now = next
		for _, p := range o.proxies {
			r, err := p.Get(t.Context(), "/")
			at, _, _ := strings.Cut(p.Pod, "-")
			if err != nil || r.Status != http.StatusOK || strings.Join(r.Header.Values("X-Stamp"), ",") != now[at] {
				t.Errorf("%s: %s answers %d with the stamps %q, %v", what, p.Pod, r.Status, r.Header.Values("X-Stamp"), err)
			}
		}
	}
	apply := func(app, name, value string, more map[string]any) func() {
		return func() { o.finish(o.begin("custom", o.filter(name, app, stamp(value), more)), false) }
	}
	refused := func(app, code string, config, more map[string]any) func() {
		return func() {
			t.Helper()
			if last := o.finish(o.begin("custom", o.filter("refused", app, config, more)), true); last.GetErrorCode() != code {
				t.Errorf("it ends with %s: %s", last.GetErrorCode(), last.GetSummary())
			}
		}
	}
	remove := func(name string) func() {
		return func() { o.finish(o.begin("remove_filter", document(name, nil)), false) }
	}
	missing := map[string]any{"delivery": map[string]any{"mode": "local", "localPath": "/there/is/no/such"}}

	for _, app := range []string{"api", "edge"} {
		x, y := "x-"+app, "y-"+app
		change("first load on "+app, app, "one", apply(app, x, "one", nil))
		change("reconfigure", app, "two", apply(app, x, "two", nil))
		change("second filter", app, "y,two", apply(app, y, "y", nil))
		change("the other order", app, "two,y", apply(app, y, "y", map[string]any{"priority": 5}))
		change("a refused configuration", app, "two,y", refused(app, "meshery-filters-1014", map[string]any{"refuse": "no"}, nil))
		change("a missing module", app, "two,y", refused(app, "meshery-filters-1016", stamp("none"), missing))
		change("one less", app, "y", remove(x))
	}
	// However far an operation has come when its adapter is killed, the next one ends it.
	for i, after := range []time.Duration{0, 50 * time.Millisecond, 150 * time.Millisecond, 300 * time.Millisecond, 600 * time.Millisecond} {
		app, value := []string{"api", "edge"}[i%2], fmt.Sprintf("killed-%d", i)
		change("killed after "+after.String(), app, value, func() {
			id := o.begin("custom", o.filter("y-"+app, app, stamp(value), map[string]any{"failurePolicy": "reload"}))
			select {
			case <-time.After(after): // the moment is what this is about
			case <-t.Context().Done():
			}
			o.stopWith(syscall.SIGKILL)
			o.start()
			o.finish(id, false)
		})
	}
	change("none on api", "api", "", remove("y-api"))
	change("none on edge", "edge", "", remove("y-edge"))
	r := load.Stop()
	t.Logf("%s", r)
	if r.Failed > 0 {
		t.Errorf("%d of %d requests failed:\n%s", r.Failed, r.Sent, strings.Join(r.Failures, "\n"))
	}
	var left struct{ Items []map[string]any }
	for _, kind := range []string{"networking.istio.io/v1alpha3/namespaces/shop/envoyfilters", "extensions.istio.io/v1alpha1/namespaces/shop/trafficextensions"} {
		if err := o.mesh.Get(t.Context(), "/apis/"+kind, &left); err != nil || len(left.Items) > 0 {
			t.Errorf("it left %v, %v", left.Items, err)
		}
	}
}
