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
			}
		})
	}
	return func() stamps {
		cancel()
		g.Wait()
		return s
	}
}

// TestOneProxyOnIstioTriesAChainBeforeTheOthers counts, on live traffic, how often each request meets each filter.
func TestOneProxyOnIstioTriesAChainBeforeTheOthers(t *testing.T) {
	m := newIstioMesh(t)
	a := newAdapter(t)
	dir, whole := t.TempDir(), m.as(t, wholeUser)
	module, err := os.ReadFile(probe)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, fmt.Sprintf("%x.wasm", sha256.Sum256(module)))
	if err := os.WriteFile(file, module, 0o644); err != nil {
		t.Fatal(err)
	}
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
			{"one whose module is missing", "y two", "y two", []string{"apply", "-f", doc("z", "delivery: {mode: local, localPath: /there/is/no/such}")}, exitFailed, []string{"by proxy shop/api-1", "is in place again"}},
			{"the other order", "y two", "two y", []string{"apply", "-f", doc("y", stamp("y")+"\npriority: 5")}, exitOK, []string{"tried by proxy shop/api-1 first", "2 of 2 proxies"}},
			{"one less", "two y", "y", []string{"remove", "shop/x"}, exitOK, []string{"2 of 2 proxies"}},
			{"all at once", "y", "three", []string{"apply", "-f", doc("y", stamp("three")+"\nrollout: all")}, exitOK, []string{"2 of 2 proxies"}},
			{"none", "three", "", []string{"remove", "shop/y"}, exitOK, []string{"2 of 2 proxies"}},
		} {
			stop := m.watch(t)
			r := a.cli(append(step.args, "--kubeconfig", whole)...).want(t, step.code, step.words...)
			s := stop()
			if len(s.failed) > 0 || s.asked < 10 {
				t.Errorf("%s, %s: of %d requests %d failed: %v", kind, step.what, s.asked, len(s.failed), s.failed)
			}
			for pod, first := range s.first {
				for had := range first {
					if had != step.before && had != step.after {
						t.Errorf("%s, %s: a request to %s was stamped %q, and not %q or %q", kind, step.what, pod, had, step.before, step.after)
					}
				}
			}
			for _, p := range m.proxies {
				if r, err := p.Get(t.Context(), "/"); err != nil || strings.Join(r.Header.Values("X-Stamp"), " ") != step.after {
					t.Errorf("%s, %s: %s stamps %q at the end: %v", kind, step.what, p.Pod, r.Header.Values("X-Stamp"), err)
				}
			}
			one, other := s.first["api-1"][step.after], s.first["api-2"][step.after]
			if strings.Contains(r.out+r.err, "tried by proxy") && !other.IsZero() && !one.Before(other) {
				t.Errorf("%s, %s: api-2 had it at %s, and api-1 at %s", kind, step.what, other, one)
			}
		}
	}
}
