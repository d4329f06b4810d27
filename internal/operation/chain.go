package operation

import (
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
	"github.com/meshery/meshery-filters/internal/wasm"
)

// plan makes the plan of a chain in the backend's world now. The plan's Chain keeps its references.
func (r *Runner) plan(ctx context.Context, b Backend, c filter.Chain) (plan.Plan, error) {
	resolved, err := r.resolvedChain(ctx, b, c)
	if err != nil {
		return plan.Plan{}, err
	}
	return r.planResolved(ctx, b, c, resolved)
}

// resolvedChain is the chain with its references resolved.
func (r *Runner) resolvedChain(ctx context.Context, b Backend, c filter.Chain) (resolved filter.Chain, err error) {
	resolved = c
	resolved.Filters = make([]filter.Filter, len(c.Filters))
	for i, f := range c.Filters {
		if resolved.Filters[i], err = f.Resolved(r.lookup(ctx, clusterOf(b), f)); err != nil {
			return resolved, named(f, err)
		}
	}
	return resolved, nil
}

func (r *Runner) planResolved(ctx context.Context, b Backend, c, resolved filter.Chain) (plan.Plan, error) {
	m, err := mesh.Find(c.Mesh)
	if err != nil {
		return plan.Plan{}, err
	}
	w, err := r.world(ctx, b, c)
	if err != nil {
		return plan.Plan{}, err
	}
	_, end := r.step(ctx, "plan", attrTarget.String(c.Target.String()))
	p, err := m.Plan(resolved, w)
	if end(err); err != nil {
		return plan.Plan{}, err
	}
	p.Chain = c
	return p, nil
}

// world is what the chain lands in.
func (r *Runner) world(ctx context.Context, b Backend, c filter.Chain) (plan.World, error) {
	reading, end := r.step(ctx, "world", attrTarget.String(c.Target.String()))
	w, err := b.World(reading, c)
	if end(err); err != nil {
		return w, fmt.Errorf("read the world of %s: %w", c.Target, err)
	}
	for digest, code := range w.Modules {
		code.URL = r.Modules.Address(digest)
		w.Modules[digest] = code
	}
	return w, nil
}

// hide has a value hidden wherever it is quoted.
func (r *Runner) hide(v string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	// A proxy quotes the configuration as it got it, which is JSON.
	for _, form := range []string{v, (filter.Value{V: v}).JSON()} {
		if !slices.Contains(r.secrets, form) {
			r.secrets = append(r.secrets, form)
		}
	}
	if over := len(r.secrets) - rememberedSecrets; over > 0 {
		r.secrets = slices.Delete(r.secrets, 0, over)
	}
}

const (
	// leastHidden is the length in bytes from which a secret is hidden: a shorter one would garble every text.
	leastHidden = 4
	// rememberedSecrets bounds the values that are hidden, old ones of rotated secrets included.
	rememberedSecrets = 2000
)

// redact hides every secret that was resolved.
func (r *Runner) redact(text string) string {
	r.mu.Lock()
	values := slices.Clone(r.secrets)
	r.mu.Unlock()
	// The longest first, so that a value that contains another is hidden whole.
	slices.SortFunc(values, func(a, b string) int { return len(b) - len(a) })
	for _, v := range values {
		text = strings.ReplaceAll(text, v, "[redacted]")
	}
	return text
}

// patience is how long an operation waits, and for what.
type patience struct {
	wait    filter.Wait
	rollout filter.Rollout
}

// of takes the most patient of several filters' wishes.
func of(filters []filter.Filter) patience {
	p := patience{wait: filter.Wait{For: filter.WaitNone}, rollout: filter.RolloutAll}
	rank := []filter.WaitFor{filter.WaitNone, filter.WaitSome, filter.WaitAll}
	for _, f := range filters {
		if slices.Index(rank, f.Spec.Wait.For) > slices.Index(rank, p.wait.For) {
			p.wait.For = f.Spec.Wait.For
		}
		p.wait.Timeout = max(p.wait.Timeout, f.Spec.Wait.Timeout)
		if f.Spec.Rollout != filter.RolloutAll {
			p.rollout = filter.RolloutCanary
		}
	}
	return p
}

// edit is what an operation changes on one target, and how its events speak of that.
type edit struct {
	subject string       // "shop/rate-limit (sha256 3f2a…)"
	touched []filter.Key // the filters it applies
	removal bool
}

// on names the edit with its target.
func (e edit) on(t filter.Target) string {
	if e.removal {
		return fmt.Sprintf("the removal of %s from %s", e.subject, t)
	}
	return fmt.Sprintf("%s on %s", e.subject, t)
}

// progress tells how far the proxies are.
func (e edit) progress(l plan.Loaded) string {
	if e.removal {
		return fmt.Sprintf("%s removed from %s", e.subject, l)
	}
	return fmt.Sprintf("%s run %s", l, e.subject)
}

// maxChain bounds the filters of one target: each costs every proxy memory, and every request time.
const maxChain = 100

func tooMany(target string, n int) error {
	return problem.NotSupported.New("%s would have %d filters, and %d is the most", target, n, maxChain)
}

// revise changes the chain of a target to what change makes of it, one operation of this process at a time. An operation of
// another adapter may change it meanwhile: each has claimed only the targets that its filters stood on when it was
// accepted, and an operation before it may have moved them. Whoever comes later then starts again from the other's chain.
func (r *Runner) revise(ctx context.Context, s *story, pl place, mesh string, t filter.Target, pt patience,
	change func(filter.Chain) (filter.Chain, edit)) (next filter.Chain, l plan.Loaded, unchanged bool, err error) {
	b, err := pl.backend(mesh)
	if err != nil {
		return next, l, false, err
	}
	id := filter.Chain{Mesh: mesh, Target: t}.ID()
	defer r.lock(pl.key(id))()
	for tries := 0; ; tries++ {
		prev, err := b.Committed(ctx, t)
		if err != nil {
			return next, l, false, fmt.Errorf("read the chain of %s: %w", t, err)
		}
		next, e := change(prev.Chain)
		l, unchanged, err = r.change(ctx, s, pl, b, prev, next, e, pt)
		if !errors.Is(err, store.ErrStale) || tries == maxRevisions {
			return next, l, unchanged, err
		}
		r.Log.Info("another adapter has changed the chain meanwhile", "operation", s.operation, "target", t.String())
		if pl.cluster != nil {
			// Nobody has claimed a cluster's target. Two that began again at once would keep each other from the end.
			select {
			case <-ctx.Done():
				return next, l, false, ctx.Err()
			case <-time.After(mathrand.N(time.Duration(tries+1) * giveWay)):
			}
		}
		if err := r.behind(ctx, b, func(c filter.Chain) error {
			if c.ID() != id {
				return nil
			}
			return r.adopt(ctx, b, c)
		}); err != nil {
			return next, l, false, err
		}
	}
}

// maxRevisions bounds how often others may come first, and giveWay is how much longer an operation may let them each time.
const (
	maxRevisions = 10
	giveWay      = time.Second
)

// change makes next hold where prev does, and proves it. When a proxy rejects it, or nothing is proved, prev holds again.
func (r *Runner) change(ctx context.Context, s *story, pl place, b Backend, prev plan.Plan, next filter.Chain, e edit, pt patience) (l plan.Loaded, unchanged bool, err error) {
	target := next.Target
	if n := len(next.Filters); n > maxChain && n > len(prev.Chain.Filters) {
		return l, false, tooMany(target.String(), n)
	}
	p, err := r.plan(ctx, b, next)
	if err != nil {
		return l, false, err
	}
	p.Rollout = pt.rollout
	for _, loss := range p.Losses {
		if slices.Contains(e.touched, loss.Filter) {
			s.warn(problem.FieldLost.New("%s", loss))
		}
	}
	unchanged = prev.Version == p.Version
	if !unchanged {
		if err := r.share(ctx, b, prev.Chain, p, e.touched); err != nil {
			return l, false, err
		}
	}
	if !e.removal { // of modules that proxies have; that one cannot be fetched may be why another goes
		if p.Before, err = r.check(ctx, b, p); err != nil {
			return l, false, err
		}
	}
	if err := s.holds(ctx); err != nil {
		return l, false, err
	}
	if !unchanged && !e.removal && pt.rollout == filter.RolloutCanary {
		if err := r.try(ctx, s, pl, b, prev.Chain, p, e, pt); err != nil {
			return l, false, err
		}
	}
	for _, o := range p.Restarts {
		s.info(o+" gets an upstream, which restarts its Pods", "they are waited for before the filters of "+target.String()+" that need it go out")
	}
	if err := r.offer(ctx, s, pl, b, p); err != nil {
		return l, false, err
	}
	l, err = r.await(ctx, s, b, p, e, pt)
	switch {
	case errors.Is(err, problem.ProxyTimeout):
		// It stays offered: whoever answers later runs what was asked for.
		if cerr := s.commit(context.WithoutCancel(ctx), b, p); cerr != nil {
			err = r.takeBack(ctx, b, p, fmt.Errorf("%w\nIt does not stay offered, since it could not be kept: %w", err, cerr))
		}
		return l, false, err
	case err != nil: // rejected or cut off: what was proved before holds
		return l, false, r.takeBack(context.WithoutCancel(ctx), b, p, err)
	}
	if err := s.commit(ctx, b, p); err != nil {
		return l, false, r.takeBack(context.WithoutCancel(ctx), b, p, fmt.Errorf("keep the chain of %s: %w", target, err))
	}
	if len(p.Again) > 0 {
		tidied, err := r.tidy(ctx, s, pl, b, p)
		switch {
		case ctx.Err() != nil, errors.Is(err, store.ErrStale), errors.Is(err, store.ErrAway), errors.Is(err, store.ErrLost):
			return l, false, err
		case err != nil:
			s.warn(problem.UpstreamStays.New("%s: %w", strings.Join(p.Again, ", "), err))
		default:
			if l, err = r.await(ctx, s, b, tidied, e, pt); err != nil { // the Pods that came up without it
				half := *problem.Of(err)
				half.Err = err
				half.Details += "\nThe chain stays: the Pods before ran it."
				return l, false, &half
			}
		}
	}
	if gone := l.In(plan.Gone); len(gone) > 0 {
		s.warn(problem.ProxyLeft.New("%s left meanwhile and did not confirm %s", plan.Names(gone), e.on(target)))
	}
	if unseen := l.By(plan.Acknowledged); len(unseen) > 0 {
		s.warn(problem.NotVerified.New("%s: the mesh says that %s took it, and they were not seen to have loaded it\nOf %s: %s",
			e.on(target), plan.Names(unseen), unseen[0].ID, unseen[0].Detail))
	}
	switch {
	case l.Unverified != "":
		s.warn(problem.NotVerified.New("%s: %s", e.on(target), l.Unverified))
	case l.Expected() == 0 && !e.removal:
		s.warn(problem.NoProxy.New("%s waits for the first proxy of %s", e.subject, target))
	case l.Count(plan.Running) < l.Expected():
		s.warn(problem.WaitNotMet.New("%s of %s have accepted so far", l, target))
	}
	return l, unchanged, nil
}

// share runs filters in the sandboxes that proxies will put them into, beside what runs there: those of the chain with the same
// module, and what they were configured with in the chain that held.
func (r *Runner) share(ctx context.Context, b Backend, held filter.Chain, p plan.Plan, touched []filter.Key) error {
	for _, f := range p.Chain.Filters {
		if !slices.Contains(touched, f.Key) {
			continue
		}
		var beside []wasm.Plugin
		var secrets []string
		seen := []filter.Filter{f}
		for i, o := range slices.Concat(held.Filters, p.Chain.Filters) {
			self := o.Key == f.Key && i >= len(held.Filters)
			if self || !sameSandbox(f, o, p.Unnamed) || slices.ContainsFunc(seen, func(s filter.Filter) bool { return samePlugin(s, o) }) {
				continue
			}
			seen = append(seen, o)
			resolved, hidden, err := r.resolved(ctx, clusterOf(b), o)
			if err != nil { // of what held: its secret may be gone
				continue
			}
			beside = append(beside, wasm.Plugin{RootID: o.Spec.RootID, Configuration: []byte(resolved.Spec.Config.Text())})
			secrets = append(secrets, hidden...)
		}
		if beside == nil {
			continue
		}
		_, data, err := r.Modules.Resolve(ctx, filter.Module{SHA256: f.Spec.Module.SHA256})
		if errors.Is(err, problem.ModuleUnavailable) {
			continue // an undo does without the bytes where proxies have them already
		} else if err != nil {
			return named(f, err)
		}
		resolved, hidden, err := r.resolved(ctx, clusterOf(b), f)
		if err != nil {
			return named(f, err)
		}
		o := Sandbox(resolved, append(secrets, hidden...))
		o.Beside = beside
		if err := r.dryRun(ctx, f, data, o); err != nil {
			return err
		}
	}
	return nil
}

// sameSandbox says whether a proxy has one sandbox for both.
func sameSandbox(a, b filter.Filter, unnamed bool) bool {
	return a.Spec.Module.SHA256 == b.Spec.Module.SHA256 && (unnamed || a.Spec.VMID == b.Spec.VMID) &&
		reflect.DeepEqual(a.Spec.Environment, b.Spec.Environment)
}

// samePlugin says whether a sandbox that runs one has nothing to do for the other. What a secret was is not known any more.
func samePlugin(a, b filter.Filter) bool {
	return a.Key == b.Key && a.Spec.RootID == b.Spec.RootID && a.Spec.Config.Text() == b.Spec.Config.Text() && len(filter.Chain{Filters: []filter.Filter{a}}.Secrets()) == 0
}

// tidy takes away what a plan, which is proved and kept, has left for the chain before. That brings up Pods anew.
func (r *Runner) tidy(ctx context.Context, s *story, pl place, b Backend, kept plan.Plan) (p plan.Plan, err error) {
	target := kept.Chain.Target
	if _, err := b.Committed(ctx, target); err != nil { // which is what is taken back to from now on
		return p, fmt.Errorf("read the chain of %s: %w", target, err)
	}
	if p, err = r.plan(ctx, b, kept.Chain); err != nil {
		return p, err
	}
	p.Back = true // nothing of the plan needs the Pods to be up again
	for _, o := range p.Restarts {
		s.info(o+" loses an upstream that nothing needs any more, which restarts its Pods", "the filters of "+target.String()+" run without it")
	}
	if err := r.offer(ctx, s, pl, b, p); err != nil {
		return p, err
	}
	return p, s.commit(ctx, b, p)
}

// offer applies a plan, and tells what that changed in a cluster.
func (r *Runner) offer(ctx context.Context, s *story, pl place, b Backend, p plan.Plan) error {
	applying, end := r.step(ctx, "apply", about(p)...)
	changes, err := b.Apply(applying, p)
	if end(err); err != nil {
		return fmt.Errorf("offer the chain to %s: %w", p.Chain.Target, err)
	}
	for _, c := range changes {
		if pl.cluster != nil && c.Action != plan.Unchanged {
			s.info(c.String(), fmt.Sprintf("for %s, chain version %s", p.Chain.Target, p.Version))
		}
	}
	return nil
}

// trier is a Backend that plans what one proxy does before the others; those that do not have ways of their own.
type trier interface {
	Try(ctx context.Context, held filter.Chain, next plan.Plan) (*plan.Trial, error)
}

// try has one proxy run a plan, while all others run what holds. When it does not, what held before holds again.
func (r *Runner) try(ctx context.Context, s *story, pl place, b Backend, held filter.Chain, p plan.Plan, e edit, pt patience) error {
	t, ok := b.(trier)
	if !ok {
		return nil
	}
	trial, err := t.Try(ctx, held, p)
	if err != nil || trial == nil {
		return err
	}
	if err := r.offer(ctx, s, pl, b, trial.Apply); err != nil {
		return err
	}
	pt.wait.For = filter.WaitAll // others wait for this one
	l, err := r.await(ctx, s, b, trial.Proof, e, pt)
	only := trial.Proof.Proxies.Only
	switch {
	case errors.Is(err, problem.ProxyTimeout):
		err = problem.CanarySilent.New("%s: no answer from proxy %s within %s; no other was asked%s", e.on(p.Chain.Target), only, pt.wait.Timeout, first(l.In(plan.Waiting)))
		fallthrough
	case err != nil:
		return r.takeBack(context.WithoutCancel(ctx), b, trial.Apply, err)
	case l.Unverified == "":
		s.info(fmt.Sprintf("%s tried by proxy %s first", e.subject, only), fmt.Sprintf("on %s, where all others follow now", p.Chain.Target))
	}
	return s.holds(ctx)
}

// check fetches once, as proxies will, what a plan has them fetch, and sees whether they can, and what they have by now.
func (r *Runner) check(ctx context.Context, b Backend, p plan.Plan) (map[string]plan.Fetching, error) {
	checked := map[string]bool{}
	for _, source := range p.Sources {
		if checked[source.URL] {
			continue
		}
		checked[source.URL] = true
		fetching, end := r.step(ctx, "check address", attrFilter.String(source.Filter.String()), attrDigest.String(source.SHA256))
		f, _ := p.Chain.Find(source.Filter)
		module := filter.Module{URL: source.URL, SHA256: source.SHA256, PullSecret: f.Spec.Module.PullSecret}
		err := r.Modules.Check(fetching, module, r.secretsOf(fetching, clusterOf(b), f))
		if end(err); err != nil {
			return nil, named(filter.Filter{Key: source.Filter}, err)
		}
	}
	if cluster, ok := b.(*clusterBackend); ok && len(p.Sources) > 0 {
		if f, ok := cluster.cluster.Cluster.(Fetcher); ok {
			return f.Before(ctx, p)
		}
	}
	return nil, nil
}

// about says in a span which plan it is about.
func about(p plan.Plan) []attribute.KeyValue {
	return []attribute.KeyValue{attrTarget.String(p.Chain.Target.String()), attrVersion.String(p.Version)}
}

// loaded says how far the proxies are.
func loaded(l plan.Loaded) []attribute.KeyValue {
	return []attribute.KeyValue{attrRunning.Int(l.Count(plan.Running)), attrExpected.Int(l.Expected())}
}

// commit makes the plan hold, unless another adapter has the operation.
func (s *story) commit(ctx context.Context, b Backend, p plan.Plan) (err error) {
	ctx, end := s.step(ctx, "commit", about(p)...)
	defer func() { end(err) }()
	if err := s.holds(ctx); err != nil {
		return err
	}
	return b.Commit(ctx, p)
}

// How long a failed operation waits at most for proxies to confirm that they have the old chain: those of the adapter's own,
// and those of a mesh, whose control plane has to be waited for, too.
const (
	settle       = 2 * time.Second
	settleInMesh = 15 * time.Second
)

// takeBack takes the offer of a plan back, waits until the old chain is proved to hold, and adds to why how that went.
func (r *Runner) takeBack(ctx context.Context, b Backend, offered plan.Plan, why error) error {
	p := *problem.Of(why)
	p.Err = why
	target := offered.Chain.Target
	reverting, end := r.step(ctx, "revert", about(offered)...)
	committed, err := b.Revert(reverting, target)
	if cluster, ok := b.(*clusterBackend); ok && err == nil {
		p.Details += cluster.restored(target)
	}
	end(err)
	switch {
	case err != nil:
		p.Details += fmt.Sprintf("\nThe offer to %s could not be taken back, so its proxies may take it still: %v", target, err)
		return &p
	case committed.Version == offered.Version:
		p.Details += "\nIt is the chain that these proxies should run already; each keeps what it accepted last."
		return &p
	case committed.Version == "":
		p.Details += "\nThe offer was taken back; each proxy keeps what it accepted last."
		return &p
	}
	bound := settle
	if _, ok := b.(*clusterBackend); ok {
		bound = settleInMesh
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	ctx, end = r.step(ctx, "wait for loaded", about(committed)...)
	var l plan.Loaded
	for now, failed := range b.Loaded(ctx, committed) {
		if err = failed; err != nil {
			break // what was seen last holds
		}
		if l = now; l.Count(plan.Running) == l.Expected() {
			break
		}
	}
	note(ctx, loaded(l)...)
	end(err)
	switch behind := slices.Concat(l.In(plan.Waiting), l.In(plan.Rejected)); {
	case len(behind) > 0:
		p.Details += fmt.Sprintf("\nThe chain that held before is offered again, and not yet confirmed by %s.", plan.Names(behind))
		if behind[0].Detail != "" {
			p.Details += fmt.Sprintf(" Of %s: %s", behind[0].ID, behind[0].Detail)
		}
	case l.Expected() == 0:
		p.Details += "\nThe offer was taken back."
	default:
		p.Details += "\nThe chain that worked before is in place again."
	}
	return &p
}

// await watches the proxies until the wait is met.
func (r *Runner) await(ctx context.Context, s *story, b Backend, p plan.Plan, e edit, pt patience) (last plan.Loaded, err error) {
	ctx, end := r.step(ctx, "wait for loaded", about(p)...)
	defer func() {
		note(ctx, loaded(last)...)
		end(err)
	}()
	wctx, cancel := context.WithTimeout(ctx, time.Duration(pt.wait.Timeout))
	defer cancel()
	told := 0
	target := p.Chain.Target
	for l, err := range b.Loaded(wctx, p) {
		if err != nil {
			if wctx.Err() != nil {
				break
			}
			return l, err
		}
		last = l
		running, expected := l.Count(plan.Running), l.Expected()
		rejected, held, gone := l.In(plan.Rejected), l.In(plan.Held), l.In(plan.Gone)
		switch {
		case len(rejected) > 0:
			return l, problem.ProxyRejected.New("%s, by proxy %s\nProxy %s says: %s", e.on(target), plan.Names(rejected), rejected[0].ID, rejected[0].Detail)
		case len(gone) > 0 && running == 0 && len(l.In(plan.Waiting)) == 0:
			// Either all have left, or the one that was to try it first.
			return l, problem.ProxyLeft.New("%s: proxy %s left before it confirmed it", e.on(target), plan.Names(gone))
		}
		// Humans read ten lines, not a thousand: of a large group only each tenth of it is told.
		if running > told && running < expected && (expected <= 10 || told == 0 || running-told >= expected/10) {
			told = running
			s.info(e.progress(l), fmt.Sprintf("on %s, chain version %s", target, p.Version))
		}
		// Whoever does not wait still has one proxy try it before all get it.
		if running == expected || pt.wait.For == filter.WaitNone && len(held) == 0 || pt.wait.For == filter.WaitSome && running > 0 {
			return l, nil
		}
	}
	if ctx.Err() != nil {
		return last, ctx.Err()
	}
	waiting, held := last.In(plan.Waiting), last.In(plan.Held)
	if len(held) > 0 {
		return last, problem.CanarySilent.New("%s: no answer from proxy %s within %s; %d more were not asked",
			e.on(target), plan.Names(waiting), pt.wait.Timeout, len(held))
	}
	return last, problem.ProxyTimeout.New("%s: %s after %s; no answer from %s%s", e.on(target), last, pt.wait.Timeout, plan.Names(waiting), first(waiting))
}

// first says what the first of several proxies is at; empty where that is not known.
func first(proxies []plan.ProxyStatus) string {
	if len(proxies) == 0 || proxies[0].Detail == "" {
		return ""
	}
	return fmt.Sprintf("\nOf %s: %s", proxies[0].ID, proxies[0].Detail)
}
