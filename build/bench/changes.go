package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
)

// change is one step in the life of a filter, with the path whose answer tells when it has come into effect.
type change struct {
	name, config, path string
	before, after      int // statuses
}

var changes = []change{
	{"first load", `{auth: {mode: unsigned}, paths: [/pull]}`, "/pull", 200, 401},
	{"reconfigure", `{auth: {mode: unsigned}, paths: [/other]}`, "/other", 200, 401},
	{"remove", "", "/other", 401, 200},
}

// series are the times of one change through one plane, pair by pair, in milliseconds.
type series struct{ effect, end []float64 }

// measureChanges takes fresh Envoys through the changes, by turns through the adapter and by a bare push.
func (b *bench) measureChanges(ctx context.Context, a *adapter, upstream string) (err error) {
	raw, err := startBare(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, raw.stop()) }()
	s := section{Title: "Change a filter in running Envoys: until all of the group answer new connections accordingly, and until its end is known",
		Columns: []string{"", "adapter", "bare push", "difference", "adapter, last event", "bare push, all acknowledged"}}
	var before, grown []float64
	for _, n := range []int{1, 2} {
		through := map[plane][]series{a: make([]series, len(changes)), raw: make([]series, len(changes))}
		for pair := range b.pairs {
			order := []plane{a, raw}
			if pair%2 == 1 {
				order = []plane{raw, a}
			}
			for _, p := range order {
				b.say("changes, group of %d, pair %d of %d", n, pair+1, b.pairs)
				was, more, err := b.life(ctx, p, fmt.Sprintf("g%d-%d", n, pair), n, upstream, through[p])
				if err != nil {
					return err
				}
				before, grown = append(before, was), append(grown, more)
			}
		}
		for i, c := range changes {
			x, y := through[a][i], through[raw][i]
			s.add(fmt.Sprintf("%s, group of %d", c.name, n), figureOf("ms", x.effect), figureOf("ms", y.effect),
				figureOf("ms", combine(x.effect, y.effect, minus)), figureOf("ms", x.end), figureOf("ms", y.end))
		}
	}
	b.report.Sections = append(b.report.Sections, s)
	m := section{Title: fmt.Sprintf("Memory of an Envoy with %d workers, RSS", workers), Columns: []string{"", "figure"}}
	m.add("before the limiter", figureOf("MiB", before))
	m.add("more after it was loaded", figureOf("MiB", grown))
	b.report.Sections = append(b.report.Sections, m)
	b.note("the difference is taken pair by pair: it is what the adapter adds to a bare push before the effect, that is the queue, the checks and " +
		"dry run of the module, and in a group of 2 the canary, which lets the second proxy wait for the first")
	b.note("the proof, which is the acknowledgements, and the storing of the chain come between the adapter's effect and its last event")
	return nil
}

// life starts a group, takes it through the changes, and returns the first Envoy's memory before and what the filter added.
func (b *bench) life(ctx context.Context, p plane, group string, n int, upstream string, to []series) (was, more float64, err error) {
	if err := p.prepare(ctx, group); err != nil {
		return 0, 0, err
	}
	var proxies []*proxy
	defer func() { err = errors.Join(err, stopAll(proxies)) }()
	for i := range n {
		px, err := b.startSlotted(ctx, group, fmt.Sprintf("%s-%d", group, i), p.addr(), upstream, byUpstream)
		if err != nil {
			return 0, 0, err
		}
		proxies = append(proxies, px)
	}
	if was, err = b.settled(ctx, proxies[0]); err != nil {
		return 0, 0, err
	}
	for i, c := range changes {
		effect, end, err := measureChange(ctx, p, group, proxies, c)
		if err == nil && i == 0 { // before anything else is asked of it
			more, err = b.settled(ctx, proxies[0])
		}
		if err == nil {
			err = samePlan(ctx, proxies, group, c)
		}
		if err != nil {
			return 0, 0, fmt.Errorf("%s: %w", c.name, err)
		}
		to[i].effect, to[i].end = append(to[i].effect, ms(effect)), append(to[i].end, ms(end))
	}
	return was, more - was, nil
}

// settled is an Envoy's memory a moment later.
func (b *bench) settled(ctx context.Context, p *proxy) (rss float64, err error) {
	if err := pause(ctx, b.settle/4); err != nil {
		return 0, err
	}
	rss, _, err = resident(p.PID())
	return rss, err
}

// measureChange makes one change while each Envoy is asked, over one new connection after the other, what it does now.
// No request may fail meanwhile.
func measureChange(ctx context.Context, p plane, group string, proxies []*proxy, c change) (effect, end time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	seen := make([]time.Time, len(proxies))
	g, ctx := errgroup.WithContext(ctx)
	for i, px := range proxies {
		g.Go(func() error {
			for {
				status, err := get(px.listener, c.path)
				switch {
				case err != nil:
					return err
				case status == c.after:
					seen[i] = time.Now()
					return nil
				case status != c.before:
					return fmt.Errorf("%s is answered %d, which is neither %d nor %d", c.path, status, c.before, c.after)
				}
				if err := pause(ctx, time.Millisecond); err != nil {
					return fmt.Errorf("%s is still answered %d: %w", c.path, status, err)
				}
			}
		})
	}
	began := time.Now()
	g.Go(func() error {
		err := p.put(ctx, group, len(proxies), c.config)
		end = time.Since(began)
		return err
	})
	if err := g.Wait(); err != nil {
		return 0, 0, err
	}
	for _, t := range seen {
		effect = max(effect, t.Sub(began))
	}
	return effect, end, nil
}

// samePlan makes sure that both planes had the Envoys run the very same resource.
func samePlan(ctx context.Context, proxies []*proxy, group string, c change) error {
	want, err := planOf(group, c.config)
	if err != nil {
		return err
	}
	for _, p := range proxies {
		got, err := p.Admin().SlotConfig(ctx)
		if err != nil {
			return err
		}
		if got.Version != want.Version {
			return fmt.Errorf("an Envoy runs version %s and not %s", got.Version, want.Version)
		}
	}
	return nil
}
