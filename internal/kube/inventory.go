package kube

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"

	"k8s.io/apimachinery/pkg/api/validate/content"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	inventoryLabel = "filters.meshery.io/inventory" // of the ConfigMaps that are inventories; its value is the mesh
	maxInventory   = 1000 << 10                     // bytes; etcd takes no object above 1.5 MiB, and a ConfigMap not above 1 MiB
	pageSize       = 100                            // inventories in one answer of a list
	maxPages       = 1000                           // of one list
)

var configMap = resource{GroupVersionKind: schema.GroupVersionKind{Version: "v1", Kind: "ConfigMap"}, plural: "configmaps", namespaced: true}

// Inventory is what we put into a cluster for one target.
type Inventory struct {
	Chain   filter.Chain
	Version string // of the plan that holds; empty while one is being applied, or was when it was cut off
	Objects []Item // sorted by kind, namespace and name

	revisions                  plan.History
	name, uid, resourceVersion string // of the ConfigMap; empty while there is none
}

// Item is one object of a target.
type Item struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Namespace  string `json:"namespace,omitempty"`
	Name       string `json:"name"`
	// UID of the object, empty between the decision to make it and its making.
	UID string `json:"uid,omitempty"`
	// Created says that we made it, so it is ours to delete.
	Created bool `json:"created,omitempty"`
	// Applied is the digest of what was applied last, and Version the resourceVersion that the object had then: as long as
	// it has that, it is known without reading it.
	Applied string `json:"applied,omitempty"`
	Version string `json:"resourceVersion,omitempty"`
	// Shared says that it is the user's and was changed under its resourceVersion: Edits are what was added to it.
	Shared bool   `json:"shared,omitempty"`
	Edits  []edit `json:"edits,omitempty"`
}

func (i Item) String() string { return subject(i.Kind, i.Namespace, i.Name) }

func (i Item) gvk() schema.GroupVersionKind {
	return schema.FromAPIVersionAndKind(i.APIVersion, i.Kind)
}

// key tells objects apart. The version of an API is no part of it: the same object is served in several.
func (i Item) key() string {
	return i.gvk().GroupKind().String() + "|" + i.Namespace + "|" + i.Name
}

// fit says whether the item can be part of a request's path.
func (i Item) fit() bool {
	segment := func(s string) bool { return s != "" && len(content.IsPathSegmentName(s)) == 0 }
	return i.APIVersion != "" && i.Kind != "" && segment(i.Name) && (i.Namespace == "" || segment(i.Namespace))
}

// find returns the item of that key.
func (v *Inventory) find(key string) (Item, bool) {
	n := slices.IndexFunc(v.Objects, func(i Item) bool { return i.key() == key })
	if n < 0 {
		return Item{}, false
	}
	return v.Objects[n], true
}

// document is the ConfigMap of an inventory.
type document struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   documentMetadata  `json:"metadata"`
	Data       map[string]string `json:"data"`
}

type documentMetadata struct {
	Name            string            `json:"name"`
	Namespace       string            `json:"namespace"`
	UID             string            `json:"uid,omitempty"`
	ResourceVersion string            `json:"resourceVersion,omitempty"`
	Labels          map[string]string `json:"labels"`
}

func inventoryName(mesh string, t filter.Target) string {
	sum := sha256.Sum256([]byte(filter.Chain{Mesh: mesh, Target: t}.ID()))
	return "meshery-filters-" + hex.EncodeToString(sum[:8])
}

func (c *Cluster) inventoryCall(method, verb, name string) call {
	return call{method: method, verb: verb, kind: configMap, namespace: c.opts.Namespace, name: name}
}

// inventory reads a target's, which is empty where there is none.
func (c *Cluster) inventory(ctx context.Context, mesh string, t filter.Target) (*Inventory, error) {
	name := inventoryName(mesh, t)
	_, body, err := c.do(ctx, c.inventoryCall(http.MethodGet, "get", name))
	if _, ok := refusedWith(err, http.StatusNotFound); ok {
		return &Inventory{Chain: filter.Chain{Mesh: mesh, Target: t}, name: name}, nil
	}
	if err != nil {
		return nil, c.problemOf(err)
	}
	var d document
	if err := json.Unmarshal(body, &d); err != nil {
		return nil, problem.ClusterAnswer.New("%s: ConfigMap/%s/%s cannot be read", c.Host, c.opts.Namespace, name)
	}
	v, err := d.inventory()
	if err != nil {
		return nil, problem.InventoryDamaged.New("%s: ConfigMap/%s/%s: %w", c.Host, c.opts.Namespace, name, err)
	}
	return v, nil
}

func (d document) inventory() (*Inventory, error) {
	v := &Inventory{name: d.Metadata.Name, uid: d.Metadata.UID, resourceVersion: d.Metadata.ResourceVersion, Version: d.Data["version"]}
	if err := json.Unmarshal([]byte(d.Data["chain"]), &v.Chain); err != nil {
		return nil, fmt.Errorf("its chain cannot be read: %w", err)
	}
	if err := json.Unmarshal([]byte(d.Data["objects"]), &v.Objects); err != nil {
		return nil, fmt.Errorf("its objects cannot be read: %w", err)
	}
	if text := d.Data["revisions"]; text != "" {
		if err := json.Unmarshal([]byte(text), &v.revisions); err != nil {
			return nil, fmt.Errorf("its revisions cannot be read: %w", err)
		}
	}
	if v.name != inventoryName(v.Chain.Mesh, v.Chain.Target) {
		return nil, fmt.Errorf("it is of %s, whose inventory has another name", clean(v.Chain.Target.String(), 200))
	}
	return v, nil
}

// Targets are what is held on every target of a cluster, read at once.
type Targets struct {
	cluster     *Cluster
	inventories []*Inventory
}

// Targets reads what holds on every target. For one operation that is one request instead of one for each target, and it
// knows where else a filter is.
func (c *Cluster) Targets(ctx context.Context) (*Targets, error) {
	inventories, err := c.Inventories(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the inventories: %w", err)
	}
	return &Targets{c, inventories}, nil
}

// Chains lists what we put there.
func (ts *Targets) Chains() []filter.Chain {
	var chains []filter.Chain
	for _, v := range ts.inventories {
		if len(v.Chain.Filters) > 0 {
			chains = append(chains, v.Chain)
		}
	}
	return chains
}

// Begun lists the chains of targets that are being changed, or whose change was cut off: what held before that, which may
// be no filters.
func (ts *Targets) Begun() []filter.Chain {
	var chains []filter.Chain
	for _, v := range ts.inventories {
		if v.Version == "" && len(v.Objects) > 0 {
			chains = append(chains, v.Chain)
		}
	}
	return chains
}

// Target is one of them as it was read, or one that has nothing.
func (ts *Targets) Target(mesh string, t filter.Target) *Target {
	empty := filter.Chain{Mesh: mesh, Target: t}
	name := inventoryName(mesh, t)
	had := &Inventory{Chain: empty, name: name}
	for _, v := range ts.inventories {
		if v.name == name && v.Chain.ID() == empty.ID() {
			had = v
		}
	}
	return &Target{cluster: ts.cluster, had: had, shared: map[string]map[string]any{}}
}

// Inventories reads those of every target, by name.
func (c *Cluster) Inventories(ctx context.Context) ([]*Inventory, error) {
	var all []*Inventory
	query := url.Values{"labelSelector": {inventoryLabel}, "limit": {fmt.Sprint(pageSize)}}
	for page := 0; ; page++ {
		if page == maxPages {
			return nil, problem.ClusterAnswer.New("%s: the list of inventories has no end", c.Host)
		}
		k := c.inventoryCall(http.MethodGet, "list", "")
		k.query = query
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
			return nil, problem.ClusterAnswer.New("%s: the inventories cannot be read", c.Host)
		}
		for _, d := range list.Items {
			v, err := d.inventory()
			if err != nil {
				return nil, problem.InventoryDamaged.New("%s: ConfigMap/%s/%s: %w", c.Host, c.opts.Namespace, d.Metadata.Name, err)
			}
			all = append(all, v)
		}
		if list.Metadata.Continue == "" {
			break
		}
		query.Set("continue", list.Metadata.Continue)
	}
	slices.SortFunc(all, func(a, b *Inventory) int { return cmp.Compare(a.Chain.ID(), b.Chain.ID()) })
	return all, nil
}

// write makes the inventory what the cluster keeps, provided that nobody has changed it since it was read.
func (c *Cluster) write(ctx context.Context, v *Inventory) error {
	if len(v.Objects) == 0 && len(v.Chain.Filters) == 0 && len(v.revisions) == 0 {
		return c.drop(ctx, v)
	}
	body, err := v.encode(c.opts.Namespace)
	if err != nil {
		return err
	}
	k := c.inventoryCall(http.MethodPut, "update", v.name)
	if v.resourceVersion == "" {
		k = c.inventoryCall(http.MethodPost, "create", "")
	}
	k.body, k.query = body, url.Values{"fieldManager": {Manager}}
	_, answer, err := c.do(ctx, k)
	if r, ok := refusedWith(err, http.StatusNotFound); ok && r.about("namespaces") {
		if err := c.makeNamespace(ctx); err != nil {
			return err
		}
		_, answer, err = c.do(ctx, k)
	}
	_, conflict := refusedWith(err, http.StatusConflict)
	_, gone := refusedWith(err, http.StatusNotFound)
	if conflict || gone {
		return problem.ChainChanged.New("%s: the chain of %s", c.Host, v.Chain.Target)
	}
	if err != nil {
		return c.problemOf(err)
	}
	var d document
	if err := json.Unmarshal(answer, &d); err != nil || d.Metadata.ResourceVersion == "" {
		return problem.ClusterAnswer.New("%s: what it says of the ConfigMap %s cannot be read", c.Host, v.name)
	}
	v.uid, v.resourceVersion = d.Metadata.UID, d.Metadata.ResourceVersion
	return nil
}

// withoutBytes is a chain with the digests of its modules and not their bytes.
func withoutBytes(c filter.Chain) filter.Chain {
	c.Filters = slices.Clone(c.Filters)
	for i := range c.Filters {
		c.Filters[i].Spec.Module.Inline = ""
	}
	return c
}

func sortItems(items []Item) {
	slices.SortFunc(items, func(a, b Item) int { return cmp.Compare(a.key(), b.key()) })
}

// encode writes the ConfigMap.
func (v *Inventory) encode(namespace string) ([]byte, error) {
	chain, err := json.MarshalIndent(v.Chain, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode the chain: %w", err)
	}
	objects, err := json.MarshalIndent(v.Objects, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode the objects: %w", err)
	}
	revisions, err := json.Marshal(v.revisions)
	if err != nil {
		return nil, fmt.Errorf("encode the revisions: %w", err)
	}
	d := document{
		APIVersion: "v1", Kind: "ConfigMap",
		Metadata: documentMetadata{
			Name: v.name, Namespace: namespace, UID: v.uid, ResourceVersion: v.resourceVersion,
			Labels: map[string]string{"app.kubernetes.io/managed-by": Manager, inventoryLabel: v.Chain.Mesh},
		},
		Data: map[string]string{"target": v.Chain.Target.String(), "chain": string(chain), "objects": string(objects), "version": v.Version},
	}
	if room := maxInventory - len(chain) - len(objects); len(v.revisions) > 0 && 2*len(revisions) < room { // quotes are escaped once more
		d.Data["revisions"] = string(revisions)
	}
	body, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("encode the inventory: %w", err)
	}
	if len(body) > maxInventory {
		return nil, problem.NotSupported.New("the inventory of %s would have %d KiB, and %d is the most; its filters' configurations are too large",
			v.Chain.Target, len(body)>>10, maxInventory>>10)
	}
	return body, nil
}

// drop deletes the inventory of a target that has nothing any more.
func (c *Cluster) drop(ctx context.Context, v *Inventory) error {
	if v.resourceVersion == "" {
		return nil
	}
	k := c.inventoryCall(http.MethodDelete, "delete", v.name)
	body, err := json.Marshal(deletion{Preconditions: preconditions{UID: v.uid, ResourceVersion: v.resourceVersion}})
	if err != nil {
		return err
	}
	k.body = body
	_, _, err = c.do(ctx, k)
	if _, ok := refusedWith(err, http.StatusConflict); ok {
		return problem.ChainChanged.New("%s: the chain of %s", c.Host, v.Chain.Target)
	}
	if _, ok := refusedWith(err, http.StatusNotFound); ok {
		return nil
	}
	return c.problemOf(err)
}

// deletion is Kubernetes' DeleteOptions.
type deletion struct {
	Preconditions     preconditions `json:"preconditions,omitzero"`
	PropagationPolicy string        `json:"propagationPolicy,omitempty"`
	DryRun            []string      `json:"dryRun,omitempty"`
}

type preconditions struct {
	UID             string `json:"uid,omitempty"`
	ResourceVersion string `json:"resourceVersion,omitempty"`
}

// makeNamespace makes the one that inventories are kept in.
func (c *Cluster) makeNamespace(ctx context.Context) error {
	kind := resource{GroupVersionKind: schema.GroupVersionKind{Version: "v1", Kind: "Namespace"}, plural: "namespaces"}
	_, _, err := c.do(ctx, call{method: http.MethodPost, verb: "create", kind: kind, query: url.Values{"fieldManager": {Manager}},
		body: fmt.Appendf(nil, `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":%q}}`, c.opts.Namespace)})
	if _, ok := refusedWith(err, http.StatusConflict); ok {
		return nil // somebody else was faster
	}
	return c.problemOf(err)
}
