package proof

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// otherListener answers by itself, in the same Envoy, whatever the slot does.
const otherListener = `  listeners:
  - name: other
    address:
      socket_address: {address: 127.0.0.1, port_value: 0}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: other
          route_config:
            virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: "/"}, direct_response: {status: 204}}]}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
`

func TestAfterACrashRequestsFareAsTheFailurePolicySays(t *testing.T) {
	t.Parallel()
	a := newAdapter(t)
	backend := upstream(t)
	type fare struct {
		status   int
		filtered bool
	}
	for _, c := range []struct {
		policy            string
		trap, next, later fare
	}{
		{"closed", fare{503, false}, fare{503, false}, fare{503, false}},
		{"open", fare{503, false}, fare{200, false}, fare{200, false}},
		{"reload", fare{503, false}, fare{503, false}, fare{200, true}},
	} {
		t.Run(c.policy, func(t *testing.T) {
			t.Parallel()
			p := startProxy(t, proxyOptions{id: c.policy, group: c.policy, upstream: backend, xds: a.addresses.XDS, edit: func(bootstrap string) string {
				return strings.Replace(bootstrap, "  listeners:\n", otherListener, 1)
			}})
			other, err := p.ListenerAddr(t.Context(), "other")
			if err != nil {
				t.Fatal(err)
			}
			config := stamp("filtered")
			config["trapPath"] = "/trap"
			a.apply(probe(t, c.policy, c.policy, config, map[string]any{"failurePolicy": c.policy}))
			// One connection, and with it one worker, for what belongs together.
			w, err := connect(p.addr, time.Now().Add(patience))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { w.conn.Close() }()
			ask := func(path string) fare {
				t.Helper()
				status, h, keep, err := w.exchange(Request{Addr: p.addr, Path: path}, time.Now().Add(patience))
				if err != nil {
					t.Fatal(err)
				}
				if !keep {
					w.conn.Close()
					if w, err = connect(p.addr, time.Now().Add(patience)); err != nil {
						t.Fatal(err)
					}
				}
				if status, _, err := get(other, "/", nil); err != nil || status != http.StatusNoContent {
					t.Errorf("the other listener answers %d, %v", status, err)
				}
				return fare{status, h.Get("x-stamp") == "filtered"}
			}
			if got := ask("/"); got != (fare{200, true}) {
				t.Fatalf("before the crash: %+v", got)
			}
			if got := ask("/trap"); got != c.trap {
				t.Errorf("the trapping request: %+v, want %+v", got, c.trap)
			}
			for i := range 3 {
				if got := ask("/"); got != c.next {
					t.Errorf("request %d after it: %+v, want %+v", i+1, got, c.next)
				}
			}
			// The time itself is what the policy is about.
			select {
			case <-time.After(1500 * time.Millisecond):
			case <-t.Context().Done():
			}
			for i := range 3 {
				if got := ask("/"); got != c.later {
					t.Errorf("request %d after 1.5 s: %+v, want %+v", i+1, got, c.later)
				}
			}
			select {
			case <-p.Done():
				t.Errorf("Envoy ended: %v", p.Err())
			default:
			}
			// Applying another configuration makes a sandbox that works, whatever became of the last.
			config = stamp("again")
			last := a.apply(probe(t, c.policy, c.policy, config, map[string]any{"failurePolicy": c.policy}))
			eventually(t, "the filter works again after "+last.GetSummary(), func() error {
				status, h, err := get(p.addr, "/", nil)
				if err != nil || status != http.StatusOK || h.Get("x-stamp") != "again" {
					return fmt.Errorf("%d with stamp %q, %v", status, h.Get("x-stamp"), err)
				}
				return nil
			})
		})
	}
}
