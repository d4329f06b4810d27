package operation

import (
	"fmt"
	"slices"
	"strings"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/problem"
)

// permit refuses what uses the adapter's own rights for a caller of whom nothing is known.
func (r *Runner) permit(j job, q Request) error {
	if q.Caller.Foreign && !r.AllowUnauthenticated && r.ownRights(j, q) {
		return problem.CallerUnknown.New("%s, from %s", q.Operation, q.Caller.Remote)
	}
	return nil
}

// ownRights says whether a job uses the adapter's own rights. One that brings none counts as one that does, and so does
// one that names filters without saying which mesh they are on.
func (r *Runner) ownRights(j job, q Request) bool {
	if j.Operation == opStatus {
		return false // it only looks
	}
	meshes := slices.Clone(j.Meshes)
	for _, f := range j.Filters {
		if strings.HasPrefix(f.Spec.Module.URL, mesheryScheme) {
			return true // the adapter is who is signed in there
		}
		meshes = append(meshes, f.Spec.Mesh)
	}
	for _, name := range meshes {
		if m, err := mesh.Find(name); err != nil || m.OwnRights() {
			return true
		}
	}
	return len(meshes) == 0 || len(q.Kubeconfigs) == 0 || r.Own != nil
}

// wide says what makes a filter's target too wide for a request in that namespace; an empty cause, that nothing does.
// Groups of proxies stand outside of namespaces. What is in Istio's root namespace is for proxies of all namespaces.
func wide(f filter.Filter, namespace string) (field, cause string) {
	t := f.Spec.Target
	switch t.Kind {
	case filter.Mesh:
		return "spec.target.kind", "a target of kind Mesh is every proxy of the mesh"
	case "", filter.ProxyGroup:
		return "", ""
	}
	field, is := "metadata.namespace", f.Key.Namespace
	if t.Namespace != "" {
		field, is = "spec.target.namespace", t.Namespace
	}
	if namespace == "" {
		namespace = f.Key.Namespace
	}
	if is == mesh.IstioRoot && f.Spec.Mesh != (mesh.Envoy{}).Name() {
		return field, "what is in the namespace " + is + " is for the whole mesh"
	}
	if is == namespace {
		return "", ""
	}
	return field, fmt.Sprintf("the target is in the namespace %s, and the request in %s", is, namespace)
}
