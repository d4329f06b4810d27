package plan

import (
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// String names an object: "WasmPlugin/shop/rate-limit".
func (o Object) String() string {
	u := o.unstructured()
	return fmt.Sprintf("%s/%s/%s", u.GetKind(), u.GetNamespace(), u.GetName())
}

func (o Object) unstructured() *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: o.Content}
}

// Reads is what a mesh wants to know of a cluster before it plans a chain.
type Reads struct {
	// Kinds that it chooses among, and Served those of which it needs no Fields. That one is not served is no error.
	Kinds, Served []schema.GroupKind
	// Objects that the target may stand for, and FirstOf those of which only the first that is there matters. That one is
	// not there, or that its kind is not served, is no error.
	Objects, FirstOf []Ref
	// Selected are Services of which what makes their Pods is wanted, and those Pods: the Deployments, StatefulSets and
	// DaemonSets of the Service's namespace whose template has the labels that it selects, and of Pods that are not over their
	// metadata alone.
	Selected []Ref
}

// Ref names an object, whatever version of its kind the cluster serves.
type Ref struct {
	schema.GroupKind
	Namespace string // empty for kinds outside of namespaces, and for the one of its name in whatever namespace it is
	Name      string
}

// Cluster is what a Kubernetes cluster serves and holds. The zero value serves nothing.
type Cluster struct {
	Kinds   []Kind   // those of Reads that are served
	Objects []Object // those of Reads that are there
}

// Kind is a kind that a cluster serves.
type Kind struct {
	schema.GroupVersionKind
	// Fields are the paths that its schema knows, such as spec.match.ports.number, with the values of those that are
	// enumerations.
	Fields map[string][]string
}

// Kind finds a served kind.
func (c Cluster) Kind(gk schema.GroupKind) (Kind, bool) {
	i := slices.IndexFunc(c.Kinds, func(k Kind) bool { return k.GroupKind() == gk })
	if i < 0 {
		return Kind{}, false
	}
	return c.Kinds[i], true
}

// Object finds an object.
func (c Cluster) Object(r Ref) (Object, bool) {
	i := slices.IndexFunc(c.Objects, func(o Object) bool {
		u := o.unstructured()
		return u.GroupVersionKind().GroupKind() == r.GroupKind && (r.Namespace == "" || u.GetNamespace() == r.Namespace) && u.GetName() == r.Name
	})
	if i < 0 {
		return Object{}, false
	}
	return c.Objects[i], true
}

// Has says whether the kind's schema knows a field.
func (k Kind) Has(path string) bool {
	_, ok := k.Fields[path]
	return ok
}

// Takes says whether a field that is an enumeration has a value.
func (k Kind) Takes(path, value string) bool { return slices.Contains(k.Fields[path], value) }

// Pod names a Pod.
type Pod struct{ Namespace, Name string }

func (p Pod) String() string { return p.Namespace + "/" + p.Name }

// Selection says in which Pods the proxies of a target are.
type Selection struct {
	Namespace string            // empty: all of them
	Labels    map[string]string // that a Pod has; none: every Pod
	// Role is what the mesh takes such a proxy for: sidecar, router or waypoint.
	Role string
	// Only is the one Pod that counts. Default: all of them.
	Only *Pod
}

// maxSchemaDepth bounds how deep a schema, which came from a cluster, is followed.
const maxSchemaDepth = 32

// Fields lists the paths of an OpenAPI v3 schema as it is in a CustomResourceDefinition or in what an API server
// publishes, decoded from JSON. Lists have their entries' fields below them.
func Fields(openAPI map[string]any) map[string][]string {
	fields := map[string][]string{}
	var walk func(s map[string]any, path string, depth int)
	walk = func(s map[string]any, path string, depth int) {
		if depth > maxSchemaDepth {
			return
		}
		if items, ok := s["items"].(map[string]any); ok {
			s = items
		}
		properties, _ := s["properties"].(map[string]any)
		for name, p := range properties {
			p, ok := p.(map[string]any)
			if !ok {
				continue
			}
			at := name
			if path != "" {
				at = path + "." + name
			}
			fields[at] = nil
			values, _ := p["enum"].([]any)
			for _, v := range values {
				if text, ok := v.(string); ok {
					fields[at] = append(fields[at], text)
				}
			}
			walk(p, at, depth+1)
		}
	}
	walk(openAPI, "", 0)
	return fields
}

// ClusterOf is a cluster that holds these objects and serves the kinds of those that are CustomResourceDefinitions: for
// whoever has a cluster's objects in files.
func ClusterOf(objects []Object) (c Cluster) {
	for _, o := range objects {
		if o.unstructured().GetKind() != "CustomResourceDefinition" {
			c.Objects = append(c.Objects, o)
			continue
		}
		if k, ok := definedKind(o.Content); ok {
			c.Kinds = append(c.Kinds, k)
		}
	}
	return c
}

// definedKind is the kind that a CustomResourceDefinition defines, in the version that it stores.
func definedKind(crd map[string]any) (k Kind, ok bool) {
	group, _, _ := unstructured.NestedString(crd, "spec", "group")
	name, _, _ := unstructured.NestedString(crd, "spec", "names", "kind")
	versions, _, _ := unstructured.NestedSlice(crd, "spec", "versions")
	for _, v := range versions {
		v, _ := v.(map[string]any)
		version, _ := v["name"].(string)
		served, _ := v["served"].(bool)
		stored, _ := v["storage"].(bool)
		if !served || ok && !stored {
			continue
		}
		openAPI, _, _ := unstructured.NestedMap(v, "schema", "openAPIV3Schema")
		k, ok = Kind{schema.GroupVersionKind{Group: group, Version: version, Kind: name}, Fields(openAPI)}, true
	}
	return k, ok && name != ""
}
