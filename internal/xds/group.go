package xds

import (
	"math/rand/v2"
	"strconv"
	"strings"
	"unicode"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

// version is one state of a group's slot. The resources are shared by all responses that carry them, and their modules by
// all versions.
type version struct {
	id        string
	resources []pieces
	shelf     *shelf
	varied    []pieces // the same for a proxy, in other bytes; made when first needed
	salt      uint32   // of varied; 0 is that of resources
}

// refusal is what a node rejected last.
type refusal struct {
	version string
	salt    uint32
}

// group is a set of proxies that get the same chain. Everything in it is guarded by Backend.mu.
type group struct {
	target   filter.Target
	chain    filter.Chain // the committed one
	good     *version     // the committed one; nil while only the stored chain is known
	offer    *offer       // nil when none is open
	proxies  map[string]*proxy
	free     map[string]int             // by node id that several streams have: no lower number of it is free
	watchers map[chan struct{}]struct{} // of capacity 1: told that something changed
	reported map[string]string          // by proxy: the version whose late rejection was reported
	refusals map[string]refusal         // by node id: they outlive streams, as what Envoy remembers does
}

// offer is a version on trial with the proxies that were connected when it was applied.
type offer struct {
	version *version
	members map[string]*member
	open    bool   // every member may have it
	canary  *proxy // the one that has it first while not open; nil when none is connected
	failed  bool   // the canary rejected it or left, so nobody else is tried
}

// member outlives the proxy's stream, so that a proxy that comes back counts again.
type member struct {
	plan.Proxy
	rejected bool
	text     string
}

// proxy is one stream's subscription to the slot.
type proxy struct {
	plan.Proxy        // its ID is unique in the group
	nodeID     string // what the node calls itself
	number     int    // tells it from others of that nodeID, from 1
	group      *group // nil while it does not subscribe to the slot
	request    *discovery.DiscoveryRequest
	out        chan cache.Response // of capacity 1, read by the stream; replaced with each request

	nonce    string // of the last response
	sent     string // the version in it; empty when the proxy has to be sent one whatever it is
	answered bool   // it was answered
	acked    string // the version acknowledged last
	refused  string // the version rejected last, which it is not sent again
	text     string // its own words about that
	bad      bool   // the last answer was a rejection
	// Only the stream's goroutine touches what the last response carried.
	carried []pieces
	salt    uint32 // of the version's bytes in it
}

func newGroup(name string) *group {
	t := filter.Target{Kind: filter.ProxyGroup, Name: name}
	return &group{
		target:   t,
		chain:    filter.Chain{Mesh: meshName, Target: t},
		proxies:  map[string]*proxy{},
		free:     map[string]int{},
		watchers: map[chan struct{}]struct{}{},
		reported: map[string]string{},
		refusals: map[string]refusal{},
	}
}

// committed is the group's committed plan, without resources.
func (g *group) committed() plan.Plan {
	p := plan.Plan{Chain: g.chain}
	if g.good != nil {
		p.Version = g.good.id
	}
	return p
}

// version returns the version of that id if it is committed or on offer.
func (g *group) version(id string) *version {
	if g.good != nil && g.good.id == id {
		return g.good
	}
	if g.offer != nil && g.offer.version.id == id {
		return g.offer.version
	}
	return nil
}

// apply begins an offer of v, or takes the open one back when v is committed.
func (g *group) apply(v *version, rollout filter.Rollout) {
	for _, p := range g.proxies {
		p.forgive(v.id)
	}
	if known := g.version(v.id); known != nil {
		v = known // so that the bytes are held once
	}
	if v == g.good {
		g.offer = nil
	} else {
		o := &offer{version: v, members: make(map[string]*member, len(g.proxies))}
		for id, p := range g.proxies {
			o.members[id] = &member{Proxy: p.Proxy}
		}
		o.open = rollout != filter.RolloutCanary || len(g.proxies) < 2
		g.offer = o
	}
	g.settle(true)
}

// commit makes the version of that id, which must be known, the one that everybody gets.
func (g *group) commit(id string, c filter.Chain) {
	v := g.version(id)
	g.good, g.chain = v, c
	if g.offer != nil && g.offer.version == v {
		g.offer = nil
	}
	g.settle(true)
}

// settle finds out who is the canary and whether the offer is open to all. When that changed, or everybody is said to
// be concerned, each proxy is sent what it lacks.
func (g *group) settle(everybody bool) {
	if o := g.offer; o != nil && !o.open {
		if o.canary == nil && !o.failed {
			o.canary = g.choose()
			everybody = everybody || o.canary != nil
		}
		if o.canary != nil && o.canary.runs(o.version.id) {
			o.open, o.canary = true, nil
			everybody = true
		}
	}
	if everybody {
		for _, p := range g.proxies {
			p.push()
		}
	}
	for w := range g.watchers {
		select {
		case w <- struct{}{}:
		default: // it has not looked yet since the last change
		}
	}
}

// choose returns the member to try the offer on: one that runs it already from an earlier offer, else one whose last
// answer was good, and of those the one with the lowest id, so that the choice can be foretold.
func (g *group) choose() (best *proxy) {
	for id := range g.offer.members {
		p := g.proxies[id]
		if p == nil || p.refused == g.offer.version.id {
			continue
		}
		if p.runs(g.offer.version.id) {
			return p
		}
		if best == nil || best.bad && !p.bad || best.bad == p.bad && p.ID < best.ID {
			best = p
		}
	}
	return best
}

// wants returns the version that the proxy should have now, or nil when it should be sent nothing.
func (g *group) wants(p *proxy) *version {
	v := g.good
	if o := g.offer; o != nil && o.members[p.ID] != nil && (o.open || o.canary == p) && p.refused != o.version.id {
		v = o.version
	}
	if v == nil || v.id == p.refused {
		return nil
	}
	return v
}

// join takes a proxy in. A node id that another stream of the group has already is told apart by #2, #3 and so on.
func (g *group) join(p *proxy) {
	p.ID, p.number = p.nodeID, 1
	if n := g.free[p.nodeID]; n > 1 {
		p.ID, p.number = p.nodeID+"#"+strconv.Itoa(n), n
	}
	for g.proxies[p.ID] != nil {
		p.number++
		p.ID = p.nodeID + "#" + strconv.Itoa(p.number)
	}
	if p.number > 1 {
		g.free[p.nodeID] = p.number + 1
	}
	p.group = g
	g.proxies[p.ID] = p
	if o := g.offer; o != nil && o.members[p.ID] != nil && o.members[p.ID].rejected {
		p.refused, p.text = o.version.id, o.members[p.ID].text
	}
	g.settle(false)
}

// leave lets a proxy go, because its stream ended or it unsubscribed.
func (g *group) leave(p *proxy) {
	delete(g.proxies, p.ID)
	switch {
	case p.number == 1:
		delete(g.free, p.nodeID)
	case p.number < g.free[p.nodeID]:
		g.free[p.nodeID] = p.number
	}
	p.group, p.out, p.request = nil, nil, nil
	p.sent, p.acked, p.refused, p.text, p.answered = "", "", "", "", true
	if o := g.offer; o != nil && o.canary == p {
		// It may be the chain that ended it, and the next one to try would end too.
		o.canary, o.failed = nil, true
	}
	g.settle(false)
}

// answer takes what the proxy says to the last response, and tells whether that is a rejection, and one that nobody
// waits for. Answers to earlier responses, and further requests after an answer, say nothing about the last version.
func (g *group) answer(p *proxy, r *discovery.DiscoveryRequest) (rejected, late bool) {
	if p.answered || p.nonce == "" || r.GetResponseNonce() != p.nonce {
		return false, false
	}
	if r.GetErrorDetail() == nil {
		if version, _ := told(r.GetVersionInfo()); version != p.sent {
			return false, false
		}
		p.answered, p.acked, p.bad = true, p.sent, false
		delete(g.reported, p.ID)
		if g.free[p.nodeID] == 0 { // otherwise it may be another of that node id that has refused
			delete(g.refusals, p.nodeID) // Envoy remembers only the bytes it saw last
		}
		g.settle(false)
		return false, false
	}
	p.answered, p.bad = true, true
	p.refused, p.text = p.sent, plainText(r.GetErrorDetail().GetMessage())
	if len(g.refusals) > 2*len(g.proxies)+100 { // of nodes that came and went
		clear(g.refusals)
	}
	g.refusals[p.nodeID] = refusal{p.sent, p.salt}
	if o := g.offer; o != nil && o.version.id == p.sent && o.members[p.ID] != nil {
		m := o.members[p.ID]
		m.rejected, m.text = true, p.text
		o.failed = o.failed || o.canary == p
	} else if g.reported[p.ID] != p.sent {
		if len(g.reported) > 2*len(g.proxies)+100 { // of proxies that came and went
			clear(g.reported)
		}
		g.reported[p.ID] = p.sent
		late = true
	}
	g.settle(false)
	return true, late
}

// loaded says how far everybody is with the version of that id.
func (g *group) loaded(id string) plan.Loaded {
	var members map[string]*member
	offered := g.offer != nil && g.offer.version.id == id
	if offered {
		members = g.offer.members
	}
	l := plan.Loaded{Proxies: make([]plan.ProxyStatus, 0, len(g.proxies))}
	for _, p := range g.proxies {
		s := plan.ProxyStatus{Proxy: p.Proxy, Expected: !offered || members[p.ID] != nil, State: g.state(p, id)}
		if s.State == plan.Rejected {
			s.Detail = p.text
		}
		l.Proxies = append(l.Proxies, s)
	}
	for mid, m := range members {
		if g.proxies[mid] != nil {
			continue
		}
		s := plan.ProxyStatus{Proxy: m.Proxy, Expected: true, State: plan.Gone}
		if m.rejected {
			s.State, s.Detail = plan.Rejected, m.text
		}
		l.Proxies = append(l.Proxies, s)
	}
	return l
}

// state says how far a connected proxy is with the version of that id.
func (g *group) state(p *proxy, id string) plan.ProxyState {
	offered := g.offer != nil && g.offer.version.id == id
	switch {
	case p.runs(id):
		return plan.Running
	case id != "" && p.refused == id:
		return plan.Rejected
	case g.good == nil && !offered, offered && g.wants(p) != g.offer.version:
		return plan.Held
	}
	return plan.Waiting
}

// runs says whether the proxy acknowledged that very version and was sent no other since.
func (p *proxy) runs(id string) bool {
	return id != "" && p.answered && p.sent == id && p.acked == id
}

// forgive lets the proxy be sent a version again that it rejected.
func (p *proxy) forgive(id string) {
	if p.refused != id {
		return
	}
	p.refused, p.text = "", ""
	if p.sent == id {
		p.sent = ""
	}
}

// push hands the stream what the proxy should have and lacks. What the stream has not taken yet is replaced, so that
// a slow one goes straight to the newest.
func (p *proxy) push() {
	if p.out == nil {
		return
	}
	select {
	case <-p.out:
	default:
	}
	v := p.group.wants(p)
	if v == nil || v.id == p.sent {
		return
	}
	r := &response{request: p.request, version: v, proxy: p, resources: v.resources}
	if version, salt := told(p.request.GetVersionInfo()); p.suspect(v) {
		r.resources, r.salt = v.other(p.group.refusals[p.nodeID])
	} else if p.nonce == "" && version == v.id && salt != 0 {
		r.resources, r.salt = v.salted(salt), salt
	}
	p.out <- r
}

// suspect says whether the proxy may have rejected the version before. Envoy accepts bytes that it has just rejected
// without looking at them again, and then seems to run what it does not: it must be sent others. One that connects and has
// not accepted this version may have rejected it in an earlier life of the adapter, or by the word of another adapter.
func (p *proxy) suspect(v *version) bool {
	accepted, _ := told(p.request.GetVersionInfo())
	return p.group.refusals[p.nodeID].version == v.id || p.nonce == "" && accepted != v.id
}

// other returns the version in bytes that the node did not reject last.
func (v *version) other(last refusal) ([]pieces, uint32) {
	if v.varied == nil || last.version == v.id && last.salt == v.salt {
		v.salt = rand.Uint32() | 1
		v.varied = v.shelf.divide(vary(join(v.resources), v.salt))
	}
	return v.varied, v.salt
}

// salted returns the version in the bytes that have that salt. Those of the last adapter, which most have, are kept.
func (v *version) salted(salt uint32) []pieces {
	if v.varied == nil {
		v.salt, v.varied = salt, v.shelf.divide(vary(join(v.resources), salt))
	}
	if v.salt == salt {
		return v.varied
	}
	return v.shelf.divide(vary(join(v.resources), salt))
}

// plainText bounds what a proxy says and takes out what could garble a log or a terminal.
func plainText(s string) string {
	const most = 2 << 10
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || unicode.IsControl(r) || unicode.Is(unicode.Cf, r) {
			return ' '
		}
		return r
	}, s))
}
