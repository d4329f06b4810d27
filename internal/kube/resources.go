package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// resource is how the API serves a kind.
type resource struct {
	schema.GroupVersionKind
	plural     string
	namespaced bool
}

// aggregated asks for every group in one answer, in the form of Kubernetes 1.30 and later, or that of 1.27.
const aggregated = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList," +
	"application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList"

// groups is the part of that answer that matters here.
type groups struct {
	Kind  string `json:"kind"`
	Items []struct {
		Metadata struct {
			Name string `json:"name"`
		} `json:"metadata"`
		Versions []struct { // the preferred one first
			Version   string `json:"version"`
			Resources []struct {
				Resource     string `json:"resource"`
				ResponseKind struct {
					Kind string `json:"kind"`
				} `json:"responseKind"`
				Scope string `json:"scope"`
			} `json:"resources"`
		} `json:"versions"`
	} `json:"items"`
}

// served is every kind of the groups below one root, by group and kind, in the server's order of versions.
type served map[schema.GroupKind][]resource

// known is what is remembered of a cluster, and since when.
type known[T any] struct {
	what  T
	since time.Time
}

// memory is how long what a cluster serves is taken for what it serves now: kinds come and go as meshes are installed and
// upgraded.
const memory = time.Minute

// root is where a group is: the core group has one of its own.
func root(group string) string {
	if group == "" {
		return "/api"
	}
	return "/apis"
}

// kinds reads what is served below a root, once a minute.
func (c *Cluster) kinds(ctx context.Context, root string) (served, error) {
	c.mu.Lock()
	k := c.served[root]
	c.mu.Unlock()
	if time.Since(k.since) < c.memory {
		return k.what, nil
	}
	_, body, err := c.do(ctx, call{method: http.MethodGet, verb: "get", raw: root, accept: aggregated})
	if err != nil {
		return nil, c.problemOf(err)
	}
	var g groups
	if err := json.Unmarshal(body, &g); err != nil || g.Kind != "APIGroupDiscoveryList" {
		return nil, problem.ClusterAnswer.New("%s does not tell its kinds at %s as Kubernetes 1.27 and later do", c.Host, root)
	}
	s := served{}
	for _, group := range g.Items {
		for _, version := range group.Versions {
			for _, r := range version.Resources {
				gk := schema.GroupKind{Group: group.Metadata.Name, Kind: r.ResponseKind.Kind}
				s[gk] = append(s[gk], resource{GroupVersionKind: gk.WithVersion(version.Version), plural: r.Resource, namespaced: r.Scope == "Namespaced"})
			}
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.served[root] = known[served]{s, time.Now()}
	return s, nil
}

// forget has what is served read again, when it is found not to hold.
func (c *Cluster) forget(group string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.served, root(group))
}

// resource finds how a kind is served, in that version; one that is not is problem.KindNotServed.
func (c *Cluster) resource(ctx context.Context, kind schema.GroupVersionKind) (resource, error) {
	s, err := c.kinds(ctx, root(kind.Group))
	if err != nil {
		return resource{}, err
	}
	for _, r := range s[kind.GroupKind()] {
		if r.Version == kind.Version {
			return r, nil
		}
	}
	c.forget(kind.Group) // it may be installed before it is asked for again
	return resource{}, problem.KindNotServed.New("%s: %s %s", c.Host, kind.GroupVersion(), kind.Kind)
}

// Read gives what the cluster serves and holds of what a mesh wants to know. A right that is missing is
// problem.RightMissing.
func (c *Cluster) Read(ctx context.Context, reads plan.Reads) (plan.Cluster, error) {
	var found plan.Cluster
	for i, gk := range slices.Concat(reads.Kinds, reads.Served) {
		s, err := c.kinds(ctx, root(gk.Group))
		if err != nil {
			return plan.Cluster{}, err
		}
		if len(s[gk]) == 0 {
			continue
		}
		kind := plan.Kind{GroupVersionKind: s[gk][0].GroupVersionKind}
		if i < len(reads.Kinds) {
			if kind.Fields, err = c.fields(ctx, kind.GroupVersionKind); err != nil {
				return plan.Cluster{}, err
			}
		}
		found.Kinds = append(found.Kinds, kind)
	}
	for _, ref := range reads.Objects {
		if _, err := c.find(ctx, ref, &found); err != nil {
			return plan.Cluster{}, err
		}
	}
	for _, ref := range reads.FirstOf {
		if ok, err := c.find(ctx, ref, &found); err != nil {
			return plan.Cluster{}, err
		} else if ok {
			break
		}
	}
	for _, ref := range reads.Selected {
		if err := c.selected(ctx, ref, &found); err != nil {
			return plan.Cluster{}, err
		}
	}
	return found, nil
}

// makers are the kinds that make Pods from a template.
var makers = []resource{
	{schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "Deployment"}, "deployments", true},
	{schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "StatefulSet"}, "statefulsets", true},
	{schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "DaemonSet"}, "daemonsets", true},
}

// selected adds what makes the Pods that a Service selects, and those Pods.
func (c *Cluster) selected(ctx context.Context, ref plan.Ref, found *plan.Cluster) error {
	var service plan.Cluster
	if ok, err := c.find(ctx, ref, &service); err != nil || !ok {
		return err
	}
	selector := descend(service.Objects[0].Content, []string{"spec", "selector"})
	if len(selector) == 0 {
		return nil
	}
	var labels []string
	for _, k := range slices.Sorted(maps.Keys(selector)) {
		labels = append(labels, fmt.Sprint(k, "=", selector[k]))
	}
	pods := call{method: http.MethodGet, verb: "list", kind: podKind, namespace: ref.Namespace, accept: namesOnly,
		query: url.Values{"fieldSelector": {"status.phase!=Succeeded,status.phase!=Failed"}, "labelSelector": {strings.Join(labels, ",")}}}
	objects, err := c.list(ctx, pods, func(map[string]any) bool { return true })
	if err != nil {
		return err
	}
	found.Objects = append(found.Objects, objects...)
	for _, kind := range makers {
		objects, err := c.list(ctx, call{method: http.MethodGet, verb: "list", kind: kind, namespace: ref.Namespace, query: url.Values{}}, func(o map[string]any) bool {
			template := descend(o, []string{"spec", "template", "metadata", "labels"})
			for k, v := range selector {
				if template[k] != v {
					return false
				}
			}
			return true
		})
		if err != nil {
			return err
		}
		found.Objects = append(found.Objects, objects...)
	}
	return nil
}

// list gives the objects of every page that f wants.
func (c *Cluster) list(ctx context.Context, k call, f func(map[string]any) bool) (found []plan.Object, err error) {
	if !k.query.Has("limit") {
		k.query.Set("limit", strconv.Itoa(pageSize))
	}
	for range maxPages {
		_, body, err := c.do(ctx, k)
		if err != nil {
			return nil, c.problemOf(err)
		}
		list, err := decode(body)
		if err != nil {
			return nil, problem.ClusterAnswer.New("%s: the list of %s cannot be read", c.Host, k.kind.plural)
		}
		items, _ := list["items"].([]any)
		for _, item := range items {
			o, ok := item.(map[string]any)
			if !ok {
				return nil, problem.ClusterAnswer.New("%s: the list of %s cannot be read", c.Host, k.kind.plural)
			}
			o["apiVersion"], o["kind"] = k.kind.ToAPIVersionAndKind() // which lists may leave out
			if f(o) {
				found = append(found, plan.Object{Content: o})
			}
		}
		next, _ := metadataOf(list)["continue"].(string)
		if next == "" {
			return found, nil
		}
		k.query.Set("continue", next)
	}
	return nil, problem.ClusterAnswer.New("%s: the list of %s has no end", c.Host, k.kind.plural)
}

// find adds an object to what was found, if it is there.
func (c *Cluster) find(ctx context.Context, ref plan.Ref, found *plan.Cluster) (bool, error) {
	s, err := c.kinds(ctx, root(ref.Group))
	if err != nil || len(s[ref.GroupKind]) == 0 {
		return false, err
	}
	kind := s[ref.GroupKind][0]
	if kind.namespaced && ref.Namespace == "" {
		objects, err := c.named(ctx, kind, ref.Name)
		found.Objects = append(found.Objects, objects...)
		return len(objects) > 0, err
	}
	version, name := kind.ToAPIVersionAndKind()
	o := &step{kind: kind, item: Item{APIVersion: version, Kind: name, Namespace: ref.Namespace, Name: ref.Name}}
	if !o.item.fit() || kind.namespaced != (ref.Namespace != "") {
		return false, nil // there can be none
	}
	if err := c.get(ctx, o); err != nil || o.live == nil {
		return false, err
	}
	found.Objects = append(found.Objects, plan.Object{Content: o.live})
	return true, nil
}

// named finds the objects of a name in all namespaces.
func (c *Cluster) named(ctx context.Context, kind resource, name string) ([]plan.Object, error) {
	k := call{method: http.MethodGet, verb: "list", kind: kind, query: url.Values{"fieldSelector": {"metadata.name=" + name}}}
	return c.list(ctx, k, func(map[string]any) bool { return true })
}

// A kind that was just installed is served a moment before its schema is published.
const (
	schemaTries = 20
	schemaPause = 250 * time.Millisecond
)

// fieldsOf are those of every kind of one version of a group.
type fieldsOf map[string]map[string][]string

// fields reads the schema of a kind, and of all kinds of its version and group, once a minute.
func (c *Cluster) fields(ctx context.Context, kind schema.GroupVersionKind) (map[string][]string, error) {
	c.mu.Lock()
	k := c.schemas[kind.GroupVersion()]
	c.mu.Unlock()
	if fields := k.what[kind.Kind]; fields != nil && time.Since(k.since) < c.memory {
		return fields, nil
	}
	for n := 0; ; n++ {
		all, err := c.schema(ctx, kind.GroupVersion())
		if err != nil {
			return nil, err
		}
		if fields := all[kind.Kind]; fields != nil {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.schemas[kind.GroupVersion()] = known[fieldsOf]{all, time.Now()}
			return fields, nil
		}
		if n == schemaTries {
			return nil, problem.ClusterAnswer.New("%s does not tell the schema of %s %s", c.Host, kind.GroupVersion(), kind.Kind)
		}
		if err := sleep(ctx, schemaPause); err != nil {
			return nil, err
		}
	}
}

// schema asks for the fields of all kinds of a version and group, as far as they are published.
func (c *Cluster) schema(ctx context.Context, of schema.GroupVersion) (fieldsOf, error) {
	at := path.Join("/openapi/v3", root(of.Group), of.Group, of.Version)
	_, body, err := c.do(ctx, call{method: http.MethodGet, verb: "get", raw: at})
	if _, ok := refusedWith(err, http.StatusNotFound); ok {
		return nil, nil
	}
	if err != nil {
		return nil, c.problemOf(err)
	}
	var api struct {
		Components struct {
			Schemas map[string]map[string]any `json:"schemas"`
		} `json:"components"`
	}
	if err := json.Unmarshal(body, &api); err != nil {
		return nil, problem.ClusterAnswer.New("%s: the schema of %s cannot be read", c.Host, of)
	}
	all := fieldsOf{}
	for _, s := range api.Components.Schemas {
		names, _ := s["x-kubernetes-group-version-kind"].([]any)
		for _, n := range names {
			if n, ok := n.(map[string]any); ok && n["group"] == of.Group && n["version"] == of.Version {
				if kind, ok := n["kind"].(string); ok {
					all[kind] = plan.Fields(s)
				}
			}
		}
	}
	return all, nil
}
