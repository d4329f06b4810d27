package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/runtime/schema"

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
		s, err := c.kinds(ctx, root(gk.Group))
		if err != nil {
			return nil, err
		}
		if len(s[gk]) == 0 {
			continue
		}
		kind := s[gk][0]
		version, name := kind.ToAPIVersionAndKind()
		k := call{method: http.MethodGet, verb: "list", kind: kind, accept: namesOnly,
			query: url.Values{"limit": {strconv.Itoa(pageSize)}, "labelSelector": {"app.kubernetes.io/managed-by=" + Manager}}}
		for page := 0; ; page++ {
			if page == maxPages {
				return nil, problem.ClusterAnswer.New("%s: the list of %s has no end", c.Host, kind.plural)
			}
			_, body, err := c.do(ctx, k)
			if err != nil {
				return nil, c.problemOf(err)
			}
			var list struct {
				Metadata struct {
					Continue string `json:"continue"`
				} `json:"metadata"`
				Items []document `json:"items"`
			}
			if err := json.Unmarshal(body, &list); err != nil {
				return nil, problem.ClusterAnswer.New("%s: the list of %s cannot be read", c.Host, kind.plural)
			}
			for _, o := range list.Items {
				item := Item{APIVersion: version, Kind: name, Namespace: o.Metadata.Namespace, Name: o.Metadata.Name}
				if !known[item.key()] {
					orphans = append(orphans, item.String())
				}
			}
			if list.Metadata.Continue == "" {
				break
			}
			k.query.Set("continue", list.Metadata.Continue)
		}
	}
	slices.Sort(orphans)
	return orphans, nil
}
