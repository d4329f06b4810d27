package consul

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// rewrites bounds how often an entry that somebody else writes at the same time is read and written again.
const rewrites = 5

// Read gives the entries that a mesh wants to know of, as Kubernetes would show them and without the extensions that are
// ours. It serves no kinds. What metadata.namespace says is the reference's: the entries are of the Client's own.
func (c *Client) Read(ctx context.Context, reads plan.Reads) (found plan.Cluster, err error) {
	for _, r := range reads.Objects {
		kind, ok := kinds[r.Kind]
		if r.Group != group || !ok {
			continue
		}
		e, err := c.entry(ctx, kind, r.Name)
		if err != nil {
			return found, err
		}
		if e.raw != nil {
			found.Objects = append(found.Objects, e.object(r.Kind, r.Namespace))
		}
	}
	return found, nil
}

// Targets are all targets as they were read at one moment.
type Targets struct {
	client  *Client
	all     []inventory
	damaged map[string]error // by key
}

// Targets reads what holds on every target.
func (c *Client) Targets(ctx context.Context) (*Targets, error) {
	all, damaged, err := c.inventories(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the inventories: %w", err)
	}
	return &Targets{c, all, damaged}, nil
}

// Damaged are the problems of targets whose inventories cannot be read.
func (t *Targets) Damaged() (all []error) {
	for _, key := range slices.Sorted(maps.Keys(t.damaged)) {
		all = append(all, t.damaged[key])
	}
	return all
}

// Chains lists those that we put into Consul.
func (t *Targets) Chains() (chains []filter.Chain) {
	for _, v := range t.all {
		if len(v.Chain.Filters) > 0 {
			chains = append(chains, v.Chain)
		}
	}
	return chains
}

// Begun lists the chains of targets that are being changed, or whose change was cut off: what held before that, which may
// be no filters.
func (t *Targets) Begun() (chains []filter.Chain) {
	for _, v := range t.all {
		if v.Version == "" && len(v.Entries) > 0 {
			chains = append(chains, v.Chain)
		}
	}
	return chains
}

// Revisions are the chains that all targets had, oldest first.
func (t *Targets) Revisions() (all []plan.Revision) {
	for _, v := range t.all {
		all = append(all, v.Revisions.Revisions(v.Chain)...)
	}
	slices.SortStableFunc(all, func(a, b plan.Revision) int { return cmp.Compare(a.Number, b.Number) })
	return all
}

// Target is one of them, or one that has nothing.
func (t *Targets) Target(mesh string, at filter.Target) *Target {
	id := filter.Chain{Mesh: mesh, Target: at}.ID()
	for _, v := range t.all {
		if v.Chain.ID() == id {
			return &Target{client: t.client, had: v}
		}
	}
	return &Target{client: t.client, had: inventory{Target: at.String(), Chain: filter.Chain{Mesh: mesh, Target: at}},
		damaged: t.damaged[inventoryKey(mesh, at)]}
}

// Target is one target as it was read: what is applied builds on that, and is problem.ChainChanged when somebody else has
// changed the target meanwhile. It is not safe for concurrent use.
type Target struct {
	client  *Client
	had     inventory
	applied *inventory // by Apply, and not committed yet
	written bool       // by the last Apply
	damaged error
}

// Damaged says why what holds there cannot be told; nil: it can.
func (t *Target) Damaged() error { return t.damaged }

// Target reads what holds on a target.
func (c *Client) Target(ctx context.Context, mesh string, t filter.Target) (*Target, error) {
	had, err := c.inventory(ctx, mesh, t)
	if err != nil {
		return nil, fmt.Errorf("read the inventory: %w", err)
	}
	return &Target{client: c, had: had}, nil
}

// Committed returns what holds: a chain, without filters when we put nothing there, and its Version, which is empty while
// an Apply was begun and not ended. Objects are not part of it.
func (t *Target) Committed() plan.Plan { return plan.Plan{Chain: t.had.Chain, Version: t.had.Version} }

// Applied says whether what was begun last has ended.
func (t *Target) Applied() bool { return t.had.Version != "" }

// Written says whether the last Apply came to write something.
func (t *Target) Written() bool { return t.written }

// Versions are of no use here: entries say what they hold.
func (t *Target) Versions() map[string]string { return nil }

// Revisions are the chains that the target had, oldest first.
func (t *Target) Revisions() []plan.Revision { return t.had.Revisions.Revisions(t.had.Chain) }

// Objects are the entries that have extensions of ours, with these alone.
func (t *Target) Objects(ctx context.Context) (objects []plan.Object, err error) {
	for _, name := range t.had.Entries {
		kind, name, _ := strings.Cut(name, "/")
		e, err := t.client.entry(ctx, kind, name)
		if errors.Is(err, problem.ConsulKubernetes) { // ours no more
			continue
		}
		if err != nil {
			return nil, err
		}
		var ours []any
		for _, x := range e.extensions() {
			if slices.Contains(t.had.Plugins, pluginOf(x)) {
				ours = append(ours, plain(x))
			}
		}
		objects = append(objects, plan.Object{Content: map[string]any{"spec": map[string]any{"envoyExtensions": ours}}})
	}
	return objects, nil
}

// step is what becomes of one entry.
type step struct {
	entry  entry
	ours   []map[string]any
	at     int // of the user's extensions before ours, in the plan
	action plan.Action
}

// prepare reads the entries, and finds out what becomes of them.
func (t *Target) prepare(ctx context.Context, p plan.Plan) (steps []*step, next inventory, err error) {
	if p.Chain.ID() != t.had.Chain.ID() {
		return nil, next, problem.Internal.New("the plan is for %s, and not for %s", p.Chain.Target, t.had.Chain.Target)
	}
	if at := p.Chain.Target.Partition; at != "" && at != t.client.Partition && len(p.Chain.Filters) > 0 {
		return nil, next, problem.NotSupported.New("spec.target.partition is %q, and the adapter is configured for another, consul.partition", at)
	}
	next = t.had
	next.Chain, next.Version, next.Entries, next.Plugins = p.Chain, p.Version, nil, nil
	for _, f := range p.Chain.Filters {
		next.Plugins = append(next.Plugins, pluginName(f.Key))
	}
	for _, o := range p.Objects {
		s := &step{}
		if s.entry, err = t.client.entryOf(ctx, o); err != nil {
			return nil, next, err
		}
		for _, x := range extensionsOf(o.Content) {
			switch {
			case isOf(x, p.Chain.Filters):
				s.ours = append(s.ours, x)
			case s.ours == nil:
				s.at++
			}
		}
		steps = append(steps, s)
		next.Entries = append(next.Entries, s.entry.String())
	}
	for _, name := range t.had.Entries {
		if kind, name, _ := strings.Cut(name, "/"); !slices.Contains(next.Entries, kind+"/"+name) {
			e, err := t.client.entry(ctx, kind, name)
			if err != nil {
				return nil, next, err
			}
			steps = append(steps, &step{entry: e})
		}
	}
	for _, s := range steps {
		s.decide(t.names(next))
	}
	return steps, next, t.alone(ctx, next)
}

// alone refuses a filter that another target's chain has in the same entry: who took it from there would take it from both.
// Such targets differ in words of which Consul knows nothing here, as the namespace of a reference is one.
func (t *Target) alone(ctx context.Context, next inventory) error {
	fresh := slices.DeleteFunc(slices.Clone(next.Plugins), func(name string) bool { return slices.Contains(t.had.Plugins, name) })
	if len(fresh) == 0 {
		return nil
	}
	all, _, err := t.client.inventories(ctx)
	if err != nil {
		return fmt.Errorf("list the inventories: %w", err)
	}
	in := func(of []string) func(string) bool { return func(s string) bool { return slices.Contains(of, s) } }
	for _, v := range all {
		if i := slices.IndexFunc(fresh, in(v.Plugins)); i >= 0 && v.Chain.ID() != next.Chain.ID() && slices.ContainsFunc(next.Entries, in(v.Entries)) {
			return problem.NotSupported.New("%s stands on %s already, which is the same in Consul; keep that target, or remove the filter first",
				strings.TrimPrefix(fresh[i], plugins), v.Chain.Target)
		}
	}
	return nil
}

// names are those of every plugin that is, was or will be the target's.
func (t *Target) names(next inventory) []string { return union(t.had.Plugins, next.Plugins) }

func union(a, b []string) []string {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

// decide says what the entry becomes, and what that is.
func (s *step) decide(names []string) (raw map[string]any) {
	if s.entry.raw == nil && s.ours == nil {
		s.action = plan.Unchanged
		return nil
	}
	raw = s.entry.with(s.ours, names, s.at)
	switch {
	case s.entry.same(raw):
		s.action = plan.Unchanged
	case s.entry.raw == nil:
		s.action = plan.Created
	case raw == nil:
		s.action = plan.Deleted
	default:
		s.action = plan.Updated
	}
	return raw
}

// write brings the entry there, over whatever others write to it meanwhile.
func (s *step) write(ctx context.Context, c *Client, names []string) error {
	for range rewrites {
		raw := s.decide(names)
		if s.action == plan.Unchanged {
			return nil
		}
		done, err := c.put(ctx, s.entry, raw)
		if done || err != nil {
			return err
		}
		if s.entry, err = c.entry(ctx, s.entry.kind, s.entry.name); err != nil {
			return err
		}
	}
	return problem.ChainChanged.New("%s: %s, %d times", c, s.entry, rewrites)
}

// Apply makes the target hold exactly what the plan says. On an error, what was done is in the inventory, so that applying
// this plan or the one before it brings the target there. Until Commit the inventory says that the chain before holds, and
// that it is being changed.
func (t *Target) Apply(ctx context.Context, p plan.Plan) ([]plan.Change, error) {
	t.applied, t.written = nil, false
	steps, next, err := t.prepare(ctx, p)
	if err != nil {
		return nil, err
	}
	names := t.names(next)
	if slices.ContainsFunc(steps, func(s *step) bool { return s.action != plan.Unchanged }) {
		// The inventory knows of everything before it is there, so that a run that is cut off leaves nothing unknown, and of
		// two adapters that are at it at once one is stopped before it writes.
		begun := t.had
		begun.Version, begun.Entries, begun.Plugins = "", union(t.had.Entries, next.Entries), names
		if t.had, err = t.client.keep(ctx, begun); err != nil {
			return nil, fmt.Errorf("write the inventory: %w", err)
		}
		t.written = true
	}
	changes := changesOf(steps)
	for _, s := range steps {
		if err := s.write(ctx, t.client, names); err != nil {
			return nil, fmt.Errorf("write %s: %w", s.entry, err)
		}
	}
	next.index = t.had.index
	// Consul counts all that is written to it: of two changes the later one has the larger number, whatever their targets.
	next.Revisions = t.had.Revisions.With(t.had.Chain, p.Chain, t.had.index, time.Now())
	t.applied = &next
	return changes, nil
}

// Commit has the inventory say that what was applied last holds.
func (t *Target) Commit(ctx context.Context) (err error) {
	if t.applied == nil {
		return problem.Internal.New("nothing is applied to %s that could be kept", t.had.Chain.Target)
	}
	if canonical(*t.applied) == canonical(t.had) {
		return nil
	}
	if t.had, err = t.client.keep(ctx, *t.applied); err != nil {
		return fmt.Errorf("write the inventory: %w", err)
	}
	return nil
}

// Diff tells what Apply would change, and writes nothing.
func (t *Target) Diff(ctx context.Context, p plan.Plan) ([]plan.Change, error) {
	steps, _, err := t.prepare(ctx, p)
	return changesOf(steps), err
}

func changesOf(steps []*step) (changes []plan.Change) {
	for _, s := range steps {
		if s.action != plan.Unchanged || s.ours != nil {
			changes = append(changes, plan.Change{Subject: s.entry.String(), Action: s.action})
		}
	}
	return changes
}
