package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Target is one target of a cluster as it was read: what is applied builds on that, and is problem.ChainChanged when
// somebody else has changed the target meanwhile. It is not safe for concurrent use.
type Target struct {
	cluster *Cluster
	had     *Inventory
	shared  map[string]map[string]any // the user's objects as Shared read them, by Item.key
	applied *change                   // by Apply, and not committed yet
	written bool                      // by the last Apply
}

// Target reads what holds on a target.
func (c *Cluster) Target(ctx context.Context, mesh string, t filter.Target) (*Target, error) {
	had, err := c.inventory(ctx, mesh, t)
	if err != nil {
		return nil, fmt.Errorf("read the inventory: %w", err)
	}
	return &Target{cluster: c, had: had, shared: map[string]map[string]any{}}, nil
}

// Committed returns what holds: a chain, without filters when we put nothing there, and its Version, which is empty while
// an Apply was begun and not ended. Objects are not part of it.
func (t *Target) Committed() plan.Plan {
	return plan.Plan{Chain: t.had.Chain, Version: t.had.Version}
}

// Shared gives an object of the user's as it is without what we have added for the target: what a plan that shares it is
// made of. It is nil when there is none. The next Apply builds on what was read here.
func (t *Target) Shared(ctx context.Context, kind schema.GroupVersionKind, namespace, name string) (map[string]any, error) {
	r, err := t.cluster.resource(ctx, kind)
	if err != nil {
		return nil, err
	}
	version, k := kind.ToAPIVersionAndKind()
	s := &step{kind: r, item: Item{APIVersion: version, Kind: k, Namespace: namespace, Name: name}}
	if !s.item.fit() {
		return nil, problem.Internal.New("%s is no name of an object", clean(s.item.String(), maxText))
	}
	if err := t.cluster.get(ctx, s); err != nil || s.live == nil {
		return nil, err
	}
	t.shared[s.item.key()] = s.live
	had, _ := t.had.find(s.item.key())
	return without(s.live, had.Edits), nil
}

// Bare is an object of the user's, as it was read, without what we have added to it for the target; not ok: that is nothing.
func (t *Target) Bare(o plan.Object) (bare map[string]any, ok bool) {
	u := unstructured.Unstructured{Object: o.Content}
	had, ok := t.had.find(Item{APIVersion: u.GetAPIVersion(), Kind: u.GetKind(), Namespace: u.GetNamespace(), Name: u.GetName()}.key())
	if !ok || len(had.Edits) == 0 {
		return nil, false
	}
	return without(o.Content, had.Edits), true
}

// Drift tells which of its objects are gone, and which somebody else has changed.
func (t *Target) Drift(ctx context.Context) ([]string, error) { return t.cluster.Drift(ctx, t.had) }

// Objects reads what the inventory lists, as far as it is there.
func (t *Target) Objects(ctx context.Context) ([]plan.Object, error) {
	var found []plan.Object
	for _, item := range t.had.Objects {
		kind, err := t.cluster.resource(ctx, item.gvk())
		if errors.Is(err, problem.KindNotServed) || !item.fit() {
			continue
		}
		if err != nil {
			return nil, err
		}
		s := &step{kind: kind, item: item}
		if err := t.cluster.get(ctx, s); err != nil {
			return nil, err
		}
		if s.live != nil {
			found = append(found, plan.Object{Content: s.live, Shared: item.Shared})
		}
	}
	return found, nil
}

// Apply makes the target hold exactly what the plan says: everything is tried first, then what differs is written in
// the order of kinds, what the plan has no more goes, and what takes time to get ready is waited for until ctx ends. The
// changes come in that order; on an error nothing is returned, and what was done is in the inventory, so that applying
// this plan or the one before it brings the target there. Until Commit the inventory says that the chain before holds, and
// that it is being changed.
//
// A cluster that refuses an object may quote it in its text, resolved secrets included.
func (t *Target) Apply(ctx context.Context, p plan.Plan) ([]plan.Change, error) {
	t.applied, t.written = nil, false
	ch, err := t.prepare(ctx, p)
	clear(t.shared) // what was read is used up
	if err != nil {
		return nil, err
	}
	if err := t.carryOut(ctx, ch); err != nil {
		return nil, err
	}
	if err := t.cluster.await(ctx, slices.DeleteFunc(slices.Clone(ch.steps), func(s *step) bool { return s.item.Shared })); err != nil {
		return nil, err
	}
	t.applied = ch
	return ch.changes(), nil
}

// Written says whether the last Apply came to write something. Then the target holds neither what it held before nor what
// was to be, if that Apply failed.
func (t *Target) Written() bool { return t.written }

// Versions are the resourceVersions of the objects as the last Apply left them, by Change.Subject.
func (t *Target) Versions() map[string]string {
	if t.applied == nil {
		return nil
	}
	versions := map[string]string{}
	for _, s := range t.applied.steps {
		versions[s.item.String()] = revision(s.live)
	}
	return versions
}

// Commit has the inventory say that what was applied last holds.
func (t *Target) Commit(ctx context.Context) error {
	if t.applied == nil {
		return problem.Internal.New("nothing is applied to %s that could be kept", t.had.Chain.Target)
	}
	return t.conclude(ctx, t.applied)
}

// Diff tells what Apply would change, and writes nothing.
func (t *Target) Diff(ctx context.Context, p plan.Plan) ([]plan.Change, error) {
	ch, err := t.prepare(ctx, p)
	if err != nil {
		return nil, err
	}
	return ch.changes(), nil
}
