package proof

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

func TestSeveralAdaptersRunSideBySideAndShareNothing(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	backend := upstream(t)
	var all []*adapter
	var proxies []*proxy
	for i := range 3 {
		a := newAdapter(t)
		all = append(all, a)
		proxies = append(proxies, startProxy(t, proxyOptions{id: "one", group: "edge", upstream: backend, xds: a.addresses.XDS}))
		a.apply(probe(t, "mark", "edge", stamp(fmt.Sprintf("adapter-%d", i)), nil))
	}
	components := map[string]bool{}
	for i, a := range all {
		if _, h := proxies[i].answer("/", nil); h.Get("x-stamp") != fmt.Sprintf("adapter-%d", i) {
			t.Errorf("the proxy of adapter %d has stamp %q", i, h.Get("x-stamp"))
		}
		c, err := a.chain("edge")
		if err != nil || len(c.GetProxies()) != 1 {
			t.Errorf("adapter %d has %v, %v", i, c, err)
		}
		components[a.outcome("filters_status", "", false).GetComponent()] = true
	}
	if len(components) != len(all) {
		t.Errorf("%d adapters have the components %v", len(all), components)
	}

	code, out := run(t, append(slices.Clone(all[0].args[:3]), all[1].args[3:]...)...)
	if code == 0 || !strings.Contains(out, all[0].state) || !strings.Contains(out, "another adapter") {
		t.Errorf("a second adapter on one state directory: exit code %d\n%s", code, out)
	}
	if _, err := all[0].chain("edge"); err != nil {
		t.Errorf("the first adapter on it does not answer any more: %v", err)
	}
}

func TestABodyThatIsTooLargeIsRefusedAtTheDoor(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	a := newAdapter(t)
	huge := strings.Repeat("# all of it a comment\n", (33<<20)/22)
	for _, c := range []struct {
		why  string
		body string
		code codes.Code
	}{
		{"more than a message may have", huge, codes.ResourceExhausted},
		{"more than a body may have", huge[:31<<20], codes.InvalidArgument},
	} {
		if _, err := a.submit("custom", c.body, false); status.Code(err) != c.code {
			t.Errorf("%s: %.300v, want %s", c.why, err, c.code)
		}
	}
	if _, err := a.filters.List(t.Context(), &filterspb.ListRequest{}); err != nil {
		t.Errorf("the adapter does not answer any more: %v", err)
	}
}

func TestAHundredAppliesAtOnceEndOnceEach(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	const (
		group = "edge"
		names = 5
		all   = 100
	)
	a := newAdapter(t)
	proxies := a.startProxies(2, group, upstream(t), 1)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	watch, err := a.filters.Watch(ctx, &filterspb.WatchRequest{FromNow: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Header(); err != nil { // it comes when the watch stands
		t.Fatal(err)
	}

	var sending sync.WaitGroup
	run := rand.Text()
	for i := range all {
		q := &meshes.ApplyRuleRequest{OpName: "apply_filter", Username: "proof", OperationId: fmt.Sprintf("%s-%d", run, i),
			CustomBody: document(fmt.Sprintf("filter-%d", i%names), map[string]any{"target": target(group), "module": map[string]any{"builtin": "headers"},
				"config": map[string]any{"response": map[string]any{fmt.Sprintf("x-filter-%d", i%names): fmt.Sprint(i)}}})}
		// Each is sent twice, as by a caller that has lost the answer: it still runs once.
		for range 2 {
			sending.Go(func() {
				if _, err := a.meshes.ApplyOperation(ctx, q); err != nil {
					t.Errorf("%s is refused: %v", q.OperationId, err)
				}
			})
		}
	}
	last := map[string]int{}
	sequence := map[string]uint64{}
	for ends := 0; ends < all; {
		r, err := watch.Recv()
		if err != nil {
			t.Fatalf("%d of %d operations have ended: %v", ends, all, err)
		}
		e := r.GetEvent()
		id := e.GetOperationId()
		if e.GetSequence() != sequence[id]+1 {
			t.Errorf("event %d of %s comes after %d", e.GetSequence(), id, sequence[id])
		}
		sequence[id] = e.GetSequence()
		if last[id] > 0 {
			t.Errorf("%s tells on after its end: %s", id, e.GetSummary())
		}
		if e.GetType() == filterspb.Event_ERROR {
			t.Errorf("%s failed: %s\n%s", id, e.GetSummary(), e.GetDetails())
		}
		if e.GetLast() {
			last[id]++
			ends++
		}
	}
	sending.Wait()
	if len(last) != all {
		t.Errorf("%d operations have ended, want %d", len(last), all)
	}

	// What holds now is whole: every filter once, with the configuration of one of the requests, everywhere the same.
	a.allRun(group, len(proxies))
	c, err := a.chain(group)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range proxies {
		var want []string
		for i := range names {
			want = append(want, fmt.Sprintf("default/filter-%d", i))
		}
		if s := p.holds(want...); s.Version != c.GetVersion() {
			t.Errorf("%s has version %s, and the adapter says %s", p.id, s.Version, c.GetVersion())
		}
		_, h := p.answer("/", nil)
		for i := range names {
			if len(h.Values(fmt.Sprintf("x-filter-%d", i))) != 1 {
				t.Errorf("%s answers with %v", p.id, h)
			}
		}
	}
	for _, stat := range []string{"config_fail", "update_rejected"} {
		for _, p := range proxies {
			if n := p.stat(stat); n != 0 {
				t.Errorf("%s: %s is %d", p.id, stat, n)
			}
		}
	}
}
