package server

import (
	"context"
	"sync"
	"time"
)

const (
	// liveOnly is the metadata key of a client of StreamEvents that wants nothing of what happened before.
	liveOnly = "meshery-filters-live-only"
	// Bounds of what a client is sent of what happened before.
	caughtUpAge    = time.Hour
	caughtUpEvents = 1000
	// saveEvery is how often the position is kept while clients listen; after a crash that much may be sent again.
	saveEvery = time.Second
)

// listeners are the clients of StreamEvents that count: Meshery's servers, which know of no cursor. What happens while
// none of them listens is sent to the next.
type listeners struct {
	server *Server

	mu     sync.Mutex
	count  int
	seen   uint64 // the farthest position that one of them has been sent
	saved  uint64
	saving time.Time // when it was last kept
}

// join returns where the client begins; it calls seen after each event, and leave at its end.
func (l *listeners) join(ctx context.Context) (from uint64, seen func(uint64), leave func()) {
	events := l.server.Events
	l.mu.Lock()
	defer l.mu.Unlock()
	from = events.Cursor()
	if l.count == 0 && l.server.Left != nil {
		left, found, err := l.server.Left.Load(ctx)
		switch {
		case err != nil:
			l.server.Log.Warn("what happened before a client of StreamEvents came is not sent", "err", err)
		case found && left < from:
			first := events.Oldest()
			if from-first > caughtUpEvents {
				first = from - caughtUpEvents
			}
			from = max(left, first)
		}
		l.seen = from
	}
	l.count++
	return from, l.note, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.count--; l.count == 0 {
			l.save()
		}
	}
}

func (l *listeners) note(position uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seen = max(l.seen, position)
	if time.Since(l.saving) > saveEvery {
		l.save()
	}
}

// save keeps the position. The lock is held.
func (l *listeners) save() {
	if l.server.Left == nil || l.saved == l.seen {
		return
	}
	l.saving = time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := l.server.Left.Save(ctx, l.seen); err != nil {
		l.server.Log.Warn("where the clients of StreamEvents stand is not kept", "err", err)
		return
	}
	l.saved = l.seen
}
