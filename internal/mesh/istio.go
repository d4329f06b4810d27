package mesh

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// IstioRoot is the namespace whose objects hold for a whole mesh, unless the mesh's configuration names another.
const IstioRoot = "istio-system"

// What objects of ours carry, besides the label that Kubernetes recommends for it.
const (
	managedBy        = "app.kubernetes.io/managed-by"
	manager          = "meshery-filters"
	filterAnnotation = "filters.meshery.io/filter"
	digestAnnotation = "filters.meshery.io/sha256"
	listSeparator    = ", " // where an object is for several filters
)

// The kinds that carry filters, the best first, and those that a target may stand for.
var (
	trafficExtension = schema.GroupKind{Group: "extensions.istio.io", Kind: "TrafficExtension"}
	wasmPlugin       = schema.GroupKind{Group: "extensions.istio.io", Kind: "WasmPlugin"}
	envoyPatch       = schema.GroupKind{Group: "networking.istio.io", Kind: "EnvoyFilter"}

	service      = schema.GroupKind{Kind: "Service"}
	namespace    = schema.GroupKind{Kind: "Namespace"}
	gateway      = schema.GroupKind{Group: "gateway.networking.k8s.io", Kind: "Gateway"}
	istioGateway = schema.GroupKind{Group: "networking.istio.io", Kind: "Gateway"}
	workloads    = []schema.GroupKind{{Group: "apps", Kind: "Deployment"}, {Group: "apps", Kind: "StatefulSet"}, {Group: "apps", Kind: "DaemonSet"}}
)

// Labels that Istio gives a meaning to.
const (
	gatewayLabel      = "gateway.networking.k8s.io/gateway-name" // of the pods of a Gateway API gateway
	waypointLabel     = "istio.io/use-waypoint"                  // of a Service or Namespace
	waypointNamespace = "istio.io/use-waypoint-namespace"        // beside it
	waypointClass     = "istio-waypoint"                         // of a Gateway
)

// Istio translates for proxies that istiod configures. Each filter is one object: a TrafficExtension where the cluster
// serves that kind, else a WasmPlugin, else an EnvoyFilter. A chain is of one kind, since order between kinds is none
// that anybody could ask for.
type Istio struct{}

var _ Mesh = Istio{}

// Name is istio.
func (Istio) Name() string { return "istio" }

// OwnRights is false: a request brings the kubeconfig of the cluster.
func (Istio) OwnRights() bool { return false }

// Complete fills the target's namespace in, and refuses targets that Istio has no word for.
func (Istio) Complete(f filter.Filter) (filter.Filter, error) {
	var m mistakes
	s := &f.Spec
	s.Mesh = "istio"
	const kinds = "use Workload, Service, Gateway, Namespace or Mesh"
	switch s.Target.Kind {
	case filter.Workload, filter.Service, filter.Gateway, filter.Namespace:
		if s.Target.Namespace == "" {
			s.Target.Namespace = f.Key.Namespace
		}
	case filter.Mesh:
		if s.Target.Namespace == "" {
			s.Target.Namespace = IstioRoot
		}
	case "":
		m.refuse("spec.target", "there is no default target on Istio", kinds)
	default:
		m.refuse("spec.target.kind", fmt.Sprintf("Istio cannot put a filter on a %s", s.Target.Kind), kinds)
	}
	if s.Target.Partition != "" {
		m.refuse("spec.target.partition", "Istio has no partitions", "leave it out")
	}
	for i, e := range s.Environment {
		if strings.HasPrefix(e.Name, "ISTIO_META_") {
			m.refuse(fmt.Sprintf("spec.environment[%d].name", i), "Istio reads variables of this name itself and takes them away", "use another name")
		}
	}
	return f, problem.NotSupported.WithFields(f.Key.String(), m)
}

// Reads names the kinds that carry filters, and what the target's name may stand for.
func (Istio) Reads(c filter.Chain) plan.Reads {
	var r plan.Reads
	t := c.Target
	named := len(t.Labels) == 0 && t.Name != ""
	if named && t.Kind != filter.Workload {
		r.Kinds = []schema.GroupKind{trafficExtension, wasmPlugin, envoyPatch}
	} else { // what an EnvoyFilter can refer to does not matter
		r.Kinds, r.Served = []schema.GroupKind{trafficExtension, wasmPlugin}, []schema.GroupKind{envoyPatch}
	}
	first := func(kinds ...schema.GroupKind) {
		for _, k := range kinds {
			r.FirstOf = append(r.FirstOf, plan.Ref{GroupKind: k, Namespace: t.Namespace, Name: t.Name})
		}
	}
	switch {
	case !named:
	case t.Kind == filter.Workload:
		first(workloads...)
	case t.Kind == filter.Service:
		r.Objects = []plan.Ref{{GroupKind: service, Namespace: t.Namespace, Name: t.Name}, {GroupKind: namespace, Name: t.Namespace}}
	case t.Kind == filter.Gateway:
		first(gateway, istioGateway)
	}
	return r
}

// Plan makes an object for each filter of the chain.
func (Istio) Plan(c filter.Chain, w plan.World) (plan.Plan, error) {
	p := plan.Plan{Chain: c, Rollout: filter.RolloutAll}
	at, err := locate(c.Target, w.Cluster)
	if err == nil {
		p.Proxies = at.proxies(c.Target)
	}
	// Where the target is gone, what was there can be taken away all the same.
	if len(c.Filters) > 0 {
		if err != nil {
			return plan.Plan{}, err
		}
		carrier, codes, err := choose(c, at, w)
		if err != nil {
			return plan.Plan{}, err
		}
		p.Unnamed = carrier.GroupKind() != envoyPatch
		order := priorities(c.Filters, p.Unnamed)
		for i, f := range c.Filters {
			name := objectName(f.Key, c.Target)
			var spec map[string]any
			var losses []plan.Loss
			if carrier.GroupKind() == envoyPatch {
				spec, losses = envoyPatchSpec(carrier, f, "meshery.filters/"+at.namespace+"."+name, at, codes[i], order[i])
			} else {
				spec, losses = pluginSpec(carrier, f, at, codes[i], order[i])
			}
			p.Objects = append(p.Objects, object(carrier, f, at.namespace, name, spec))
			if u := codes[i].url; u != "" {
				p.Sources = append(p.Sources, plan.Source{Filter: f.Key, URL: u, SHA256: f.Spec.Module.SHA256})
			}
			p.Losses = append(p.Losses, append(losses, at.losses(f, untriable(c, at, w, codes))...)...)
		}
	}
	if p.Version, err = versionOf(p.Objects); err != nil {
		return plan.Plan{}, fmt.Errorf("marshal the objects of %s: %w", c.Target, err)
	}
	return p, nil
}

// versionOf changes whenever the objects do.
func versionOf(objects []plan.Object) (string, error) {
	data, err := json.Marshal(objects) // which sorts keys
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8]), nil
}

func object(k plan.Kind, f filter.Filter, namespace, name string, spec map[string]any) plan.Object {
	o := &unstructured.Unstructured{Object: map[string]any{"spec": spec}}
	o.SetGroupVersionKind(k.GroupVersionKind)
	o.SetNamespace(namespace)
	o.SetName(name)
	o.SetLabels(map[string]string{managedBy: manager})
	o.SetAnnotations(map[string]string{filterAnnotation: f.Key.String(), digestAnnotation: f.Spec.Module.SHA256})
	return plan.Object{Content: o.Object}
}

// objectName is a DNS label that tells a person the filter and the target, and that no other filter or target has: a
// filter that moves is on both its targets for a while.
func objectName(k filter.Key, t filter.Target) string {
	word := t.Name
	if word == "" {
		for _, label := range slices.Sorted(maps.Keys(t.Labels)) {
			word = t.Labels[label]
			break
		}
	}
	if word == "" {
		word = string(t.Kind)
	}
	sum := sha256.Sum256([]byte(k.String() + "|" + t.ID()))
	return cut(k.Name, 31) + "-" + cut(word, 20) + "-" + hex.EncodeToString(sum[:5])
}

// cut makes at most n characters of a DNS label out of text.
func cut(text string, n int) string {
	text = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(text))
	return strings.Trim(text[:min(len(text), n)], "-")
}

// site is where a target's proxies are, in Istio's words.
type site struct {
	namespace string
	labels    map[string]string // of the pods; with neither labels nor a ref, all in the namespace
	ref       *plan.Ref         // what a policy refers to, where it does not choose by labels
	gateway   bool              // the proxies stand at the edge: one direction, and another listener than sidecars have
	waypoint  bool              // the proxies stand before workloads that have none of their own
	through   *plan.Ref         // the waypoint that a Service is behind
}

// proxies chooses the site's proxies by their Pods. Objects in the root namespace hold for all namespaces, but for those
// that name a gateway.
func (at site) proxies(t filter.Target) *plan.Selection {
	s := &plan.Selection{Namespace: at.namespace, Labels: at.labels, Role: "sidecar"}
	switch {
	case at.waypoint:
		s.Role = "waypoint"
	case at.gateway:
		s.Role = "router"
	}
	switch {
	case at.waypoint && at.through != nil:
		s.Namespace, s.Labels = at.through.Namespace, map[string]string{gatewayLabel: at.through.Name}
	case at.ref != nil:
		s.Labels = map[string]string{gatewayLabel: at.ref.Name}
	case t.Kind == filter.Mesh || at.namespace == IstioRoot:
		s.Namespace = ""
	}
	return s
}

// locate finds the target's proxies.
func locate(t filter.Target, c plan.Cluster) (site, error) {
	at := site{namespace: t.Namespace, labels: t.Labels, gateway: t.Kind == filter.Gateway}
	find := func(k schema.GroupKind) (plan.Object, bool) {
		return c.Object(plan.Ref{GroupKind: k, Namespace: t.Namespace, Name: t.Name})
	}
	if len(t.Labels) > 0 {
		return at, nil
	}
	kind := string(t.Kind)
	switch t.Kind {
	case filter.Workload:
		kind = "Deployment, StatefulSet or DaemonSet"
		for _, k := range workloads {
			o, ok := find(k)
			if !ok {
				continue
			}
			if at.labels, _, _ = unstructured.NestedStringMap(o.Content, "spec", "selector", "matchLabels"); len(at.labels) == 0 {
				return at, problem.TargetNotFound.New("%s: %s %s/%s does not choose its pods by labels alone; use target.labels with labels that its pods have", t, k.Kind, t.Namespace, t.Name)
			}
			return at, nil
		}
	case filter.Service:
		o, ok := find(service)
		if !ok {
			break
		}
		by := labelsOf(o)
		if by[waypointLabel] == "" {
			ns, _ := c.Object(plan.Ref{GroupKind: namespace, Name: t.Namespace})
			by = labelsOf(ns)
		}
		if use := by[waypointLabel]; use != "" && use != "none" {
			at.waypoint, at.ref = true, &plan.Ref{GroupKind: service, Name: t.Name}
			at.through = &plan.Ref{GroupKind: gateway, Namespace: cmp.Or(by[waypointNamespace], t.Namespace), Name: use}
			return at, nil
		}
		if at.labels, _, _ = unstructured.NestedStringMap(o.Content, "spec", "selector"); len(at.labels) == 0 {
			return at, problem.TargetNotFound.New("%s: the Service selects no pods, so there is no sidecar behind it", t)
		}
		return at, nil
	case filter.Gateway:
		if o, ok := find(gateway); ok {
			class, _, _ := unstructured.NestedString(o.Content, "spec", "gatewayClassName")
			at.waypoint = class == waypointClass
			at.gateway = !at.waypoint
			at.ref = &plan.Ref{GroupKind: gateway, Name: t.Name}
			return at, nil
		}
		if o, ok := find(istioGateway); ok {
			selector, _, _ := unstructured.NestedStringMap(o.Content, "spec", "selector")
			return at, problem.TargetNotFound.New("%s is a Gateway of networking.istio.io, which does not say where its pods are: name their namespace and labels instead, target: {kind: Gateway, namespace: NAMESPACE, labels: %s}", t, flow(selector))
		}
	default: // Namespace, Mesh
		return at, nil
	}
	return at, problem.TargetNotFound.New("%s: the cluster has no %s of that name", t, kind)
}

func labelsOf(o plan.Object) map[string]string {
	labels, _, _ := unstructured.NestedStringMap(o.Content, "metadata", "labels")
	return labels
}

// flow writes labels as a person would.
func flow(labels map[string]string) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		parts = append(parts, fmt.Sprintf("%s: %q", k, labels[k]))
	}
	return "{" + strings.Join(parts, ", ") + "}"
}

// reachable says why a kind cannot name the site, if it cannot.
func (at site) reachable(k plan.Kind) (why string) {
	switch {
	case !at.waypoint:
	case k.GroupKind() == envoyPatch:
		return "an EnvoyFilter does not reach waypoints"
	case !k.Has("spec.targetRefs"):
		return "it has no targetRefs, which is how a waypoint is reached"
	}
	return ""
}

// selection begins a kind's spec with what names the site: a reference where there is one and the kind has them, else
// labels.
func (at site) selection(k plan.Kind) map[string]any {
	labels := at.labels
	if at.ref != nil {
		if k.Has("spec.targetRefs") {
			return map[string]any{"targetRefs": []any{map[string]any{"group": at.ref.Group, "kind": at.ref.Kind, "name": at.ref.Name}}}
		}
		labels = map[string]string{gatewayLabel: at.ref.Name}
	}
	if len(labels) == 0 {
		return map[string]any{}
	}
	values := map[string]any{}
	for l, v := range labels {
		values[l] = v
	}
	if k.GroupKind() == envoyPatch {
		return map[string]any{"workloadSelector": map[string]any{"labels": values}}
	}
	return map[string]any{"selector": map[string]any{"matchLabels": values}}
}

// losses are what no kind has a word for, there or anywhere; untriable says why a canary is not possible.
func (at site) losses(f filter.Filter, untriable string) (losses []plan.Loss) {
	if f.Spec.Match.Direction != "" && (at.gateway || at.waypoint) {
		losses = append(losses, plan.Loss{Filter: f.Key, Field: "spec.match.direction", Reason: "a gateway or waypoint has one direction only"})
	}
	if f.Spec.Rollout == filter.RolloutCanary && untriable != "" {
		losses = append(losses, plan.Loss{Filter: f.Key, Field: "spec.rollout", Reason: "all proxies of the target get it at once: " + untriable})
	}
	return losses
}

// code is how the proxies get one filter's module.
type code struct {
	inline []byte
	url    string
	pinned bool   // by the digest in url's own text
	path   string // on the proxies' machines
}

// maxInline bounds a module that travels inside an object, in bytes: with base64 and what is around it an object stays
// well under the 1.5 MiB that etcd takes.
const maxInline = 512 << 10

// deliver picks the first way that holds of those the kind has, or says of each why it does not.
func deliver(f filter.Filter, k schema.GroupKind, w plan.World) (c code, mode filter.DeliveryMode, why []string) {
	m, d := f.Spec.Module, f.Spec.Delivery
	known := w.Modules[m.SHA256]
	modes := []filter.DeliveryMode{filter.DeliverInline, filter.DeliverDirect, filter.DeliverServed, filter.DeliverLocal}
	if d.Mode != filter.DeliverAuto {
		modes = []filter.DeliveryMode{d.Mode}
	}
	for _, mode := range modes {
		no := ""
		switch mode {
		case filter.DeliverInline:
			switch {
			case k != envoyPatch:
				no = "a " + k.Kind + " cannot carry bytes"
			case known.Inline == nil:
				no = "its bytes are not at hand"
			case len(known.Inline) > maxInline:
				no = fmt.Sprintf("it has %d bytes, and an object carries at most %d", len(known.Inline), maxInline)
			default:
				return code{inline: known.Inline}, mode, nil
			}
		case filter.DeliverDirect:
			oci := strings.HasPrefix(m.URL, "oci://")
			pinned := oci && strings.Contains(m.URL, "@sha256:")
			switch {
			case m.URL == "" || strings.HasPrefix(m.URL, "meshery://"):
				no = "it has no https or oci address of its own"
			case oci && !pinned:
				no = "its oci address has no digest (oci://HOST/REPOSITORY@sha256:…)"
			case oci && m.PullSecret != "" && k == envoyPatch:
				no = "an EnvoyFilter cannot name a pull secret"
			default:
				return code{url: m.URL, pinned: pinned}, mode, nil
			}
		case filter.DeliverServed:
			if known.URL != "" {
				return code{url: known.URL}, mode, nil
			}
			no = "the adapter serves no modules at an address that proxies reach"
		case filter.DeliverLocal:
			switch {
			case d.LocalPath != "":
				return code{path: strings.TrimSuffix(d.LocalPath, "/") + "/" + m.SHA256 + ".wasm"}, mode, nil
			case known.Path != "":
				return code{path: known.Path}, mode, nil
			}
			no = "spec.delivery.localPath is not set"
		}
		why = append(why, fmt.Sprintf("%s: %s", mode, no))
	}
	return code{}, "", why
}

// choose picks the kind that carries the whole chain, and how each module is delivered with it: a plugin, unless a
// filter needs what plugins do not have, or travels inline by auto's choice. What has a phase that an EnvoyFilter cannot
// keep goes as a plugin whenever that is possible.
func choose(c filter.Chain, at site, w plan.World) (plan.Kind, []code, error) {
	var plugin plan.Kind
	var plugins bool
	for _, gk := range []schema.GroupKind{trafficExtension, wasmPlugin} {
		if plugin, plugins = w.Cluster.Kind(gk); plugins {
			break
		}
	}
	patch, patches := w.Cluster.Kind(envoyPatch)
	if !plugins && !patches {
		return plan.Kind{}, nil, problem.KindMissing.New("%s: none of TrafficExtension, WasmPlugin and EnvoyFilter is served", c.Target)
	}
	var byPlugin, byPatch []code
	var notPlugin, notPatch []string // why not
	var undelivered bool
	inline, phased := false, false
	for _, f := range c.Filters {
		if plugins {
			why := misfits(plugin, f, at)
			code, _, not := deliver(f, plugin.GroupKind(), w)
			undelivered = undelivered || not != nil
			byPlugin = append(byPlugin, code)
			for _, w := range append(why, not...) {
				notPlugin = append(notPlugin, fmt.Sprintf("%s as %s: %s", f.Key, plugin.GroupVersionKind.Kind, w))
			}
		}
		if patches {
			var why []string
			if no := at.reachable(patch); no != "" {
				why = append(why, no)
			}
			code, mode, not := deliver(f, envoyPatch, w)
			undelivered = undelivered || not != nil
			inline = inline || mode == filter.DeliverInline
			phased = phased || f.Spec.Before == "" && (f.Spec.Phase == filter.Authz || f.Spec.Phase == filter.Stats)
			byPatch = append(byPatch, code)
			for _, w := range append(why, not...) {
				notPatch = append(notPatch, fmt.Sprintf("%s as EnvoyFilter: %s", f.Key, w))
			}
		}
	}
	plugins, patches = plugins && notPlugin == nil, patches && notPatch == nil
	switch {
	case plugins && !(patches && inline && !phased):
		return plugin, byPlugin, nil
	case patches:
		return patch, byPatch, nil
	}
	reasons := append(notPlugin, notPatch...)
	kind := problem.NotSupported
	if undelivered {
		kind = problem.NoDelivery
	}
	return plan.Kind{}, nil, kind.New("%s\n%s", c.Target, strings.Join(reasons, "\n"))
}

// priorities gives every filter one of its own, so that the age of objects never decides: what the user set where that
// keeps the order, else the least number above the next filter's. Plugins count within each phase; patches over all.
func priorities(filters []filter.Filter, byPhase bool) []int64 {
	p := make([]int64, len(filters))
	n := len(filters)
	for i := n - 1; i >= 0; i-- {
		p[i] = int64(filters[i].Spec.Priority)
		if i+1 < n && (!byPhase || filters[i].Spec.Phase == filters[i+1].Spec.Phase) {
			p[i] = max(p[i], p[i+1]+1)
		}
	}
	// Both bounds keep the order, and leave room for the numbers of a whole chain and for a changed sign.
	for i := range p {
		p[i] = min(max(p[i], -math.MaxInt32+int64(n-1-i)), math.MaxInt32-int64(i))
	}
	return p
}

// Istio131 is what Istio 1.31 serves, of the fields that the translation asks for: the world of someone who renders
// without a cluster.
func Istio131() []plan.Kind {
	under := func(at string) map[string][]string {
		return map[string][]string{
			"spec.match": nil, "spec.targetRefs": nil,
			at + ".failStrategy":    {"FAIL_CLOSE", "FAIL_OPEN", "FAIL_RELOAD"},
			at + ".imagePullPolicy": {"UNSPECIFIED_POLICY", "IfNotPresent", "Always"},
			at + ".type":            {"UNSPECIFIED_PLUGIN_TYPE", "HTTP", "NETWORK"},
			at + ".vmConfig.env":    nil,
		}
	}
	return []plan.Kind{
		{GroupVersionKind: trafficExtension.WithVersion("v1alpha1"), Fields: under("spec.wasm")},
		{GroupVersionKind: wasmPlugin.WithVersion("v1alpha1"), Fields: under("spec")},
		{GroupVersionKind: envoyPatch.WithVersion("v1alpha3"), Fields: map[string][]string{"spec.priority": nil, "spec.targetRefs": nil}},
	}
}
