package event

import (
	"context"
	"encoding/json"
	"fmt"
	"sync/atomic"

	"github.com/meshery/meshkit/broker"

	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

// Log keeps every event in the store, in the envelope of Meshery's broker, and hands them to a Hub at the positions that
// they have there.
//
// The envelope's EventType is ADDED for every event, failures too: each adds to an operation's story, and a reader of
// Meshery's takes ERROR for a failure of its own. Object.event_type tells a failure.
type Log struct {
	store store.Log
	hub   *Hub
	from  uint64 // position that Run goes on at

	appended [Error + 1]atomic.Uint64 // by type
}

// NewLog fills the Hub with the newest of what is kept.
func NewLog(ctx context.Context, kept store.Log, hub *Hub) (*Log, error) {
	first, next, err := kept.Bounds(ctx)
	if err != nil {
		return nil, err
	}
	l := &Log{store: kept, hub: hub, from: next}
	start := first
	if next-first > uint64(hub.ring.maxEvents) {
		start = next - uint64(hub.ring.maxEvents)
	}
	hub.restart(start)
	if start == next {
		return l, nil
	}
	for r, err := range kept.From(ctx, start) {
		if err != nil {
			return nil, err
		}
		l.forward(r)
		if r.Position >= next-1 || r.Last {
			break
		}
	}
	return l, ctx.Err()
}

// Run hands on what is added, by whichever adapter, until ctx ends.
func (l *Log) Run(ctx context.Context) error {
	for r, err := range l.store.From(ctx, l.from) {
		if err != nil {
			if ctx.Err() != nil {
				break
			}
			return fmt.Errorf("follow the events: %w", err)
		}
		l.forward(r)
	}
	return nil
}

func (l *Log) forward(r store.Record) {
	e, err := decodeRecord(r)
	if err != nil { // a newer version of the adapter may write what this one does not know
		e = Event{Operation: r.Subject, Type: Warn, Summary: "an event that cannot be read", Details: err.Error()}
	}
	l.hub.Put(r.Position, e)
}

func decodeRecord(r store.Record) (e Event, err error) {
	if err := json.Unmarshal(r.Data, &broker.Message{Object: &e}); err != nil {
		return e, fmt.Errorf("read event %d: %w", r.Position, err)
	}
	return e, nil
}

// Append keeps an event that follows the one at the position after, 0 for an operation's first, and returns its own. It
// is on disk then. Texts are cut as Bounded says. store.ErrStale when another event follows that one already,
// problem.InvalidRequest when the operation's id is not valid.
func (l *Log) Append(ctx context.Context, e Event, after uint64) (position uint64, err error) {
	if !ValidOperation(e.Operation) {
		return 0, problem.InvalidRequest.New("the operation id %.140q is not [A-Za-z0-9_-]{1,128}", e.Operation)
	}
	e = e.Bounded()
	data, err := json.Marshal(broker.Message{ObjectType: ObjectType, EventType: broker.Add, Object: e})
	if err != nil {
		return 0, problem.Internal.New("write event %d of operation %s: %w", e.Sequence, e.Operation, err)
	}
	if position, err = l.store.Append(ctx, e.Operation, data, after); err != nil {
		return 0, err
	}
	if e.Type >= 0 && int(e.Type) < len(l.appended) {
		l.appended[e.Type].Add(1)
	}
	l.hub.put(position, e, false) // else Run brings it, after those before it
	return position, nil
}

// Appended counts the events of a type that this process has added.
func (l *Log) Appended(t Type) uint64 { return l.appended[t].Load() }

// Of returns an operation's events that are kept, and the position of the last.
func (l *Log) Of(ctx context.Context, operation string) (events []Event, last uint64, err error) {
	records, err := l.store.Of(ctx, operation)
	if err != nil {
		return nil, 0, err
	}
	for _, r := range records {
		e, err := decodeRecord(r)
		if err != nil {
			return nil, 0, err
		}
		events, last = append(events, e), r.Position
	}
	return events, last, nil
}
