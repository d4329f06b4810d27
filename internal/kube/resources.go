package kube

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/problem"
)

// resource is how the API serves a kind.
type resource struct {
	schema.GroupVersionKind
	plural     string
	namespaced bool
}

// Serves says whether the cluster serves a kind.
func (c *Cluster) Serves(ctx context.Context, kind schema.GroupVersionKind) (bool, error) {
	_, err := c.resource(ctx, kind)
	if errors.Is(err, problem.KindNotServed) {
		return false, nil
	}
	return err == nil, err
}

// resource finds how a kind is served; one that is not is problem.KindNotServed.
func (c *Cluster) resource(ctx context.Context, kind schema.GroupVersionKind) (resource, error) {
	kinds, err := c.served(ctx, kind.GroupVersion())
	if err != nil {
		return resource{}, err
	}
	r, ok := kinds[kind.Kind]
	if !ok {
		c.forget(resource{GroupVersionKind: kind}) // it may be installed before it is asked for again
		return resource{}, problem.KindNotServed.New("%s: %s %s", c.Host, kind.GroupVersion(), kind.Kind)
	}
	return r, nil
}

// served reads what a group's version has, once. A group that is not served has nothing.
func (c *Cluster) served(ctx context.Context, v schema.GroupVersion) (map[string]resource, error) {
	c.mu.Lock()
	kinds, ok := c.kinds[v]
	c.mu.Unlock()
	if ok {
		return kinds, nil
	}
	group := resource{GroupVersionKind: v.WithKind("")}
	_, body, err := c.do(ctx, call{method: http.MethodGet, verb: "get", kind: group})
	if _, ok := refusedWith(err, http.StatusNotFound); ok {
		return nil, nil
	}
	if err != nil {
		return nil, c.problemOf(err)
	}
	var list metav1.APIResourceList
	if err := json.Unmarshal(body, &list); err != nil || list.Kind != "APIResourceList" {
		return nil, problem.ClusterAnswer.New("%s does not tell the resources of %s", c.Host, v)
	}
	kinds = map[string]resource{}
	for _, r := range list.APIResources {
		// Subresources have the kind of what is sent to them.
		if _, ok := kinds[r.Kind]; !ok && !strings.Contains(r.Name, "/") {
			kinds[r.Kind] = resource{GroupVersionKind: v.WithKind(r.Kind), plural: r.Name, namespaced: r.Namespaced}
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kinds[v] = kinds
	return kinds, nil
}

// forget has the next one who asks for a kind read it again: what is served changes as custom resources come and go.
func (c *Cluster) forget(r resource) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.kinds, r.GroupVersion())
}
