package cli

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
)

// istioMesh is a real API server, istiod and sidecars of the Pods api-1 and api-2 in the namespace shop.
type istioMesh struct {
	*istiotest.Mesh
	proxies []*istiotest.Proxy
}

// Users of the mesh's cluster, with the rights of templates/rbac: all roles, and those without which nothing is proved.
const (
	wholeUser = "whole"
	baseUser  = "base"
)

func newIstioMesh(t *testing.T, change ...func(*istiotest.ProxyOptions)) istioMesh {
	t.Helper()
	m := startIstio(t)
	for _, pod := range []string{"api-1", "api-2"} {
		o := istiotest.ProxyOptions{Namespace: "shop", Pod: pod, Labels: map[string]string{"app": "api"}}
		for _, c := range change {
			c(&o)
		}
		m.add(t, o)
	}
	return *m
}

// add starts a proxy.
func (m *istioMesh) add(t *testing.T, o istiotest.ProxyOptions) *istiotest.Proxy {
	t.Helper()
	p, err := m.Proxy(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	m.proxies = append(m.proxies, p)
	return p
}

// shared is the mesh of this package's tests, which the first of them starts. It has the Gateway API, too.
var shared struct {
	dir  string
	mesh *istiotest.Mesh
}

var startShared = sync.OnceValues(func() (_ *istiotest.Mesh, err error) {
	if shared.dir, err = os.MkdirTemp("", "cli"); err != nil {
		return nil, err
	}
	shared.mesh, err = istiotest.Start(context.Background(), shared.dir, istiotest.Options{Users: []string{wholeUser, baseUser}, GatewayAPI: true})
	return shared.mesh, err
})

func stopShared() {
	if shared.mesh != nil {
		shared.mesh.Stop()
	}
	if shared.dir != "" {
		os.RemoveAll(shared.dir)
	}
}

// startIstio is the shared mesh, which is empty before a test and after it, or one of the test's own that is without some
// kinds.
func startIstio(t *testing.T, without ...string) *istioMesh {
	t.Helper()
	if testing.Short() {
		t.Skip("starts a Kubernetes API server, istiod and Envoys")
	}
	var m *istiotest.Mesh
	var err error
	if len(without) > 0 {
		m, err = istiotest.Start(t.Context(), t.TempDir(), istiotest.Options{Users: []string{wholeUser, baseUser}, Without: without})
	} else {
		m, err = startShared()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("istiod's log ends:\n%s", m.Log())
		}
		if len(without) > 0 {
			m.Stop()
		} else if err := m.Clear(context.WithoutCancel(t.Context()), "shop", "meshery-filters", istiotest.Namespace); err != nil {
			t.Error(err)
		}
	})
	grant(t, m.Server)
	return &istioMesh{Mesh: m}
}

// grant gives wholeUser and baseUser their rights in a cluster.
func grant(t *testing.T, s *k8stest.Server) {
	t.Helper()
	for role, users := range map[string][]string{"base": {wholeUser, baseUser}, "proof": {wholeUser}, "imagehub": {wholeUser}} {
		if err := s.Grant(t.Context(), role, users...); err != nil {
			t.Fatal(err)
		}
	}
}

// as writes the kubeconfig of a user.
func (m istioMesh) as(t *testing.T, user string) (file string) {
	t.Helper()
	return put(t, t.TempDir(), "config", string(m.Kubeconfig(m.Token(user))))
}

// answer checks what every proxy answers with in the header x-there, over connections of its own.
func (m istioMesh) answer(t *testing.T, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, p := range m.proxies {
		r, err := p.Get(ctx, "/")
		if err != nil || r.Status != http.StatusOK || r.Header.Get("X-There") != want {
			t.Errorf("%s answers %d with %q, %v, and should with %q", p.Pod, r.Status, r.Header.Get("X-There"), err, want)
		}
	}
}

// load asks every proxy again and again, over a connection of its own each time, until stop says how many requests there
// were and how the ones went that were not answered with 200.
func (m istioMesh) load(t *testing.T) (stop func() (asked int, failed []string)) {
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var asked int
	var failed []string
	var g sync.WaitGroup
	for _, p := range m.proxies {
		g.Go(func() {
			for ctx.Err() == nil {
				r, err := p.Get(ctx, "/")
				if ctx.Err() != nil {
					return
				}
				mu.Lock()
				if asked++; err != nil || r.Status != http.StatusOK {
					failed = append(failed, fmt.Sprintf("%s: %d %v", p.Pod, r.Status, err))
				}
				mu.Unlock()
				time.Sleep(2 * time.Millisecond) // so that the rest has a machine too
			}
		})
	}
	return func() (int, []string) {
		cancel()
		g.Wait()
		return asked, failed
	}
}

// TestAnOperationOnIstioEndsWhenTheProxiesRunIt never waits: the end of an operation is what is relied on.
func TestAnOperationOnIstioEndsWhenTheProxiesRunIt(t *testing.T) {
	m := newIstioMesh(t, func(o *istiotest.ProxyOptions) { o.Relay = o.Pod == "api-1" })
	a := newAdapter(t)
	dir, whole, base := t.TempDir(), m.as(t, wholeUser), m.as(t, baseUser)
	doc := func(name, value, more string) string {
		return put(t, dir, "d.yaml", istioDocument(name, "mesh: istio\n"+toLabels+headers+more+"config: {response: {x-there: "+value+"}}"))
	}
	m.answer(t, "")
	stop := m.load(t)
	defer stop()
	a.cli("apply", "-f", doc("x", "one", ""), "--kubeconfig", whole).want(t, exitOK, "EnvoyFilter/shop/x-api-", "created", "2 of 2 proxies", "seen in each proxy itself")
	m.answer(t, "one")
	a.cli("apply", "-f", doc("x", "two", ""), "--kubeconfig", whole).want(t, exitOK, "updated", "2 of 2 proxies", "seen in each proxy itself")
	m.answer(t, "two")
	a.cli("run", "filters_status", "--kubeconfig", whole).want(t, exitOK, "2 of 2 proxies run version", "0 drifted")
	runWith(t, "", nil, "status", "--kubeconfig", whole).want(t, exitOK, "Workload shop {app=api}", "2 of 2 proxies", "as applied")
	runWith(t, "", nil, "status", "--kubeconfig", base).want(t, exitOK, "not verified", "verb list, resource pods")

	// What a proxy refuses is taken back, and the proxies have what they had.
	a.cli("apply", "-f", doc("y", "three", missing), "--kubeconfig", whole).want(t, exitFailed, "a proxy rejected the configuration", "Invalid path", "is in place again")
	m.answer(t, "two")
	runWith(t, "", nil, "list", "--kubeconfig", whole, "-o", "json").want(t, exitOK, "x")
	a.cli("apply", "-f", doc("y", "three", "protocol: tcp\n"), "--kubeconfig", whole).want(t, exitFailed, "is the module made for requests")

	// Without the right to look, what was applied is applied, and that nobody looked is told.
	r := a.cli("apply", "-f", doc("x", "four", ""), "--kubeconfig", base).want(t, exitOK, "not verified", "nothing proves that proxies run it", "verb list, resource pods")
	if strings.Contains(r.out, "proxies") {
		t.Errorf("it says of proxies: %s", r.out)
	}
	a.cli("apply", "-f", doc("x", "four", ""), "--kubeconfig", whole).want(t, exitOK, "is unchanged and runs on", "2 of 2 proxies")
	m.answer(t, "four")

	a.cli("remove", "shop/x", "--kubeconfig", whole).want(t, exitOK, "removed from", "2 of 2 proxies")
	m.answer(t, "")
	if asked, failed := stop(); len(failed) > 0 || asked < 100 {
		t.Errorf("of %d requests meanwhile %d failed: %v", asked, len(failed), failed)
	}

	// A plugin whose module is missing has every request answered with 500, until it is taken back; a proxy that tries it
	// first refuses it instead.
	a.cli("apply", "-f", doc("y", "five", missing), "--kubeconfig", whole).want(t, exitFailed, "-first created", "a proxy rejected the configuration")
	m.answer(t, "")
	a.cli("apply", "-f", doc("y", "five", "rollout: all\n"+missing), "--kubeconfig", whole).want(t, exitFailed, "TrafficExtension/shop/y-api-", "a proxy rejected the configuration")
	m.answer(t, "")
	runWith(t, "", nil, "list", "--kubeconfig", whole).want(t, exitOK, "No filter is applied.")

	// A proxy that has lost istiod runs on what is taken away from the others.
	a.cli("apply", "-f", doc("x", "six", ""), "--kubeconfig", whole).want(t, exitOK, "2 of 2 proxies")
	runWith(t, "", nil, "list", "--kubeconfig", whole, "--proxies").want(t, exitOK, "shop/x", "Looked at 2 of 2 proxies")
	m.proxies[0].Cut()
	a.cli("remove", "shop/x", "--kubeconfig", base).want(t, exitOK, "not verified")
	status := make(chan result)
	go func() { status <- a.cli("run", "filters_status", "--kubeconfig", whole) }()
	runWith(t, "", nil, "list", "--kubeconfig", whole, "--proxies").want(t, exitOK, "No filter is applied.",
		"Orphan, which no resource explains: shop/api-1 runs meshery.filters/shop.x-api-", "(sha256 9805f1b18a94…, inline)", "Looked at 2 of 2 proxies", "kubectl -n NAMESPACE delete pod")
	(<-status).want(t, exitOK, "proxies run Wasm filters that nothing explains: 1 found", "shop/api-1 runs meshery.filters/shop.x-api-", "No filter is applied, 1 in proxies that nothing explains")
	r = runWith(t, "", nil, "list", "--kubeconfig", base, "--proxies", "-o", "json").want(t, exitOK, `"filters": []`)
	if !strings.Contains(r.err, "what proxies run is not known") || !strings.Contains(r.err, "verb list, resource pods") || strings.Contains(r.out, "survey") {
		t.Errorf("without the right to look it says %s%s", r.out, r.err)
	}
	a.cli("run", "filters_status", "--kubeconfig", base).want(t, exitOK, "nobody looked for filters in proxies that nothing explains")
}
