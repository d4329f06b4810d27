// Package mesh translates chains into what each mesh's control plane or proxies take. It is pure: no I/O, no clock, no
// randomness, so that every translation is a golden file.
package mesh

import (
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Mesh translates for one mesh.
type Mesh interface {
	// Name is what spec.mesh says.
	Name() string
	// OwnRights says whether the adapter changes the mesh with its own rights, whatever a request brings.
	OwnRights() bool
	// Complete fills in what the document left to the mesh, and refuses what the mesh can never do.
	Complete(filter.Filter) (filter.Filter, error)
	// Reads says what of a cluster must be in the chain's world.
	Reads(filter.Chain) plan.Reads
	// Plan says what must hold so that the chain, whose secrets are resolved, runs in this world.
	Plan(filter.Chain, plan.World) (plan.Plan, error)
}

// Carries says whether an object of a plan is for the filter, alone or with others.
func Carries(o plan.Object, k filter.Key) bool {
	of := (&unstructured.Unstructured{Object: o.Content}).GetAnnotations()[filterAnnotation]
	spec, _ := o.Content["spec"].(map[string]any)
	extensions, _ := spec["envoyExtensions"].([]any)
	return slices.Contains(strings.Split(of, listSeparator), k.String()) ||
		slices.ContainsFunc(extensions, func(e any) bool { return extensionPlugin(e) == consulPlugin(k) })
}

// mistakes are what a filter asks of a mesh that has no word for it.
type mistakes []problem.Field

func (m *mistakes) refuse(path, cause, remedy string) {
	*m = append(*m, problem.Field{Path: path, Cause: cause, Remedy: remedy})
}

// Trier is a Mesh that can have one proxy run a chain before the others do.
type Trier interface {
	// Try plans that the proxy of one Pod runs the chain c, whose secrets are resolved and of which next is the plan, while
	// all others go on with what is held. Nil: there it cannot be done.
	Try(held, next plan.Plan, c filter.Chain, w plan.World, pod plan.Pod) (*plan.Trial, error)
}

var _ Trier = Istio{}

var known = []Mesh{Envoy{}, Istio{}, Consul{}}

// Names lists the meshes that this version translates for.
func Names() []string {
	names := make([]string, len(known))
	for i, m := range known {
		names[i] = m.Name()
	}
	return names
}

// Find returns the mesh of that name.
func Find(name string) (Mesh, error) {
	for _, m := range known {
		if m.Name() == name {
			return m, nil
		}
	}
	return nil, problem.MeshNotSupported.New("spec.mesh is %q, and this version knows %s", name, strings.Join(Names(), ", "))
}

// signs are the kinds by which a cluster shows which meshes it has, those included that nothing here translates for.
var signs = []struct {
	mesh  string
	kinds []schema.GroupKind
}{
	{"istio", []schema.GroupKind{trafficExtension, wasmPlugin, envoyPatch}},
	{"consul", []schema.GroupKind{serviceDefaults}},
	{"envoy-gateway", []schema.GroupKind{{Group: "gateway.envoyproxy.io", Kind: "EnvoyExtensionPolicy"}}},
	{"kuma", []schema.GroupKind{{Group: "kuma.io", Kind: "Mesh"}}},
}

// Signs are what of a cluster tells its meshes.
func Signs() (r plan.Reads) {
	for _, s := range signs {
		r.Served = append(r.Served, s.kinds...)
	}
	return r
}

// Seen names the meshes that a cluster shows, of which its Signs were read.
func Seen(c plan.Cluster) (names []string) {
	for _, s := range signs {
		if slices.ContainsFunc(s.kinds, func(k schema.GroupKind) bool { _, ok := c.Kind(k); return ok }) {
			names = append(names, s.mesh)
		}
	}
	return names
}

// Carriers are the kinds of objects that carry filters and nothing else, over all meshes.
func Carriers() []schema.GroupKind {
	return []schema.GroupKind{trafficExtension, wasmPlugin, envoyPatch}
}
