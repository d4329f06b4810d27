package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
)

// senders is how many clients send operations side by side.
const senders = 16

// Bars, in MiB and ms.
const (
	targetsBar = 400
	idleBar    = 80
	startBar   = 500
	oldBar     = 1000
)

// measureOperations sends operations as fast as they end.
func (b *bench) measureOperations(ctx context.Context) error {
	s := section{Title: fmt.Sprintf("Operations a second, of %d clients that each send one after the other; no proxies", senders), Columns: []string{"", "a second"}}
	change := func(a *adapter) (func(sender, i int) error, error) {
		return func(sender, i int) error {
			name := fmt.Sprintf("sender-%d", sender)
			return a.operate(ctx, "apply_filter", header(name, name, fmt.Sprint(i)))
		}, nil
	}
	status := func(a *adapter) (func(sender, i int) error, error) {
		return func(int, int) error { _, err := a.tell(ctx, burst); return err }, a.fill(ctx, burst)
	}
	for _, k := range []struct {
		name, sync string
		load       func(*adapter) (func(sender, i int) error, error)
	}{
		{"each changes a filter on a target of its own, sync: always", "always", change},
		{"the same, sync: interval", "interval", change},
		{fmt.Sprintf("each tells %d events and does nothing else, sync: always", burst), "always", status},
		{"the same, sync: interval", "interval", status},
	} {
		var perSecond []float64
		for round := range b.repeats {
			b.say("operations: %s, round %d of %d", k.name, round+1, b.repeats)
			a, _, err := startAdapter(ctx, b.program, b.state(), "--sync", k.sync)
			if err != nil {
				return err
			}
			do, err := k.load(a)
			var n float64
			if err == nil {
				n, err = rate(ctx, b.changes, do)
			}
			if err := errors.Join(err, a.stop()); err != nil {
				return err
			}
			perSecond = append(perSecond, n)
		}
		s.add(k.name, figureOf("/s", perSecond))
	}
	if b.library != "" {
		var perSecond []float64
		for range b.repeats {
			l, _, err := startLibrary(ctx, b.library, b.state()+".log")
			if err != nil {
				return err
			}
			n, err := rate(ctx, b.changes, func(int, int) error { _, err := l.tell(ctx, burst); return err })
			if err := errors.Join(err, l.stop()); err != nil {
				return err
			}
			perSecond = append(perSecond, n)
		}
		s.add("the same of the library, which keeps nothing and has not sent them yet", figureOf("/s", perSecond))
	}
	b.report.Sections = append(b.report.Sections, s)
	return nil
}

// rate has each sender do something n times, after once that does not count, and returns how often a second it was done.
func rate(ctx context.Context, n int, do func(sender, i int) error) (perSecond float64, err error) {
	all := func(from, to int) error {
		g, ctx := errgroup.WithContext(ctx)
		for s := range senders {
			g.Go(func() error {
				for i := from; i < to && ctx.Err() == nil; i++ {
					if err := do(s, i); err != nil {
						return err
					}
				}
				return ctx.Err()
			})
		}
		return g.Wait()
	}
	if err := all(0, 1); err != nil {
		return 0, err
	}
	began := time.Now()
	if err := all(1, n+1); err != nil {
		return 0, err
	}
	return float64(senders*n) / time.Since(began).Seconds(), nil
}

// changeAll gives as many targets a filter each, or another configuration of it, and returns when all operations have
// ended well.
func changeAll(ctx context.Context, a *adapter, targets int, value string) error {
	g, ctx := errgroup.WithContext(ctx)
	next := make(chan int)
	g.Go(func() error {
		defer close(next)
		for i := range targets {
			select {
			case next <- i:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	for range senders {
		g.Go(func() error {
			for i := range next {
				name := fmt.Sprintf("target-%d", i)
				if err := a.operate(ctx, "apply_filter", header(name, name, value)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// cost is what an adapter took for something.
type cost struct{ seconds, cpu float64 }

func costOf(a *adapter, do func() error) (c cost, err error) {
	before, err := cpuTime(a.pid())
	if err != nil {
		return c, err
	}
	began := time.Now()
	if err := do(); err != nil {
		return c, err
	}
	c.seconds = time.Since(began).Seconds()
	after, err := cpuTime(a.pid())
	c.cpu = (after - before).Seconds()
	return c, err
}

// measureTargets has many targets, of which some have a proxy, and changes the filter of each.
func (b *bench) measureTargets(ctx context.Context) (err error) {
	a, _, err := startAdapter(ctx, b.program, b.state())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.stop()) }()
	proxies, err := startSwarm(ctx, a.addr(), b.targetProxies, func(i int) string { return fmt.Sprintf("target-%d", i) })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, proxies.stop()) }()
	if err := proxies.acknowledges(ctx, b.targetProxies); err != nil {
		return err
	}
	s := section{Title: fmt.Sprintf("%d filters on %d targets, %d simulated proxies: until every operation has ended and every proxy has acknowledged",
		b.targets, b.targets, b.targetProxies), Columns: []string{"", "time", "CPU of the adapter"}}
	for i, what := range []string{"apply them", "change them all"} {
		b.say("%d targets: %s", b.targets, what)
		c, err := costOf(a, func() error {
			if err := changeAll(ctx, a, b.targets, fmt.Sprint(i)); err != nil {
				return err
			}
			return proxies.acknowledges(ctx, (i+2)*b.targetProxies)
		})
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		s.add(what, figureOf("s", []float64{c.seconds}), figureOf("s", []float64{c.cpu}))
	}
	b.report.Sections = append(b.report.Sections, s)
	most, err := b.memory(ctx, a, fmt.Sprintf("Memory of the adapter with %d filters and %d proxies", b.targets, b.targetProxies))
	if err == nil {
		b.verdict(fmt.Sprintf("the most memory with %d filters and %d proxies", b.targets, b.targetProxies), most, targetsBar)
	}
	return err
}

// measureGroup has many proxies in one group, and changes its filter.
func (b *bench) measureGroup(ctx context.Context) (err error) {
	a, _, err := startAdapter(ctx, b.program, b.state())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.stop()) }()
	b.say("%d proxies in one group", b.groupProxies)
	var proxies *swarm
	first, err := costOf(a, func() (err error) {
		if proxies, err = startSwarm(ctx, a.addr(), b.groupProxies, func(int) string { return "crowd" }); err == nil {
			err = proxies.acknowledges(ctx, b.groupProxies)
		}
		return err
	})
	if proxies != nil {
		defer func() { err = errors.Join(err, proxies.stop()) }()
	}
	if err != nil {
		return err
	}
	s := section{Title: fmt.Sprintf("%d simulated proxies in one group: until all have acknowledged", b.groupProxies), Columns: []string{"", "time", "CPU of the adapter"}}
	s.add("connect them", figureOf("s", []float64{first.seconds}), figureOf("s", []float64{first.cpu}))
	acks := b.groupProxies
	for _, rollout := range []string{"canary", "all"} {
		var seconds, cpu []float64
		for i := range b.changes {
			b.say("%d proxies: change %d of %d, rollout: %s", b.groupProxies, i+1, b.changes, rollout)
			c, err := costOf(a, func() error {
				return a.operate(ctx, "apply_filter", header("crowd", "crowd", fmt.Sprint(rollout, i))+"  rollout: "+rollout+"\n")
			})
			if acks += b.groupProxies; err == nil {
				err = proxies.acknowledges(ctx, acks)
			}
			if err != nil {
				return fmt.Errorf("change with rollout %s: %w", rollout, err)
			}
			seconds, cpu = append(seconds, c.seconds), append(cpu, c.cpu)
		}
		s.add("change the filter, rollout: "+rollout, figureOf("s", seconds), figureOf("s", cpu))
	}
	b.report.Sections = append(b.report.Sections, s)
	_, err = b.memory(ctx, a, fmt.Sprintf("Memory of the adapter with %d proxies in one group", b.groupProxies))
	return err
}

// memory adds what an adapter holds and held to the report, and returns the most.
func (b *bench) memory(ctx context.Context, a *adapter, title string) (most figure, err error) {
	if err := pause(ctx, b.settle); err != nil {
		return most, err
	}
	rss, _, err := resident(a.pid())
	if err != nil {
		return most, err
	}
	high, err := peak(a.pid())
	if err != nil {
		return most, err
	}
	most = figureOf("MiB", []float64{high})
	s := section{Title: title, Columns: []string{"", "figure"}}
	s.add(fmt.Sprintf("%s after the last change, RSS", b.settle), figureOf("MiB", []float64{rss}))
	s.add("the most so far", most)
	b.report.Sections = append(b.report.Sections, s)
	return most, nil
}
