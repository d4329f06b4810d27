// Package istiod proves that the proxies of an Istio mesh run what was planned for them: by what istiod's debug endpoints
// say that proxies were sent and acknowledged, and by the proxies' own configuration and statistics, both reached by
// port-forward.
//
// The promise: a proxy counts as running a plan only if istiod knows of no refusal and the proxy itself shows every filter
// in its listeners, in the plan's order, with the module and the configuration of the plan or, where it may not be asked,
// if istiod says that it acknowledged a push with them. The limits: what a proxy acknowledged may still not be loaded,
// which only the proxy itself tells; and of an EnvoyFilter istiod gives no version away, so that a change of nothing but its
// place among filters of others, by priority, looks as if it had been there before.
package istiod

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Silence is how long an istiod or a proxy may say nothing when it is asked, unless one says otherwise.
const Silence = 5 * time.Second

const (
	rootNamespace = "istio-system" // where istiod is, unless a target names the mesh's root
	firstPause    = 100 * time.Millisecond
	lastPause     = 2 * time.Second
	listAgain     = 5 * time.Second // after which the Pods are listed again
	mostLines     = 64              // connections that are kept from one look to the next
	parallel      = 4               // Pods that are asked at once
	patience      = 3               // looks in a row that may fail; one that ends in silence counts twice
	mostPushes    = 3
	settling      = 3 * time.Second  // after which an istiod that has sent the plan to one proxy has sent it to others
	debouncing    = 11 * time.Second // after which it pushes what it has, however busy it is, unless it is told otherwise
)

// Cluster is how the mesh is reached; kube.Cluster is one.
type Cluster interface {
	// Pods lists those that run in a namespace, or with none in all, and that have all of the labels.
	Pods(ctx context.Context, namespace string, labels map[string]string) ([]plan.Pod, error)
	// Dial connects to a port of a Pod, as `kubectl port-forward` does.
	Dial(ctx context.Context, namespace, pod string, port int) (net.Conn, error)
	// Read gives the objects that are asked for.
	Read(context.Context, plan.Reads) (plan.Cluster, error)
	// Annotate gives an object an annotation.
	Annotate(ctx context.Context, ref plan.Ref, name, value string) error
}

// A change of an annotation whose name has istio.io in it has istiod push to the proxies that the object is for.
const pushAnnotation = "istio.io.filters.meshery.io/pushed"

// Loaded yields how far the plan's proxies are, at once and whenever that changes: those of its Pods that are connected to
// an istiod. It ends with ctx, when the consumer stops, or after an error. What cannot be looked at, since a right is
// missing or no istiod answers, is problem.NotVerified, also where ctx's deadline ends the first look; that an object of
// the plan is gone is problem.ChainChanged. Of a proxy that may not be asked itself, or says nothing for as long as silence,
// Detail says why.
//
// A proxy may hold on to a plugin that it has refused, although there is a better one of that name now, until istiod pushes
// to it again. Then the first of the plan's objects gets an annotation, which makes it push.
//
// The texts of proxies may quote their configuration, resolved secrets included.
func Loaded(ctx context.Context, c Cluster, p plan.Plan, silence time.Duration) iter.Seq2[plan.Loaded, error] {
	return func(yield func(plan.Loaded, error) bool) {
		w := newWatch(c, p, silence)
		defer w.close()
		if err := w.begin(ctx); err != nil {
			yield(plan.Loaded{}, w.unverified(ctx, err))
			return
		}
		var last *plan.Loaded
		failures := 0
		for pause := firstPause; ; pause = min(pause*3/2, lastPause) {
			begun := time.Now()
			err := w.look(ctx)
			took := time.Since(begun)
			if err != nil {
				if errors.Is(err, errSilent) {
					failures++
					took = 0
				}
				if failures++; failures >= patience || ctx.Err() != nil || errors.Is(err, problem.RightMissing) {
					// Who was waited for has a name, also where the first look came to no end.
					if w.looked && last == nil && ctx.Err() != nil && !yield(w.loaded(), nil) {
						return
					}
					yield(plan.Loaded{}, w.unverified(ctx, err))
					return
				}
			} else {
				failures = 0
				if now := w.loaded(); last == nil || !slices.Equal(last.Proxies, now.Proxies) {
					if last = &now; !yield(now, nil) {
						return
					}
					pause = firstPause
				}
			}
			// Half of the time at least is left to others, unless somebody was waited for.
			select {
			case <-ctx.Done():
				yield(plan.Loaded{}, ctx.Err())
				return
			case <-time.After(max(pause, min(took, lastPause))):
			}
		}
	}
}

// Connected lists the plan's Pods whose proxies are connected to an istiod, by name. With fewer than two Pods nobody is
// asked.
func Connected(ctx context.Context, c Cluster, p plan.Plan, silence time.Duration) ([]plan.Pod, error) {
	if p.Proxies == nil {
		return nil, nil
	}
	w := newWatch(c, p, silence)
	defer w.close()
	if err := w.listTarget(ctx); err != nil || len(w.pods) < 2 {
		return w.pods, err
	}
	if err := w.listIstiods(ctx); err != nil {
		return nil, err
	}
	connected, err := w.ask(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(w.pods, func(pod plan.Pod) bool { _, ok := connected[pod]; return !ok }), nil
}

func newWatch(c Cluster, p plan.Plan, silence time.Duration) *watch {
	w := &watch{cluster: c, plan: p, silence: silence, root: rootNamespace, proxies: map[plan.Pod]*proxy{}, silent: map[string]error{}, shown: map[plan.Pod]time.Time{}, lines: map[endpoint]*line{}}
	if p.Chain.Target.Kind == filter.Mesh {
		w.root = p.Chain.Target.Namespace
	}
	return w
}

// unverified makes a problem of what stood in the way.
func (w *watch) unverified(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil && (w.looked || !errors.Is(ctx.Err(), context.DeadlineExceeded)):
		return ctx.Err()
	case errors.Is(err, problem.Internal), errors.Is(err, problem.ChainChanged):
		return err
	}
	return problem.NotVerified.New("%s: %w", w.plan.Chain.Target, err)
}

// watch is one look after another at a plan's proxies.
type watch struct {
	cluster Cluster
	plan    plan.Plan
	silence time.Duration
	root    string
	all     bool   // filters of proxies are looked at, and not only ours
	wants   []want // in the order that requests meet them
	begun   time.Time
	looked  bool // once at least
	pushes  int  // that we asked for, the last of them at asked
	asked   time.Time
	proxies map[plan.Pod]*proxy
	pods    []plan.Pod // of the target, and istiod's, as they were listed
	istiods []plan.Pod
	listed  time.Time

	mu     sync.Mutex
	lines  map[endpoint]*line     // that are kept
	silent map[string]error       // namespaces whose proxies we may not ask
	shown  map[plan.Pod]time.Time // by istiod: when it first had the whole plan for a proxy
}

// proxy is what is known of one.
type proxy struct {
	pod      plan.Pod
	expected bool
	istiod   plan.Pod // that it is connected to
	there    bool     // connected now
	said     synced   // by istiod, now
	before   synced   // and at the look before
	proved   *synced  // what istiod said when the proxy was found to run the plan
	planned  bool     // istiod's own view held the plan at the look before
	shown    int      // and of so many filters the proxy's own
	failures *uint64  // of its fetching modules, before it had the plan
	state    plan.ProxyState
	proof    plan.Proof
	detail   string
	stuck    bool // with a plugin that it refused before

	silent error  // that it said nothing, when istiod said as much as heard
	heard  synced // of it
}

// begin reads what the plan's objects are now.
func (w *watch) begin(ctx context.Context) (err error) {
	w.begun = time.Now()
	if w.plan.Proxies == nil && len(w.plan.Objects) > 0 {
		return problem.Internal.New("the plan for %s does not say where its proxies are", w.plan.Chain.Target)
	}
	if w.wants, err = wantsOf(w.plan.Objects); err != nil || len(w.wants) == 0 {
		return err
	}
	if !slices.ContainsFunc(w.wants, func(x want) bool { return w.plan.Versions[x.object] == "" }) {
		for i, x := range w.wants {
			w.wants[i].version = w.plan.Versions[x.object]
		}
		return nil
	}
	var reads plan.Reads
	for _, x := range w.wants {
		reads.Objects = append(reads.Objects, x.ref)
	}
	found, err := w.cluster.Read(ctx, reads)
	if err != nil {
		return err
	}
	for i, x := range w.wants {
		o, ok := found.Object(x.ref)
		if !ok {
			return problem.ChainChanged.New("%s is not there any more", x.object)
		}
		w.wants[i].version = versionOf(o)
	}
	return nil
}

// look asks every istiod, and every proxy that may have come further.
func (w *watch) look(ctx context.Context) error {
	if w.plan.Proxies == nil { // the target is gone, and with it its proxies
		return nil
	}
	connected, err := w.connected(ctx)
	if err != nil {
		return err
	}
	first := !w.looked
	w.looked = true
	for _, p := range w.proxies {
		p.there = false
	}
	var asked []*proxy
	for _, pod := range w.pods {
		at, ok := connected[pod]
		if !ok {
			continue
		}
		p := w.proxies[pod]
		if p == nil {
			p = &proxy{pod: pod, expected: first, state: plan.Waiting}
			w.proxies[pod] = p
		}
		p.there, p.istiod, p.before, p.said = true, at.istiod, p.said, at.synced
		if p.state == plan.Gone {
			p.state, p.detail, p.proved = plan.Waiting, "", nil
		}
		if p.proved == nil || *p.proved != p.said {
			asked = append(asked, p)
		}
	}
	for _, p := range w.proxies {
		if !p.there {
			p.state, p.detail, p.proof, p.planned, p.proved = plan.Gone, "it is not connected to any istiod any more", "", false, nil
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for _, p := range asked {
		p.stuck = false
		g.Go(func() error { return w.judge(gctx, p) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, p := range asked {
		if p.proved != nil { // it is asked no more, unless istiod sends it something else
			w.hangUp(endpoint{p.pod, adminPort})
		}
	}
	w.free(ctx, asked)
	return nil
}

// free has istiod push again to proxies that hold on to what they refused, a few times, and with patience for each.
func (w *watch) free(ctx context.Context, proxies []*proxy) {
	stuck := slices.DeleteFunc(proxies, func(p *proxy) bool { return !p.stuck })
	if len(stuck) == 0 || w.pushes == mostPushes || time.Since(w.asked) < settling {
		return
	}
	w.asked = time.Now()
	w.pushes++
	if err := w.cluster.Annotate(ctx, w.wants[0].ref, pushAnnotation, w.asked.UTC().Format(time.RFC3339Nano)); err != nil {
		for _, p := range stuck {
			p.detail += "; that cannot be brought about: " + reason(err)
		}
	}
}

// loaded tells how far the proxies are.
func (w *watch) loaded() (l plan.Loaded) {
	for _, p := range w.proxies {
		l.Proxies = append(l.Proxies, plan.ProxyStatus{Proxy: plan.Proxy{ID: p.pod.String()},
			State: p.state, Expected: p.expected, Detail: p.detail, Proof: p.proof})
	}
	l.Sort()
	return l
}

// say sets where the proxy is.
func (p *proxy) say(s plan.ProxyState, proof plan.Proof, detail string) {
	p.state, p.proof, p.detail, p.proved = s, proof, detail, nil
	if s == plan.Running {
		said := p.said
		p.proved = &said
	}
}

// judge finds out how far one proxy is. Only what ends the whole look is an error.
func (w *watch) judge(ctx context.Context, p *proxy) error {
	wants := w.wants
	v, err := w.hear(ctx, p)
	if err == nil && w.complete(v, p, wants) {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	late := time.Since(w.begun) > settling
	if err == nil && !late && p.said.errors() == "" && v.replaced(wants) == "" {
		p.say(plan.Waiting, "", cmp.Or(v.missing(wants, w.plan.Dropped), unconfirmed))
		return nil
	}
	// istiod's own view tells whether what it sent, or what was refused, was the plan.
	planned, perr := w.planned(ctx, p)
	if perr != nil {
		return perr
	}
	missing := planned.missing(wants, w.plan.Dropped)
	now := missing == ""
	settled := now && p.planned && p.said == p.before
	p.planned = now
	switch {
	case !now && late:
		return w.partial(p, v, err, planned)
	case !now:
		p.say(plan.Waiting, "", "istiod has not taken it up yet: "+missing)
	case !settled:
		p.say(plan.Waiting, "", "istiod is sending it")
	case p.said.errors() != "":
		p.refuse(wants)
	case err == nil && p.said.acknowledged() && v.replaced(wants) != "":
		p.say(plan.Rejected, "", v.replaced(wants))
	case err == nil: // istiod has sent it, and the proxy does not show it
		p.say(plan.Waiting, "", "it was sent, but "+cmp.Or(v.missing(wants, w.plan.Dropped), unconfirmed))
	case p.said.acknowledged():
		w.show(p)
		p.say(plan.Running, plan.Acknowledged, "its own state was not seen: "+reason(err))
	default:
		p.say(plan.Waiting, "", "it has not answered istiod yet")
	}
	return nil
}

// hear visits a proxy. One that said nothing is not asked again before istiod has sent it or heard from it more: while it
// loads a module it may have had no time.
func (w *watch) hear(ctx context.Context, p *proxy) (*view, error) {
	if p.silent != nil && p.heard == p.said {
		return nil, p.silent
	}
	v, err := w.visit(ctx, p.pod)
	if p.silent = nil; errors.Is(err, errSilent) {
		p.silent, p.heard = err, p.said
	}
	return v, err
}

const unconfirmed = "istiod has not heard of it what it took"

// refuse tells of the proxy's refusal. Plugins come by discovery, and a listener that names one is refused only where the
// proxy still has a plugin of that name that it refused before: then it takes the listener with istiod's next push.
func (p *proxy) refuse(wants []want) {
	patched := slices.ContainsFunc(wants, func(x want) bool { return x.exact != nil })
	if p.stuck = p.said.extensions.LastError == "" && !patched && len(wants) > 0; p.stuck {
		p.say(plan.Waiting, "", "it holds on to a plugin that it refused before, until istiod pushes again: "+p.said.errors())
		return
	}
	p.say(plan.Rejected, "", p.said.errors())
}

// complete says whether the proxy itself shows that it runs the plan or cannot.
func (w *watch) complete(v *view, p *proxy, wants []want) bool {
	if p.failures == nil {
		var none uint64
		if p.failures = &none; v.missing(wants, nil) != "" {
			none = v.stats.fetchFailures
		}
	}
	if why := v.refused(wants, *p.failures); why != "" {
		p.say(plan.Rejected, "", why)
		return true
	}
	shows := v.missing(wants, w.plan.Dropped) == ""
	// Where the proxy does not tell what it accepted, istiod does, if nothing happened since the look before.
	taken := !v.untold(wants) || p.shown == len(wants) && p.said == p.before && p.said.acknowledged()
	if shows {
		p.shown = len(wants)
	} else if p.shown == len(wants) {
		p.shown = 0
	}
	if !shows || !taken || !p.said.listeners.answered() || v.failing(wants) {
		return false
	}
	if why := v.unloaded(wants); why != "" {
		p.say(plan.Waiting, "", why)
		return true
	}
	if len(wants) == len(w.wants) {
		w.show(p)
	}
	p.say(plan.Running, plan.Seen, "")
	return true
}

// show notes that the proxy's istiod has the plan.
func (w *watch) show(p *proxy) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.shown[p.istiod].IsZero() {
		w.shown[p.istiod] = time.Now()
	}
}

// pushed says whether the proxy's istiod has surely sent it all that it gets of the plan, and whether any proxy has all.
func (w *watch) pushed(p *proxy) (sent, anywhere bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	at := w.shown[p.istiod]
	return !at.IsZero() && time.Since(at) > settling || time.Since(w.begun) > debouncing, len(w.shown) > 0
}

// partial judges a proxy that istiod gives less than the plan, long after it was applied: filters for ports that the proxy
// does not have, or for HTTP where it has none.
func (w *watch) partial(p *proxy, v *view, err error, planned *view) error {
	var some []want
	for _, x := range w.wants {
		if planned.missing([]want{x}, nil) == "" {
			some = append(some, x)
		}
	}
	sent, anywhere := w.pushed(p)
	switch {
	case len(some) == 0 && sent && anywhere:
		p.expected = false
		p.say(plan.Waiting, "", "it has no listener that any of the filters is for")
	case len(some) == 0 || !sent || planned.missing(some, w.plan.Dropped) != "":
		p.say(plan.Waiting, "", "istiod does not give it to the proxy: "+planned.missing(w.wants, w.plan.Dropped))
	case err == nil && w.complete(v, p, some):
		if p.state == plan.Running {
			p.detail = fmt.Sprintf("%d of %d filters are for listeners that it has", len(some), len(w.wants))
		}
	case p.said.errors() != "":
		p.refuse(some)
	case err != nil && p.said.acknowledged():
		p.say(plan.Running, plan.Acknowledged, fmt.Sprintf("%d of %d filters are for listeners that it has; its own state was not seen: %s", len(some), len(w.wants), reason(err)))
	default:
		p.say(plan.Waiting, "", "it has not answered istiod yet")
	}
	return nil
}

// reason is what an error tells people.
func reason(err error) string {
	var p *problem.Problem
	if errors.As(err, &p) {
		return p.Error()
	}
	return err.Error()
}
