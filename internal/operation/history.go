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

	"github.com/meshery/meshery-filters/internal/filter"
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
}

// Alone is the filter as if nothing else were on its target.
func (r Revision) Alone() Status {
	return Status{Chain: filter.Chain{Mesh: r.Filter.Spec.Mesh, Target: r.Filter.Spec.Target, Filters: []filter.Filter{r.Filter}}}
}

// History tells what became of a filter, oldest first, as far as the last 10 changes of each target's chain go.
func (r *Runner) History(ctx context.Context, namespace, name string) ([]Revision, error) {
	key, err := filter.ParseKey(name, cmp.Or(namespace, "default"))
	if err != nil || strings.Contains(name, "/") {
		return nil, problem.InvalidRequest.WithFields("", []problem.Field{{Path: "name", Cause: fmt.Sprintf("%q is not a filter's name", clip(name)),
			Remedy: "use lower-case letters, digits and dashes, and put the namespace into its own field"}})
	}
	return r.history(ctx, key)
}

func (r *Runner) history(ctx context.Context, key filter.Key) ([]Revision, error) {
	history := []Revision{}
	for _, b := range r.Backends {
		revisions, err := b.History(ctx)
		if err != nil {
			return nil, fmt.Errorf("read the history of the chains: %w", err)
		}
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
				history = append(history, Revision{Number: rev.Number, Time: rev.Time, Change: Removed, Filter: was})
				continue
			}
			change := Applied
			if had {
				change = Changed
			} else if last != "" {
				change = Moved
			}
			on[id], last = f, id
			history = append(history, Revision{Number: rev.Number, Time: rev.Time, Change: change, Filter: f, First: oldest && rev.Oldest})
		}
	}
	slices.SortStableFunc(history, func(a, b Revision) int { return int(a.Number) - int(b.Number) })
	if len(history) == 0 {
		return nil, problem.FilterNotFound.New("%s", key)
	}
	return history, nil
}

func same(a, b filter.Filter) bool {
	x, xerr := json.Marshal(a)
	y, yerr := json.Marshal(b)
	return errors.Join(xerr, yerr) == nil && string(x) == string(y)
}

// readUndo makes an Undo what it comes to now: applying the filter as it was, or removing it.
func (r *Runner) readUndo(ctx context.Context, j *job) error {
	u := j.Undo
	history, err := r.history(ctx, u.Key)
	if err != nil {
		return err
	}
	last := len(history) - 1
	to := last - 1
	if u.Revision != 0 {
		to = slices.IndexFunc(history, func(rev Revision) bool { return rev.Number == u.Revision })
		if to < 0 {
			var numbers []string
			for _, rev := range history {
				numbers = append(numbers, fmt.Sprint(rev.Number))
			}
			return problem.RevisionNotFound.New("%s has no revision %d; there are %s", u.Key, u.Revision, strings.Join(numbers, ", "))
		}
	}
	switch {
	case to < 0 && history[last].First:
		return problem.RevisionNotFound.New("%s was there before its revision %d, and nothing older is kept", u.Key, history[last].Number)
	case to < 0 || history[to].Change == Removed:
		if history[last].Change == Removed {
			return problem.FilterNotFound.New("%s is removed already", u.Key)
		}
		j.Remove = []filter.Key{u.Key}
		pt := of([]filter.Filter{history[last].Filter})
		j.Wait, j.Rollout = pt.wait, pt.rollout
		return nil
	}
	f := history[to].Filter
	if _, _, err := r.Modules.Resolve(ctx, f.Spec.Module); errors.Is(err, problem.DigestMismatch) {
		// The program ships another module by that name now; the bytes it had are kept.
		f.Spec.Module = filter.Module{SHA256: f.Spec.Module.SHA256}
	}
	j.Filters = []filter.Filter{f}
	return nil
}
