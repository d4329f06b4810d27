package filter

import (
	"cmp"
	"maps"
	"slices"
	"strings"
)

// Chain is what stands on a target, in the order requests meet it. Responses meet it in reverse.
type Chain struct {
	Mesh    string   `json:"mesh"`
	Target  Target   `json:"target"`
	Filters []Filter `json:"filters"`
}

// ID names the chain's place over all meshes.
func (c Chain) ID() string { return c.Mesh + "|" + c.Target.ID() }

// With returns the chain with f in its place; a filter of the same key is replaced. c is left as it is.
func (c Chain) With(f Filter) Chain {
	c = c.Without(f.Key)
	c.Filters = append(c.Filters, f)
	slices.SortStableFunc(c.Filters, byOrder)
	return c
}

// Without returns the chain less the filter of that key. c is left as it is.
func (c Chain) Without(k Key) Chain {
	kept := make([]Filter, 0, len(c.Filters)+1)
	for _, f := range c.Filters {
		if f.Key != k {
			kept = append(kept, f)
		}
	}
	c.Filters = kept
	return c
}

// Find returns the filter of that key.
func (c Chain) Find(k Key) (Filter, bool) {
	i := slices.IndexFunc(c.Filters, func(f Filter) bool { return f.Key == k })
	if i < 0 {
		return Filter{}, false
	}
	return c.Filters[i], true
}

// Names lists the filters' keys in order.
func (c Chain) Names() []string {
	names := make([]string, len(c.Filters))
	for i, f := range c.Filters {
		names[i] = f.Key.String()
	}
	return names
}

// Secrets lists every secret that the chain refers to.
func (c Chain) Secrets() []SecretRef {
	var refs []SecretRef
	for _, f := range c.Filters {
		refs = append(refs, f.Secrets()...)
	}
	return refs
}

// Secrets lists every secret that the filter refers to.
func (f Filter) Secrets() []SecretRef {
	refs := f.Spec.Config.Secrets()
	for _, e := range f.Spec.Environment {
		if e.Value != nil {
			refs = append(refs, e.Value.Secrets()...)
		}
	}
	return refs
}

// Resolved returns the filter with every secret reference replaced by its value. It must never be stored or shown.
func (f Filter) Resolved(lookup func(SecretRef) (string, error)) (Filter, error) {
	var err error
	if f.Spec.Config, err = f.Spec.Config.Resolve(lookup); err != nil {
		return Filter{}, err
	}
	f.Spec.Environment = slices.Clone(f.Spec.Environment)
	for i, e := range f.Spec.Environment {
		if e.Value == nil {
			continue
		}
		v, err := e.Value.Resolve(lookup)
		if err != nil {
			return Filter{}, err
		}
		f.Spec.Environment[i].Value = &v
	}
	return f, nil
}

// phases gives the order of Istio's WasmPlugin phases: AUTHN, AUTHZ, STATS, then unspecified.
var phases = map[Phase]int{Authn: 0, Authz: 1, Stats: 2, "": 3}

// byOrder compares two filters by phase, then priority (higher first), then name, so that creation time never decides.
func byOrder(a, b Filter) int {
	return cmp.Or(
		cmp.Compare(phases[a.Spec.Phase], phases[b.Spec.Phase]),
		cmp.Compare(b.Spec.Priority, a.Spec.Priority),
		cmp.Compare(a.Key.Namespace, b.Key.Namespace),
		cmp.Compare(a.Key.Name, b.Key.Name),
	)
}

func joinLabels(labels map[string]string) string {
	parts := make([]string, 0, len(labels))
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		parts = append(parts, k+"="+labels[k])
	}
	return strings.Join(parts, ",")
}
