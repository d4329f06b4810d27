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

// maxCounted bounds the groups that are counted by name, half of it those that their proxies made up. A group keeps its place
// for good: proxies name their groups themselves, and each name that came and went would be a series in whoever scrapes.
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
		if byName[name] == nil {
			byName[name] = &Stats{Group: name, Proxies: map[plan.ProxyState]int{}}
		}
		return byName[name]
	}
	entry("")
	for name, n := range b.rejections {
		entry(name).Rejections += n
	}
	for _, g := range groups {
		s := entry(b.countedAs(g))
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

// countedAs is the name that a group is counted by. It must be called with the lock held.
func (b *Backend) countedAs(g *group) string {
	name := g.target.Name
	if _, has := b.counted[name]; !has {
		if place := maxCounted / (2 - g.rank()); len(b.counted) >= place {
			return ""
		}
		b.counted[name] = struct{}{}
	}
	return name
}

// countRejection must be called with the lock held.
func (b *Backend) countRejection(g *group) { b.rejections[b.countedAs(g)]++ }

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
