package operation

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// What a Revision did to its filter.
const (
	Applied = "applied"
	Changed = "changed"
	Moved   = "moved"
	Removed = "removed"
)

// Revision is a state that a filter had.
type Revision struct {
	Number uint64 // as an Undo names it; it grows with each change
	Time   time.Time
	Change string // Applied, Changed, Moved or Removed
	Filter filter.Filter
	// First says that nothing older is kept: the filter may have been there before.
	First bool

	of filter.Chain // that the revision is kept of
}

// astray says that the filter is for another mesh or target than the chain that its revision is kept of. The adapter writes
// none such: somebody else has changed where it is kept.
func (r Revision) astray() bool {
	return filter.Chain{Mesh: r.Filter.Spec.Mesh, Target: r.Filter.Spec.Target}.ID() != r.of.ID()
}

// Alone is the filter as if nothing else were on its target.
func (r Revision) Alone() Status {
	return Status{Chain: filter.Chain{Mesh: r.Filter.Spec.Mesh, Target: r.Filter.Spec.Target, Filters: []filter.Filter{r.Filter}}}
}

// History tells what became of a filter, oldest first, as far as the last 10 changes of each target's chain go: on the
// adapter's own proxies, then in its own cluster and Consul. What could be told is told beside an error.
func (r *Runner) History(ctx context.Context, namespace, name string) ([]Revision, error) {
	key, err := filter.ParseKey(name, cmp.Or(namespace, "default"))
	if err != nil || strings.Contains(name, "/") {
		return nil, problem.InvalidRequest.WithFields("", []problem.Field{{Path: "name", Cause: fmt.Sprintf("%q is not a filter's name", clip(name)),
			Remedy: "use lower-case letters, digits and dashes, and put the namespace into its own field"}})
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	// Side by side: one that does not answer takes no time from the others.
	places := append([]place{r.here()}, r.elsewhere(nil)...)
	in, errs := make([][]Revision, len(places)), make([]error, len(places))
	var g errgroup.Group
	for i, pl := range places {
		g.Go(func() error {
			if in[i], errs[i] = pl.history(ctx, key); errs[i] == nil {
				errs[i] = pl.damage(ctx)
			}
			return nil
		})
	}
	_ = g.Wait()
	history := append([]Revision{}, slices.Concat(in...)...)
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(history) == 0 && len(errs) == 0 {
		return nil, problem.FilterNotFound.New("%s: no change of it is kept", key)
	}
	return history, joined(errs)
}

// history tells what became of a filter in the place; nothing where it never was.
func (pl place) history(ctx context.Context, key filter.Key) (history []Revision, err error) {
	for _, b := range pl.backends {
		revisions, err := b.History(ctx)
		if err != nil {
			return nil, fmt.Errorf("read the history of the chains of %s: %w", pl.title(), err)
		}
		history = append(history, HistoryOf(revisions, key)...)
	}
	slices.SortStableFunc(history, func(a, b Revision) int { return cmp.Compare(a.Number, b.Number) })
	return history, nil
}

// HistoryOf tells what became of a filter, by the chains that targets had, oldest first.
func HistoryOf(revisions []plan.Revision, key filter.Key) (history []Revision) {
	on := map[string]filter.Filter{} // by chain, what stands on it
	seen := map[string]bool{}
	last := "" // id of the chain that has it, empty where none has
	for _, rev := range revisions {
		id := rev.Chain.ID()
		oldest := !seen[id]
		seen[id] = true
		f, there := rev.Chain.Find(key)
		was, had := on[id]
		switch {
		case there && had && same(f, was), !there && !had:
			continue
		case !there:
			delete(on, id)
			if last != id {
				continue // it had moved away before
			}
			last = ""
			history = append(history, Revision{Number: rev.Number, Time: rev.Time, Change: Removed, Filter: was, of: rev.Chain})
			continue
		}
		change := Applied
		if had {
			change = Changed
		} else if last != "" {
			change = Moved
		}
		on[id], last = f, id
		history = append(history, Revision{Number: rev.Number, Time: rev.Time, Change: change, Filter: f, First: oldest && rev.Oldest, of: rev.Chain})
	}
	return history
}

func same(a, b filter.Filter) bool {
	x, xerr := json.Marshal(a)
	y, yerr := json.Marshal(b)
	return errors.Join(xerr, yerr) == nil && string(x) == string(y)
}

// readUndo makes an Undo what it comes to now: applying the filter as it was, or removing it. That is looked up in the
// clusters, of which the adapter's own Consul may be one, and here, and holds for where the filter has a history. A cluster
// that does not answer may have one. Those that came with a connection, which are implied, count where there is none here.
func (r *Runner) readUndo(ctx context.Context, j *job, clusters []place, implied bool) (err error) {
	defer func() {
		if !errors.Is(err, problem.FilterNotFound) && !errors.Is(err, problem.RevisionNotFound) {
			return
		}
		for _, pl := range clusters {
			if damage := problem.Of(pl.damage(ctx)); damage != nil {
				p := *problem.Of(err)
				p.Details += fmt.Sprintf("\nIt may be in what cannot be read: %s [%s]", damage.Details, damage.Kind.Code)
				err = &p
			}
		}
	}()
	u := j.Undo
	here, err := r.here().history(ctx, u.Key)
	if err != nil {
		return err
	}
	if implied && len(here) > 0 {
		clusters = nil
	}
	found, histories, err := pasts(ctx, clusters, u.Key)
	if err != nil && len(here) == 0 {
		return err
	}
	switch {
	case len(found) > 0 && len(here) > 0:
		return problem.UndoAmbiguous.New("%s has a history on plain Envoys and in %s", u.Key, found[0].name())
	case len(found) == 0 && len(here) == 0:
		return problem.FilterNotFound.New("%s: no change of it is kept", u.Key)
	case len(found) == 0:
		found, histories = []place{r.here()}, [][]Revision{here}
	case len(j.kubeconfigs) == 0 && !r.AllowWideTargets && j.Namespace != "" && u.Key.Namespace != j.Namespace:
		return problem.TargetTooWide.New("%s is in another namespace than the request, which is in %s", u.Key, j.Namespace)
	}
	var to past
	var lines []string
	for i, pl := range found {
		p, err := pastOf(u, histories[i])
		if err != nil && (len(found) == 1 || errors.Is(err, problem.RevisionAstray)) {
			return err
		} else if err != nil {
			lines = append(lines, pl.says(problem.Of(err).Details))
			continue
		}
		if pl.cluster != nil {
			j.Only = append(j.Only, pl.name())
		}
		if lines = append(lines, pl.name()+": "+p.String()); to.is == "" {
			to = p
		}
		if to.is != p.is || !same(to.filter, p.filter) {
			return problem.UndoAmbiguous.New("%s\n%s", u.Key, strings.Join(lines, "\n"))
		}
	}
	if to.is == "" {
		return problem.RevisionNotFound.New("%s\n%s", u.Key, strings.Join(lines, "\n"))
	}
	f := to.filter
	if _, cause := wide(f, j.Namespace); cause != "" && !r.AllowWideTargets {
		return problem.TargetTooWide.New("%s: %s", u.Key, cause)
	}
	if to.is == Removed {
		j.Remove = []filter.Key{u.Key}
		if len(j.Only) > 0 {
			j.Meshes = []string{f.Spec.Mesh}
		}
		pt := of([]filter.Filter{f})
		j.Wait, j.Rollout = pt.wait, pt.rollout
		return nil
	}
	if m := f.Spec.Module; m.Builtin != "" && r.Modules.Shipped()[m.Builtin] != m.SHA256 {
		// The program ships another module by that name now; the bytes it had are kept.
		f.Spec.Module = filter.Module{SHA256: m.SHA256}
	}
	j.Filters = []filter.Filter{f}
	return nil
}

// pasts are the clusters that have a history of a filter, and what it is. A cluster that cannot be asked is an error.
func pasts(ctx context.Context, clusters []place, key filter.Key) (found []place, histories [][]Revision, err error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	all, errs := make([][]Revision, len(clusters)), make([]error, len(clusters))
	var g errgroup.Group
	g.SetLimit(sideBySide)
	for i, pl := range clusters {
		g.Go(func() error {
			if all[i], errs[i] = pl.history(ctx, key); ctx.Err() != nil {
				errs[i] = problem.ClusterUnreachable.New("it did not tell its history within %s", lookTimeout)
			}
			return nil
		})
	}
	_ = g.Wait()
	var silent []place
	var why []error
	for i, pl := range clusters {
		switch {
		case errs[i] != nil:
			silent, why = append(silent, pl), append(why, errs[i])
		case len(all[i]) > 0:
			found, histories = append(found, pl), append(histories, all[i])
		}
	}
	if len(why) > 0 {
		return nil, nil, together(silent, why)
	}
	return found, histories, nil
}

// past is what a filter was, and is to be again: Applied, or Removed, with the filter as it is.
type past struct {
	is     string
	filter filter.Filter
}

func (p past) String() string {
	if p.is == Removed {
		return "it was not there"
	}
	return fmt.Sprintf("it was on %s, with sha256 %s…", p.filter.Spec.Target, filter.ShortDigest(p.filter.Spec.Module.SHA256))
}

// pastOf finds what an undo brings a filter back to.
func pastOf(u *undo, history []Revision) (past, error) {
	last := len(history) - 1
	to := last - 1
	if u.Revision != 0 {
		to = slices.IndexFunc(history, func(rev Revision) bool { return rev.Number == u.Revision })
		if to < 0 {
			var numbers []string
			for _, rev := range history {
				numbers = append(numbers, fmt.Sprint(rev.Number))
			}
			return past{}, problem.RevisionNotFound.New("%s has no revision %d; there are %s", u.Key, u.Revision, strings.Join(numbers, ", "))
		}
	}
	for _, i := range []int{to, last} {
		if rev := history[max(i, 0)]; rev.astray() {
			return past{}, problem.RevisionAstray.New("%s in its revision %d is for %s of mesh %s, and that is kept of %s of mesh %s",
				u.Key, rev.Number, rev.Filter.Spec.Target, rev.Filter.Spec.Mesh, rev.of.Target, rev.of.Mesh)
		}
	}
	switch {
	case to < 0 && history[last].First:
		return past{}, problem.RevisionNotFound.New("%s was there before its revision %d, and nothing older is kept", u.Key, history[last].Number)
	case to < 0 || history[to].Change == Removed:
		if history[last].Change == Removed {
			return past{}, problem.FilterNotFound.New("%s is removed already", u.Key)
		}
		return past{Removed, history[last].Filter}, nil
	}
	return past{Applied, history[to].Filter}, nil
}
