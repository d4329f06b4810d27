package store

import (
	"context"
	"slices"
	"sync"

	"github.com/meshery/meshery-filters/internal/problem"
)

// DefaultQueueLength is how many entries a queue holds when nothing else is said.
const DefaultQueueLength = 1000

// memoryQueue is one list in order of arrival, begun entries included: the order of a list is all the fairness that is
// needed, and scanning it is cheap at the lengths that a queue may have.
type memoryQueue struct {
	max int

	mu     sync.Mutex
	held   []*held
	closed bool
	// changed is closed, and replaced, when an entry may have become free to run.
	changed chan struct{}
}

type held struct {
	Entry
	begun bool
}

var _ Queue = (*memoryQueue)(nil)

// NewQueue makes a Queue in memory: what it holds is gone with the process. It holds at most max entries that are not
// done, begun ones included; DefaultQueueLength when max is not positive.
func NewQueue(max int) Queue {
	if max <= 0 {
		max = DefaultQueueLength
	}
	return &memoryQueue{max: max, changed: make(chan struct{})}
}

// Put names the last of the entries that share a key with e: once that one is done, so are the others.
func (q *memoryQueue) Put(ctx context.Context, e Entry) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.closed:
		return "", problem.ShuttingDown.New("operation %s was not accepted", e.ID)
	case len(q.held) >= q.max:
		return "", problem.QueueFull.New("%d operations are waiting or running, the most that the adapter takes", q.max)
	}
	e.Keys = slices.Clone(e.Keys)
	behind := ""
	for _, h := range slices.Backward(q.held) {
		if slices.ContainsFunc(h.Keys, func(key string) bool { return slices.Contains(e.Keys, key) }) {
			behind = h.ID
			break
		}
	}
	q.held = append(q.held, &held{Entry: e})
	q.wake()
	return behind, nil
}

func (q *memoryQueue) Next(ctx context.Context) (Entry, func(), error) {
	for {
		if err := ctx.Err(); err != nil {
			return Entry{}, nil, err
		}
		h, changed, err := q.begin()
		if err != nil {
			return Entry{}, nil, err
		}
		if h != nil {
			return h.Entry, func() { q.done(h) }, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

// begin marks the first entry that may run, or says what to wait for.
func (q *memoryQueue) begin() (*held, <-chan struct{}, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	taken := map[string]bool{}
	waiting := false
	for _, h := range q.held {
		free := !h.begun
		for _, key := range h.Keys {
			free = free && !taken[key]
		}
		if free {
			h.begun = true
			return h, nil, nil
		}
		for _, key := range h.Keys {
			taken[key] = true
		}
		waiting = waiting || !h.begun
	}
	if q.closed && !waiting {
		return nil, nil, problem.ShuttingDown.New("no operation is left to run")
	}
	return nil, q.changed, nil
}

// done may be called more than once.
func (q *memoryQueue) done(h *held) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if i := slices.Index(q.held, h); i >= 0 {
		q.held = slices.Delete(q.held, i, i+1)
		q.wake()
	}
}

func (q *memoryQueue) Close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.closed {
		q.closed = true
		q.wake()
	}
}

// Drain gives them in the order they came.
func (q *memoryQueue) Drain() []Entry {
	q.mu.Lock()
	defer q.mu.Unlock()
	var drained []Entry
	q.held = slices.DeleteFunc(q.held, func(h *held) bool {
		if !h.begun {
			drained = append(drained, h.Entry)
		}
		return !h.begun
	})
	q.wake()
	return drained
}

// wake lets every waiting Next look again. The lock is held.
func (q *memoryQueue) wake() {
	close(q.changed)
	q.changed = make(chan struct{})
}
