package kube

import (
	"cmp"
	"slices"
	"strconv"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

// revised adds the chain that holds from now on. A revision's number is the resourceVersion that the inventory had before.
func (v *Inventory) revised(now filter.Chain) plan.History {
	number, _ := strconv.ParseUint(v.resourceVersion, 10, 63) // 0: there is no inventory yet
	return v.revisions.With(v.Chain, now, number, time.Now())
}

// Revisions are the chains that the target had, oldest first.
func (v *Inventory) Revisions() []plan.Revision { return v.revisions.Revisions(v.Chain) }

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
