package xds

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

const (
	all    = filter.RolloutAll
	canary = filter.RolloutCanary
)

// TestOffers tells stories of one group, each on its own backend. Every story ends with a commit that all proxies
// get, so that the histories prove what else did not come.
func TestOffers(t *testing.T) {
	for _, c := range []struct {
		name  string
		story func(t *testing.T, r *rig)
	}{
		{"a proxy of a group without a chain gets the empty chain, so that its listener opens", func(t *testing.T, r *rig) {
			empty := r.plan(all)
			a := r.join("a")
			a.ack(a.want(empty))
			r.await(empty, "a=running")
			if got := r.apply(empty); got != "[ProxyGroup edge unchanged]" {
				t.Fatal(got)
			}
		}},
		{"all proxies are offered the chain at once without a canary", func(t *testing.T, r *rig) {
			a, b := r.joinAndAck("a"), r.joinAndAck("b")
			p := r.plan(all, "one")
			if got := r.apply(p); got != "[ProxyGroup edge created]" {
				t.Fatal(got)
			}
			r.await(p, "a=waiting b=waiting")
			a.ack(a.want(p))
			r.await(p, "a=running b=waiting")
			b.ack(b.want(p))
			r.await(p, "a=running b=running")
		}},
		{"the canary is offered the chain first and the others after it accepted", func(t *testing.T, r *rig) {
			empty := r.plan(all)
			a, b, c := r.joinAndAck("a"), r.joinAndAck("b"), r.joinAndAck("c")
			r.await(empty, "a=running b=running c=running")
			p := r.plan(canary, "one")
			r.apply(p)
			m := a.want(p)
			r.await(p, "a=waiting b=held c=held")
			g := r.b.Groups()[0]
			if g.Version != empty.Version || g.Offered != p.Version || len(g.OfferedProxies) != 3 || g.OfferedProxies[0].State != plan.Waiting ||
				g.OfferedProxies[1].State != plan.Held || g.Proxies[1].State != plan.Running {
				t.Errorf("the group during the offer: %+v", g)
			}
			a.ack(m)
			b.ack(b.want(p))
			r.await(p, "a=running b=running c=waiting")
			c.ack(c.want(p))
			r.await(p, "a=running b=running c=running")
			r.commit(p)
			if g := r.b.Groups()[0]; g.Offered != "" || g.OfferedProxies != nil {
				t.Errorf("the group after it: %+v", g)
			}
			q := r.put(r.plan(all, "one", "two"))
			for _, s := range []*sim{a, b, c} {
				s.ack(s.want(q))
				s.wantHistory(empty, p, q)
			}
		}},
		{"a group of one has no canary to wait for", func(t *testing.T, r *rig) {
			a := r.joinAndAck("a")
			p := r.plan(canary, "one")
			r.apply(p)
			a.ack(a.want(p))
			r.await(p, "a=running")
		}},
		{"a canary that never answers holds the others back, and lets them go when it does at last", func(t *testing.T, r *rig) {
			a, b := r.joinAndAck("a"), r.joinAndAck("b")
			p := r.plan(canary, "one")
			r.apply(p)
			m := a.want(p)
			r.await(p, "a=waiting b=held")
			a.ack(m)
			b.ack(b.want(p))
			r.await(p, "a=running b=running")
		}},
		{"when the canary leaves before it answers, nobody else is tried", func(t *testing.T, r *rig) {
			a, b := r.joinAndAck("a"), r.joinAndAck("b")
			p := r.plan(canary, "one")
			r.apply(p)
			a.want(p)
			a.leave()
			r.await(p, "a=gone b=held")
			r.joinAndAck("a") // gets what is committed
			r.await(p, "a=held b=held")
			if c, err := r.b.Revert(t.Context(), edge); err != nil || c.Version != r.plan(all).Version {
				t.Fatal(c, err)
			}
			r.await(r.plan(all), "a=running b=running")
			b.wantHistory(r.plan(all))
		}},
		{"the canary is one whose last answer was good", func(t *testing.T, r *rig) {
			empty := r.plan(all)
			a, b := r.join("a"), r.joinAndAck("b")
			a.nack(a.want(empty), "no")
			r.await(empty, "a=rejected b=running")
			p := r.plan(canary, "one")
			r.apply(p)
			b.ack(b.want(p))
			a.ack(a.want(p))
			r.await(p, "a=running b=running")
		}},
		{"a rejection by the canary keeps the chain from the others, and the old one comes back", func(t *testing.T, r *rig) {
			a, b := r.joinAndAck("a"), r.joinAndAck("b")
			good := r.put(r.plan(all, "one"))
			a.ack(a.want(good))
			b.ack(b.want(good))
			bad := r.plan(canary, "one", "bad")
			r.apply(bad)
			a.nack(a.want(bad), "Unable to create Wasm plugin \x1b[31mshop/bad\n")
			l := r.awaitFunc(bad, "a rejected", func(l plan.Loaded) bool { return describe(l) == "a=rejected b=held" })
			if got := l.Proxies[0].Detail; got != "Unable to create Wasm plugin  [31mshop/bad" {
				t.Fatalf("detail %q", got)
			}
			a.ack(a.want(good)) // at once, and not only when the operation takes the offer back
			if got := r.apply(good); got != "[ProxyGroup edge updated]" {
				t.Fatal(got)
			}
			r.await(good, "a=running b=running")
			next := r.put(r.plan(all, "two"))
			a.ack(a.want(next))
			b.ack(b.want(next))
			r.await(next, "a=running b=running")
			a.wantHistory(r.plan(all), good, bad, good, next)
			b.wantHistory(r.plan(all), good, next)
			if late := r.lateRejections(); len(late) > 0 {
				t.Fatalf("the operation's own rejection was reported as late: %v", late)
			}
		}},
		{"a proxy that rejected a version is asked again by the next offer of it", func(t *testing.T, r *rig) {
			a := r.joinAndAck("a")
			p := r.plan(all, "one")
			r.apply(p)
			a.nack(a.want(p), "no")
			a.ack(a.want(r.plan(all)))
			r.await(p, "a=rejected")
			r.apply(p)
			a.ack(a.wantVersion(p)) // other bytes, unless the answer to the chain in between is there already
			r.await(p, "a=running")
		}},
		{"a rejection outlives the stream, and the proxy is not asked again when it comes back", func(t *testing.T, r *rig) {
			empty := r.plan(all)
			a, b := r.joinAndAck("a"), r.joinAndAck("b")
			p := r.plan(canary, "one")
			r.apply(p)
			a.nack(a.want(p), "no")
			r.await(p, "a=rejected b=held")
			a.leave()
			r.awaitMember("a", false)
			r.await(p, "a=rejected b=held")
			a = r.join("a")
			a.ack(a.want(empty))
			r.await(p, "a=rejected b=held")
			q := r.put(r.plan(all, "two"))
			a.ack(a.want(q))
			b.ack(b.want(q))
			a.wantHistory(empty, q)
			b.wantHistory(empty, q)
		}},
		{"taking an offer back gives the committed chain to those that had the other, answered or not", func(t *testing.T, r *rig) {
			empty := r.plan(all)
			a, b, c := r.joinAndAck("a"), r.joinAndAck("b"), r.joinAndAck("c")
			p := r.plan(all, "one")
			r.apply(p)
			a.ack(a.want(p))
			unanswered := b.want(p)
			c.nack(c.want(p), "no")
			c.ack(c.want(empty))
			r.await(p, "a=running b=waiting c=rejected")
			r.apply(empty)
			a.ack(a.want(empty))
			b.ack(unanswered) // late: says nothing about what was sent since
			r.await(empty, "a=running b=waiting c=running")
			b.ack(b.want(empty))
			r.await(empty, "a=running b=running c=running")
		}},
		{"a newer offer replaces the old one, and late answers to the old one do not count for it", func(t *testing.T, r *rig) {
			empty := r.plan(all)
			a, b, c := r.joinAndAck("a"), r.joinAndAck("b"), r.joinAndAck("c")
			r.await(empty, "a=running b=running c=running")
			first, second := r.plan(all, "one"), r.plan(all, "two")
			r.apply(first)
			am, bm, cm := a.want(first), b.want(first), c.want(first)
			r.apply(second)
			a.ack(am)
			b.nack(bm, "no")
			second2 := []*discovery.DiscoveryResponse{a.want(second), b.want(second), c.want(second)}
			r.await(second, "a=waiting b=waiting c=waiting")
			c.ack(cm)
			c.ack(second2[2])
			r.await(second, "a=waiting b=waiting c=running")
			a.ack(second2[0])
			b.ack(second2[1])
			r.await(second, "a=running b=running c=running")
			r.commit(second)
			last := r.put(r.plan(all))
			for _, s := range []*sim{a, b, c} {
				s.ack(s.want(last))
				s.wantHistory(empty, first, second, empty)
			}
		}},
		{"an answer with the right nonce and another version is none", func(t *testing.T, r *rig) {
			a := r.joinAndAck("a")
			p := r.plan(all, "one")
			r.apply(p)
			m := a.want(p)
			a.send(&discovery.DiscoveryRequest{TypeUrl: m.GetTypeUrl(), ResourceNames: []string{Slot}, ResponseNonce: m.GetNonce(), VersionInfo: "other"})
			b := r.join("b") // by now the first stream's request was read, or it will be before the next one on it
			r.await(p, "a=waiting (b=held)")
			a.ack(m)
			r.await(p, "a=running (b=held)")
			b.leave()
		}},
		{"of two proxies with one node id, that one accepts is no reason for the other to see again what it has refused", func(t *testing.T, r *rig) {
			a, b := r.join("a"), r.join("a")
			for _, s := range []*sim{a, b} {
				s.ack(s.next())
			}
			p := r.put(r.plan(all, "one"))
			m := a.want(p)
			a.nack(m, "no such file")
			r.awaitFunc(p, "one refuses", func(l plan.Loaded) bool { return l.Count(plan.Rejected) == 1 })
			b.ack(b.want(p))
			r.awaitFunc(p, "one of each", func(l plan.Loaded) bool { return l.Count(plan.Rejected) == 1 && l.Count(plan.Running) == 1 })
			r.apply(p)
			a.ack(a.wantOther(p, m.GetResources()[0].GetValue()))
			r.await(p, "a=running a#2=running")
		}},
		{"a proxy that joins during an offer gets the committed chain until the commit and is not waited for", func(t *testing.T, r *rig) {
			good := r.put(r.plan(all, "one"))
			a := r.join("a")
			a.ack(a.wantVersion(good))
			r.await(good, "a=running")
			p := r.plan(all, "two")
			r.apply(p)
			am := a.want(p)
			b := r.join("b")
			b.ack(b.wantVersion(good))
			r.await(p, "a=waiting (b=held)")
			a.ack(am)
			r.await(p, "a=running (b=held)")
			r.commit(p)
			b.ack(b.want(p))
			r.await(p, "a=running b=running")
			b.wantHistory(good, p)
		}},
		{"an expected proxy that comes back counts again", func(t *testing.T, r *rig) {
			a, b := r.joinAndAck("a"), r.joinAndAck("b")
			p := r.plan(all, "one")
			r.apply(p)
			b.ack(b.want(p))
			a.leave()
			r.await(p, "a=gone b=running")
			a = r.join("a")
			a.ack(a.wantVersion(p))
			r.await(p, "a=running b=running")
		}},
		{"an offer without a proxy is committed for those that come", func(t *testing.T, r *rig) {
			p := r.plan(canary, "one")
			r.apply(p)
			r.await(p, "")
			a := r.join("a")
			a.ack(a.want(r.plan(all)))
			r.await(p, "(a=held)")
			r.commit(p)
			a.ack(a.want(p))
			r.await(p, "a=running")
		}},
		{"offering a version again does not take it from those that run it", func(t *testing.T, r *rig) {
			empty := r.plan(all)
			a, b, c := r.joinAndAck("a"), r.joinAndAck("b"), r.joinAndAck("c")
			p := r.plan(all, "one")
			r.apply(p)
			a.want(p)
			b.ack(b.want(p))
			c.ack(c.want(p))
			r.await(p, "a=waiting b=running c=running")
			p.Rollout = canary
			r.apply(p)
			r.await(p, "a=waiting b=running c=running")
			q := r.put(r.plan(all, "two"))
			for _, s := range []*sim{a, b, c} {
				s.want(q)
				s.wantHistory(empty, p, q)
			}
		}},
		{"a commit leaves alone who rejected the version, and says nothing about it a second time", func(t *testing.T, r *rig) {
			empty := r.plan(all)
			a, b := r.joinAndAck("a"), r.joinAndAck("b")
			p := r.plan(all, "one")
			r.apply(p)
			a.nack(a.want(p), "no")
			a.ack(a.want(empty))
			b.ack(b.want(p))
			r.await(p, "a=rejected b=running")
			r.commit(p)
			r.await(p, "a=rejected b=running")
			q := r.put(r.plan(all, "two"))
			a.ack(a.want(q))
			a.wantHistory(empty, p, empty, q)
			if late := r.lateRejections(); len(late) > 0 {
				t.Fatal(late)
			}
		}},
		{"a rejection after the commit is reported once for the proxy and version, however often it comes back", func(t *testing.T, r *rig) {
			p := r.put(r.plan(all, "one"))
			var seen []byte // last
			for range 3 {
				a := r.join("a")
				m := a.wantOther(p, seen)
				seen = m.GetResources()[0].GetValue()
				a.nack(m, "no such runtime")
				r.await(p, "a=rejected")
				a.leave()
				r.awaitMember("a", false)
			}
			late := r.lateRejections()
			if len(late) != 1 || late[0].Target.ID() != edge.ID() || late[0].Version != p.Version || late[0].Text != "no such runtime" ||
				late[0].Proxy != (plan.Proxy{ID: "a", Version: "1.40.0"}) {
				t.Fatalf("%+v", late)
			}
			if strings.Contains(r.log.String(), "no such runtime") {
				t.Fatal("the proxy's text, which may quote the configuration, is in the log")
			}
			q := r.plan(all, "two")
			a := r.join("a")
			a.nack(a.wantOther(p, seen), "no such runtime")
			r.put(q)
			a.nack(a.want(q), "no such runtime")
			eventually(t, "the next version's rejection is reported", func() bool { return len(r.lateRejections()) == 2 })
		}},
		{"a rejection by a proxy that was not expected is a late one", func(t *testing.T, r *rig) {
			a := r.joinAndAck("a")
			p := r.plan(all, "one")
			r.apply(p)
			a.ack(a.want(p))
			b := r.join("b")
			b.nack(b.want(r.plan(all)), "no")
			r.await(p, "a=running (b=held)")
			eventually(t, "a late rejection", func() bool { return len(r.lateRejections()) == 1 })
		}},
		{"two streams with one node id are two proxies", func(t *testing.T, r *rig) {
			a := r.joinAndAck("a")
			twin := r.open(r.conn())
			twin.send(&discovery.DiscoveryRequest{Node: node("a"), TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}})
			twin.ack(twin.next())
			r.await(r.plan(all), "a=running a#2=running")
			a.leave()
			r.await(r.plan(all), "a#2=running")
			r.joinAndAck("a")
			r.await(r.plan(all), "a=running a#2=running")
		}},
		{"a proxy that unsubscribes is gone, and gets its chain again when it asks again", func(t *testing.T, r *rig) {
			empty := r.plan(all)
			a := r.join("a")
			m := a.want(empty)
			a.ack(m)
			a.send(&discovery.DiscoveryRequest{TypeUrl: m.GetTypeUrl(), VersionInfo: m.GetVersionInfo(), ResponseNonce: m.GetNonce()})
			r.awaitMember("a", false)
			a.send(&discovery.DiscoveryRequest{TypeUrl: m.GetTypeUrl(), VersionInfo: m.GetVersionInfo(), ResponseNonce: m.GetNonce(), ResourceNames: []string{Slot}})
			m = a.want(empty)
			r.await(empty, "a=waiting")
			a.ack(m)
			r.await(empty, "a=running")
		}},
		{"a request for more names beside the slot's is not a reason to send it again", func(t *testing.T, r *rig) {
			empty := r.plan(all)
			a := r.join("a")
			m := a.want(empty)
			a.ack(m)
			a.send(&discovery.DiscoveryRequest{TypeUrl: m.GetTypeUrl(), VersionInfo: m.GetVersionInfo(), ResponseNonce: m.GetNonce(), ResourceNames: []string{"other", Slot}})
			r.await(empty, "a=running")
			p := r.put(r.plan(all, "one"))
			a.want(p)
			a.wantHistory(empty, p)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.story(t, newRig(t))
		})
	}
}

func TestTheEmptyChainIsTheOneThatTheMeshPlans(t *testing.T) {
	p, err := mesh.Envoy{}.Plan(filter.Chain{Target: edge}, plan.World{})
	if err != nil {
		t.Fatal(err)
	}
	v, err := emptyChain()
	if err != nil {
		t.Fatal(err)
	}
	if v.Version != p.Version || Slot != mesh.Slot || defaultGroup != mesh.DefaultGroup || meshName != (mesh.Envoy{}).Name() {
		t.Fatalf("version %s and %s", v.Version, p.Version)
	}
}

func TestAProxysGroupIsItsMetadataOrItsClusterOrTheDefault(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		node *core.Node
		want string
	}{
		{"metadata before cluster", withGroup(node("a"), structpb.NewStringValue("blue")), "blue"},
		{"cluster without metadata", node("a"), "edge"},
		{"default with neither", &core.Node{Id: "a"}, "default"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			s := r.open(r.conn())
			s.send(&discovery.DiscoveryRequest{Node: c.node, TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}})
			s.next()
			g := r.b.Groups()
			if len(g) != 1 || g[0].Target.Name != c.want || g[0].Held || len(g[0].Proxies) != 1 {
				t.Fatalf("%+v", g)
			}
			s.leave()
			eventually(t, "the group is forgotten with its last proxy", func() bool { return len(r.b.Groups()) == 0 })
		})
	}
}

func TestStreamsThatAreRefused(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(o *Options) {
		o.Admit = func(_ context.Context, group string) error {
			if group == "secret" {
				return status.Error(codes.PermissionDenied, "your certificate does not name secret")
			}
			return nil
		}
	})
	slot := func(n *core.Node) []*discovery.DiscoveryRequest {
		return []*discovery.DiscoveryRequest{{Node: n, TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}}}
	}
	big := node("big")
	big.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{"x": structpb.NewStringValue(strings.Repeat("x", maxMetadata))}}
	cluster := node("a")
	cluster.Cluster = "no such/group"
	secret := node("a")
	secret.Cluster = "secret"
	var types []*discovery.DiscoveryRequest
	for i := range maxTypes + 1 {
		types = append(types, &discovery.DiscoveryRequest{Node: node("a"), TypeUrl: fmt.Sprintf("type.googleapis.com/%d", i)})
	}
	names := slot(node("a"))
	names[0].ResourceNames = make([]string, maxNames+1)
	for _, c := range []struct {
		name     string
		requests []*discovery.DiscoveryRequest
		code     codes.Code
		text     string
	}{
		{"no node", slot(nil), codes.InvalidArgument, "node.id"},
		{"an endless id", slot(node(strings.Repeat("i", maxNodeID+1))), codes.InvalidArgument, "node.id"},
		{"an id that garbles a terminal", slot(node("a\x1b[2J")), codes.InvalidArgument, "node.id"},
		{"a group that is no name", slot(cluster), codes.InvalidArgument, `"no such/group"`},
		{"a group that is a number", slot(withGroup(node("a"), structpb.NewNumberValue(1))), codes.InvalidArgument, `""`},
		{"a group that it may not join", slot(secret), codes.PermissionDenied, "does not name secret"},
		{"huge metadata", slot(big), codes.InvalidArgument, "metadata"},
		{"very many names", names, codes.InvalidArgument, "100 resources"},
		{"very many types", types, codes.InvalidArgument, "20 types"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := r.open(r.conn())
			for _, q := range c.requests {
				s.send(q)
			}
			select {
			case <-s.ended:
			case <-time.After(patience):
				t.Fatal("the stream stays open")
			}
			if status.Code(s.err) != c.code || !strings.Contains(s.err.Error(), c.text) {
				t.Fatalf("%v, want %s with %q", s.err, c.code, c.text)
			}
		})
	}
	eventually(t, "no stream is counted any more", func() bool {
		r.b.mu.Lock()
		defer r.b.mu.Unlock()
		return r.b.streams.Total() == 0 && len(r.b.groups) == 0
	})
}

func TestMoreProxiesThanTheLimitAreRefusedUntilOneLeaves(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(o *Options) { o.Streams.Total = 1 })
	a := r.joinAndAck("a")
	b := r.open(r.conn())
	<-b.ended
	if status.Code(b.err) != codes.ResourceExhausted {
		t.Fatal(b.err)
	}
	a.leave()
	r.awaitMember("a", false)
	r.joinAndAck("b")
}

func TestIncrementalStreamsAreRefusedWithTheRemedy(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(r.conn()).DeltaAggregatedResources(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "api_type GRPC") {
		t.Fatal(err)
	}
}

func TestOtherTypesAndNamesAreAnsweredWithNothing(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	s := r.open(r.conn())
	s.send(&discovery.DiscoveryRequest{Node: node("a"), TypeUrl: resource.ClusterType})
	s.send(&discovery.DiscoveryRequest{TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{"somebody.elses"}})
	s.send(&discovery.DiscoveryRequest{TypeUrl: resource.ListenerType})
	eventually(t, "it is logged", func() bool {
		return strings.Count(r.log.String(), "nothing is served for this type") == 2 && strings.Contains(r.log.String(), "nothing is served for these names")
	})
	if r.has("a") {
		t.Fatal("a proxy without the slot is waited for")
	}
	s.send(&discovery.DiscoveryRequest{TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}})
	s.ack(s.want(r.plan(all)))
	r.await(r.plan(all), "a=running")
	s.wantHistory(r.plan(all))
}

func TestARestartHoldsProxiesUntilTheirChainIsThereAgain(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := r.put(r.plan(all, "one", "two"))
	blue := filter.Target{Kind: filter.ProxyGroup, Name: "blue", Partition: "ignored"}
	r.put(r.planOf(r.chain(blue, "three"), all))
	r.put(r.planOf(r.chain(blue), all)) // and away again
	a := r.join("a")
	a.ack(a.wantVersion(p))
	r.await(p, "a=running")
	r.stop()
	<-a.ended
	if status.Code(a.err) != codes.Unavailable {
		t.Fatalf("the stream ended with %v", a.err)
	}

	r.start()
	if held := r.b.Held(); len(held) != 1 || held[0].ID() != edge.ID() {
		t.Fatalf("held: %v", held)
	}
	chains, err := r.b.List(t.Context())
	if err != nil || len(chains) != 1 {
		t.Fatal(chains, err)
	}
	c, err := r.committed()
	if err != nil || fmt.Sprint(c.Names()) != "[shop/one shop/two]" {
		t.Fatal(c, err)
	}
	a = r.join("a")
	other := r.open(r.conn())
	n := node("a")
	n.Cluster = "blue"
	other.send(&discovery.DiscoveryRequest{Node: n, TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}})
	other.next() // a group without a stored chain does not wait
	if g := r.b.Groups(); !g[1].Held || g[1].Version != "" || g[1].Proxies[0].State != plan.Held {
		t.Fatalf("%+v", g[1])
	}
	again := r.planOf(c, canary)
	if again.Version != p.Version {
		t.Fatalf("the stored chain has version %s and had %s", again.Version, p.Version)
	}
	r.put(again)
	a.ack(a.wantVersion(again))
	r.await(again, "a=running")
	a.wantHistory(p)
	if held := r.b.Held(); len(held) != 0 {
		t.Fatalf("held: %v", held)
	}
}

// failing is a disk that is full, unless it is mended.
type failing struct {
	store.Records
	mended *atomic.Bool
}

func (f failing) Put(ctx context.Context, key string, value []byte) error {
	if f.mended.Load() {
		return f.Records.Put(ctx, key, value)
	}
	return errors.New("no space left on device")
}
func (failing) Delete(context.Context, string) error { return errors.New("read-only file system") }

func TestACommitThatCannotBeWrittenChangesNothing(t *testing.T) {
	t.Parallel()
	var mended atomic.Bool
	r := newRig(t, func(o *Options) { o.Records = failing{o.Records, &mended} })
	empty := r.plan(all)
	a := r.joinAndAck("a")
	r.await(empty, "a=running")
	p := r.plan(all, "one")
	r.apply(p)
	a.ack(a.want(p))
	if err := r.b.Commit(t.Context(), p); !errors.Is(err, problem.StoreFailed) || !strings.Contains(err.Error(), "no space left") {
		t.Fatal(err)
	}
	b := r.join("b")
	b.ack(b.want(empty))
	r.await(p, "a=running (b=held)")
	if c, _ := r.committed(); len(c.Filters) != 0 {
		t.Fatal(c)
	}
	r.apply(empty)
	a.ack(a.want(empty))
	r.await(empty, "a=running b=running")
	// Nothing is recorded of the group, so there is nothing to delete.
	if err := r.b.Commit(t.Context(), empty); err != nil {
		t.Fatal(err)
	}
	mended.Store(true)
	r.apply(p)
	a.ack(a.want(p))
	b.ack(b.want(p))
	if err := r.b.Commit(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	r.apply(empty)
	a.ack(a.want(empty))
	b.ack(b.want(empty))
	if err := r.b.Commit(t.Context(), empty); !errors.Is(err, problem.StoreFailed) {
		t.Fatal(err)
	}
}

func TestADamagedRecordIsNamedAtTheStart(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"no JSON":                "{",
		"another target's chain": `{"mesh":"envoy","target":{"kind":"ProxyGroup","name":"blue"},"filters":[{}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			if err := r.dir.Records().Put(t.Context(), recordKey(edge), []byte(text)); err != nil {
				t.Fatal(err)
			}
			_, err := New(t.Context(), r.b.opts)
			if !errors.Is(err, problem.StateDamaged) || !strings.Contains(err.Error(), recordKey(edge)) {
				t.Fatal(err)
			}
		})
	}
}

func TestRecordsOfOthersAreLeftAlone(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, key := range []string{"operations/1", "chains/Workload||shop|web|"} {
		if err := r.dir.Records().Put(t.Context(), key, []byte("whatever")); err != nil {
			t.Fatal(err)
		}
	}
	r.stop()
	r.start()
}

func TestPlansThatAreNotOnOffer(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	first, second := r.plan(all, "one"), r.plan(all, "two")
	if err := r.b.Commit(t.Context(), first); !errors.Is(err, problem.Internal) {
		t.Fatalf("commit of a plan that was never applied: %v", err)
	}
	r.apply(first)
	started := make(chan struct{})
	ended := make(chan error)
	go func() {
		once := sync.OnceFunc(func() { close(started) })
		var last error
		for _, err := range r.b.Loaded(t.Context(), first) {
			once()
			last = err
		}
		ended <- last
	}()
	<-started
	r.apply(second)
	if err := <-ended; !errors.Is(err, problem.Internal) {
		t.Fatalf("whoever follows a plan that was replaced hears %v", err)
	}
	if err := r.b.Commit(t.Context(), first); !errors.Is(err, problem.Internal) {
		t.Fatalf("commit of a plan that was replaced: %v", err)
	}
	workload := first
	workload.Chain.Target.Kind = filter.Workload
	if _, err := r.b.Apply(t.Context(), workload); !errors.Is(err, problem.Internal) {
		t.Fatal(err)
	}
	if w, err := r.b.World(t.Context(), r.chain(edge, "one").With(filter.Filter{Key: filter.Key{Name: "x"}, Spec: filter.Spec{Module: filter.Module{SHA256: strings.Repeat("0", 64)}}})); !errors.Is(err, problem.ModuleUnavailable) {
		t.Fatal(w, err)
	}
}

func TestLoadedEndsAndLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	empty := r.plan(all)
	watched := func() bool {
		r.b.mu.Lock()
		defer r.b.mu.Unlock()
		return len(r.b.groups) > 0
	}
	for range r.b.Loaded(t.Context(), empty) {
		break
	}
	if watched() {
		t.Fatal("a consumer that stopped is still listed")
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, err := range r.b.Loaded(ctx, empty) {
		if err != nil {
			t.Fatal(err)
		}
		cancel()
	}
	if watched() {
		t.Fatal("a consumer whose context ended is still listed")
	}
	var last error
	for _, err := range r.b.Loaded(t.Context(), empty) {
		last = err
		r.b.Close()
	}
	if !errors.Is(last, problem.ShuttingDown) {
		t.Fatalf("after Close: %v", last)
	}
}

func TestAChainWithTheSameVersionAndOtherLabelsIsRecorded(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := r.put(r.plan(all, "one"))
	p.Chain.Filters = slices.Clone(p.Chain.Filters)
	p.Chain.Filters[0].Labels = map[string]string{"team": "blue"}
	if got := r.apply(p); got != "[ProxyGroup edge unchanged]" {
		t.Fatal(got)
	}
	r.commit(p)
	r.stop()
	r.start()
	if c, err := r.committed(); err != nil || c.Filters[0].Labels["team"] != "blue" {
		t.Fatal(c, err)
	}
}
