package xds

import (
	"cmp"
	"slices"

	"github.com/meshery/meshery-filters/internal/plan"
)

// Stats counts what the proxies of one group do.
type Stats struct {
	// Group is its name; empty for all groups together that have no place of their own in the counts.
	Group string
	// Proxies counts the connected ones by how far they are with what they should have: the version that is offered to
	// them, or else the committed one.
	Proxies map[plan.ProxyState]int
	// Rejections counts the refusals of a chain since the start.
	Rejections uint64
}

// maxCounted bounds the groups that are counted by name. Proxies name their groups themselves, so names are no measure of
// what is configured.
const maxCounted = 200

// Stats counts by group: by name those that have a chain or are offered one, as far as there is place others that have
// proxies, and the rest together.
func (b *Backend) Stats() []Stats {
	b.mu.Lock()
	defer b.mu.Unlock()
	groups := b.sorted()
	slices.SortStableFunc(groups, func(x, y *group) int { return cmp.Compare(y.rank(), x.rank()) })
	byName := map[string]*Stats{}
	entry := func(name string) *Stats {
		s := byName[name]
		if s == nil && name != "" && len(byName) >= maxCounted {
			name = ""
			s = byName[name]
		}
		if s == nil {
			s = &Stats{Group: name, Proxies: map[plan.ProxyState]int{}}
			byName[name] = s
		}
		return s
	}
	entry("")
	for name, n := range b.rejections {
		entry(name).Rejections += n // counts must not go down, so these have their place first
	}
	for _, g := range groups {
		s := entry(g.target.Name)
		for _, p := range g.proxies {
			s.Proxies[g.state(p, g.due(p))]++
		}
	}
	all := make([]Stats, 0, len(byName))
	for _, s := range byName {
		all = append(all, *s)
	}
	slices.SortFunc(all, func(x, y Stats) int { return cmp.Compare(x.Group, y.Group) })
	return all
}

// countRejection must be called with the lock held.
func (b *Backend) countRejection(g *group) {
	name := g.target.Name
	if _, counted := b.rejections[name]; !counted && (g.rank() == 0 || len(b.rejections) >= maxCounted/2) {
		name = ""
	}
	b.rejections[name]++
}

// rank is 1 of a group that somebody has configured, and 0 of one that its proxies made up.
func (g *group) rank() int {
	if len(g.chain.Filters) > 0 || g.offer != nil {
		return 1
	}
	return 0
}

// due is the id of the version that the proxy should have.
func (g *group) due(p *proxy) string {
	if o := g.offer; o != nil && o.members[p.ID] != nil {
		return o.version.id
	}
	if g.good != nil {
		return g.good.id
	}
	return ""
}
