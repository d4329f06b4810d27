package kube

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Drift tells what of an inventory's objects is not as it was applied: those that are gone, and those that somebody else has
// written since. Of an object of the user's only that it is gone is told, since others write it as they like.
func (c *Cluster) Drift(ctx context.Context, v *Inventory) ([]string, error) {
	found := make([]string, len(v.Objects))
	var g errgroup.Group
	g.SetLimit(parallel)
	for i, item := range v.Objects {
		g.Go(func() (err error) {
			found[i], err = c.drift(ctx, item)
			return err
		})
	}
	err := g.Wait()
	return slices.DeleteFunc(found, func(s string) bool { return s == "" }), err
}

func (c *Cluster) drift(ctx context.Context, item Item) (string, error) {
	if !item.fit() {
		return "", problem.InventoryDamaged.New("%s: an inventory has an object without a fit name", c.Host)
	}
	kind, err := c.resource(ctx, item.gvk())
	if err != nil {
		return "", err
	}
	s := &step{kind: kind, item: item}
	if err := c.get(ctx, s); err != nil {
		return "", err
	}
	if s.live == nil || uid(s.live) != item.UID {
		return fmt.Sprintf("%s is gone", item), nil
	}
	if item.Shared || revision(s.live) == item.Version {
		return "", nil
	}
	var others []string
	for _, m := range managers(s.live) {
		if name, _ := m["manager"].(string); name != Manager && m["subresource"] == nil && !slices.Contains(others, name) {
			others = append(others, clean(name, maxText))
		}
	}
	if len(others) == 0 {
		return "", nil
	}
	return fmt.Sprintf("%s was changed by %s", item, strings.Join(others, ", ")), nil
}

// Orphans lists the objects of these kinds, in all namespaces, that have our label and are in none of the inventories.
func (c *Cluster) Orphans(ctx context.Context, kinds []schema.GroupKind, inventories []*Inventory) ([]string, error) {
	known := map[string]bool{}
	for _, v := range inventories {
		for _, item := range v.Objects {
			known[item.key()] = true
		}
	}
	var orphans []string
	for _, gk := range kinds {
		objects, err := c.objects(ctx, gk, labelled, false)
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			u := unstructured.Unstructured{Object: o.Content}
			item := Item{APIVersion: u.GetAPIVersion(), Kind: u.GetKind(), Namespace: u.GetNamespace(), Name: u.GetName()}
			if !known[item.key()] {
				orphans = append(orphans, item.String())
			}
		}
	}
	slices.Sort(orphans)
	return orphans, nil
}

// labelled selects the objects that have our label.
const labelled = "app.kubernetes.io/managed-by=" + Manager

// Names lists all objects of a kind in all namespaces, as Kind/namespace/name; none where it is not served.
func (c *Cluster) Names(ctx context.Context, kind schema.GroupKind) (names []string, err error) {
	objects, err := c.objects(ctx, kind, "", false)
	for _, o := range objects {
		names = append(names, o.String())
	}
	return names, err
}

// Foreign gives the objects of a kind in all namespaces that do not have our label; none where it is not served.
func (c *Cluster) Foreign(ctx context.Context, kind schema.GroupKind) ([]plan.Object, error) {
	return c.objects(ctx, kind, strings.Replace(labelled, "=", "!=", 1), true)
}

// All gives the objects of a kind in all namespaces; none where it is not served.
func (c *Cluster) All(ctx context.Context, kind schema.GroupKind) ([]plan.Object, error) {
	return c.objects(ctx, kind, "", true)
}

// wholePage is how many whole objects are in one answer of a list: etcd takes none above 1.5 MiB.
const wholePage = maxBody / (1536 << 10)

// objects gives those of a kind, in all namespaces, that a selector chooses: whole, or with their metadata only.
func (c *Cluster) objects(ctx context.Context, gk schema.GroupKind, selector string, whole bool) ([]plan.Object, error) {
	s, err := c.kinds(ctx, root(gk.Group))
	if err != nil || len(s[gk]) == 0 {
		return nil, err
	}
	k := call{method: http.MethodGet, verb: "list", kind: s[gk][0], accept: namesOnly, query: url.Values{"labelSelector": {selector}}}
	if whole {
		k.accept = ""
		k.query.Set("limit", strconv.Itoa(wholePage))
	}
	return c.list(ctx, k, func(map[string]any) bool { return true })
}
