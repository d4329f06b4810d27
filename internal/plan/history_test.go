package plan

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
)

func chainOf(priority int, rootID string) filter.Chain {
	return filter.Chain{Mesh: "consul", Filters: []filter.Filter{{Key: filter.Key{Name: "a"},
		Spec: filter.Spec{Priority: priority, RootID: rootID, Module: filter.Module{Inline: "AGFzbQ==", SHA256: "5e"}}}}}
}

func TestAHistoryHasTheLastChangesAndNoBytes(t *testing.T) {
	var h History
	at := time.Date(2026, 3, 4, 5, 6, 7, 8, time.FixedZone("", 3600))
	if h = h.With(filter.Chain{}, filter.Chain{}, 7, at); h != nil {
		t.Errorf("nothing became nothing: %+v", h)
	}
	before := filter.Chain{}
	for n := range 12 {
		now := chainOf(n, "")
		h = h.With(before, now, 5, at) // a number that does not grow
		h = h.With(now, now, 50, at)   // no change
		before = now
	}
	if len(h) != 10 || !h[0].Oldest || h[1].Oldest || h[0].Number != 7 || h[9].Number != 16 || h[9].Filters[0].Spec.Priority != 11 {
		t.Errorf("%d, from %+v to %+v", len(h), h[0], h[len(h)-1])
	}
	if h[0].Filters[0].Spec.Module.Inline != "" || before.Filters[0].Spec.Module.Inline == "" || !h[0].Time.Equal(at.Truncate(time.Second)) {
		t.Errorf("%+v of %+v", h[0], before)
	}
	for n := range 4 {
		h = h.With(before, chainOf(n, strings.Repeat(fmt.Sprint(n), 20<<10)), 100, at)
	}
	if len(h) != 3 || !h[0].Oldest || h[0].Filters[0].Spec.Priority != 1 {
		t.Errorf("%d of the large ones are kept", len(h))
	}
	if r := h.Revisions(chainOf(9, "")); len(r) != 3 || r[2].Chain.Filters[0].Spec.Priority != 3 || r[2].Chain.Mesh != "consul" || r[2].Number != 103 {
		t.Errorf("%d revisions, of which the last should be 103", len(r))
	}
	// What was there before anything was kept is not known.
	if first := (History{}).With(chainOf(1, ""), chainOf(2, ""), 0, at); len(first) != 1 || !first[0].Oldest || first[0].Number != 1 {
		t.Errorf("%+v", first)
	}
}
