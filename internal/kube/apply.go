package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// rewrites bounds how often an object that somebody else writes at the same time is read and written again.
const rewrites = 5

// step is what becomes of one object.
type step struct {
	item   Item // for the inventory
	kind   resource
	action plan.Action
	body   map[string]any // what is applied or, of a shared object, put; nil when the object has to go
	live   map[string]any // the object as it was last read or written; nil when it was not there
	read   map[string]any // of a shared object: what the plan was made of, if that is known
	edits  []edit         // of a shared object: what it gets
	old    []edit         // of a shared object: what it has of an earlier plan
	later  bool           // its namespace is made first, so it cannot be tried before
}

// change is what becomes of a target.
type change struct {
	plan  plan.Plan
	force bool
	had   *Inventory
	steps []*step // in the order of their kinds
	stale []*step // what the plan has no more, in the reverse order
}

// prepare tries everything.
func (t *Target) prepare(ctx context.Context, p plan.Plan) (*change, error) {
	if p.Chain.ID() != t.had.Chain.ID() {
		return nil, problem.Internal.New("the plan is for %s, and not for %s", p.Chain.Target, t.had.Chain.Target)
	}
	c := t.cluster
	p.Chain = withoutBytes(p.Chain)
	ch := &change{plan: p, had: t.had}
	ch.force = slices.ContainsFunc(p.Chain.Filters, func(f filter.Filter) bool { return f.Spec.Force })
	if err := t.plan(ctx, ch); err != nil {
		return nil, err
	}
	for _, first := range []bool{true, false} { // namespaces, and then what may be in them
		var steps []*step
		for _, s := range ch.steps {
			if (rank(s.kind.GroupKind()) == 0) == first {
				steps = append(steps, s)
			}
		}
		if err := each(steps, func(s *step) error { return c.try(ctx, ch, s) }); err != nil {
			return nil, fmt.Errorf("try what is to be applied: %w", err)
		}
	}
	if err := each(ch.stale, func(s *step) error { return c.tryRemoval(ctx, s) }); err != nil {
		return nil, fmt.Errorf("try what is to be removed: %w", err)
	}
	return ch, nil
}

// plan makes the steps.
func (t *Target) plan(ctx context.Context, ch *change) error {
	c := t.cluster
	planned := map[string]bool{}
	for _, o := range ch.plan.Objects {
		body, err := normal(o.Content)
		if err != nil {
			return fmt.Errorf("read an object of the plan: %w", err)
		}
		s, err := c.step(ctx, body)
		if err != nil {
			return err
		}
		if planned[s.item.key()] {
			return problem.Internal.New("the plan has %s twice", s.item)
		}
		planned[s.item.key()] = true
		had, ok := ch.had.find(s.item.key())
		if ok && had.Shared != o.Shared {
			// Somebody has deleted it since, and what is there now, if anything, is another one.
			if err := c.get(ctx, s); err != nil {
				return err
			}
			if s.live != nil && uid(s.live) == had.UID {
				return problem.Internal.New("the plan has %s as shared: %v, and the inventory has not", s.item, o.Shared)
			}
			s.live, had = nil, Item{}
		}
		s.item.Shared, s.item.UID, s.item.Created, s.old = o.Shared, had.UID, had.Created, had.Edits
		s.item.Applied, s.item.Version = had.Applied, had.Version
		if o.Shared {
			s.live = t.shared[s.item.key()]
			if o.Read != nil {
				if s.read, err = normal(o.Read); err != nil {
					return fmt.Errorf("read an object of the plan: %w", err)
				}
			}
		}
		ch.steps = append(ch.steps, s)
	}
	slices.SortStableFunc(ch.steps, func(a, b *step) int { return rank(a.kind.GroupKind()) - rank(b.kind.GroupKind()) })
	for _, item := range ch.had.Objects {
		if planned[item.key()] {
			continue
		}
		if !item.fit() {
			return problem.InventoryDamaged.New("%s: ConfigMap/%s/%s has an object without a fit name", c.Host, c.opts.Namespace, ch.had.name)
		}
		kind, err := c.resource(ctx, item.gvk())
		if errors.Is(err, problem.KindNotServed) {
			continue // with the kind went all of its objects
		}
		if err != nil {
			return err
		}
		ch.stale = append(ch.stale, &step{item: item, kind: kind, old: item.Edits})
	}
	slices.SortStableFunc(ch.stale, func(a, b *step) int { return rank(b.kind.GroupKind()) - rank(a.kind.GroupKind()) })
	return nil
}

// step reads what an object is.
func (c *Cluster) step(ctx context.Context, body map[string]any) (*step, error) {
	meta := descend(body, []string{"metadata"})
	text := func(m map[string]any, key string) string { v, _ := m[key].(string); return v }
	item := Item{APIVersion: text(body, "apiVersion"), Kind: text(body, "kind"), Namespace: text(meta, "namespace"), Name: text(meta, "name")}
	if !item.fit() {
		return nil, problem.Internal.New("the plan has an object without apiVersion, kind or a fit name: %s", clean(item.String(), maxText))
	}
	kind, err := c.resource(ctx, item.gvk())
	if err != nil {
		return nil, err
	}
	if kind.namespaced != (item.Namespace != "") {
		return nil, problem.Internal.New("the plan has %s, whose kind is served with a namespace: %v", item, kind.namespaced)
	}
	if kind.GroupKind() == (schema.GroupKind{Kind: "Namespace"}) {
		// The server adds it, in the name of whoever makes the namespace; applying again without it would be a change.
		labels, ok := meta["labels"].(map[string]any)
		if !ok {
			labels = map[string]any{}
			meta["labels"] = labels
		}
		labels["kubernetes.io/metadata.name"] = item.Name
	}
	return &step{item: item, kind: kind, body: body}, nil
}

// each does f for every step, some at once, and returns the first error in their order: all are done whatever fails, so
// that the same mistake is told every time.
func each(steps []*step, f func(*step) error) error {
	var group errgroup.Group
	group.SetLimit(parallel)
	errs := make([]error, len(steps))
	for i, s := range steps {
		group.Go(func() error {
			errs[i] = f(s)
			return nil
		})
	}
	_ = group.Wait()
	return errors.Join(errs...)
}

func (s *step) call(method, verb string) call {
	return call{method: method, verb: verb, kind: s.kind, namespace: s.item.Namespace, name: s.item.Name}
}

// get reads the object into s.live, which is nil when it is not there.
func (c *Cluster) get(ctx context.Context, s *step) error {
	s.live = nil
	_, body, err := c.do(ctx, s.call(http.MethodGet, "get"))
	if _, ok := refusedWith(err, http.StatusNotFound); ok {
		return nil
	}
	if err != nil {
		return c.problemOf(err)
	}
	s.live, err = c.object(s, body)
	return err
}

func (c *Cluster) object(s *step, body []byte) (map[string]any, error) {
	o, err := decode(body)
	if err != nil {
		return nil, problem.ClusterAnswer.New("%s: what it says of %s cannot be read", c.Host, s.item)
	}
	return o, nil
}

// metadataOnly asks for an object without its spec and status: modules that travel in objects are large.
const metadataOnly = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"

// send writes the body, by server-side apply, and returns the object, whole or its metadata, and whether it was made.
func (c *Cluster) send(ctx context.Context, s *step, body map[string]any, dry, force, whole bool) (o map[string]any, made bool, err error) {
	k := s.call(http.MethodPatch, "patch")
	if !whole {
		k.accept = metadataOnly
	}
	k.media = "application/apply-patch+yaml" // which JSON is too
	k.query = writing(dry)
	if force {
		k.query.Set("force", "true")
	}
	if k.body, err = json.Marshal(body); err != nil {
		return nil, false, fmt.Errorf("encode %s: %w", s.item, err)
	}
	pause := firstPause
	for n := 0; ; n++ {
		code, answer, err := c.do(ctx, k)
		r, ok := refusedWith(err, http.StatusConflict)
		if ok && conflicts(r) == "" && n < rewrites && body["metadata"].(map[string]any)["uid"] == nil {
			// Somebody wrote it between the server's reading and its writing.
			if err := sleep(ctx, pause); err != nil {
				return nil, false, err
			}
			pause *= 2
			continue
		}
		if err != nil {
			return nil, false, err
		}
		o, err := c.object(s, answer)
		return o, code == http.StatusCreated, err
	}
}

// put writes a whole object under its resourceVersion.
func (c *Cluster) put(ctx context.Context, s *step, body map[string]any, dry bool) (map[string]any, error) {
	k := s.call(http.MethodPut, "update")
	k.query = writing(dry)
	data, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", s.item, err)
	}
	k.body = data
	_, answer, err := c.do(ctx, k)
	if err != nil {
		return nil, err
	}
	return c.object(s, answer)
}

func writing(dry bool) url.Values {
	// Strict, since a field that the server does not know would be dropped without a word.
	query := url.Values{"fieldManager": {Manager}, "fieldValidation": {"Strict"}}
	if dry {
		query.Set("dryRun", "All")
	}
	return query
}

// try finds out what applying an object will do.
func (c *Cluster) try(ctx context.Context, ch *change, s *step) error {
	if s.item.Shared {
		err := c.tryShared(ctx, s)
		if err == nil && s.action == plan.Restarted && !ch.plan.Back {
			err = c.tryWatch(ctx, s)
		}
		return err
	}
	if s.later = ch.makes(s.item.Namespace); s.later {
		s.action, s.item.UID, s.item.Created = plan.Created, "", true
		return nil
	}
	whole := ch.force || takesTime(s.kind.GroupKind())
	o, made, err := c.send(ctx, s, s.body, true, ch.force, whole)
	if err != nil {
		return c.problemOf(err)
	}
	// What we wrote last, and nobody since, is what we wrote. By force an entry of others might go, which has to be seen.
	if known := !made && s.item.Version != "" && s.item.Version == revision(o) && s.item.UID == uid(o); known && !ch.force {
		s.live = o
		if s.action = plan.Updated; s.item.Applied == digest(s.body) {
			s.action = plan.Unchanged
		}
		return nil
	}
	if !made && !whole { // others have to do with it
		if o, made, err = c.send(ctx, s, s.body, true, false, true); err != nil {
			return c.problemOf(err)
		}
	}
	if !made {
		if err := c.get(ctx, s); err != nil {
			return err
		}
	}
	if made || s.live == nil {
		s.action, s.item.UID, s.item.Created = plan.Created, "", true
		return nil
	}
	s.item.Created = ours(s.item, s.live)
	s.item.UID = uid(s.live)
	if at := dropped(s.live, o, nil); ch.force && !s.item.Created && at != "" {
		return problem.FieldConflict.New("%s: %s: an entry that others have put there would be lost, which spec.force does not do", s.item, at)
	}
	s.action = plan.Updated
	if reflect.DeepEqual(timeless(o), timeless(s.live)) {
		s.action = plan.Unchanged
	}
	return nil
}

// dropped names a list of which an entry would be gone; empty when there is none. Many lists are owned as a whole, so that
// taking one over by force is to throw away what others have in it.
func dropped(live, next map[string]any, path []string) string {
	for _, key := range slices.Sorted(maps.Keys(live)) {
		at := append(slices.Clone(path), key)
		if isServers(at) {
			continue
		}
		switch was := live[key].(type) {
		case map[string]any:
			if is, ok := next[key].(map[string]any); ok {
				if found := dropped(was, is, at); found != "" {
					return found
				}
			}
		case []any:
			is, _ := next[key].([]any)
			for _, entry := range was {
				if !slices.ContainsFunc(is, func(v any) bool { return reflect.DeepEqual(v, entry) }) {
					return "." + strings.Join(at, ".")
				}
			}
		}
	}
	return ""
}

// makes says whether a namespace has still to be made, so that nothing in it can be tried.
func (ch *change) makes(namespace string) bool {
	return slices.ContainsFunc(ch.steps, func(s *step) bool {
		return rank(s.kind.GroupKind()) == 0 && s.item.Name == namespace && s.live == nil
	})
}

// tryShared finds out what the user's object becomes. s.live is what the plan was made of, if World has read it.
func (c *Cluster) tryShared(ctx context.Context, s *step) error {
	desired := s.body
	if s.live == nil {
		if err := c.get(ctx, s); err != nil {
			return err
		}
	}
	if s.live == nil {
		return problem.ChainChanged.New("%s, which others made, is not there any more", s.item)
	}
	read := s.read
	if read == nil {
		read = s.live
	}
	edits, err := difference(without(read, s.old), desired)
	if err != nil {
		return problem.ChainChanged.New("%s: %w", s.item, err)
	}
	s.edits = edits
	return c.retouch(ctx, s, true)
}

// retouch gives a shared object its edits instead of the old ones, or tries that. Whoever else writes it meanwhile is not
// overwritten: it is read again.
func (c *Cluster) retouch(ctx context.Context, s *step, dry bool) error {
	for n := 0; ; n++ {
		if s.live == nil {
			if s.edits == nil {
				s.action = plan.Unchanged
				return nil // the user has deleted it, and with it what we had added
			}
			return problem.ChainChanged.New("%s, which others made, is not there any more", s.item)
		}
		body := added(without(s.live, s.old), s.edits)
		s.item.UID, s.item.Edits = uid(s.live), s.edits
		if s.action == "" {
			s.action = plan.Updated
			if template := []string{"spec", "template"}; !reflect.DeepEqual(descend(body, template), descend(s.live, template)) {
				s.action = plan.Restarted
			}
		}
		if reflect.DeepEqual(body, s.live) {
			if dry {
				s.action = plan.Unchanged
			}
			return nil
		}
		o, err := c.put(ctx, s, body, dry)
		if _, ok := refusedWith(err, http.StatusConflict); ok && n < rewrites {
			if err := c.get(ctx, s); err != nil {
				return err
			}
			continue
		}
		if _, ok := refusedWith(err, http.StatusNotFound); ok {
			s.live = nil
			continue
		}
		if err != nil {
			return c.problemOf(err)
		}
		if !dry {
			s.live = o
		}
		return nil
	}
}

// tryRemoval finds out how an object that the plan has no more goes.
func (c *Cluster) tryRemoval(ctx context.Context, s *step) error {
	if s.item.Shared {
		if err := c.get(ctx, s); err != nil {
			return err
		}
		return c.retouch(ctx, s, true)
	}
	keep := holdsOthers(s.kind.GroupKind())
	if s.item.UID == "" || !s.item.Created || keep {
		if err := c.get(ctx, s); err != nil {
			return err
		}
		if s.live == nil {
			s.action = plan.Unchanged
			return nil
		}
		s.item.Created = ours(s.item, s.live)
		s.item.UID = uid(s.live)
	}
	if s.item.Created && !keep {
		s.action = plan.Deleted
		return c.delete(ctx, s, true)
	}
	s.action = plan.Unchanged
	if managed(s.live) {
		s.action = plan.Updated
		if _, _, err := c.send(ctx, s, s.bare(), true, false, false); err != nil {
			return c.problemOf(err)
		}
	}
	if s.item.Created {
		s.action = plan.Kept
	}
	return nil
}

// bare is the object without a field of ours. Applying it gives the fields back that we have, and makes nothing: there has
// to be an object of that UID.
func (s *step) bare() map[string]any {
	meta := map[string]any{"name": s.item.Name, "uid": s.item.UID}
	if s.item.Namespace != "" {
		meta["namespace"] = s.item.Namespace
	}
	return map[string]any{"apiVersion": s.item.APIVersion, "kind": s.item.Kind, "metadata": meta}
}

// delete takes the very object away that we made: one of the same name that somebody else made since stays.
func (c *Cluster) delete(ctx context.Context, s *step, dry bool) error {
	k := s.call(http.MethodDelete, "delete")
	d := deletion{Preconditions: preconditions{UID: s.item.UID}, PropagationPolicy: "Background"}
	if dry {
		d.DryRun = []string{"All"} // in the body, since with a body the server does not look at the query
	}
	body, err := json.Marshal(d)
	if err != nil {
		return err
	}
	k.body = body
	_, _, err = c.do(ctx, k)
	_, gone := refusedWith(err, http.StatusNotFound)
	_, another := refusedWith(err, http.StatusConflict)
	if gone || another {
		s.action = plan.Unchanged
		return nil
	}
	return c.problemOf(err)
}

// carryOut writes what was tried.
func (t *Target) carryOut(ctx context.Context, ch *change) error {
	c := t.cluster
	// The inventory knows of everything before it is there, so that a run that is cut off leaves nothing unknown, and of
	// two adapters that are at it at once one is stopped before it writes.
	next := *ch.had
	next.Objects = ch.intended()
	if ch.writes() {
		next.Version = ""
		if err := t.write(ctx, next); err != nil {
			return err
		}
		t.written = true
		defer t.learn(ch)
	}
	for i := range order {
		if err := c.applyRank(ctx, ch, i); err != nil {
			return err
		}
	}
	if err := c.applyRank(ctx, ch, len(order)); err != nil {
		return err
	}
	for i := len(order); i >= 0; i-- {
		stale := ranked(ch.stale, i)
		if err := each(stale, func(s *step) error { return c.remove(ctx, s) }); err != nil {
			return fmt.Errorf("remove: %w", err)
		}
	}
	restored := ch.stale
	if ch.plan.Back {
		restored = slices.Concat(ch.steps, ch.stale)
	}
	c.awaitRestored(ctx, restored)
	return nil
}

// learn has the inventory, where it is not yet written, know of the objects what is known after a change, for whoever goes
// on from here or back: what somebody else has made meanwhile is not ours.
func (t *Target) learn(ch *change) {
	for i, item := range t.had.Objects {
		for _, s := range ch.steps {
			if s.item.key() == item.key() && !item.Shared {
				t.had.Objects[i] = s.item
			}
		}
	}
}

// conclude writes the inventory of what holds now, unless it says so already.
func (t *Target) conclude(ctx context.Context, ch *change) error {
	next := *t.had
	next.Chain, next.Version, next.Objects, next.revisions = ch.plan.Chain, ch.plan.Version, nil, t.had.revised(ch.plan.Chain)
	if len(ch.plan.Again) > 0 { // the change is not over, and whoever is cut off before that finds it
		next.Version = ""
	}
	for _, s := range ch.steps {
		next.Objects = append(next.Objects, s.item)
	}
	sortItems(next.Objects)
	if next.Version == t.had.Version && slices.EqualFunc(next.Objects, t.had.Objects, sameItem) && digest(next.Chain) == digest(t.had.Chain) {
		return nil
	}
	return t.write(ctx, next)
}

// write makes an inventory the one that there is.
func (t *Target) write(ctx context.Context, next Inventory) error {
	if err := t.cluster.write(ctx, &next); err != nil {
		return fmt.Errorf("write the inventory: %w", err)
	}
	t.had = &next
	return nil
}

// intended is all that there may be while the change is carried out.
func (ch *change) intended() []Item {
	all := slices.Clone(ch.had.Objects)
	for _, s := range ch.steps {
		i := slices.IndexFunc(all, func(i Item) bool { return i.key() == s.item.key() })
		if i < 0 {
			all = append(all, s.item)
			continue
		}
		item := s.item
		item.Edits = union(s.old, s.edits)
		if !sameItem(all[i], item) {
			all[i] = item
		}
	}
	sortItems(all)
	return all
}

func sameItem(a, b Item) bool { return digest(a) == digest(b) }

func ranked(steps []*step, r int) []*step {
	var of []*step
	for _, s := range steps {
		if rank(s.kind.GroupKind()) == r {
			of = append(of, s)
		}
	}
	return of
}

// applyRank writes the objects of one rank that differ.
func (c *Cluster) applyRank(ctx context.Context, ch *change, r int) error {
	steps := ranked(ch.steps, r)
	if err := each(steps, func(s *step) error { return c.apply(ctx, ch, s) }); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	if !ch.plan.Back {
		if err := c.awaitRestarts(ctx, ch, steps); err != nil {
			return err
		}
	}
	if r > 0 || len(steps) == 0 {
		return nil
	}
	// What others are put into has to be there before they are, and before they can be tried.
	if err := c.await(ctx, steps); err != nil {
		return err
	}
	var later []*step
	for _, s := range ch.steps {
		if s.later {
			later = append(later, s)
		}
	}
	if err := each(later, func(s *step) error { return c.try(ctx, ch, s) }); err != nil {
		return fmt.Errorf("try what is to be applied: %w", err)
	}
	return nil
}

func (c *Cluster) apply(ctx context.Context, ch *change, s *step) error {
	if s.action == plan.Unchanged {
		return nil
	}
	if s.item.Shared {
		return c.retouch(ctx, s, false)
	}
	o, made, err := c.send(ctx, s, s.body, false, ch.force, takesTime(s.kind.GroupKind()))
	if err != nil {
		return c.problemOf(err)
	}
	s.later = false
	switch {
	case made:
		s.action, s.item.Created = plan.Created, true
	case s.action == plan.Created: // somebody else has made it since it was tried
		s.action, s.item.Created = plan.Updated, false
	}
	s.live, s.item.UID = o, uid(o)
	s.item.Applied, s.item.Version = digest(s.body), revision(o)
	return nil
}

func (c *Cluster) remove(ctx context.Context, s *step) error {
	switch {
	case s.action == plan.Unchanged:
		return nil
	case s.item.Shared:
		return c.retouch(ctx, s, false)
	case s.action == plan.Deleted:
		return c.delete(ctx, s, false)
	case !managed(s.live):
		return nil
	}
	_, _, err := c.send(ctx, s, s.bare(), false, false, false)
	_, gone := refusedWith(err, http.StatusNotFound)
	_, another := refusedWith(err, http.StatusConflict)
	if gone || another {
		s.action = plan.Unchanged
		return nil
	}
	return c.problemOf(err)
}

// writes says whether there is anything to do.
func (ch *change) writes() bool {
	return slices.ContainsFunc(slices.Concat(ch.steps, ch.stale), func(s *step) bool { return s.action != plan.Unchanged })
}

// changes tells what was done, or will be.
func (ch *change) changes() []plan.Change {
	var changes []plan.Change
	for _, s := range ch.steps {
		changes = append(changes, plan.Change{Subject: s.item.String(), Action: s.action})
	}
	for _, s := range ch.stale {
		if s.action != plan.Unchanged {
			changes = append(changes, plan.Change{Subject: s.item.String(), Action: s.action})
		}
	}
	return changes
}

func metadataOf(o map[string]any) map[string]any { return descend(o, []string{"metadata"}) }

func uid(o map[string]any) string { v, _ := metadataOf(o)["uid"].(string); return v }

func revision(o map[string]any) string { v, _ := metadataOf(o)["resourceVersion"].(string); return v }

// ours says whether we made the object that is there. Of one that was being made when a run was cut off, its managed fields
// tell: we have applied it, when it was new. That could be wrong only if somebody else had made it within the moment
// between our trying and our applying, and that very run was cut off.
func ours(item Item, live map[string]any) bool {
	if !item.Created || item.UID != "" {
		return item.Created && item.UID == uid(live)
	}
	born := moment(metadataOf(live)["creationTimestamp"])
	return slices.ContainsFunc(managers(live), func(m map[string]any) bool {
		return m["manager"] == Manager && m["operation"] == "Apply" && moment(m["time"]).Sub(born).Abs() <= newborn
	})
}

// newborn is how far an object's first entry of managed fields may be from its making: they are noted one after the other,
// in whole seconds.
const newborn = 5 * time.Second

func moment(v any) time.Time {
	text, _ := v.(string)
	t, _ := time.Parse(time.RFC3339, text)
	return t
}

// managed says whether we have a field of the object.
func managed(live map[string]any) bool {
	return slices.ContainsFunc(managers(live), func(m map[string]any) bool {
		return m["manager"] == Manager && m["operation"] == "Apply"
	})
}

func managers(live map[string]any) []map[string]any {
	list, _ := metadataOf(live)["managedFields"].([]any)
	var all []map[string]any
	for _, v := range list {
		if m, ok := v.(map[string]any); ok {
			all = append(all, m)
		}
	}
	return all
}

// timeless is an object without the times of its managed fields, which a dry run sets anew. Who has which field stays:
// becoming the owner of a field is a change.
func timeless(o map[string]any) map[string]any {
	o = clone(o)
	meta := metadataOf(o)
	if meta == nil {
		return o
	}
	var fields []any
	for _, m := range managers(o) {
		m = clone(m)
		delete(m, "time")
		fields = append(fields, m)
	}
	meta["managedFields"] = fields
	return o
}
