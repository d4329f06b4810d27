package main

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// burst is how many events are told at a time, where it is not one by one.
const burst = 5

// teller is an adapter that can be asked for events.
type teller interface {
	pid() int
	grpcConn() *grpc.ClientConn
	// tell has an operation tell so many events, and returns when each of them was told, unless they say so themselves.
	tell(ctx context.Context, events int) (map[key]time.Time, error)
}

// key is an event as StreamEvents and Watch both tell it.
type key uint64

var seed = maphash.MakeSeed()

func keyOf(e interface {
	GetOperationId() string
	GetSummary() string
	GetDetails() string
}) key {
	return key(maphash.Comparable(seed, [...]string{e.GetOperationId(), e.GetSummary(), e.GetDetails()}))
}

// tell asks for the status, which tells one event for each target with filters; fill has made as many as it takes.
func (a *adapter) tell(ctx context.Context, n int) (map[key]time.Time, error) {
	events, err := a.story(ctx, "filters_status", "")
	if err != nil {
		return nil, err
	}
	if len(events) != n {
		return nil, fmt.Errorf("filters_status tells %d events and not %d", len(events), n)
	}
	told := map[key]time.Time{}
	for _, e := range events {
		told[keyOf(e)] = e.GetTime().AsTime()
	}
	return told, nil
}

// fill gives the adapter as many filters as filters_status needs to tell so many events: one each, and one of its end.
func (a *adapter) fill(ctx context.Context, events int) error {
	for i := range events - 1 {
		if err := a.operate(ctx, "apply_filter", header(fmt.Sprintf("status-%d", i), fmt.Sprintf("status-%d", i), "1")); err != nil {
			return err
		}
	}
	return nil
}

// header is a document of the module that sets a header.
func header(name, group, value string) string {
	return fmt.Sprintf("apiVersion: filters.meshery.io/v1alpha1\nkind: Filter\nmetadata: {name: %s}\nspec:\n  target: {kind: ProxyGroup, name: %s}\n"+
		"  module: {builtin: headers}\n  config: {response: {x-bench: %q}}\n  wait: {timeout: 2m}\n", name, group, value)
}

// audience is clients that listen, each on a connection of its own, and note when what comes.
type audience struct {
	cancel  context.CancelFunc
	group   sync.WaitGroup
	clients []*client
	got     atomic.Int64 // events, by all of them
	failure atomic.Pointer[error]
}

type client struct{ noted []note }

// note is an event that a client got. told is zero if the event does not say when it was told.
type note struct {
	key      key
	at, told time.Time
}

// gather connects clients of StreamEvents, or of Watch.
func gather(ctx context.Context, t teller, clients int, watch bool) (*audience, error) {
	ctx, cancel := context.WithCancel(ctx)
	a := &audience{cancel: cancel}
	for range clients {
		conn, err := grpc.NewClient(t.grpcConn().Target(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, errors.Join(err, a.leave())
		}
		c := &client{}
		a.clients = append(a.clients, c)
		next, err := listen(ctx, conn, watch)
		if err != nil {
			conn.Close()
			return nil, errors.Join(err, a.leave())
		}
		a.group.Go(func() {
			defer conn.Close()
			for {
				n, err := next()
				if ctx.Err() != nil {
					return
				}
				if err != nil {
					a.failure.CompareAndSwap(nil, &err)
					return
				}
				c.noted = append(c.noted, n)
				a.got.Add(1)
			}
		})
	}
	return a, nil
}

// listen begins a stream, and returns what waits for its next event.
func listen(ctx context.Context, conn *grpc.ClientConn, watch bool) (next func() (note, error), err error) {
	if watch {
		stream, err := filterspb.NewFilterServiceClient(conn).Watch(ctx, &filterspb.WatchRequest{FromNow: true})
		if err != nil {
			return nil, err
		}
		if _, err := stream.Header(); err != nil {
			return nil, err
		}
		return func() (note, error) {
			r, err := stream.Recv()
			at := time.Now()
			if err != nil {
				return note{}, err
			}
			return note{key: keyOf(r.GetEvent()), at: at, told: r.GetEvent().GetTime().AsTime()}, nil
		}, nil
	}
	// Nothing of what happened before; the library knows nothing of that.
	ctx = metadata.AppendToOutgoingContext(ctx, "meshery-filters-live-only", "true")
	stream, err := meshes.NewMeshServiceClient(conn).StreamEvents(ctx, &meshes.EventsRequest{})
	if err != nil {
		return nil, err
	}
	return func() (note, error) {
		e, err := stream.Recv()
		n := note{at: time.Now()}
		if err != nil {
			return n, err
		}
		n.key = keyOf(e)
		if ns, err := strconv.ParseInt(e.GetDetails(), 10, 64); err == nil {
			n.told = time.Unix(0, ns)
		}
		return n, nil
	}, nil
}

// hears waits until all clients together have got that many events.
func (a *audience) hears(ctx context.Context, events int64) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for a.got.Load() < events {
		if err := a.failure.Load(); err != nil {
			return *err
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			return fmt.Errorf("%d of %d events came: %w", a.got.Load(), events, err)
		}
	}
	return nil
}

func (a *audience) leave() error {
	a.cancel()
	a.group.Wait()
	if err := a.failure.Load(); err != nil {
		return *err
	}
	return nil
}

// latency has an adapter tell events, and returns how long the median and the slowest hundredth of all took to each client,
// in milliseconds.
func (b *bench) latency(ctx context.Context, l listeners) (p50, p99 float64, err error) {
	a, err := gather(ctx, l.of, l.clients, l.watch)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, a.leave()) }()
	// Those that do not tell that they listen, the library's streams, are given a moment; the first operation does not count.
	if err := pause(ctx, b.settle/4); err != nil {
		return 0, 0, err
	}
	told := map[key]time.Time{}
	for i := range l.times + 1 {
		some, err := l.of.tell(ctx, l.events)
		if err != nil {
			return 0, 0, err
		}
		if i > 0 {
			for k, at := range some {
				told[k] = at
			}
		}
		if err := a.hears(ctx, int64((i+1)*l.events*l.clients)); err != nil {
			return 0, 0, err
		}
		if err := pause(ctx, l.pause); err != nil {
			return 0, 0, err
		}
	}
	if err := a.leave(); err != nil {
		return 0, 0, err
	}
	var took []float64
	for _, c := range a.clients {
		for _, n := range c.noted[min(l.events, len(c.noted)):] {
			if n.told.IsZero() {
				n.told = told[n.key]
			}
			took = append(took, ms(n.at.Sub(n.told)))
		}
	}
	slices.Sort(took)
	return took[len(took)/2], took[len(took)*99/100], nil
}

// listeners is one line of the table of latencies.
type listeners struct {
	name    string
	of      teller
	watch   bool
	clients int
	events  int // at a time
	times   int
	pause   time.Duration // between
}

// latencyBar is what the slowest hundredth of events may take to 100 clients, in milliseconds.
const latencyBar = 5

// measureEvents has events told to few and many clients, by turns.
func (b *bench) measureEvents(ctx context.Context) (err error) {
	var stop []func() error
	defer func() {
		for _, f := range stop {
			err = errors.Join(err, f())
		}
	}()
	begin := func(events int, args ...string) (*adapter, error) {
		a, _, err := startAdapter(ctx, b.program, b.state(), args...)
		if err != nil {
			return nil, err
		}
		stop = append(stop, a.stop)
		return a, a.fill(ctx, events)
	}
	one, err := begin(1)
	if err != nil {
		return err
	}
	interval, err := begin(1, "--sync", "interval")
	if err != nil {
		return err
	}
	five, err := begin(burst)
	if err != nil {
		return err
	}
	const breath = 10 * time.Millisecond
	var all []listeners
	add := func(of teller, name string, watch bool, events, times int, pause time.Duration) {
		for _, n := range b.audiences {
			all = append(all, listeners{fmt.Sprintf("%s, %d", name, n), of, watch, n, events, times, pause})
		}
	}
	add(one, "StreamEvents", false, 1, b.told, breath)
	add(one, "Watch", true, 1, b.told, breath)
	add(interval, "StreamEvents, sync: interval", false, 1, b.told, breath)
	bars := len(all)
	add(five, fmt.Sprintf("StreamEvents, %d events at a time", burst), false, burst, b.told/burst, breath)
	if b.library != "" {
		l, _, err := startLibrary(ctx, b.library, b.state()+".log")
		if err != nil {
			return err
		}
		stop = append(stop, l.stop)
		// It waits for half a second after each event that it sends.
		add(l, "the library's StreamEvents, every 0.6 s", false, 1, 5, 600*time.Millisecond)
		add(l, fmt.Sprintf("the library's StreamEvents, %d events at a time", burst), false, burst, 1, 600*time.Millisecond)
	}
	p50, p99 := make([][]float64, len(all)), make([][]float64, len(all))
	for round := range b.repeats {
		for i, l := range all {
			b.say("events to %s, round %d of %d", l.name, round+1, b.repeats)
			x, y, err := b.latency(ctx, l)
			if err != nil {
				return fmt.Errorf("%s: %w", l.name, err)
			}
			p50[i], p99[i] = append(p50[i], x), append(p99[i], y)
		}
	}
	s := section{Title: "Events: from being told until each of so many clients has it, on a connection of its own", Columns: []string{"clients", "p50", "p99"}}
	for i, l := range all {
		s.add(l.name, figureOf("ms", p50[i]), figureOf("ms", p99[i]))
		if l.clients == 100 && i < bars {
			b.verdict("p99 to "+l.name, figureOf("ms", p99[i]), latencyBar)
		}
	}
	b.report.Sections = append(b.report.Sections, s)
	return nil
}

// measureLeaving counts goroutines of programs to which nothing happened, and of those that clients have left.
func (b *bench) measureLeaving(ctx context.Context) error {
	s := section{Title: fmt.Sprintf("Goroutines: after the start, and when %d clients of StreamEvents have left and %d events were told", b.comers, b.comers*4),
		Columns: []string{"", "at first", "at last"}}
	kinds := []struct {
		name  string
		start func() (dumper, error)
	}{
		{"the adapter", func() (dumper, error) { a, _, err := startAdapter(ctx, b.program, b.state()); return a, err }},
		{"the library's adapter", func() (dumper, error) { l, _, err := startLibrary(ctx, b.library, b.state()+".log"); return l, err }},
	}
	if b.library == "" {
		kinds = kinds[:1]
	}
	for _, k := range kinds {
		b.say("clients of %s come and go", k.name)
		count := func(load func(dumper) error) ([]float64, error) {
			d, err := k.start()
			if err != nil {
				return nil, err
			}
			if err := load(d); err != nil {
				return nil, errors.Join(err, d.stop())
			}
			d.grpcConn().Close()
			if err := pause(ctx, b.settle); err != nil {
				return nil, errors.Join(err, d.stop())
			}
			n, err := d.goroutines()
			return []float64{float64(n)}, err
		}
		first, err := count(func(dumper) error { return nil })
		if err != nil {
			return err
		}
		last, err := count(func(d dumper) error {
			if a, ok := d.(*adapter); ok {
				if err := a.fill(ctx, burst); err != nil {
					return err
				}
			}
			clients, err := gather(ctx, d, b.comers, false)
			if err == nil {
				err = errors.Join(pause(ctx, b.settle/4), clients.leave())
			}
			for range b.comers * 4 / burst {
				if err == nil {
					_, err = d.tell(ctx, burst)
				}
			}
			return err
		})
		if err != nil {
			return err
		}
		s.add(k.name, figureOf("goroutines", first), figureOf("goroutines", last))
	}
	b.report.Sections = append(b.report.Sections, s)
	return nil
}

// dumper is a teller whose goroutines can be counted, which ends it.
type dumper interface {
	teller
	goroutines() (int, error)
	stop() error
}
