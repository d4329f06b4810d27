package server

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/meshery/meshery-filters/internal/event"
)

const (
	// liveOnly is the metadata key of a client of StreamEvents that wants nothing of what happened before.
	liveOnly = "meshery-filters-live-only"
	// Bounds of what a client is sent of what happened before.
	caughtUpAge    = time.Hour
	caughtUpEvents = 1000
	// settleEvery is how often it is looked at what has reached the clients, and that is saved.
	settleEvery = time.Second
	// inFlight bounds how long what is sent takes to a client, and the client's next frame takes back. A frame that was
	// read later than that after something was sent shows that it has arrived.
	inFlight = time.Second
)

// listeners are the clients of StreamEvents that count: Meshery's servers, which know of no cursor. What may not have
// reached any of them is sent to the next.
//
// A server that dies or loses its connection does not say what it has read, and what was written to a connection need
// not have arrived. Therefore an event counts as received when its client has shown a sign of life a moment after it was
// sent; until then whoever comes gets it too. So nothing is lost, and what was sent in a client's last moments may come
// again to its successor.
type listeners struct {
	server *Server

	mu    sync.Mutex
	all   map[*listener]struct{}
	left  uint64 // the farthest position that a client had received when it left
	saved *uint64
	tried time.Time // when saving was last considered

	saving sync.Mutex     // of Left, taken before mu: what takes long must hold up no client that is there
	saves  sync.WaitGroup // of what saves while clients are there
}

// listener is one of them.
type listener struct {
	of       *listeners
	conn     *life
	received uint64 // position before which everything has reached it
	marks    []mark // what is under way, oldest first
}

// mark says that by that time what is before a position was sent.
type mark struct {
	begun, at time.Time
	position  uint64
}

// join adds a client, which begins at the position before which it counts as having received everything.
func (l *listeners) join(ctx context.Context, conn *life) *listener {
	events := l.server.Events
	l.mu.Lock()
	alone := len(l.all) == 0
	l.mu.Unlock()
	if alone { // so that Left is read
		l.saving.Lock()
		defer l.saving.Unlock()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	from := events.Cursor()
	switch {
	case len(l.all) > 0:
		from = min(from, l.settle())
	case !alone: // the last one has left just now
		from = min(from, l.left)
	case l.server.Left != nil:
		left, found, err := l.server.Left.Load(ctx)
		if err != nil {
			l.server.Log.Warn("what happened before a client of StreamEvents came is not sent", "err", err)
		} else if found {
			from = min(from, left)
		}
	}
	first := events.Oldest()
	if end := events.Cursor(); end-first > caughtUpEvents {
		first = end - caughtUpEvents
	}
	c := &listener{of: l, conn: conn, received: max(from, first)}
	if l.all == nil {
		l.all = map[*listener]struct{}{}
	}
	l.all[c] = struct{}{}
	return c
}

// next waits for an event. As long as what was sent before has not reached the client, it looks at that from time to time.
func (c *listener) next(ctx context.Context, sub *event.Subscription) (event.Event, error) {
	for !c.settled() {
		moment, cancel := context.WithTimeout(ctx, settleEvery)
		e, err := sub.Next(moment)
		cancel()
		if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			return e, err
		}
	}
	return sub.Next(ctx)
}

// sent notes what was sent to the client.
func (c *listener) sent(position uint64) {
	l := c.of
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	// Marks that are close are one, so that a client that shows no life has few.
	if n := len(c.marks); n > 0 && now.Sub(c.marks[n-1].begun) < inFlight/10 {
		c.marks[n-1].at, c.marks[n-1].position = now, position
	} else {
		c.marks = append(c.marks, mark{now, now, position})
	}
}

// settled says whether everything that was sent has reached the client, and that is saved.
func (c *listener) settled() bool {
	l := c.of
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.tried) >= settleEvery {
		l.tried = time.Now()
		if position := l.settle(); l.saving.TryLock() {
			l.saves.Go(func() {
				defer l.saving.Unlock()
				l.save(position)
			})
		}
	}
	return len(c.marks) == 0 && (l.server.Left == nil || l.saved != nil && *l.saved >= c.received)
}

// leave is the client's end.
func (c *listener) leave() {
	l := c.of
	l.saving.Lock()
	defer l.saving.Unlock()
	l.mu.Lock()
	l.settle()
	delete(l.all, c)
	l.left = max(l.left, c.received)
	last, position := len(l.all) == 0, l.left
	l.mu.Unlock()
	if last {
		l.save(position)
	}
}

// settle returns the position before which everything has reached the clients that are there.
func (l *listeners) settle() uint64 {
	position := ^uint64(0)
	for c := range l.all {
		heard := c.conn.lastHeard()
		for len(c.marks) > 0 && heard.Sub(c.marks[0].at) >= inFlight {
			c.received, c.marks = c.marks[0].position, c.marks[1:]
		}
		position = min(position, c.received)
	}
	return position
}

// save keeps where the next client begins after a restart. saving is held.
func (l *listeners) save(position uint64) {
	l.mu.Lock()
	same := l.saved != nil && *l.saved == position
	l.mu.Unlock()
	if l.server.Left == nil || same {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := l.server.Left.Save(ctx, position); err != nil {
		l.server.Log.Warn("where the clients of StreamEvents stand is not kept", "err", err)
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.saved = &position
}
