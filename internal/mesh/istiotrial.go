package mesh

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

// trialPriority is what the EnvoyFilter of a trial has, so that Istio works through it after all others.
const trialPriority = math.MaxInt32 / 2

// trialSuffix ends the name of a trial's object.
const trialSuffix = "-first"

// maxTrialBytes bounds the modules that a trial's one object carries: an object of Kubernetes has 1.5 MiB at most, and
// base64 makes a third more of them.
const maxTrialBytes = 1 << 20

// untriable says why no single proxy can try a chain first; empty when one can. Only an EnvoyFilter names a proxy.
func untriable(c filter.Chain, at site, w plan.World, codes []code) string {
	if _, ok := w.Cluster.Kind(envoyPatch); !ok {
		return "the cluster serves no EnvoyFilter, which alone names one proxy"
	}
	if at.waypoint {
		return "an EnvoyFilter, which alone names one proxy, does not reach waypoints"
	}
	size := 0
	for i, f := range c.Filters {
		size += len(codes[i].inline)
		switch {
		case f.Spec.Protocol == filter.TCP:
			return "a filter for TCP is not taken away from one proxy alone"
		case f.Spec.Module.PullSecret != "":
			return "an EnvoyFilter, which alone names one proxy, cannot name a pull secret"
		case int(f.Spec.Priority) > trialPriority/2 || int(f.Spec.Priority) < -trialPriority/2:
			return "its priority leaves no room above it"
		}
	}
	if size > maxTrialBytes {
		return "the chain's modules are together larger than one EnvoyFilter, which alone names one proxy, can carry"
	}
	return ""
}

// Try has an EnvoyFilter take everything that is the target's away from the proxy of one Pod, and put the chain there. It
// names other filters than the plans do, and takes away what holds and what is to hold alike. So whatever the order in
// which it and the plans' objects come and go, each request meets one chain or the other, once and whole: that is why it is
// one object, which istiod never sees in part.
//
// A filter of phase authz or stats stands right before the router there, since an EnvoyFilter knows no phases.
func (Istio) Try(held, next plan.Plan, c filter.Chain, w plan.World, pod plan.Pod) (*plan.Trial, error) {
	at, err := locate(c.Target, w.Cluster)
	if err != nil || len(c.Filters) == 0 {
		return nil, err
	}
	_, codes, err := choose(c, at, w)
	if err != nil || untriable(c, at, w, codes) != "" {
		return nil, err
	}
	var names, dropped []string
	for _, o := range held.Objects {
		dropped = append(dropped, o.String())
	}
	for _, o := range slices.Concat(held.Objects, next.Objects) {
		names = append(names, filterNames(o)...)
	}
	slices.Sort(names)
	var patches []any
	for _, name := range slices.Compact(names) {
		patches = append(patches, map[string]any{"applyTo": "HTTP_FILTER", "patch": map[string]any{"operation": "REMOVE"},
			"match": map[string]any{"context": "ANY", "listener": map[string]any{"filterChain": map[string]any{
				"filter": map[string]any{"name": connectionManager, "subFilter": map[string]any{"name": name}}}}}})
	}
	patch, _ := w.Cluster.Kind(envoyPatch)
	name := objectName(c.Filters[0].Key, c.Target) + trialSuffix
	var puts []any
	var tried []string
	for i, f := range c.Filters {
		spec, _ := envoyPatchSpec(patch, f, fmt.Sprintf("meshery.filters/%s.%s.%03d", at.namespace, name, i), at, codes[i], 0)
		tried = append(tried, f.Key.String())
		if own := spec["configPatches"].([]any); f.Spec.Before == "" && f.Spec.Phase == filter.Authn {
			puts = slices.Concat(own, puts) // what is put first of all last stands foremost
		} else {
			puts = append(puts, own...)
		}
	}
	patches = append(patches, puts...)
	for _, p := range patches {
		p.(map[string]any)["match"].(map[string]any)["proxy"] = map[string]any{"metadata": map[string]any{"NAME": pod.Name, "NAMESPACE": pod.Namespace}}
	}
	spec := at.selection(patch)
	spec["configPatches"], spec["priority"] = patches, int64(trialPriority)
	o := object(patch, c.Filters[0], at.namespace, name, spec)
	(&unstructured.Unstructured{Object: o.Content}).SetAnnotations(map[string]string{filterAnnotation: strings.Join(tried, listSeparator)})
	objects := []plan.Object{o}
	only := *next.Proxies
	only.Only = &pod
	t := &plan.Trial{
		Apply: plan.Plan{Chain: held.Chain, Objects: slices.Concat(held.Objects, objects), Proxies: next.Proxies},
		Proof: plan.Plan{Chain: next.Chain, Objects: objects, Proxies: &only, Dropped: dropped},
	}
	if t.Apply.Version, err = versionOf(t.Apply.Objects); err != nil {
		return nil, err
	}
	t.Proof.Version = t.Apply.Version
	return t, nil
}

// filterNames are what proxies call the filter that an object puts there.
func filterNames(o plan.Object) []string {
	u := &unstructured.Unstructured{Object: o.Content}
	name := u.GetNamespace() + "." + u.GetName()
	switch u.GroupVersionKind().GroupKind() {
	case envoyPatch:
		return []string{"meshery.filters/" + name}
	case wasmPlugin: // as Istio calls it since 1.30, and before
		return []string{"extensions.istio.io/trafficextension/" + name + "~istio-translated-wasmplugin", "extensions.istio.io/wasmplugin/" + name}
	}
	return []string{"extensions.istio.io/" + strings.ToLower(u.GetKind()) + "/" + name}
}
