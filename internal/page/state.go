package page

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Bounds of what one state lists; the rest is counted.
const (
	maxTargets = 2000
	maxProxies = 200 // of one target
)

// Group is how a group of proxies stands, as its backend tells it. Details of proxies are not shown, since a proxy may
// quote secrets in them; those of Options.Chains are.
type Group struct {
	Chain   filter.Chain // the committed one, with its mesh and target
	Version string       // the committed one; empty while Held
	Held    bool         // proxies are not answered yet
	Proxies []plan.ProxyStatus
	// Offered is the version on trial and how far the proxies are with it; empty when none is.
	Offered        string
	OfferedProxies []plan.ProxyStatus
}

// Condition is how a target is, in a word.
type Condition string

const (
	AsApplied  Condition = "as applied"        // every proxy runs the chain
	Drifted    Condition = "drifted"           // a proxy does not, and nothing is under way
	RollingOut Condition = "rolling out"       // a change is offered to the proxies
	Waiting    Condition = "waits for a proxy" // none is connected
	Empty      Condition = "no filters"        // proxies are connected, and run nothing of ours
	Held       Condition = "held"              // the stored chain could not be applied since the adapter's start
	Unplanned  Condition = "cannot be planned" // such as when a secret is missing
	Unverified Condition = "not verified"      // it is applied to a cluster, and nobody may look at its proxies
)

// State is what /api/state answers.
type State struct {
	Version     string   `json:"version"`
	Component   string   `json:"component"`
	Problem     string   `json:"problem,omitempty"` // why the chains cannot be told
	Targets     []Target `json:"targets"`           // by name
	MoreTargets int      `json:"moreTargets"`       // that are not listed
	Proxies     int      `json:"proxies"`           // connected ones
	Drifted     int      `json:"drifted"`           // targets that are drifted, held or cannot be planned
}

// Target is one target with what stands on it.
type Target struct {
	Target    string                  `json:"target"` // ProxyGroup edge
	Mesh      string                  `json:"mesh"`
	Condition Condition               `json:"condition"`
	Problem   string                  `json:"problem,omitempty"`
	Version   string                  `json:"version"`
	Offered   string                  `json:"offered,omitempty"`
	Filters   []Filter                `json:"filters"` // in the order requests meet them
	Counts    map[plan.ProxyState]int `json:"counts"`  // connected proxies by state; of the offered version while one is
	Proxies   []Proxy                 `json:"proxies"` // those that do not run the version first
	More      int                     `json:"moreProxies"`
}

// Filter is one filter of a chain.
type Filter struct {
	Name          string `json:"name"` // namespace/name
	Source        string `json:"source"`
	SHA256        string `json:"sha256"`
	Phase         string `json:"phase,omitempty"`
	Priority      int    `json:"priority,omitempty"`
	FailurePolicy string `json:"failurePolicy"`
}

// Proxy is one proxy of a target.
type Proxy struct {
	ID      string          `json:"id"`
	Version string          `json:"version"` // of Envoy
	State   plan.ProxyState `json:"state"`   // with the version; with the offered one while one is
	Detail  string          `json:"detail,omitempty"`
}

// read makes the state as JSON.
func (p *Page) read(ctx context.Context) ([]byte, error) {
	state := State{Version: p.Version, Component: p.Component, Targets: []Target{}}
	statuses, err := p.Chains(ctx)
	if err != nil {
		// A chain may have changed while it was looked at.
		statuses, err = p.Chains(ctx)
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		state.Problem = problem.Of(err).Error()
	}
	byID := map[string]operation.Status{}
	for _, s := range statuses {
		byID[s.Chain.ID()] = s
	}
	var all []Target
	for _, g := range p.Groups() {
		id := g.Chain.ID()
		all = append(all, ofGroup(g, byID[id]))
		delete(byID, id)
	}
	for _, s := range byID { // of backends without groups
		all = append(all, ofGroup(Group{Chain: s.Chain, Version: s.Version, Proxies: s.Loaded.Proxies}, s))
	}
	slices.SortFunc(all, func(a, b Target) int { return cmp.Or(cmp.Compare(a.Target, b.Target), cmp.Compare(a.Mesh, b.Mesh)) })
	for _, t := range all {
		for s, n := range t.Counts {
			if s != plan.Gone {
				state.Proxies += n
			}
		}
		if t.Condition == Drifted || t.Condition == Held || t.Condition == Unplanned {
			state.Drifted++
		}
	}
	if more := len(all) - maxTargets; more > 0 {
		state.MoreTargets, all = more, all[:maxTargets]
	}
	state.Targets = append(state.Targets, all...)
	body, err := json.Marshal(state)
	if err != nil {
		return nil, fmt.Errorf("encode the state: %w", err)
	}
	return body, nil
}

// ofGroup shows one group, with the status of its chain if there is one.
func ofGroup(g Group, s operation.Status) Target {
	t := Target{Target: g.Chain.Target.String(), Mesh: g.Chain.Mesh, Problem: s.Problem, Version: g.Version, Offered: g.Offered,
		Filters: []Filter{}, Counts: map[plan.ProxyState]int{}, Proxies: []Proxy{}}
	for _, f := range g.Chain.Filters {
		t.Filters = append(t.Filters, Filter{Name: f.Key.String(), Source: f.Spec.Module.Source(), SHA256: f.Spec.Module.SHA256,
			Phase: string(f.Spec.Phase), Priority: f.Spec.Priority, FailurePolicy: string(f.Spec.FailurePolicy)})
	}
	proxies, details := g.Proxies, map[string]string{}
	if g.Offered != "" {
		proxies = g.OfferedProxies
	} else {
		for _, p := range s.Loaded.Proxies {
			details[p.ID] = p.Detail
		}
	}
	connected := 0
	for _, p := range proxies {
		shown := Proxy{ID: p.ID, Version: p.Version, State: p.State}
		if p.State == plan.Rejected {
			shown.Detail = details[p.ID]
		}
		if p.State != plan.Gone {
			connected++
		}
		t.Counts[p.State]++
		t.Proxies = append(t.Proxies, shown)
	}
	slices.SortStableFunc(t.Proxies, func(a, b Proxy) int {
		return cmp.Or(compare(a.State == plan.Running, b.State == plan.Running), cmp.Compare(a.ID, b.ID))
	})
	if more := len(t.Proxies) - maxProxies; more > 0 {
		t.More, t.Proxies = more, t.Proxies[:maxProxies]
	}
	switch {
	case g.Held:
		t.Condition = Held
	case t.Problem != "":
		t.Condition = Unplanned
	case s.Loaded.Unverified != "":
		t.Condition, t.Problem = Unverified, s.Loaded.Unverified
	case g.Offered != "":
		t.Condition = RollingOut
	case t.Counts[plan.Running]+t.Counts[plan.Apart] < len(proxies):
		t.Condition = Drifted
	case connected == 0:
		t.Condition = Waiting
	case len(t.Filters) == 0:
		t.Condition = Empty
	default:
		t.Condition = AsApplied
	}
	return t
}

// compare puts false before true.
func compare(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// cache keeps the state for a moment, so that any number of browsers costs as much as one, and for longer when it was
// dear, so that all of them together take at most a twentieth of one core.
type cache struct {
	read func(context.Context) ([]byte, error)
	turn chan struct{} // holds one token: whoever has it may look at what follows
	body []byte
	till time.Time
}

const (
	shortest = 250 * time.Millisecond
	share    = 20
)

func newCache(read func(context.Context) ([]byte, error)) *cache {
	c := &cache{read: read, turn: make(chan struct{}, 1)}
	c.turn <- struct{}{}
	return c
}

func (c *cache) get(ctx context.Context) ([]byte, error) {
	select {
	case <-c.turn:
		defer func() { c.turn <- struct{}{} }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	begun := time.Now()
	if begun.Before(c.till) {
		return c.body, nil
	}
	body, err := c.read(ctx)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	c.body, c.till = body, now.Add(max(shortest, share*now.Sub(begun)))
	return body, nil
}
