package xds

import (
	"fmt"
	"maps"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

// stats waits until the counts of a group are these.
func (r *rig) stats(group string, rejections uint64, proxies map[plan.ProxyState]int) {
	r.t.Helper()
	eventually(r.t, fmt.Sprintf("%s has %v, %d rejections", group, proxies, rejections), func() bool {
		for _, s := range r.b.Stats() {
			if s.Group == group {
				return s.Rejections == rejections && maps.Equal(s.Proxies, proxies)
			}
		}
		return false
	})
}

func TestStatsCountWhereProxiesAreWithWhatTheyShouldHave(t *testing.T) {
	r := newRig(t)
	a, b := r.joinAndAck("a"), r.joinAndAck("b")
	r.stats("edge", 0, map[plan.ProxyState]int{plan.Running: 2})

	p := r.plan(filter.RolloutCanary, "one")
	r.apply(p)
	m := a.want(p)
	r.stats("edge", 0, map[plan.ProxyState]int{plan.Waiting: 1, plan.Held: 1})
	a.nack(m, "no")
	r.stats("edge", 1, map[plan.ProxyState]int{plan.Rejected: 1, plan.Held: 1})

	if _, err := r.b.Revert(t.Context(), edge); err != nil {
		t.Fatal(err)
	}
	a.ack(a.next())
	r.stats("edge", 1, map[plan.ProxyState]int{plan.Running: 2})
	b.leave()
	r.stats("edge", 1, map[plan.ProxyState]int{plan.Running: 1})
	a.leave()
	r.stats("edge", 1, map[plan.ProxyState]int{}) // counts do not go down when the group is gone
}

func TestStatsOfGroupsThatProxiesMakeUpAreBounded(t *testing.T) {
	r := newRig(t)
	const madeUp = maxCounted + 50
	conn := r.conn()
	for i := range madeUp {
		s := r.open(conn)
		s.send(&discovery.DiscoveryRequest{Node: withGroup(node("a"), structpb.NewStringValue(fmt.Sprintf("a-%d", i))),
			TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}})
		s.nack(s.next(), "no") // of the empty chain
	}
	// A group that is configured has its place, though its name is the last.
	last := filter.Target{Kind: filter.ProxyGroup, Name: "z"}
	r.put(r.planOf(r.chain(last, "one"), filter.RolloutAll))
	s := r.open(conn)
	s.send(&discovery.DiscoveryRequest{Node: withGroup(node("a"), structpb.NewStringValue("z")), TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}})
	s.nack(s.next(), "no")
	r.stats("z", 1, map[plan.ProxyState]int{plan.Rejected: 1})
	eventually(t, "all are counted", func() bool {
		all := r.b.Stats()
		if len(all) > maxCounted+1 {
			t.Fatalf("%d groups are counted by name", len(all))
		}
		proxies, rejections := 0, uint64(0)
		for _, g := range all {
			rejections += g.Rejections
			for _, n := range g.Proxies {
				proxies += n
			}
		}
		return proxies == madeUp+1 && rejections == madeUp+1
	})
}

func TestStatsNameFewGroupsHoweverManyProxiesMakeUpOneAfterAnother(t *testing.T) {
	r := newRig(t)
	conn := r.conn()
	names := map[string]bool{}
	for i := range 3 * maxCounted {
		s := r.open(conn)
		s.send(&discovery.DiscoveryRequest{Node: withGroup(node("a"), structpb.NewStringValue(fmt.Sprintf("a-%d", i))),
			TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}})
		s.next()
		for _, g := range r.b.Stats() {
			names[g.Group] = true
		}
		s.leave()
	}
	if len(names) > maxCounted+1 {
		t.Errorf("%d groups were counted by name", len(names))
	}
	last := filter.Target{Kind: filter.ProxyGroup, Name: "z"}
	r.put(r.planOf(r.chain(last, "one"), filter.RolloutAll))
	r.stats("z", 0, map[plan.ProxyState]int{})
}
