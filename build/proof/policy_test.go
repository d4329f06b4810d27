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
	onRealParts(t)
	t.Parallel()
	a := newAdapter(t)
	backend := upstream(t)
	type fare struct {
		status   int
		filtered bool
	}
	broken, unfiltered, works := fare{503, false}, fare{200, false}, fare{200, true}
	for _, c := range []struct {
		policy string
		// next follows the trapping request at once, later 1.5 s after it.
		next, later fare
		// trap is what a second trapping request gets right after that, and again the one behind it.
		trap, again fare
	}{
		{"closed", broken, broken, broken, broken},
		{"open", unfiltered, unfiltered, unfiltered, unfiltered},
		// Envoy makes a new sandbox a second after it made the last. One that had run for longer is replaced with the next
		// request already, and one that crashes again and again once a second.
		{"reload", works, works, broken, broken},
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
			ask := func(path string) fare {
				t.Helper()
				status, h := p.answer(path, nil)
				if status, _, err := get(other, "/", nil); err != nil || status != http.StatusNoContent {
					t.Errorf("the other listener answers %d, %v", status, err)
				}
				return fare{status, h.Get("x-stamp") == "filtered"}
			}
			want := func(when string, got, want fare) {
				t.Helper()
				if got != want {
					t.Errorf("%s: %+v, want %+v", when, got, want)
				}
			}
			// The time itself is what the policy is about.
			pause := func() {
				select {
				case <-time.After(1500 * time.Millisecond):
				case <-t.Context().Done():
				}
			}
			pause()
			want("before the crash", ask("/"), works)
			want("the trapping request", ask("/trap"), broken)
			made := time.Now()
			want("the request after it", ask("/"), c.next)
			trap, again := ask("/trap"), ask("/")
			// On a busy machine they may come too late to meet the second in which there is no new sandbox.
			if c.policy != "reload" || time.Since(made) < 900*time.Millisecond {
				want("the next trapping request", trap, c.trap)
				want("the request after that", again, c.again)
			}
			pause()
			for i := range 3 {
				want(fmt.Sprintf("request %d after 1.5 s", i+1), ask("/"), c.later)
			}
			select {
			case <-p.Done():
				t.Errorf("Envoy ended: %v", p.Err())
			default:
			}
			// Another configuration makes a sandbox that works, whatever became of the last.
			a.apply(probe(t, c.policy, c.policy, stamp("again"), map[string]any{"failurePolicy": c.policy}))
			eventually(t, "the filter works again", func() error {
				status, h, err := get(p.addr, "/", nil)
				if err != nil || status != http.StatusOK || h.Get("x-stamp") != "again" {
					return fmt.Errorf("%d with stamp %q, %v", status, h.Get("x-stamp"), err)
				}
				return nil
			})
		})
	}
}
