package istiod

import (
	"context"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/survey"
)

// canonical is a label that Istio gives every Pod that has one of its proxies: those it injects, gateways and waypoints.
const canonical = "service.istio.io/canonical-name"

var (
	envoyFilter = schema.GroupKind{Group: "networking.istio.io", Kind: "EnvoyFilter"}
	pluginKinds = []schema.GroupKind{{Group: "extensions.istio.io", Kind: "TrafficExtension"}, {Group: "extensions.istio.io", Kind: "WasmPlugin"}}
)

// Surveyed is how a mesh is surveyed; kube.Cluster is one.
type Surveyed interface {
	Cluster
	// Labelled lists the Pods that run in a namespace, or with none in all, and that have the label.
	Labelled(ctx context.Context, namespace, label string) ([]plan.Pod, error)
	// Names lists all objects of a kind, as plan.Object.String has them; none where it is not served.
	Names(context.Context, schema.GroupKind) ([]string, error)
	// Foreign gives the objects of a kind that do not have our label.
	Foreign(context.Context, schema.GroupKind) ([]plan.Object, error)
}

// Proxies are those of a mesh, for a survey. Whoever made it calls Close.
type Proxies struct {
	cluster Surveyed
	watch   *watch
}

var _ survey.Mesh = (*Proxies)(nil)

// ProxiesOf makes it, without a request.
func ProxiesOf(c Surveyed) *Proxies {
	w := newWatch(c, plan.Plan{}, Silence)
	w.all = true
	return &Proxies{c, w}
}

// Close ends the connections to proxies.
func (p *Proxies) Close() { p.watch.close() }

// Proxies lists the Pods that have one.
func (p *Proxies) Proxies(ctx context.Context, namespace string) ([]plan.Pod, error) {
	return p.cluster.Labelled(ctx, namespace, canonical)
}

// Running reads a proxy's listeners. What Istio's agent has put into the place of a filter counts as that filter.
func (p *Proxies) Running(ctx context.Context, pod plan.Pod) (running []plan.WasmFilter, err error) {
	v, err := p.watch.visit(ctx, pod)
	if err != nil {
		return nil, err
	}
	for _, l := range slices.Concat(v.lists...) {
		e := l.entry
		if e == nil {
			e = v.configs[l.subject]
		}
		switch {
		case e == nil:
		case e.kind == "Wasm" && !survey.Builtin(e.plugin), e.kind == "RBAC" && strings.HasPrefix(e.name, plugins):
			if f := survey.FilterOf(e.name, e.plugin); !slices.Contains(running, f) {
				running = append(running, f)
			}
		}
	}
	return running, nil
}

// Explained finds the objects by the filters' names. Those of the names that Istio and we do not give are looked for in what
// EnvoyFilters patch in.
func (p *Proxies) Explained(ctx context.Context, names []string) (map[string]bool, error) {
	there := map[string]bool{}
	for _, kind := range append([]schema.GroupKind{envoyFilter}, pluginKinds...) {
		objects, err := p.cluster.Names(ctx, kind)
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			there[o] = true
		}
	}
	explained := map[string]bool{}
	others := false
	for _, name := range names {
		subject, ok := subjectOf(name)
		if strings.HasPrefix(name, patches) {
			subject = objectOf(subject)
		}
		explained[name] = there[subject]
		others = others || !ok || strings.HasPrefix(name, patches) && !there[subject]
	}
	if !others {
		return explained, nil
	}
	objects, err := p.cluster.Foreign(ctx, envoyFilter)
	if err != nil {
		return nil, err
	}
	for _, o := range objects {
		for name := range textsOf(o.Content["spec"], map[string]bool{}) {
			explained[name] = true
		}
	}
	return explained, nil
}

// textsOf collects all texts of a value.
func textsOf(v any, texts map[string]bool) map[string]bool {
	switch v := v.(type) {
	case string:
		texts[v] = true
	case []any:
		for _, e := range v {
			textsOf(e, texts)
		}
	case map[string]any:
		for _, e := range v {
			textsOf(e, texts)
		}
	}
	return texts
}

// Settling is how long istiod may put a push off.
func (p *Proxies) Settling() time.Duration { return debouncing }
