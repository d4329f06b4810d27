package cli

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
)

// stamps notes what every answer of a proxy was stamped with, and when it was first stamped so.
type stamps struct {
	first  map[string]map[string]time.Time // by proxy and stamps
	failed []string
	asked  int
}

// watch asks every proxy again and again, over a connection of its own each time, until stop.
func (m istioMesh) watch(t *testing.T) (stop func() stamps) {
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var g sync.WaitGroup
	s := stamps{first: map[string]map[string]time.Time{}}
	for _, p := range m.proxies {
		s.first[p.Pod] = map[string]time.Time{}
	}
	for _, p := range m.proxies {
		g.Go(func() {
			for ctx.Err() == nil {
				r, err := p.Get(ctx, "/")
				if ctx.Err() != nil {
					return
				}
				mu.Lock()
				if s.asked++; err != nil || r.Status != http.StatusOK {
					s.failed = append(s.failed, fmt.Sprintf("%s: %d %v", p.Pod, r.Status, err))
				} else if had := strings.Join(r.Header.Values("X-Stamp"), " "); s.first[p.Pod][had].IsZero() {
					s.first[p.Pod][had] = time.Now()
				}
				mu.Unlock()
				time.Sleep(2 * time.Millisecond) // so that the rest has a machine too
			}
		})
	}
	return func() stamps {
		cancel()
		g.Wait()
		return s
	}
}

// during does something while the proxies are asked. Each answer is stamped as it was before or as it is to be after, and
// at the end all are.
func (m istioMesh) during(t *testing.T, what, before, after string, do func() result) (result, stamps) {
	t.Helper()
	stop := m.watch(t)
	r := do()
	s := stop()
	if len(s.failed) > 0 || s.asked < 10 {
		t.Errorf("%s: of %d requests %d failed: %v", what, s.asked, len(s.failed), s.failed)
	}
	for pod, first := range s.first {
		for had := range first {
			if had != before && had != after {
				t.Errorf("%s: a request to %s was stamped %q, and not %q or %q", what, pod, had, before, after)
			}
		}
	}
	m.stamped(t, what, after)
	return r, s
}

// stamped checks what the proxies stamp answers with.
func (m istioMesh) stamped(t *testing.T, what, want string) {
	t.Helper()
	for _, p := range m.proxies {
		if r, err := p.Get(t.Context(), "/"); err != nil || r.Status != http.StatusOK || strings.Join(r.Header.Values("X-Stamp"), " ") != want {
			t.Errorf("%s: %s answers %d and stamps %q, and not %q: %v", what, p.Pod, r.Status, r.Header.Values("X-Stamp"), want, err)
		}
	}
}

// probeFile is the probe where proxies read it as a file of that folder.
func probeFile(t *testing.T, dir string) string {
	t.Helper()
	module, err := os.ReadFile(probe)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, fmt.Sprintf("%x.wasm", sha256.Sum256(module)))
	if err := os.WriteFile(file, module, 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// missing is where no proxy finds a module.
const missing = "delivery: {mode: local, localPath: /there/is/no/such}\n"

// TestOneProxyOnIstioTriesAChainBeforeTheOthers counts, on live traffic, how often each request meets each filter.
func TestOneProxyOnIstioTriesAChainBeforeTheOthers(t *testing.T) {
	m := newIstioMesh(t)
	a := newAdapter(t)
	dir, whole := t.TempDir(), m.as(t, wholeUser)
	file := probeFile(t, dir)
	for kind, delivery := range map[string]string{"EnvoyFilter": "", "TrafficExtension": "delivery: {mode: local, localPath: " + dir + "}\n"} {
		doc := func(name, spec string) string {
			return put(t, t.TempDir(), "d.yaml", istioDocument(name, "mesh: istio\n"+toLabels+"module: {file: "+file+"}\n"+spec))
		}
		stamp := func(value string) string {
			return delivery + "config: {stamp: {header: x-stamp, value: " + value + "}}"
		}
		for _, step := range []struct {
			what          string
			before, after string // the stamps of an answer, of which responses meet the last filter first
			args          []string
			code          int
			words         []string
		}{
			{"a first filter", "", "one", []string{"apply", "-f", doc("x", stamp("one"))}, exitOK, []string{kind + "/shop/x-api-", "-first created", "tried by proxy shop/api-1 first", "-first removed", "2 of 2 proxies"}},
			{"another configuration", "one", "two", []string{"apply", "-f", doc("x", stamp("two"))}, exitOK, []string{"-first created", "tried by proxy shop/api-1 first", "updated", "2 of 2 proxies"}},
			{"a second filter", "two", "y two", []string{"apply", "-f", doc("y", stamp("y"))}, exitOK, []string{"tried by proxy shop/api-1 first", "2 of 2 proxies"}},
			{"one whose module is missing", "y two", "y two", []string{"apply", "-f", doc("z", missing)}, exitFailed, []string{"by proxy shop/api-1", "is in place again"}},
			{"the other order", "y two", "two y", []string{"apply", "-f", doc("y", stamp("y")+"\npriority: 5")}, exitOK, []string{"tried by proxy shop/api-1 first", "2 of 2 proxies"}},
			{"one less", "two y", "y", []string{"remove", "shop/x"}, exitOK, []string{"2 of 2 proxies"}},
			{"all at once", "y", "three", []string{"apply", "-f", doc("y", stamp("three")+"\nrollout: all")}, exitOK, []string{"2 of 2 proxies"}},
			{"none", "three", "", []string{"remove", "shop/y"}, exitOK, []string{"2 of 2 proxies"}},
		} {
			r, s := m.during(t, kind+", "+step.what, step.before, step.after, func() result {
				return a.cli(append(step.args, "--kubeconfig", whole)...).want(t, step.code, step.words...)
			})
			one, other := s.first["api-1"][step.after], s.first["api-2"][step.after]
			if strings.Contains(r.out+r.err, "tried by proxy") && !other.IsZero() && !one.Before(other) {
				t.Errorf("%s, %s: api-2 had it at %s, and api-1 at %s", kind, step.what, other, one)
			}
		}
	}
}

// TestOneProxyOfEveryTargetOnIstioTriesAChainBeforeTheOthers has a cluster that serves no TrafficExtension.
func TestOneProxyOfEveryTargetOnIstioTriesAChainBeforeTheOthers(t *testing.T) {
	m := startIstio(t, "TrafficExtension")
	for _, pod := range []string{"api-1", "api-2", "edge-1", "edge-2"} {
		app, _, _ := strings.Cut(pod, "-")
		m.add(t, istiotest.ProxyOptions{Namespace: "shop", Pod: pod, Labels: map[string]string{"app": app}, Gateway: app == "edge"})
	}
	sidecars, gateways := istioMesh{m.Mesh, m.proxies[:2]}, istioMesh{m.Mesh, m.proxies[2:]}
	a := newAdapter(t, "--allow-wide-targets")
	dir, whole := t.TempDir(), m.as(t, wholeUser)
	file := probeFile(t, dir)
	for _, at := range []struct {
		target, namespace string
		those, others     istioMesh
	}{
		{"{kind: Workload, labels: {app: api}}", "shop", sidecars, gateways},
		{"{kind: Namespace}", "shop", sidecars, gateways},
		{"{kind: Mesh}", "istio-system", sidecars, gateways},
		{"{kind: Gateway, labels: {app: edge}}", "shop", gateways, sidecars},
	} {
		for kind, delivery := range map[string]string{"EnvoyFilter": "", "WasmPlugin": "delivery: {mode: local, localPath: " + dir + "}\n"} {
			if kind == "EnvoyFilter" && strings.Contains(at.target, "Workload") {
				continue // as where TrafficExtensions are served
			}
			doc := func(name, spec string) string {
				return put(t, t.TempDir(), "d.yaml", istioDocument(name, "mesh: istio\ntarget: "+at.target+"\nmodule: {file: "+file+"}\n"+spec))
			}
			first, second := at.those.proxies[0], at.those.proxies[1]
			tried := "tried by proxy shop/" + first.Pod + " first"
			for _, step := range []struct {
				what, before, after string
				args                []string
				code                int
				words               []string
			}{
				{"a first filter", "", "one", []string{"apply", "-f", doc("x", delivery+"config: {stamp: {header: x-stamp, value: one}}")}, exitOK, []string{kind + "/" + at.namespace + "/x-", "-first created", tried, "2 of 2 proxies"}},
				{"one whose module is missing", "one", "one", []string{"apply", "-f", doc("z", missing)}, exitFailed, []string{"by proxy shop/" + first.Pod, "Invalid path", "is in place again"}},
				{"none", "one", "", []string{"remove", "shop/x"}, exitOK, []string{"2 of 2 proxies"}},
			} {
				what := fmt.Sprintf("%s on %s, %s", kind, at.target, step.what)
				stop := at.others.watch(t)
				_, s := at.those.during(t, what, step.before, step.after, func() result {
					return a.cli(append(step.args, "--kubeconfig", whole)...).want(t, step.code, step.words...)
				})
				one, other := s.first[first.Pod][step.after], s.first[second.Pod][step.after]
				if step.before == "" && !one.Before(other) {
					t.Errorf("%s: %s had it at %s, and %s at %s", what, second.Pod, other, first.Pod, one)
				}
				for pod, stamps := range stop().first {
					for had := range stamps {
						if had != "" {
							t.Errorf("%s: %s, which is not meant, stamps %q", what, pod, had)
						}
					}
				}
			}
		}
	}
	for _, p := range []*istiotest.Proxy{sidecars.proxies[1], gateways.proxies[1]} {
		stats, err := p.Envoy.Admin().Stats(t.Context(), "lds.update_rejected")
		if err != nil || len(stats) != 1 || stats["listener_manager.lds.update_rejected"] != 0 {
			t.Errorf("%s, which was to try nothing, has refused something: %v %v", p.Pod, stats, err)
		}
	}
}
