package event

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/meshery/meshery-filters/internal/problem"
)

// Hub hands events to any number of subscribers in this process. It holds the newest of them once, whoever reads; a
// subscriber is a position in that and nothing else, so one that leaves, or never reads, costs nothing.
type Hub struct {
	mu     sync.RWMutex
	ring   ring
	closed bool
	// changed is closed, and replaced, at the next event after somebody began to wait.
	changed chan struct{}
	waiting atomic.Bool // set while mu is held for reading, so that Put sees it

	missed, missing atomic.Uint64
}

// NewHub makes a Hub that holds the newest maxEvents events, and fewer when their texts pass maxBytes.
// DefaultMaxEvents and DefaultMaxBytes when not positive.
func NewHub(maxEvents, maxBytes int) *Hub {
	return &Hub{ring: newRing(maxEvents, maxBytes), changed: make(chan struct{})}
}

// Put adds the event at a position, which Cursor gives; it never waits for a reader. A position that was put before is
// ignored. One behind Cursor lets go of what is held, since what is in between is gone. Texts are cut as Bounded says.
func (h *Hub) Put(position uint64, e Event) { h.put(position, e, true) }

func (h *Hub) put(position uint64, e Event, leap bool) {
	e = e.Bounded()
	h.mu.Lock()
	end := h.ring.end()
	if h.closed || position < end || position > end && !leap {
		h.mu.Unlock()
		return
	}
	if position > end {
		h.ring.restart(position)
	}
	h.ring.push(e)
	wake := h.swap()
	h.mu.Unlock()
	if wake != nil {
		close(wake)
	}
}

// restart lets go of everything; the next event has that position.
func (h *Hub) restart(position uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ring.restart(position)
}

// swap returns the channel to close, if anybody waits on it. The lock is held for writing.
func (h *Hub) swap() chan struct{} {
	if !h.waiting.Swap(false) {
		return nil
	}
	wake := h.changed
	h.changed = make(chan struct{})
	return wake
}

// Cursor is the position of the next event: subscribing from it gives what happens from now on.
func (h *Hub) Cursor() uint64 {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.ring.end()
}

// Oldest is the position of the oldest event that is held: subscribing from it gives all there is.
func (h *Hub) Oldest() uint64 {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.ring.first
}

// Missed counts the events that slow readers did not get, each as often as readers missed it, and how often a reader was
// told so.
func (h *Hub) Missed() (events, times uint64) { return h.missed.Load(), h.missing.Load() }

// Close ends every subscription once it has read what is held.
func (h *Hub) Close() {
	h.mu.Lock()
	h.closed = true
	wake := h.swap()
	h.mu.Unlock()
	if wake != nil {
		close(wake)
	}
}

// Subscription reads the Hub's events in order. It needs no closing. One goroutine at a time may use it.
type Subscription struct {
	hub       *Hub
	operation string
	next      uint64
}

// Subscribe reads from a position on, which is one that Cursor or Oldest gave; one that is still to come counts as
// Cursor. With an operation's id only its events are read, otherwise those of all.
func (h *Hub) Subscribe(from uint64, operation string) *Subscription {
	return &Subscription{hub: h, operation: operation, next: min(from, h.Cursor())}
}

// Cursor is the position that Next reads at.
func (s *Subscription) Cursor() uint64 { return s.next }

// Next waits for an event. A reader that was so slow that events were let go before it read them gets
// problem.EventsMissed once, and then the oldest that is held; with an operation's id too, for nobody knows any longer
// whose events they were. It returns ctx's error when ctx ends, and problem.ShuttingDown after Close when everything was
// read.
func (s *Subscription) Next(ctx context.Context) (Event, error) {
	for {
		e, found, changed, err := s.read()
		if found || err != nil {
			return e, err
		}
		// What is held is read even after ctx has ended, so that a server that stops still hands out the last events.
		if err := ctx.Err(); err != nil {
			return Event{}, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

func (s *Subscription) read() (e Event, found bool, changed <-chan struct{}, err error) {
	h := s.hub
	h.mu.RLock()
	defer h.mu.RUnlock()
	if missed := h.ring.first - min(s.next, h.ring.first); missed > 0 {
		s.next = h.ring.first
		h.missed.Add(missed)
		h.missing.Add(1)
		return Event{}, false, nil, problem.EventsMissed.New("the %d events before this were skipped", missed)
	}
	for _, e := range h.ring.from(s.next) {
		s.next++
		if s.operation == "" || s.operation == e.Operation {
			return e, true, nil, nil
		}
	}
	if h.closed {
		return Event{}, false, nil, problem.ShuttingDown.New("no more events follow")
	}
	h.waiting.Store(true)
	return Event{}, false, h.changed, nil
}
