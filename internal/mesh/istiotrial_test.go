package mesh

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

// What holds while a proxy tries a chain must reach no other proxy, and leave nothing of the target's own to that one.
func TestATrialIsForOneProxyAndTakesThereAllElseAway(t *testing.T) {
	pod := plan.Pod{Namespace: "shop", Name: "api-1"}
	tried, untried := 0, 0
	for _, in := range istioCases(t) {
		for name, kinds := range installations(t) {
			c, w, err := istioCase(t, in, kinds)
			if err != nil {
				continue
			}
			next, err := Istio{}.Plan(c, w)
			if err != nil || len(c.Filters) == 0 {
				continue
			}
			before := c.Without(c.Filters[0].Key)
			held, err := Istio{}.Plan(before, w)
			if err != nil {
				t.Fatal(err)
			}
			trial, err := Istio{}.Try(held, next, c, w, pod)
			if err != nil {
				t.Fatal(err)
			}
			at, _ := locate(c.Target, w.Cluster)
			if trial == nil {
				untried++
				_, codes, _ := choose(c, at, w)
				if untriable(c, at, w, codes) == "" {
					t.Errorf("%s, %s: it is not tried", in, name)
				}
				continue
			}
			tried++
			again, _ := Istio{}.Try(held, next, c, w, pod)
			if !reflect.DeepEqual(trial, again) || trial.Apply.Version == held.Version || trial.Apply.Version == next.Version {
				t.Errorf("%s, %s: another trial each time, or none", in, name)
			}
			if trial.Apply.Chain.ID() != before.ID() || len(trial.Apply.Chain.Filters) != len(before.Filters) || len(trial.Apply.Objects) != len(held.Objects)+1 {
				t.Errorf("%s, %s: what held does not hold meanwhile", in, name)
			}
			if len(trial.Proof.Objects) != 1 || *trial.Proof.Proxies.Only != pod || next.Proxies.Only != nil || len(trial.Proof.Dropped) != len(held.Objects) {
				t.Errorf("%s, %s: another proof than that of one proxy: %+v", in, name, trial.Proof.Proxies)
			}
			var gone []string
			for _, o := range slices.Concat(held.Objects, next.Objects) {
				gone = append(gone, filterNames(o)...)
			}
			for _, o := range trial.Proof.Objects {
				u := &unstructured.Unstructured{Object: o.Content}
				if u.GroupVersionKind().GroupKind() != envoyPatch || !strings.HasSuffix(u.GetName(), "-first") {
					t.Errorf("%s, %s: %s", in, name, o)
				}
				if n, _, _ := unstructured.NestedInt64(o.Content, "spec", "priority"); n != trialPriority {
					t.Errorf("%s, %s: %s has the priority %d", in, name, o, n)
				}
				patches, _, _ := unstructured.NestedSlice(o.Content, "spec", "configPatches")
				var removed []string
				var put []string
				for _, p := range patches {
					p := p.(map[string]any)
					if only, _, _ := unstructured.NestedStringMap(p, "match", "proxy", "metadata"); only["NAME"] != pod.Name || only["NAMESPACE"] != pod.Namespace {
						t.Errorf("%s, %s: a patch of %s is for %v", in, name, o, only)
					}
					if operation, _, _ := unstructured.NestedString(p, "patch", "operation"); operation != "REMOVE" {
						if value, _, _ := unstructured.NestedString(p, "patch", "value", "name"); !slices.Contains(put, value) {
							put = append(put, value)
						}
						continue
					}
					if len(put) > 0 {
						t.Errorf("%s, %s: %s takes away after it has put in", in, name, o)
					}
					filter, _, _ := unstructured.NestedString(p, "match", "listener", "filterChain", "filter", "subFilter", "name")
					removed = append(removed, filter)
				}
				slices.Sort(gone)
				if gone = slices.Compact(gone); !slices.Equal(removed, gone) {
					t.Errorf("%s, %s: %s takes away %q, and should %q", in, name, o, removed, gone)
				}
				if len(put) != len(c.Filters) {
					t.Errorf("%s, %s: %s puts %q there for %d filters", in, name, o, put, len(c.Filters))
				}
			}
		}
	}
	if tried < 30 || untried < 5 {
		t.Errorf("%d are tried and %d are not", tried, untried)
	}
}

func TestWhereACanaryIsNotPossibleThatIsALoss(t *testing.T) {
	w := plan.World{Modules: map[string]plan.Code{}, Cluster: plan.Cluster{Kinds: Istio131()}}
	digest := strings.Repeat("a", 64)
	for _, one := range []struct {
		name   string
		change func(*filter.Spec)
		lost   string
	}{
		{"a filter for HTTP", func(*filter.Spec) {}, ""},
		{"one for TCP", func(s *filter.Spec) { s.Protocol = filter.TCP }, "TCP"},
		{"a pull secret", func(s *filter.Spec) { s.Module.PullSecret = "registry" }, "pull secret"},
		{"a priority above all others", func(s *filter.Spec) { s.Priority = 2_000_000_000 }, "priority"},
	} {
		f := filter.Filter{Key: filter.Key{Namespace: "shop", Name: "x"}, Spec: filter.Spec{Mesh: "istio", Protocol: filter.HTTP, Rollout: filter.RolloutCanary,
			Target: filter.Target{Kind: filter.Workload, Namespace: "shop", Labels: map[string]string{"app": "api"}},
			Module: filter.Module{URL: "https://example.com/x.wasm", SHA256: digest}, Delivery: filter.Delivery{Mode: filter.DeliverDirect}, VMID: "shop/x"}}
		one.change(&f.Spec)
		c := filter.Chain{Mesh: "istio", Target: f.Spec.Target}.With(f)
		p, err := Istio{}.Plan(c, w)
		if err != nil {
			t.Fatalf("%s: %v", one.name, err)
		}
		var lost []string
		for _, l := range p.Losses {
			if l.Field == "spec.rollout" {
				lost = append(lost, l.Reason)
			}
		}
		trial, err := Istio{}.Try(plan.Plan{Chain: c.Without(f.Key)}, p, c, w, plan.Pod{Namespace: "shop", Name: "api-1"})
		if err != nil || (trial == nil) != (one.lost != "") || (one.lost == "") != (lost == nil) || !strings.Contains(strings.Join(lost, ""), one.lost) {
			t.Errorf("%s: tried %t, lost %q: %v", one.name, trial != nil, lost, err)
		}
	}
}

func TestModulesThatOneObjectCannotCarryTogetherAreNotTried(t *testing.T) {
	w := plan.World{Modules: map[string]plan.Code{}, Cluster: plan.Cluster{Kinds: Istio131()}}
	c := filter.Chain{Mesh: "istio", Target: filter.Target{Kind: filter.Workload, Namespace: "shop", Labels: map[string]string{"app": "api"}}}
	for i, name := range []string{"a", "b", "c"} {
		digest := strings.Repeat(name, 64)
		w.Modules[digest] = plan.Code{Inline: make([]byte, 400<<10)}
		c = c.With(filter.Filter{Key: filter.Key{Namespace: "shop", Name: name}, Spec: filter.Spec{Mesh: "istio", Protocol: filter.HTTP,
			Rollout: filter.RolloutCanary, Target: c.Target, Module: filter.Module{SHA256: digest}, Delivery: filter.Delivery{Mode: filter.DeliverInline}, VMID: name}})
		p, err := Istio{}.Plan(c, w)
		if err != nil {
			t.Fatal(err)
		}
		trial, err := Istio{}.Try(plan.Plan{}, p, c, w, plan.Pod{Namespace: "shop", Name: "api-1"})
		if err != nil {
			t.Fatal(err)
		}
		small := i < 2
		lost := slices.ContainsFunc(p.Losses, func(l plan.Loss) bool { return strings.Contains(l.Reason, "larger than one EnvoyFilter") })
		if (trial != nil) != small || lost == small {
			t.Errorf("%d modules of 400 KiB: tried %t, lost %t", i+1, trial != nil, lost)
		}
	}
}
