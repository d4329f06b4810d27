// Package xds is the backend for plain Envoys: it answers their aggregated discovery streams with one resource, the
// chain of the group they belong to, and follows what each of them says to every version.
//
// The promise: a proxy gets a version at most once per offer and stream, so a rejection is exactly one rejection; a
// proxy counts as running a version only if it acknowledged the very response that carried it, and nothing was sent
// after that; the committed chain is on disk before any proxy outside of the offer gets it; and a restart sends no
// proxy of a stored chain anything else than that chain. The limit: what is known is what proxies say. A proxy that
// lies, or that lost its configuration without closing its stream, is not found out here.
package xds

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	filterchain "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/filter_chain/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/limit"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

// Slot is the name of the one resource that proxies are given.
const Slot = "meshery.filters"

const (
	meshName     = "envoy"   // the mesh of the chains that are kept here
	defaultGroup = "default" // of proxies that name none
	recordPrefix = "chains/" // of the keys in Options.Records
)

// Options are what a Backend needs. Records, Modules and Log must be set.
type Options struct {
	// Records keeps the committed chains, under keys that begin with chains/.
	Records store.Records
	// Shared says that other adapters change the records too.
	Shared bool
	// Modules gives the bytes of modules by digest.
	Modules store.Blobs
	Log     *slog.Logger
	// OnLateRejection hears of a rejection that no operation waits for, once per proxy and version, and after the first
	// hundred at most of one a second: proxies that refuse must not push everything else out of the events. It is called
	// on the proxy's stream, which waits for it to return. Default: nobody hears.
	OnLateRejection func(LateRejection)
	// Streams bounds the open streams of one client, told by its certificate or address, and of all; one more is
	// refused with ResourceExhausted. Default: 20000 of all.
	Streams limit.Bounds
	// ProxyRate and Rate bound the requests a second of one stream and of all, with twice as many at once; a stream that
	// goes beyond ends with ResourceExhausted. Default: no bound.
	ProxyRate, Rate int
	// GroupMetadataKey is the key of a node's metadata that names its group. Default: meshery-filters/group.
	GroupMetadataKey string
	// Admit says whether the peer of the stream that ctx belongs to may join the group, with a gRPC status error if
	// not; AdmitCertified is one. Default: everybody may join every group.
	Admit func(ctx context.Context, group string) error
}

// LateRejection is a proxy's refusal of a version that no operation was offering to it.
type LateRejection struct {
	Target  filter.Target
	Version string
	Proxy   plan.Proxy
	Text    string // Envoy's own, at most 2 KiB; it may quote the configuration, resolved secrets included
}

// GroupStatus is how a group of proxies stands.
type GroupStatus struct {
	Target  filter.Target
	Chain   filter.Chain // the committed one
	Version string       // the committed one; empty while Held
	Offered string       // the version that is being offered; empty when none is
	Held    bool         // the stored chain was not applied since the start, so the proxies are not answered yet
	// Proxies is how far the proxies are with Version, and OfferedProxies with Offered.
	Proxies, OfferedProxies []plan.ProxyStatus
}

// Backend serves the proxies' streams and keeps the groups' chains.
type Backend struct {
	opts  Options
	ctx   context.Context // ends every stream
	stop  context.CancelFunc
	empty *version // of a group that has no chain
	shelf shelf

	// changing lets one Apply or Commit at a time in; it is held while a record is written.
	changing sync.Mutex
	recorded map[string][sha256.Size]byte // digest of each record, under changing

	streams  *limit.Clients
	requests *rate.Limiter
	refusals rate.Sometimes // of log lines about streams beyond a bound
	refused  *rate.Limiter  // of log lines about proxies that may not join
	rejected *rate.Limiter  // of log lines about proxies that reject
	late     *rate.Limiter  // of what OnLateRejection hears

	mu         sync.Mutex // guards all below, and every group and proxy
	groups     map[string]*group
	rejections map[string]uint64   // by group, as Stats tells them
	counted    map[string]struct{} // the groups that Stats tells by name
}

// New loads the stored chains. The streams end when ctx does. A record that cannot be understood is problem.StateDamaged.
func New(ctx context.Context, o Options) (*Backend, error) {
	if o.Streams == (limit.Bounds{}) {
		o.Streams.Total = 20000
	}
	o.GroupMetadataKey = cmp.Or(o.GroupMetadataKey, "meshery-filters/group")
	empty, err := emptyChain()
	if err != nil {
		return nil, err
	}
	b := &Backend{opts: o, streams: limit.New("discovery streams", o.Streams), requests: limiter(o.Rate),
		refusals: rate.Sometimes{First: 1, Interval: 10 * time.Second}, refused: rate.NewLimiter(1, 100),
		rejected: rate.NewLimiter(1, 100), late: rate.NewLimiter(1, 100), groups: map[string]*group{},
		rejections: map[string]uint64{}, counted: map[string]struct{}{}, recorded: map[string][sha256.Size]byte{}}
	b.empty = b.version(empty)
	records, err := o.Records.All(ctx)
	if err != nil {
		return nil, fmt.Errorf("load chains: %w", storeFailed(err))
	}
	for key, data := range records {
		if !strings.HasPrefix(key, recordPrefix+string(filter.ProxyGroup)+"|") {
			continue
		}
		var c filter.Chain
		if err := json.Unmarshal(data, &c); err != nil {
			return nil, problem.StateDamaged.New("the record %q is not a chain: %w", key, err)
		}
		if recordKey(c.Target) != key || len(c.Filters) == 0 {
			return nil, problem.StateDamaged.New("the record %q holds the chain of %s", key, c.Target)
		}
		g := newGroup(c.Target.Name)
		g.chain = c
		b.groups[g.target.Name] = g
		b.recorded[key] = sha256.Sum256(data)
	}
	b.ctx, b.stop = context.WithCancel(ctx)
	return b, nil
}

// Close ends every stream, which makes the proxies connect again elsewhere, or here after a restart. They keep their
// chains meanwhile. It comes before the grpc.Server's GracefulStop, which waits for streams; one that is stuck in
// sending to a proxy that does not read ends only with Stop.
func (b *Backend) Close() { b.stop() }

// Register offers the discovery services on s.
func (b *Backend) Register(s *grpc.Server) {
	discovery.RegisterAggregatedDiscoveryServiceServer(s, service{b})
	s.RegisterService(extensionConfigs(), service{b})
}

// World gives the bytes of the chain's modules and the connected proxies of its target.
func (b *Backend) World(ctx context.Context, c filter.Chain) (plan.World, error) {
	w := plan.World{Modules: make(map[string]plan.Code, len(c.Filters))}
	for _, f := range c.Filters {
		digest := f.Spec.Module.SHA256
		if _, ok := w.Modules[digest]; ok {
			continue
		}
		data, err := b.opts.Modules.Get(ctx, digest)
		if err != nil {
			return plan.World{}, fmt.Errorf("%s: get module %s: %w", f.Key, filter.ShortDigest(digest), err)
		}
		w.Modules[digest] = plan.Code{Inline: data}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if g := b.groups[c.Target.Name]; g != nil {
		for _, p := range g.proxies {
			w.Proxies = append(w.Proxies, p.Proxy)
		}
	}
	slices.SortFunc(w.Proxies, func(a, b plan.Proxy) int { return cmp.Compare(a.ID, b.ID) })
	return w, nil
}

// Committed returns the group's committed chain and its version, which is empty while the stored chain was not applied
// since the start.
func (b *Backend) Committed(_ context.Context, t filter.Target) (plan.Plan, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if g := b.groups[t.Name]; g != nil && t.Kind == filter.ProxyGroup {
		return g.committed(), nil
	}
	return plan.Plan{Chain: filter.Chain{Mesh: meshName, Target: t}, Version: b.empty.id}, nil
}

// Revert takes the open offer back: every proxy that was sent it gets the committed chain again.
func (b *Backend) Revert(_ context.Context, t filter.Target) (plan.Plan, error) {
	b.changing.Lock()
	defer b.changing.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	g := b.group(t.Name)
	defer b.forget(g)
	g.offer = nil
	g.settle(true)
	b.opts.Log.Info("offer taken back", "group", t.Name)
	return g.committed(), nil
}

// List returns every committed chain that has filters, by group name.
func (b *Backend) List(context.Context) ([]filter.Chain, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var chains []filter.Chain
	for _, g := range b.sorted() {
		if len(g.chain.Filters) > 0 {
			chains = append(chains, g.chain)
		}
	}
	return chains, nil
}

// Drift is none: nobody else changes what proxies are offered.
func (b *Backend) Drift(context.Context, filter.Chain) ([]plan.Change, error) { return nil, nil }

// History returns what the last changes of each group's chain made of it.
func (b *Backend) History(ctx context.Context) ([]plan.Revision, error) {
	revisions, err := b.opts.Records.History(ctx, recordPrefix+string(filter.ProxyGroup)+"|")
	if err != nil {
		return nil, fmt.Errorf("read the history of chains: %w", storeFailed(err))
	}
	count := map[string]int{}
	for _, r := range revisions {
		count[r.Key]++
	}
	var all []plan.Revision
	last := map[string]filter.Target{}
	seen := map[string]bool{}
	for _, r := range revisions {
		rev := plan.Revision{Number: r.Number, Time: r.Time, Oldest: !seen[r.Key] && count[r.Key] >= keptRevisions}
		seen[r.Key] = true
		if r.Value == nil {
			rev.Chain = filter.Chain{Mesh: meshName, Target: last[r.Key]}
			if rev.Chain.Target.Name == "" {
				continue // what it emptied is not kept
			}
		} else if err := json.Unmarshal(r.Value, &rev.Chain); err != nil {
			return nil, problem.StoreFailed.New("revision %d of the record %q is not a chain: %w", r.Number, r.Key, err)
		}
		last[r.Key] = rev.Chain.Target
		all = append(all, rev)
	}
	return all, nil
}

// Behind returns the chains that another adapter has committed since this one read them, with those that it emptied.
func (b *Backend) Behind(ctx context.Context) ([]filter.Chain, error) {
	if !b.opts.Shared {
		return nil, nil
	}
	records, err := b.opts.Records.All(ctx)
	if err != nil {
		return nil, fmt.Errorf("load chains: %w", storeFailed(err))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	var behind []filter.Chain
	for _, g := range b.sorted() {
		key := recordKey(g.target)
		if _, there := records[key]; !there && len(g.chain.Filters) > 0 {
			behind = append(behind, filter.Chain{Mesh: meshName, Target: g.target})
		}
	}
	for key, data := range records {
		if !strings.HasPrefix(key, recordPrefix+string(filter.ProxyGroup)+"|") {
			continue
		}
		var c filter.Chain
		if err := json.Unmarshal(data, &c); err != nil {
			return nil, problem.StateDamaged.New("the record %q is not a chain: %w", key, err)
		}
		if g := b.groups[c.Target.Name]; g == nil || !sameChain(g.chain, c) {
			behind = append(behind, c)
		}
	}
	return behind, nil
}

func sameChain(a, b filter.Chain) bool {
	x, xerr := json.Marshal(a)
	y, yerr := json.Marshal(b)
	return errors.Join(xerr, yerr) == nil && string(x) == string(y)
}

// Adopt gives every proxy of the group the plan of a chain that is recorded already.
func (b *Backend) Adopt(_ context.Context, p plan.Plan) error {
	b.changing.Lock()
	defer b.changing.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	data, err := json.Marshal(p.Chain)
	if err != nil {
		return err
	}
	if key := recordKey(p.Chain.Target); len(p.Chain.Filters) > 0 {
		b.recorded[key] = sha256.Sum256(data)
	} else {
		delete(b.recorded, key)
	}
	g := b.group(p.Chain.Target.Name)
	g.apply(b.version(p), filter.RolloutAll)
	g.commit(p.Version, p.Chain)
	b.forget(g)
	b.opts.Log.Info("another adapter's chain taken over", "group", p.Chain.Target.Name, "version", p.Version, "filters", p.Chain.Names())
	return nil
}

// keptRevisions is how many values a store keeps of each record.
const keptRevisions = 10

// Held lists the groups whose stored chain was not committed since the start. Their proxies are answered only after
// Apply and Commit of that chain, or of another, so that a restart never takes a chain away for a moment.
func (b *Backend) Held() []filter.Target {
	b.mu.Lock()
	defer b.mu.Unlock()
	var held []filter.Target
	for _, g := range b.sorted() {
		if g.good == nil {
			held = append(held, g.target)
		}
	}
	return held
}

// Groups tells how every group stands that has a chain or a proxy, by name.
func (b *Backend) Groups() []GroupStatus {
	b.mu.Lock()
	defer b.mu.Unlock()
	var all []GroupStatus
	for _, g := range b.sorted() {
		s := GroupStatus{Target: g.target, Chain: g.chain, Held: g.good == nil}
		if g.offer != nil {
			s.Offered = g.offer.version.id
			l := g.loaded(s.Offered)
			l.Sort()
			s.OfferedProxies = l.Proxies
		}
		if g.good != nil {
			s.Version = g.good.id
		}
		l := g.loaded(s.Version)
		l.Sort()
		s.Proxies = l.Proxies
		all = append(all, s)
	}
	return all
}

// Apply offers the plan to the proxies of its group that are connected now; a plan of the committed version takes an
// offer back. Proxies that rejected the version before are asked again.
func (b *Backend) Apply(ctx context.Context, p plan.Plan) ([]plan.Change, error) {
	b.changing.Lock()
	defer b.changing.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	t := p.Chain.Target
	if t.Kind != filter.ProxyGroup || !filter.IsGroupName(t.Name) || p.Version == "" || len(p.Resources) == 0 {
		return nil, problem.Internal.New("the plan for %s is not one for a group of plain Envoys", t)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	g := b.group(t.Name)
	change := plan.Change{Subject: g.target.String(), Action: plan.Updated}
	switch {
	case g.good != nil && g.good.id == p.Version && g.offer == nil:
		change.Action = plan.Unchanged
	case len(p.Chain.Filters) == 0:
		change.Action = plan.Deleted
	case len(g.chain.Filters) == 0:
		change.Action = plan.Created
	}
	g.apply(b.version(p), p.Rollout)
	b.opts.Log.Info("chain offered", "group", t.Name, "version", p.Version, "proxies", len(g.proxies))
	return []plan.Change{change}, nil
}

// Commit writes the plan's chain down, and then gives it to every proxy of the group. If it cannot be written nothing
// changes and the error is problem.StoreFailed.
func (b *Backend) Commit(ctx context.Context, p plan.Plan) error {
	b.changing.Lock()
	defer b.changing.Unlock()
	t := p.Chain.Target
	b.mu.Lock()
	g := b.groups[t.Name]
	known := g != nil && t.Kind == filter.ProxyGroup && g.version(p.Version) != nil
	b.mu.Unlock()
	if !known {
		return problem.Internal.New("version %s of %s was not applied, or another one was since", p.Version, t)
	}
	// What else the target says does not tell groups apart.
	c := p.Chain
	c.Target = filter.Target{Kind: filter.ProxyGroup, Name: t.Name}
	if err := b.record(ctx, c); err != nil {
		return fmt.Errorf("record the chain of %s: %w", t, storeFailed(err))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	// The group may have been forgotten meanwhile, if it is empty; its versions change only under changing.
	g = b.group(t.Name)
	g.commit(p.Version, c)
	b.forget(g)
	b.opts.Log.Info("chain committed", "group", t.Name, "version", p.Version, "filters", c.Names())
	return nil
}

// record writes a chain down. One that is written already, as after a restart, is no revision of its own.
func (b *Backend) record(ctx context.Context, c filter.Chain) error {
	key := recordKey(c.Target)
	was, there := b.recorded[key]
	if len(c.Filters) == 0 {
		if !there {
			return nil
		}
		if err := b.opts.Records.Delete(ctx, key); err != nil {
			return err
		}
		delete(b.recorded, key)
		return nil
	}
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(data)
	if there && was == sum {
		return nil
	}
	if err := b.opts.Records.Put(ctx, key, data); err != nil {
		return err
	}
	b.recorded[key] = sum
	return nil
}

// Loaded yields how far the group's proxies are with the plan, at once and after changes; changes that come close
// together are yielded as one. While the plan is on offer the expected proxies are those that were connected when it
// was applied; once it is committed, all. It ends with ctx, and with an error when the plan is neither, or when the
// backend was closed.
func (b *Backend) Loaded(ctx context.Context, p plan.Plan) iter.Seq2[plan.Loaded, error] {
	return func(yield func(plan.Loaded, error) bool) {
		t := p.Chain.Target
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(b.ctx, func() { cancel(problem.ShuttingDown.New("%s is not served any more", t)) })()
		b.mu.Lock()
		g := b.group(t.Name)
		changed := make(chan struct{}, 1)
		g.watchers[changed] = struct{}{}
		b.mu.Unlock()
		defer func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			delete(g.watchers, changed)
			b.forget(g)
		}()
		for last := (*plan.Loaded)(nil); ; {
			b.mu.Lock()
			known := g.version(p.Version) != nil
			l := g.loaded(p.Version)
			b.mu.Unlock()
			if !known {
				yield(plan.Loaded{}, problem.Internal.New("version %s of %s is not on offer any more", p.Version, t))
				return
			}
			l.Sort()
			if last == nil || !slices.Equal(last.Proxies, l.Proxies) {
				if !yield(l, nil) {
					return
				}
				last = &l
			}
			select {
			case <-changed:
			case <-ctx.Done():
			}
			// The pause grows with the group, so that the answers of thousands of proxies cost a few looks at all of
			// them and not one each.
			select {
			case <-time.After(min(time.Duration(len(l.Proxies))*20*time.Microsecond, 100*time.Millisecond)):
			case <-ctx.Done():
			}
			if err := context.Cause(ctx); err != nil {
				if errors.Is(err, problem.ShuttingDown) {
					yield(plan.Loaded{}, err)
				}
				return
			}
		}
	}
}

func (b *Backend) version(p plan.Plan) *version {
	return &version{id: p.Version, resources: b.shelf.divide(p.Resources), shelf: &b.shelf}
}

// group returns the group of that name, which is made when there is none.
func (b *Backend) group(name string) *group {
	g := b.groups[name]
	if g == nil {
		g = newGroup(name)
		g.good = b.empty
		b.groups[name] = g
	}
	return g
}

// forget drops a group that nothing distinguishes from one that never was, so that made-up names cost nothing.
func (b *Backend) forget(g *group) {
	if g.good != nil && g.good.id == b.empty.id && len(g.chain.Filters) == 0 && g.offer == nil && len(g.proxies) == 0 && len(g.watchers) == 0 {
		delete(b.groups, g.target.Name)
	}
}

func (b *Backend) sorted() []*group {
	groups := make([]*group, 0, len(b.groups))
	for _, g := range b.groups {
		groups = append(groups, g)
	}
	slices.SortFunc(groups, func(a, b *group) int { return cmp.Compare(a.target.Name, b.target.Name) })
	return groups
}

func recordKey(t filter.Target) string { return recordPrefix + t.ID() }

func storeFailed(err error) error {
	if errors.Is(err, problem.StoreFailed) || errors.Is(err, problem.StoreAway) || errors.Is(err, problem.StateDamaged) {
		return err
	}
	return problem.StoreFailed.New("%w", err)
}

// emptyChain is what a group without a chain gets, since a slot without a resource keeps its listener closed. It is
// the same resource and version as a mesh plans for an empty chain, so that such a plan finds itself committed.
func emptyChain() (plan.Plan, error) {
	inner, err := pack(&filterchain.FilterChainConfig{})
	if err != nil {
		return plan.Plan{}, err
	}
	resource, err := pack(&core.TypedExtensionConfig{Name: Slot, TypedConfig: inner})
	if err != nil {
		return plan.Plan{}, err
	}
	sum := sha256.Sum256(resource.Value)
	return plan.Plan{Version: hex.EncodeToString(sum[:8]), Resources: []*anypb.Any{resource}}, nil
}

func pack(m proto.Message) (*anypb.Any, error) {
	a := &anypb.Any{}
	if err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, fmt.Errorf("marshal the empty chain: %w", err)
	}
	return a, nil
}
