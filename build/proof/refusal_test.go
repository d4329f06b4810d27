package proof

import (
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

func TestWhatAnEnvoyRefusesIsAskedOfOneAndTakenBack(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	const group = "edge"
	a := newAdapter(t)
	proxies := a.startProxies(2, group, upstream(t), 1)
	a.apply(probe(t, "mark", group, stamp("one"), nil))

	nowhere := filepath.Join(t.TempDir(), "nowhere")
	id, err := a.submit("custom", probe(t, "mark", group, stamp("two"), map[string]any{"delivery": map[string]any{"mode": "local", "localPath": nowhere}}), false)
	if err != nil {
		t.Fatal(err)
	}
	events, err := a.story(id)
	if err != nil {
		t.Fatal(err)
	}
	last := events[len(events)-1]
	if last.GetType() != filterspb.Event_ERROR || last.GetErrorCode() != "meshery-filters-1016" {
		t.Fatalf("the operation ended with %v", last)
	}
	// Envoy's words, which nobody else would choose.
	for _, words := range []string{"Invalid path: " + nowhere, group + "-1"} {
		if !strings.Contains(last.GetDetails(), words) {
			t.Errorf("the last event does not say %q: %s", words, last.GetDetails())
		}
	}
	serve := func(value string) {
		t.Helper()
		for _, p := range proxies {
			if status, h := p.answer("/", nil); status != http.StatusOK || h.Get("x-stamp") != value {
				t.Errorf("%s answers %d with stamp %q, want %q", p.id, status, h.Get("x-stamp"), value)
			}
		}
	}
	serve("one")
	a.allRun(group, 2)
	if got := proxies[1].stat("config_fail") + proxies[1].stat("update_rejected"); got != 0 {
		t.Errorf("the second Envoy was asked too: %d refusals", got)
	}

	a.apply(probe(t, "mark", group, stamp("three"), nil))
	serve("three")
	for _, p := range proxies {
		p.holds("default/mark")
	}
	// Whatever was sent again would have been counted by now: the next chain was accepted after it.
	if one, all := proxies[0].stat("update_rejected"), proxies[1].stat("update_rejected"); one != 1 || all != 0 {
		t.Errorf("the Envoys refused %d and %d updates, want 1 and 0", one, all)
	}
	if one, all := proxies[0].stat("config_fail"), proxies[1].stat("config_fail"); one != 1 || all != 0 {
		t.Errorf("the Envoys failed on %d and %d configurations, want 1 and 0", one, all)
	}
}
