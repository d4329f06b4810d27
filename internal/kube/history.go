package kube

import (
	"cmp"
	"encoding/json"
	"slices"
	"strconv"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

const (
	maxRevisions = 10
	// maxHistory bounds the revisions of a target in bytes: every operation reads those of all targets.
	maxHistory = 64 << 10
)

// kept is a chain that a target had, as its inventory keeps it.
type kept struct {
	// Number grows with each change of any target of the cluster: it is the resourceVersion that the inventory had before.
	Number  uint64          `json:"number"`
	Time    time.Time       `json:"time"`
	Filters []filter.Filter `json:"filters"`
	Oldest  bool            `json:"oldest,omitempty"` // older ones were there, and are not kept
}

// revised adds the chain that holds from now on, unless it is the one that held before.
func (v *Inventory) revised(now filter.Chain) []kept {
	if len(v.revisions) == 0 && len(now.Filters) == 0 {
		return nil
	}
	next := kept{Number: 1, Time: time.Now().UTC().Truncate(time.Second), Filters: now.Filters, Oldest: len(v.revisions) == 0 && len(v.Chain.Filters) > 0}
	if n, err := strconv.ParseUint(v.resourceVersion, 10, 63); err == nil {
		next.Number = n
	}
	if len(v.revisions) > 0 {
		last := v.revisions[len(v.revisions)-1]
		if digest(last.Filters) == digest(next.Filters) || len(last.Filters) == 0 && len(next.Filters) == 0 {
			return v.revisions
		}
		next.Number = max(next.Number, last.Number+1)
	}
	return bounded(append(slices.Clone(v.revisions), next))
}

// bounded leaves out the oldest revisions that are too many, or too large.
func bounded(all []kept) []kept {
	size, from := 0, len(all)
	for from > 0 && len(all)-from < maxRevisions {
		data, err := json.Marshal(all[from-1])
		if size += len(data); err != nil || size > maxHistory {
			break
		}
		from--
	}
	if from > 0 && from < len(all) {
		all[from].Oldest = true
	}
	return all[from:]
}

// Revisions are the chains that the target had, oldest first.
func (v *Inventory) Revisions() []plan.Revision {
	var all []plan.Revision
	for _, k := range v.revisions {
		chain := v.Chain
		chain.Filters = k.Filters
		all = append(all, plan.Revision{Number: k.Number, Time: k.Time, Chain: chain, Oldest: k.Oldest})
	}
	return all
}

// Revisions are the chains that the target had, oldest first.
func (t *Target) Revisions() []plan.Revision { return t.had.Revisions() }

// Revisions are the chains that all targets had, oldest first.
func (ts *Targets) Revisions() []plan.Revision {
	var all []plan.Revision
	for _, v := range ts.inventories {
		all = append(all, v.Revisions()...)
	}
	slices.SortStableFunc(all, func(a, b plan.Revision) int { return cmp.Compare(a.Number, b.Number) })
	return all
}
