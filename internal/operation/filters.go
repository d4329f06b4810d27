package operation

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
	"github.com/meshery/meshery-filters/internal/wasm"
)

// runFilters applies the job's filters and removes the ones it names. Every module and configuration is proved in a
// sandbox before anything is offered to a proxy.
func (r *Runner) runFilters(ctx context.Context, s *story, j job) (summary, details string, err error) {
	defer func() {
		if err != nil && s.again && ctx.Err() == nil {
			err = r.settle(ctx, s, j, err)
		}
	}()
	if len(j.Remove) > 0 {
		return r.remove(ctx, s, j)
	}
	places, err := r.places(j)
	if err != nil {
		return "", "", err
	}
	filters := slices.Clone(j.Filters)
	for i, f := range filters {
		var data []byte
		if filters[i].Spec.Module, data, err = r.resolve(ctx, f, places); err != nil {
			return "", "", named(f, err)
		}
		defer r.using(filters[i].Spec.Module.SHA256)()
		if r.secretThere(f) {
			continue // each cluster has other values
		}
		if err := r.prove(ctx, s, nil, filters[i], data); err != nil {
			return "", "", err
		}
	}
	out, err := r.each(ctx, s, places, func(ctx context.Context, s *story, pl place) (outcomes, error) {
		if damage := pl.damage(ctx); damage != nil && j.Undo != nil { // which may have more of the filter's past
			s.warn(problem.Of(damage))
		}
		return r.applyIn(ctx, s, pl, pl.of(filters))
	})
	if err != nil {
		return "", "", err
	}
	summary, details = out.tell(fmt.Sprintf("%d filters run on %d targets", len(filters), len(out)))
	return summary, strings.Join(append([]string{details}, notes(filters)...), "\n"), nil
}

// settle takes away what an attempt before this one has begun on targets in clusters and this one, which fails, does not
// come to: what one proxy was to try first. What it cannot take away is added to why.
func (r *Runner) settle(ctx context.Context, s *story, j job, why error) error {
	keys := slices.Clone(j.Remove)
	for _, f := range j.Filters {
		keys = append(keys, f.Key)
	}
	places, err := r.places(j)
	if err != nil {
		return why
	}
	_, err = r.each(ctx, s, places, func(ctx context.Context, s *story, pl place) (outcomes, error) {
		return nil, pl.begun(ctx, keys, func(b *clusterBackend, c begun) error { return r.untry(ctx, s, pl, b, c.Chain) })
	})
	if err == nil || errors.Is(err, store.ErrAway) || errors.Is(err, store.ErrLost) {
		return errors.Join(why, err)
	}
	p := *problem.Of(why)
	p.Err = why
	p.Details += "\nWhat was begun before the adapter ended may be there still; the next change of the target takes it away, and so does removing the filter: " + problem.Of(err).Details
	return &p
}

// untry makes a target hold what it held before a change that was cut off.
func (r *Runner) untry(ctx context.Context, s *story, pl place, b *clusterBackend, c filter.Chain) error {
	defer r.lock(pl.key(c.ID()))()
	if err := s.holds(ctx); err != nil {
		return err
	}
	if _, err := b.Revert(ctx, c.Target); err != nil {
		return fmt.Errorf("take back what was begun on %s: %w", c.Target, err)
	}
	s.info("What was begun on "+c.Target.String()+" before the adapter ended is taken back", meets(c))
	return nil
}

// applyIn applies filters to their targets in one place, target by target.
func (r *Runner) applyIn(ctx context.Context, s *story, pl place, filters []filter.Filter) (out outcomes, err error) {
	if err := pl.taken(ctx, filters); err != nil {
		return nil, err
	}
	byChain := map[string][]filter.Filter{}
	var order []string
	for _, f := range filters {
		if r.secretThere(f) {
			_, data, err := r.Modules.Resolve(ctx, filter.Module{SHA256: f.Spec.Module.SHA256})
			if err != nil {
				return nil, named(f, err)
			}
			if err := r.prove(ctx, s, pl.cluster, f, data); err != nil {
				return nil, err
			}
		}
		id := filter.Chain{Mesh: f.Spec.Mesh, Target: f.Spec.Target}.ID()
		if byChain[id] == nil {
			order = append(order, id)
		}
		byChain[id] = append(byChain[id], f)
	}
	for i, id := range order {
		o, err := r.applyTo(ctx, s, pl, id, byChain[id])
		if err != nil {
			return nil, out.partly(err, len(order)-i-1)
		}
		out = append(out, o)
	}
	return out, nil
}

// taken refuses filters that would take the place of another component's of a design.
func (pl place) taken(ctx context.Context, filters []filter.Filter) error {
	of := map[filter.Key]string{}
	for _, f := range filters {
		if component := f.Labels[filter.ComponentLabel]; component != "" {
			of[f.Key] = component
		}
	}
	if len(of) == 0 {
		return nil
	}
	chains, err := pl.holding(ctx, slices.Collect(maps.Keys(of))...)
	if err != nil {
		return err
	}
	for _, c := range chains {
		for _, f := range c.Filters {
			if is, was := of[f.Key], f.Labels[filter.ComponentLabel]; is != "" && was != "" && was != is {
				return problem.ComponentTaken.New("%s is the filter of the component %s on %s, and not of %s", f.Key, was, pl.on(c.Target), is)
			}
		}
	}
	return nil
}

// outcome is what an operation did on one target, in a line and in what is left to say.
type outcome struct{ line, detail string }

type outcomes []outcome

// tell is the last event of an operation; several is its summary where there is more than one target.
func (o outcomes) tell(several string) (summary, details string) {
	if len(o) == 1 {
		return o[0].line, o[0].detail
	}
	var lines []string
	for _, e := range o {
		lines = append(lines, e.line+"; "+e.detail)
	}
	return several, strings.Join(lines, "\n")
}

// partly adds to an error what an operation over several targets did before it.
func (o outcomes) partly(err error, left int) error {
	if len(o) == 0 && left == 0 {
		return err
	}
	p := *problem.Of(err)
	if len(o) > 0 {
		p.Details += "\nDone before that, and still in place: "
		for i, e := range o {
			if i > 0 {
				p.Details += "; "
			}
			p.Details += e.line
		}
		p.Details += "."
	}
	if left > 0 {
		p.Details += fmt.Sprintf("\nNot begun: %d further targets. Sending the operation again finishes it.", left)
	}
	return &p
}

// prove runs a filter's module with its real configuration where it can do no harm. Its secrets are those of the cluster, if
// there is one.
func (r *Runner) prove(ctx context.Context, s *story, c Cluster, f filter.Filter, bytes []byte) error {
	module := f.Spec.Module
	resolved, secrets, err := r.resolved(ctx, c, f)
	if err != nil {
		return named(f, err)
	}
	if err := r.dryRun(ctx, f, bytes, Sandbox(resolved, secrets)); err != nil {
		return err
	}
	s.info(fmt.Sprintf("Module of %s accepted its configuration in a dry run", f.Key),
		fmt.Sprintf("%s, %d bytes, sha256 %s", module.Source(), len(bytes), module.SHA256))
	if r.unsigned(ctx, f) {
		s.warn(problem.UnsignedTokens.New("%s", f.Key))
	}
	return nil
}

// resolved is a filter with its references resolved, and the values that they stand for. They are those of the cluster, if
// there is one.
func (r *Runner) resolved(ctx context.Context, c Cluster, f filter.Filter) (resolved filter.Filter, secrets []string, err error) {
	lookup := r.lookup(ctx, c, f)
	resolved, err = f.Resolved(func(ref filter.SecretRef) (string, error) {
		v, err := lookup(ref)
		secrets = append(secrets, v)
		return v, err
	})
	return resolved, secrets, err
}

func (r *Runner) dryRun(ctx context.Context, f filter.Filter, bytes []byte, o wasm.Options) error {
	begun := time.Now()
	running, end := r.step(ctx, "dry run", attrFilter.String(f.Key.String()), attrDigest.String(f.Spec.Module.SHA256))
	_, err := wasm.DryRun(running, bytes, o)
	r.Observer.DryRun(err, time.Since(begun))
	if end(err); err != nil {
		return named(f, err)
	}
	return nil
}

// Sandbox is how a filter, whose secrets are resolved, runs in a dry run. The secrets' values are hidden in what it says.
func Sandbox(f filter.Filter, secrets []string) wasm.Options {
	o := wasm.Options{RootID: f.Spec.RootID, Configuration: []byte(f.Spec.Config.Text()), Environment: map[string]string{}, Redact: secrets,
		Connections: f.Spec.Protocol == filter.TCP}
	for _, e := range f.Spec.Environment {
		if e.Value != nil {
			o.Environment[e.Name] = e.Value.Text()
		}
	}
	return o
}

// named puts the filter's name before an error's details.
func named(f filter.Filter, err error) error {
	p := *problem.Of(err)
	p.Details = f.Key.String() + ": " + p.Details
	return &p
}

func describe(filters []filter.Filter) string {
	var names []string
	for _, f := range filters {
		names = append(names, fmt.Sprintf("%s (sha256 %s…)", f.Key, filter.ShortDigest(f.Spec.Module.SHA256)))
	}
	return listed(names)
}

// listed joins names; of many it gives ten, and counts the others.
func listed(names []string) string {
	const most = 10
	if more := len(names) - most; more > 1 {
		return strings.Join(names[:most], ", ") + fmt.Sprintf(" and %d more", more)
	}
	return strings.Join(names, ", ")
}

// applyTo brings filters to their one target in one change, then takes them from targets they stood on before.
func (r *Runner) applyTo(ctx context.Context, s *story, pl place, chainID string, filters []filter.Filter) (outcome, error) {
	target := filters[0].Spec.Target
	e := edit{subject: describe(filters)}
	for _, f := range filters {
		e.touched = append(e.touched, f.Key)
	}
	pt := of(filters)
	next, l, unchanged, err := r.revise(ctx, s, pl, filters[0].Spec.Mesh, target, pt, func(c filter.Chain) (filter.Chain, edit) {
		for _, f := range filters {
			c = c.With(f)
		}
		return c, e
	})
	if err != nil && !errors.Is(err, problem.ProxyTimeout) {
		return outcome{}, err
	}
	moved, herr := pl.holding(ctx, e.touched...)
	if herr != nil {
		return outcome{}, errors.Join(err, herr)
	}
	for _, c := range moved {
		if c.ID() == chainID {
			continue
		}
		unmoved := func(err error) (outcome, error) {
			p := *problem.Of(err)
			p.Details += fmt.Sprintf("\n%s is on %s now and is on %s still; applying it again finishes the move.", e.subject, target, c.Target)
			return outcome{}, &p
		}
		if err != nil { // the new target is not proved to have it
			return unmoved(err)
		}
		o, err := r.takeFrom(ctx, s, pl, c, e.touched, pt)
		if err != nil {
			return unmoved(err)
		}
		s.info(o.line, "it moved to "+target.String())
	}
	if err != nil {
		return outcome{}, err
	}
	be, run := "is", "runs"
	if len(filters) > 1 {
		be, run = "are", "run"
	}
	verb := run + " on"
	switch {
	case l.Unverified != "" && unchanged:
		verb = be + " unchanged on"
	case l.Unverified != "":
		verb = be + " applied to"
	case l.Expected() == 0:
		verb = be + " kept for"
	case l.Count(plan.Running) == 0:
		verb = be + " offered to"
	case unchanged:
		verb = be + " unchanged and " + run + " on"
	}
	detail := meets(next)
	if seen := len(l.By(plan.Seen)); seen > 0 && seen == l.Expected() {
		detail += "; seen in each proxy itself"
	}
	return outcome{fmt.Sprintf("%s %s %s (%s)", e.subject, verb, target, l), detail}, nil
}

// meets tells what requests go through on a target.
func meets(c filter.Chain) string {
	if len(c.Filters) == 0 {
		return "no filter is left there"
	}
	return "requests meet " + listed(c.Names())
}

// takeFrom removes filters from one chain. One that holds none of them has what a change that was cut off left.
func (r *Runner) takeFrom(ctx context.Context, s *story, pl place, held filter.Chain, keys []filter.Key, pt patience) (outcome, error) {
	if in := slices.DeleteFunc(slices.Clone(keys), func(k filter.Key) bool { _, ok := held.Find(k); return !ok }); len(in) > 0 {
		keys = in
	}
	e := edit{removal: true, subject: listed(texts(keys))}
	next, l, _, err := r.revise(ctx, s, pl, held.Mesh, held.Target, pt, func(c filter.Chain) (filter.Chain, edit) {
		for _, k := range keys {
			c = c.Without(k)
		}
		return c, e
	})
	if err != nil {
		return outcome{}, err
	}
	return outcome{fmt.Sprintf("%s removed from %s (%s)", e.subject, held.Target, l), meets(next)}, nil
}

// remove takes filters away wherever they stand.
func (r *Runner) remove(ctx context.Context, s *story, j job) (summary, details string, err error) {
	places, err := r.places(j)
	if err != nil {
		return "", "", err
	}
	if len(j.Meshes) == 0 {
		places = opened(s, places)
	}
	var mu sync.Mutex
	missing := map[filter.Key]bool{}
	for _, k := range j.Remove {
		missing[k] = true
	}
	out, err := r.each(ctx, s, places, func(ctx context.Context, s *story, pl place) (out outcomes, err error) {
		held, err := pl.holding(ctx, j.Remove...)
		if err != nil {
			return nil, err
		}
		chains := slices.Clone(held)
		if damage := pl.damage(ctx); damage != nil { // of a target that may have one of them, too
			s.warn(problem.Of(damage))
		}
		if j.Component != "" { // what another component has put there is not this one's to take away
			chains = slices.DeleteFunc(chains, func(c filter.Chain) bool {
				f, _ := c.Find(j.Remove[0])
				was := f.Labels[filter.ComponentLabel]
				return was != "" && was != j.Component
			})
		}
		mu.Lock()
		for _, c := range chains {
			for _, f := range c.Filters {
				delete(missing, f.Key)
			}
		}
		mu.Unlock()
		if err := pl.begun(ctx, j.Remove, func(_ *clusterBackend, c begun) error {
			if slices.ContainsFunc(held, func(h filter.Chain) bool { return h.ID() == c.ID() }) {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			for _, k := range c.keys {
				delete(missing, k)
			}
			chains = append(chains, c.Chain)
			return nil
		}); err != nil {
			return nil, err
		}
		for i, c := range chains {
			o, err := r.takeFrom(ctx, s, pl, c, j.Remove, patience{j.Wait, j.Rollout})
			if err != nil {
				return nil, out.partly(err, len(chains)-i-1)
			}
			out = append(out, o)
		}
		return out, nil
	})
	if err != nil {
		return "", "", err
	}
	var names []string
	for _, k := range j.Remove {
		if missing[k] {
			names = append(names, k.String())
		}
	}
	switch {
	case len(names) > 0 && s.again && len(out) == 0: // an attempt before this one has removed them
		return strings.Join(names, ", ") + " removed", "no target has it any more", nil
	case len(names) > 0 && !s.again:
		return "", "", out.partly(problem.FilterNotFound.New("%s", strings.Join(names, ", ")), 0)
	}
	summary, details = out.tell(fmt.Sprintf("%d filters removed from %d targets", len(j.Remove), len(out)))
	return summary, details, nil
}

// unsigned says whether a filter is the limiter, wherever its bytes came from, and believes whatever a client claims.
func (r *Runner) unsigned(ctx context.Context, f filter.Filter) bool {
	config, _ := f.Spec.Config.V.(map[string]any)
	auth, _ := config["auth"].(map[string]any)
	if auth["mode"] != "unsigned" {
		return false
	}
	limiter, _, err := r.Modules.Resolve(ctx, filter.Module{Builtin: limiterModule})
	return err == nil && limiter.SHA256 == f.Spec.Module.SHA256
}

// limiterModule is the builtin of Image Hub's limiter.
const limiterModule = "ratelimit"

// notes are what users of a builtin should know once it runs.
func notes(filters []filter.Filter) []string {
	if slices.ContainsFunc(filters, func(f filter.Filter) bool { return f.Spec.Module.Builtin == limiterModule }) {
		return []string{"The limiter counts in each Envoy by itself: with several in front of one service a user has the limit at each of them."}
	}
	return nil
}

// runStatus tells one event per chain, and one of a cluster whose proxies run what nothing explains.
func (r *Runner) runStatus(ctx context.Context, s *story, j job) (summary, details string, err error) {
	places, err := r.places(j)
	if err != nil {
		return "", "", err
	}
	places = opened(s, places)
	var drifted, orphans atomic.Int32
	var mu sync.Mutex
	var looks []string
	out, err := r.each(ctx, s, places, func(ctx context.Context, s *story, pl place) (out outcomes, err error) {
		statuses, err := r.list(ctx, pl)
		if errors.Is(err, problem.ConsulDamaged) {
			s.warn(problem.Of(err))
			err = nil
		}
		for _, st := range statuses {
			line, drift := st.tell(s)
			if drift {
				drifted.Add(1)
			}
			out = append(out, outcome{line: line})
		}
		if pl.cluster != nil && len(j.kubeconfigs) > 0 && err == nil && !r.isAgent(pl.cluster) {
			if err := r.forgetBrought(ctx, pl.cluster, j.ID); err != nil && ctx.Err() == nil {
				r.Log.Warn("modules of a cluster are not compared with its inventories", "cluster", pl.name(), "err", err)
			}
		}
		if c, ok := pl.cluster.(Surveyed); ok && err == nil {
			var look string
			if look, err = survey(ctx, s, pl, c, &orphans); look != "" {
				mu.Lock()
				looks = append(looks, look)
				mu.Unlock()
			}
		}
		return out, err
	})
	if err != nil {
		return "", "", err
	}
	slices.Sort(looks)
	found := ""
	if n := orphans.Load(); n > 0 {
		found = fmt.Sprintf(", %d in proxies that nothing explains", n)
	}
	if len(out) == 0 {
		return "No filter is applied" + found, strings.Join(looks, "\n"), nil
	}
	noun := "targets have"
	if len(out) == 1 {
		noun = "target has"
	}
	var lines []string
	for _, o := range out {
		lines = append(lines, o.line)
	}
	return fmt.Sprintf("%d %s filters, %d drifted%s", len(out), noun, drifted.Load(), found), strings.Join(append(lines, looks...), "\n"), nil
}

// survey warns of filters in a cluster's proxies that nothing explains, and says how far its look went, and why not further.
func survey(ctx context.Context, s *story, pl place, c Surveyed, orphans *atomic.Int32) (look string, err error) {
	found, err := c.Survey(ctx)
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case err != nil:
		return fmt.Sprintf("%s: nobody looked for filters in proxies that nothing explains: %s", pl.name(), problem.Of(err).Details), nil
	case found.Proxies == 0 && found.Files == nil:
		return "", nil
	}
	look = fmt.Sprintf("%s: %s", pl.name(), found)
	if left := found.Left(); left != "" {
		look += "\n" + left
	}
	if n := len(found.Orphans); n > 0 {
		orphans.Add(int32(n))
		lines := texts(found.Orphans[:min(n, maxOrphans)])
		if more := n - len(lines); more > 0 {
			lines = append(lines, fmt.Sprintf("and %d more; `meshery-filters list --proxies` lists them all, those of another cluster than the adapter's own with --kubeconfig FILE", more))
		}
		s.warn(problem.OrphanFilters.New("%d found; %s\n%s", n, found, strings.Join(lines, "\n")))
	}
	return look, nil
}

// maxOrphans is how many an event lists.
const maxOrphans = 20

// tell tells how one chain is, and whether proxies differ from it.
func (st Status) tell(s *story) (line string, drifted bool) {
	var names []string
	for _, f := range st.Chain.Filters {
		names = append(names, fmt.Sprintf("%s (%s, sha256 %s…)", f.Key, f.Spec.Module.Source(), filter.ShortDigest(f.Spec.Module.SHA256)))
	}
	line = fmt.Sprintf("%s: %s run version %s", st.Chain.Target, st.Loaded, st.Version)
	detail := "requests meet " + listed(names)
	if st.Loaded.Unverified != "" {
		line = fmt.Sprintf("%s: version %s is applied (%s)", st.Chain.Target, st.Version, st.Loaded)
		detail += "\nnot verified: " + st.Loaded.Unverified
	}
	drift := map[string][]string{}
	for _, p := range st.Loaded.Proxies {
		if p.State != "running" {
			drift[string(p.State)] = append(drift[string(p.State)], strings.TrimSpace(p.ID+" "+p.Detail))
		}
	}
	if st.Problem != "" {
		drift["problem"] = []string{st.Problem}
	}
	if len(drift) == 0 {
		s.info(line, detail)
		return line, false
	}
	for _, state := range slices.Sorted(maps.Keys(drift)) {
		detail += fmt.Sprintf("\n%s: %s", state, listed(drift[state]))
	}
	s.warn(problem.Drift.New("%s\n%s", line, detail))
	return line, true
}
