package operation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// plan makes the plan of a chain in the backend's world now. The plan's Chain keeps its references.
func (r *Runner) plan(ctx context.Context, b Backend, c filter.Chain) (plan.Plan, error) {
	resolved, err := c.Resolved(r.lookup)
	if err != nil {
		return plan.Plan{}, err
	}
	return r.planResolved(ctx, b, c, resolved)
}

func (r *Runner) planResolved(ctx context.Context, b Backend, c, resolved filter.Chain) (plan.Plan, error) {
	m, err := mesh.Find(c.Mesh)
	if err != nil {
		return plan.Plan{}, err
	}
	w, err := b.World(ctx, c)
	if err != nil {
		return plan.Plan{}, fmt.Errorf("read the world of %s: %w", c.Target, err)
	}
	p, err := m.Plan(resolved, w)
	if err != nil {
		return plan.Plan{}, err
	}
	p.Chain = c
	return p, nil
}

func (r *Runner) lookup(ref filter.SecretRef) (string, error) { return r.Secret(ref.Name, ref.Key) }

// redactor hides the values of every secret that the chains refer to.
func (r *Runner) redactor(chains ...filter.Chain) func(string) string {
	var values []string
	for _, c := range chains {
		for _, ref := range c.Secrets() {
			if v, err := r.lookup(ref); err == nil && v != "" {
				values = append(values, v)
				// A proxy quotes the configuration as it got it, which is JSON.
				if quoted := (filter.Value{V: v}).JSON(); quoted != v {
					values = append(values, quoted)
				}
			}
		}
	}
	// The longest first, so that a value that contains another is hidden whole.
	slices.SortFunc(values, func(a, b string) int { return len(b) - len(a) })
	return func(text string) string {
		for _, v := range values {
			text = strings.ReplaceAll(text, v, "[redacted]")
		}
		return text
	}
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

// change makes next hold where prev does, proves it, and returns "2 of 2 proxies". subject is what the events are
// about, without being a sentence: "shop/rate-limit (sha256 3f2a…)". When a proxy rejects the chain, prev holds again.
func (r *Runner) change(ctx context.Context, s *story, b Backend, prev, next filter.Chain, subject string, pt patience) (proven string, unchanged bool, err error) {
	old, oldErr := r.plan(ctx, b, prev)
	p, err := r.plan(ctx, b, next)
	if err != nil {
		return "", false, err
	}
	p.Rollout = pt.rollout
	s.redact = r.redactor(prev, next)
	for _, l := range p.Losses {
		if _, had := prev.Find(l.Filter); !had || !slices.ContainsFunc(old.Losses, func(o plan.Loss) bool { return o == l }) {
			s.warn(problem.FieldLost.New("%s", l))
		}
	}
	unchanged = oldErr == nil && old.Version == p.Version
	if err := s.holds(ctx); err != nil {
		return "", false, err
	}
	if _, err := b.Apply(ctx, p); err != nil {
		return "", false, fmt.Errorf("offer the chain to %s: %w", next.Target, err)
	}
	l, err := r.await(ctx, s, b, p, subject, pt)
	switch {
	case errors.Is(err, problem.ProxyRejected), errors.Is(err, errWithdraw):
		return "", false, r.takeBack(ctx, b, old, oldErr, err)
	case errors.Is(err, problem.ProxyTimeout):
		// It stays offered: whoever answers later runs what was asked for.
		if cerr := s.commit(context.WithoutCancel(ctx), b, p); cerr != nil {
			err = errors.Join(err, cerr)
		}
		return "", false, err
	case err != nil: // cut off: nothing is proved, so what was proved before holds
		return "", false, r.takeBack(context.WithoutCancel(ctx), b, old, oldErr, err)
	}
	if err := s.commit(ctx, b, p); err != nil {
		return "", false, r.takeBack(context.WithoutCancel(ctx), b, old, oldErr, fmt.Errorf("keep the chain of %s: %w", next.Target, err))
	}
	switch {
	case l.Expected() == 0 && len(next.Filters) > 0:
		s.warn(problem.NoProxy.New("%s waits for the first proxy of %s", subject, next.Target))
	case l.Count(plan.Running) < l.Expected():
		s.warn(problem.WaitNotMet.New("%s of %s have accepted so far", l, next.Target))
	}
	return l.String(), unchanged, nil
}

// commit makes the plan hold, unless another adapter has the operation.
func (s *story) commit(ctx context.Context, b Backend, p plan.Plan) error {
	if err := s.holds(ctx); err != nil {
		return err
	}
	return b.Commit(ctx, p)
}

// errWithdraw marks a timeout after which nothing should stay offered.
var errWithdraw = errors.New("withdrawn")

// settle bounds how long a failed operation waits for proxies to confirm that they have the old chain.
const settle = 2 * time.Second

// takeBack offers the old chain again, waits until it is proved to hold, and adds to why how that went.
func (r *Runner) takeBack(ctx context.Context, b Backend, old plan.Plan, oldErr, why error) error {
	err := oldErr
	if err == nil {
		old.Rollout = filter.RolloutAll
		_, err = b.Apply(ctx, old)
	}
	p := *problem.Of(why)
	if err != nil {
		p.Details += fmt.Sprintf("\nThe chain that %s had before could not be put back; its proxies keep what they accepted last, and applying the filter again finishes it: %v", old.Chain.Target, err)
		p.Err = errors.Join(why, err)
		return &p
	}
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	var l plan.Loaded
	for l, err = range b.Loaded(ctx, old) {
		if err != nil || l.Count(plan.Running) == l.Expected() {
			break
		}
	}
	if behind := l.In(plan.Waiting); len(behind) > 0 {
		p.Details += fmt.Sprintf("\nThe chain that worked before is offered again, and not yet confirmed by %s.", plan.Names(behind))
	} else {
		p.Details += "\nThe chain that worked before is in place again."
	}
	return &p
}

// await watches the proxies until the wait is met.
func (r *Runner) await(ctx context.Context, s *story, b Backend, p plan.Plan, subject string, pt patience) (plan.Loaded, error) {
	wctx, cancel := context.WithTimeout(ctx, time.Duration(pt.wait.Timeout))
	defer cancel()
	var last plan.Loaded
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
		if rejected := l.In(plan.Rejected); len(rejected) > 0 {
			return l, problem.ProxyRejected.New("%s on %s, by proxy %s\nProxy %s says: %s",
				subject, target, plan.Names(rejected), rejected[0].ID, rejected[0].Detail)
		}
		// Humans read ten lines, not a thousand: of a large group only each tenth of it is told.
		if running > told && running < expected && (expected <= 10 || told == 0 || running-told >= expected/10) {
			told = running
			s.info(fmt.Sprintf("%s run %s", l, subject), fmt.Sprintf("on %s, chain version %s", target, p.Version))
		}
		if running == expected || pt.wait.For == filter.WaitNone || pt.wait.For == filter.WaitSome && running > 0 {
			return l, nil
		}
	}
	if ctx.Err() != nil {
		return last, ctx.Err()
	}
	waiting, held := last.In(plan.Waiting), last.In(plan.Held)
	if len(held) > 0 {
		return last, fmt.Errorf("%w: %w", errWithdraw, problem.ProxyTimeout.New(
			"%s on %s: proxy %s, which was to try it first, did not answer within %s\nThe offer was taken back; %d others were not asked.",
			subject, target, plan.Names(waiting), pt.wait.Timeout, len(held)))
	}
	return last, problem.ProxyTimeout.New("%s on %s: %s run it after %s; no answer from %s", subject, target, last, pt.wait.Timeout, plan.Names(waiting))
}

// backend finds the backend of a mesh.
func (r *Runner) backend(meshName string) (Backend, error) {
	b, ok := r.Backends[meshName]
	if !ok {
		return nil, problem.MeshNotSupported.New("spec.mesh is %q, and this adapter has no backend for it", meshName)
	}
	return b, nil
}

// holding lists the chains that hold any of the filters.
func (r *Runner) holding(ctx context.Context, keys ...filter.Key) ([]filter.Chain, error) {
	var out []filter.Chain
	for _, b := range r.Backends {
		chains, err := b.List(ctx)
		if err != nil {
			return nil, fmt.Errorf("list chains: %w", err)
		}
		for _, c := range chains {
			if slices.ContainsFunc(keys, func(k filter.Key) bool { _, ok := c.Find(k); return ok }) {
				out = append(out, c)
			}
		}
	}
	slices.SortFunc(out, func(a, b filter.Chain) int { return strings.Compare(a.ID(), b.ID()) })
	return out, nil
}
