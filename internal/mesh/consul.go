package mesh

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// ConsulRoot is the namespace where the entry for a whole mesh is made, unless there is one elsewhere or the target names
// another.
const ConsulRoot = "consul"

// ConsulPlugin begins the names of the plugins that are ours, in Consul's entries and in the proxies. The filter's
// namespace and name follow, with a dot between them.
const ConsulPlugin = "meshery.filters/"

var (
	serviceDefaults = schema.GroupKind{Group: "consul.hashicorp.com", Kind: "ServiceDefaults"}
	proxyDefaults   = schema.GroupKind{Group: "consul.hashicorp.com", Kind: "ProxyDefaults"}
)

const (
	consulVersion   = "v1alpha1"
	globalDefaults  = "global"       // the one name that ProxyDefaults may have
	wasmExtension   = "builtin/wasm" // of Consul's extensions
	consulTimeout   = "10s"          // of a proxy's fetching a module; Consul counts whole seconds
	injectedLabel   = "consul.hashicorp.com/connect-inject-status"
	partOf          = "app.kubernetes.io/part-of"
	consulConnected = "connect-proxy" // the only kind of proxies that the extension is for
)

// Consul translates for proxies that Consul configures. A chain is the wasm extensions of one entry, since Consul keeps
// them as one list: ServiceDefaults for a service, ProxyDefaults for a whole mesh. An entry that the user has is shared,
// and their own extensions keep their order around ours.
type Consul struct{}

var _ Mesh = Consul{}

// Name is consul.
func (Consul) Name() string { return "consul" }

// OwnRights is false: a request brings the kubeconfig of the cluster.
func (Consul) OwnRights() bool { return false }

// Complete fills the target's namespace in, and refuses what Consul has no word for.
func (Consul) Complete(f filter.Filter) (filter.Filter, error) {
	var m mistakes
	s := &f.Spec
	s.Mesh = "consul"
	const kinds = "use Service with the service's name, or Mesh"
	switch s.Target.Kind {
	case filter.Service:
		s.Target.Namespace = cmp.Or(s.Target.Namespace, f.Key.Namespace)
	case filter.Mesh:
		s.Target.Namespace = cmp.Or(s.Target.Namespace, ConsulRoot)
	case "":
		m.refuse("spec.target", "there is no default target on Consul", kinds)
	default:
		m.refuse("spec.target.kind", fmt.Sprintf("Consul cannot put a filter on a %s", s.Target.Kind), kinds)
	}
	if s.Delivery.UpstreamPort != 0 && s.Target.Kind == filter.Mesh {
		m.refuse("spec.delivery.upstreamPort", "it would restart every Pod of the mesh", "give the Pods the upstream yourself, or use a target of kind Service")
	}
	if s.Delivery.Mode == filter.DeliverInline {
		m.refuse("spec.delivery.mode", "Consul's entries cannot carry a module's bytes", "use local, direct or served, or leave it out")
	}
	return f, problem.NotSupported.WithFields(f.Key.String(), m)
}

// Reads names the entries that say what the service is, and on Kubernetes the Service that selects its Pods.
func (Consul) Reads(c filter.Chain) plan.Reads {
	t := c.Target
	r := plan.Reads{
		Served:  []schema.GroupKind{serviceDefaults},
		Objects: []plan.Ref{{GroupKind: proxyDefaults, Name: globalDefaults}}, // in whatever namespace
	}
	if t.Kind == filter.Service {
		r.Objects = append(r.Objects, plan.Ref{GroupKind: serviceDefaults, Namespace: t.Namespace, Name: t.Name},
			plan.Ref{GroupKind: service, Namespace: t.Namespace, Name: t.Name})
		if slices.ContainsFunc(c.Filters, func(f filter.Filter) bool { _, ok := asks(f); return ok }) {
			r.Selected = []plan.Ref{{GroupKind: service, Namespace: t.Namespace, Name: t.Name}}
		}
	}
	return r
}

// Plan makes the one entry that holds the whole chain.
func (Consul) Plan(c filter.Chain, w plan.World) (plan.Plan, error) {
	t := c.Target
	_, kubernetes := w.Cluster.Kind(serviceDefaults)
	p := plan.Plan{Chain: c, Rollout: filter.RolloutAll}
	ref := plan.Ref{GroupKind: serviceDefaults, Namespace: t.Namespace, Name: t.Name}
	if t.Kind == filter.Mesh {
		ref = plan.Ref{GroupKind: proxyDefaults, Name: globalDefaults}
		p.Proxies = &plan.Selection{Labels: map[string]string{injectedLabel: "injected"}, Role: "sidecar"}
	} else if o, ok := w.Cluster.Object(plan.Ref{GroupKind: service, Namespace: t.Namespace, Name: t.Name}); ok {
		if selector, _, _ := unstructured.NestedStringMap(o.Content, "spec", "selector"); len(selector) > 0 {
			selector[injectedLabel] = "injected"
			p.Proxies = &plan.Selection{Namespace: t.Namespace, Labels: selector, Role: "sidecar"}
		}
	}
	if !kubernetes {
		p.Proxies = nil
	}
	entry, there := w.Cluster.Object(ref)
	var extensions []any
	var undelivered []string
	var wanted []upstream
	var added []any // of the makers of Pods: which they are, and what they get
	for _, f := range c.Filters {
		if t.Kind == filter.Service {
			if err := sameProtocol(f, w.Cluster, kubernetes); err != nil {
				return plan.Plan{}, err
			}
		}
		code, why := consulDelivery(f, w)
		if why != nil {
			undelivered = append(undelivered, why...)
			continue
		}
		extensions = append(extensions, consulExtension(f, code))
		if code.url != "" {
			p.Sources = append(p.Sources, plan.Source{Filter: f.Key, URL: code.url, SHA256: f.Spec.Module.SHA256})
		}
		if u, ok := asks(f); ok && code.url != "" && kubernetes {
			wanted = append(wanted, u)
		} else if ok {
			p.Losses = append(p.Losses, plan.Loss{Filter: f.Key, Field: "spec.delivery.upstreamPort",
				Reason: "only Pods that fetch their modules get an upstream: elsewhere it is of the service's registration, and files need none"})
		}
		p.Losses = append(p.Losses, consulLosses(f, kubernetes)...)
	}
	if kubernetes && t.Kind == filter.Service {
		if err := keepsUpstreams(p.Sources, c, w.Held); err != nil {
			return plan.Plan{}, err
		}
	}
	if undelivered != nil {
		return plan.Plan{}, problem.NoDelivery.New("%s\n%s", t, strings.Join(undelivered, "\n"))
	}
	// What we made for something else than a chain, such as Image Hub, is shared too.
	by := labelsOf(entry)
	shared := there && (by[managedBy] != manager || by[partOf] != "")
	if len(extensions) > 0 {
		namespace := t.Namespace
		if there {
			namespace, _, _ = unstructured.NestedString(entry.Content, "metadata", "namespace")
		}
		o := plan.Object{Content: entry.Content, Shared: shared, Read: entry.Content}
		if !shared {
			u := &unstructured.Unstructured{Object: map[string]any{}}
			u.SetGroupVersionKind(ref.WithVersion(consulVersion))
			u.SetNamespace(namespace)
			u.SetName(ref.Name)
			u.SetLabels(map[string]string{managedBy: manager})
			o.Content, o.Read = u.Object, nil
			if t.Kind == filter.Service {
				// The service has it from elsewhere. An entry that does not say it makes Consul give the callers another cluster.
				o.Content["spec"] = map[string]any{"protocol": string(c.Filters[0].Spec.Protocol)}
			}
		}
		o.Content = withExtensions(o.Content, extensions)
		p.Objects = []plan.Object{o}
	}
	if len(wanted) > 0 {
		g, err := withUpstreams(t, wanted, needed(entry), w.Cluster)
		if err != nil {
			return plan.Plan{}, err
		}
		p.Objects, p.Restarts, p.Again = append(slices.Clone(g.objects), p.Objects...), g.restarts, g.again
		for _, o := range g.objects {
			notes, _, _ := unstructured.NestedStringMap(o.Content, "metadata", "annotations")
			added = append(added, o.String(), notes[upstreamsNote])
		}
	}
	// Not of the user's own settings, which change the entry and not what we put into it.
	data, err := json.Marshal(append([]any{ref, shared, extensions}, added...))
	if err != nil {
		return plan.Plan{}, fmt.Errorf("marshal the extensions of %s: %w", t, err)
	}
	sum := sha256.Sum256(data)
	p.Version = hex.EncodeToString(sum[:8])
	return p, nil
}

// ConsulKinds are what Consul serves on Kubernetes, of what the translation asks for: the world of someone who renders without
// a cluster.
func ConsulKinds() []plan.Kind {
	return []plan.Kind{{GroupVersionKind: serviceDefaults.WithVersion(consulVersion)}}
}

// sameProtocol refuses a filter for another protocol than the service's, of which Consul would say nothing.
func sameProtocol(f filter.Filter, c plan.Cluster, kubernetes bool) error {
	t := f.Spec.Target
	set := func(ref plan.Ref, path ...string) string {
		o, _ := c.Object(ref)
		v, _, _ := unstructured.NestedString(o.Content, path...)
		return strings.ToLower(v)
	}
	of := fmt.Sprintf("ServiceDefaults %s", t.Name)
	if kubernetes {
		of = fmt.Sprintf("ServiceDefaults %s/%s", t.Namespace, t.Name)
	}
	protocol, by := set(plan.Ref{GroupKind: serviceDefaults, Namespace: t.Namespace, Name: t.Name}, "spec", "protocol"), "says "+of
	if protocol == "" {
		protocol, by = set(plan.Ref{GroupKind: proxyDefaults, Name: globalDefaults}, "spec", "config", "protocol"), "says ProxyDefaults global"
	}
	if protocol == "" {
		protocol, by = string(filter.TCP), "is Consul's default"
	}
	if protocol == string(f.Spec.Protocol) {
		return nil
	}
	fix := fmt.Sprintf("set protocol: %s in %s", f.Spec.Protocol, of)
	if protocol == string(filter.TCP) {
		fix += ", if that is what the service speaks"
		if _, there := c.Object(plan.Ref{GroupKind: serviceDefaults, Namespace: t.Namespace, Name: t.Name}); !there {
			fix += ", or correct spec.target.name, if no service is called " + t.Name
		}
	} else if f.Spec.Protocol == filter.HTTP {
		fix += ", if its clients can do without " + protocol
	}
	return problem.ProtocolDiffers.New("%s: its protocol is %s, which %s, and %s is for %s; %s", t, protocol, by, f.Key, f.Spec.Protocol, fix)
}

// consulDelivery picks the first way that holds, or says of each why it does not.
func consulDelivery(f filter.Filter, w plan.World) (c code, why []string) {
	m, d := f.Spec.Module, f.Spec.Delivery
	known := w.Modules[m.SHA256]
	modes := []filter.DeliveryMode{filter.DeliverLocal, filter.DeliverDirect, filter.DeliverServed}
	if d.Mode != filter.DeliverAuto {
		modes = []filter.DeliveryMode{d.Mode}
	}
	const upstream = "spec.delivery.service does not say which of the proxies' upstreams leads to "
	for _, mode := range modes {
		no := ""
		switch mode {
		case filter.DeliverLocal:
			switch {
			case d.LocalPath != "":
				return code{path: strings.TrimSuffix(d.LocalPath, "/") + "/" + m.SHA256 + ".wasm"}, nil
			case known.Path != "":
				return code{path: known.Path}, nil
			}
			no = "spec.delivery.localPath is not set"
		case filter.DeliverDirect:
			switch {
			case !strings.HasPrefix(m.URL, "https://"):
				no = "it has no https address of its own"
			case d.Service == "":
				no = upstream + "its address"
			default:
				return code{url: m.URL}, nil
			}
		case filter.DeliverServed:
			switch {
			case known.URL == "":
				no = "the adapter serves no modules at an address that proxies reach"
			case d.Service == "":
				no = upstream + "the adapter"
			default:
				return code{url: known.URL}, nil
			}
		}
		why = append(why, fmt.Sprintf("%s: %s: %s", f.Key, mode, no))
	}
	return code{}, why
}

// consulExtension is one entry of envoyExtensions. Consul reads its arguments whatever the case of their names.
func consulExtension(f filter.Filter, c code) map[string]any {
	s := f.Spec
	source := map[string]any{}
	if c.path != "" {
		source["local"] = map[string]any{"filename": c.path}
	} else {
		source["remote"] = map[string]any{
			"httpURI": map[string]any{"service": map[string]any{"name": s.Delivery.Service}, "uri": c.url, "timeout": consulTimeout},
			"sha256":  s.Module.SHA256,
			// A proxy that starts may have the extension before it has reached the upstream.
			"retryPolicy": map[string]any{"numRetries": int64(5), "retryBackOff": map[string]any{"baseInterval": "1s", "maxInterval": "10s"}},
		}
	}
	vm := map[string]any{"vmID": consulSandbox(f, c), "runtime": "v8", "code": source}
	if environment := environmentOf(f, "keyValues", "hostEnvKeys"); len(environment) > 0 {
		vm["environmentVariables"] = environment
	}
	plugin := map[string]any{"name": consulPlugin(f.Key), "vmConfig": vm}
	if s.RootID != "" {
		plugin["rootID"] = s.RootID
	}
	if !s.Config.IsZero() {
		plugin["configuration"] = s.Config.Text()
	}
	listener := filter.Inbound
	if s.Match.Direction != "" {
		listener = s.Match.Direction
	}
	return map[string]any{
		"name":     wasmExtension,
		"required": s.FailurePolicy != filter.FailOpen,
		"arguments": map[string]any{"protocol": string(s.Protocol), "listenerType": string(listener),
			"proxyType": consulConnected, "pluginConfig": plugin},
	}
}

// consulSandbox names a filter's sandbox. Envoy gives a plugin the sandbox that it has when that has the same id and the same
// bytes, but while it fetches a module it takes the bytes for none (createWasm in source/extensions/common/wasm/wasm.cc, Envoy
// 1.40): of two such modules with one id the second would never run. So the digest is part of the id.
func consulSandbox(f filter.Filter, c code) string {
	if c.path != "" {
		return f.Spec.VMID
	}
	return f.Spec.VMID + "@" + f.Spec.Module.SHA256
}

// withExtensions copies an entry with these extensions where ours stand, or at the end.
func withExtensions(entry map[string]any, ours []any) map[string]any {
	spec, _ := entry["spec"].(map[string]any)
	spec = maps.Clone(spec)
	if spec == nil {
		spec = map[string]any{}
	}
	list, _ := spec["envoyExtensions"].([]any)
	at := slices.IndexFunc(list, ownExtension)
	if at < 0 {
		at = len(list)
	}
	list = slices.DeleteFunc(slices.Clone(list), ownExtension) // none of which stands before at
	spec["envoyExtensions"] = slices.Insert(list, at, ours...)
	entry = maps.Clone(entry)
	entry["spec"] = spec
	return entry
}

// ownExtension says whether an extension is ours, by its plugin's name.
func ownExtension(v any) bool { return strings.HasPrefix(extensionPlugin(v), ConsulPlugin) }

// extensionPlugin is the name of a Wasm extension's plugin; empty of other extensions.
func extensionPlugin(v any) string {
	extension, _ := v.(map[string]any)
	if extension["name"] != wasmExtension {
		return ""
	}
	name, _ := valueAt(extension["arguments"], "pluginConfig", "name").(string)
	return name
}

// valueAt follows names in maps, whatever their case is.
func valueAt(v any, path ...string) any {
	for _, name := range path {
		m, _ := v.(map[string]any)
		v = nil
		for k, e := range m {
			if strings.EqualFold(k, name) {
				v = e
			}
		}
	}
	return v
}

func consulPlugin(k filter.Key) string { return ConsulPlugin + k.Namespace + "." + k.Name }

// consulLosses lists what the user set and Consul has no word for.
func consulLosses(f filter.Filter, kubernetes bool) (losses []plan.Loss) {
	lose := func(set bool, field, reason string) {
		if set {
			losses = append(losses, plan.Loss{Filter: f.Key, Field: field, Reason: reason})
		}
	}
	s := f.Spec
	lose(s.Phase != "", "spec.phase", "Consul has no phases: the chain stands right before the router, where the phase orders it among the filters of its target")
	lose(s.Before != "", "spec.before", "Consul places every filter right before the router")
	lose(len(s.Match.Ports) > 0, "spec.match.ports", "Consul's extensions hold for all ports of a service")
	lose(s.FailurePolicy == filter.FailReload, "spec.failurePolicy", "Consul has no FAIL_RELOAD; it fails closed")
	lose(s.Rollout == filter.RolloutCanary, "spec.rollout", "Consul gives a filter to all proxies of its target at once")
	lose(s.Target.Partition != "" && kubernetes, "spec.target.partition", "a cluster's entries are of the partition that its Consul is installed with")
	return losses
}
