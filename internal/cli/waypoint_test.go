package cli

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/internal/envoy"
)

// waypointGetsAFilter has requests go to a Service behind a waypoint as a ztunnel sends them.
func waypointGetsAFilter(t *testing.T, m *istioMesh, a *adapter) {
	w, err := m.Waypoint(t.Context(), "shop", "way", "api")
	if err != nil {
		t.Fatal(err)
	}
	dir, whole := t.TempDir(), m.as(t, wholeUser)
	file := probeFile(t, dir)
	doc := func(target, value string) string {
		return put(t, t.TempDir(), "d.yaml", istioDocument("x", "mesh: istio\ntarget: "+target+"\nmodule: {file: "+file+
			"}\ndelivery: {mode: local, localPath: "+dir+"}\nconfig: {stamp: {header: x-stamp, value: "+value+"}}"))
	}
	stamp := func(ctx context.Context) (string, error) {
		r, err := w.Get(ctx, "/")
		if err == nil && (r.Status != http.StatusOK || r.Body != "GET /\n") {
			err = fmt.Errorf("it answers %+v", r)
		}
		return strings.Join(r.Header.Values("X-Stamp"), " "), err
	}
	for _, step := range []struct {
		before, after string
		args          []string
		word          string
	}{
		{"", "one", []string{"apply", "-f", doc("{kind: Service, name: api}", "one")}, "TrafficExtension/shop/x-api-"},
		{"one", "two", []string{"apply", "-f", doc("{kind: Service, name: api}", "two")}, "updated"},
		{"two", "", []string{"remove", "shop/x"}, "removed from Service shop/api"},
		{"", "three", []string{"apply", "-f", doc("{kind: Gateway, name: way}", "three")}, "TrafficExtension/shop/x-way-"},
		{"three", "", []string{"remove", "shop/x"}, "removed from Gateway shop/way"},
	} {
		ctx, stop := context.WithCancel(t.Context())
		asked := make(chan int, 1)
		go func() {
			n := 0
			for ; ctx.Err() == nil; n++ {
				if had, err := stamp(ctx); ctx.Err() == nil && (err != nil || had != step.before && had != step.after) {
					t.Errorf("meanwhile an answer is stamped %q, and not %q or %q: %v", had, step.before, step.after, err)
				}
			}
			asked <- n
		}()
		a.cli(append(step.args, "--kubeconfig", whole)...).want(t, exitOK, step.word, "1 of 1 proxy")
		stop()
		if n := <-asked; n < 5 {
			t.Errorf("%d requests meanwhile", n)
		}
		if had, err := stamp(t.Context()); err != nil || had != step.after {
			t.Errorf("an answer is stamped %q, and not %q: %v", had, step.after, err)
		}
		if has := strings.Contains(listeners(t, w.Admin), "extensions.istio.io/trafficextension/shop.x-"); has != (step.after != "") {
			t.Errorf("stamped %q, it is in the waypoint's configuration: %t", step.after, has)
		}
		stats, err := envoy.Admin{Addr: w.Admin}.Stats(t.Context(), `^wasm\.wasm_vm_count$`)
		if err != nil || step.after != "" && stats["wasm.wasm_vm_count"] == 0 {
			t.Errorf("stamped %q, it has the sandboxes %v: %v", step.after, stats, err)
		}
	}
}

// listeners are an Envoy's, as it shows them.
func listeners(t *testing.T, admin string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+admin+"/config_dump?resource=dynamic_listeners", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
