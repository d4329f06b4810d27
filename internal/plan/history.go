package plan

import (
	"encoding/json"
	"slices"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
)

const (
	maxRevisions = 10
	// maxHistory bounds the revisions of a target in bytes: every operation reads those of all targets.
	maxHistory = 64 << 10
)

// Past is a chain that a target had, as an inventory keeps it.
type Past struct {
	// Number grows with each change of any target that is kept in the same place.
	Number  uint64          `json:"number"`
	Time    time.Time       `json:"time"`
	Filters []filter.Filter `json:"filters"`          // with the digests of their modules and not their bytes
	Oldest  bool            `json:"oldest,omitempty"` // older ones were there, and are not kept
}

// History is the last chains that a target had, at most 10 and 64 KiB of them, oldest first; the last is the one that holds.
type History []Past

// With adds the chain that holds from now on, unless it is the one that held before.
func (h History) With(before, now filter.Chain, number uint64, at time.Time) History {
	if len(h) == 0 && len(now.Filters) == 0 {
		return nil
	}
	next := Past{Number: max(number, 1), Time: at.UTC().Truncate(time.Second), Filters: slices.Clone(now.Filters), Oldest: len(h) == 0 && len(before.Filters) > 0}
	for i := range next.Filters {
		next.Filters[i].Spec.Module.Inline = ""
	}
	if len(h) > 0 {
		last := h[len(h)-1]
		if sameFilters(last.Filters, next.Filters) {
			return h
		}
		next.Number = max(number, last.Number+1)
	}
	return append(slices.Clone(h), next).bounded()
}

func sameFilters(a, b []filter.Filter) bool {
	x, xerr := json.Marshal(a)
	y, yerr := json.Marshal(b)
	return len(a)+len(b) == 0 || xerr == nil && yerr == nil && string(x) == string(y)
}

// bounded leaves out the oldest revisions that are too many, or too large.
func (h History) bounded() History {
	size, from := 0, len(h)
	for from > 0 && len(h)-from < maxRevisions {
		data, err := json.Marshal(h[from-1])
		if size += len(data); err != nil || size > maxHistory {
			break
		}
		from--
	}
	if from > 0 && from < len(h) {
		h[from].Oldest = true
	}
	return h[from:]
}

// Revisions are the chains, of the target of this one.
func (h History) Revisions(of filter.Chain) (all []Revision) {
	for _, k := range h {
		of.Filters = k.Filters
		all = append(all, Revision{Number: k.Number, Time: k.Time, Chain: of, Oldest: k.Oldest})
	}
	return all
}
