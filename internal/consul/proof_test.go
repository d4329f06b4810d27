package consul

import (
	"testing"

	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

// TestEnvoyCountsAnewWhenOldListenersAreGone goes through what an Envoy 1.40 said while a second module could not be fetched
// after another that could not be: between the two the counters went away and began again.
func TestEnvoyCountsAnewWhenOldListenersAreGone(t *testing.T) {
	extension := map[string]any{"name": "builtin/wasm", "required": true, "arguments": map[string]any{"listenerType": "inbound",
		"pluginConfig": map[string]any{"name": plugins + "shop.y", "vmConfig": map[string]any{"runtime": "v8", "code": map[string]any{"remote": map[string]any{
			"httpURI": map[string]any{"uri": "http://modules/a.wasm"}, "sha256": "a"}}}}}}
	chain := filter.Chain{Filters: []filter.Filter{{Key: filter.Key{Namespace: "shop", Name: "y"}}}}
	with := plan.Plan{Chain: chain, Objects: []plan.Object{{Content: map[string]any{"spec": map[string]any{"envoyExtensions": []any{extension}}}}}}
	const (
		failedBefore = "wasm.remote_load_cache_hits: 4\nwasm.remote_load_fetch_failures: 1\nwasm.remote_load_fetch_successes: 1\nwasm.wasm_vm_count: 6\n"
		gone         = "wasm.wasm_vm_count: 3\n"
		failedAnew   = "wasm.remote_load_cache_hits: 0\nwasm.remote_load_fetch_failures: 1\nwasm.remote_load_fetch_successes: 0\nwasm.wasm_vm_count: 3\n"
	)
	for name, c := range map[string]struct {
		said []string // while the listener warms, and last when it takes traffic
		want plan.ProxyState
	}{
		"it fails, counted anew":                 {[]string{failedBefore, gone, failedAnew}, plan.Rejected},
		"it loads, and nothing is counted":       {[]string{failedBefore, gone}, plan.Running},
		"it loads, beside the failure of before": {[]string{failedBefore, failedBefore}, plan.Running},
		"it fails, and had before":               {[]string{gone, failedAnew}, plan.Rejected},
	} {
		x := NewProof(with)
		if x.err != nil {
			t.Fatal(x.err)
		}
		plugin := envoy.Plugins{x.wants[0].plugin}
		for i, said := range c.said {
			l := envoy.Listener{Direction: "INBOUND", Warming: []envoy.Plugins{plugin}}
			want := plan.Waiting
			if i == len(c.said)-1 {
				l.Active, l.Warming, want = l.Warming, nil, c.want
			}
			if state, detail := x.judge([]envoy.Listener{l}, readStats([]byte(said))); state != want {
				t.Errorf("%s: look %d: %s (%s), and should be %s", name, i, state, detail, want)
			}
		}
	}
}
