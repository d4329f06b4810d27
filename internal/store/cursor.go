package store

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/meshery/meshery-filters/internal/problem"
)

// cursor is a record that one adapter holds for a while.
type cursor struct {
	store  *Store
	name   string
	stream jetstream.Stream
	last   uint64 // sequence of its message
}

var _ Cursor = (*cursor)(nil)

type place struct {
	Position uint64    `json:"position"`
	Owner    string    `json:"owner"`
	Until    time.Time `json:"until"`
}

// Cursor returns the cursor of that name, which is made when it is first saved. One goroutine at a time may use it.
func (s *Store) Cursor(name string) Cursor { return &cursor{store: s, name: name} }

func (c *cursor) subject() string { return "$KV." + cursorsBucket + "." + encodeKey(c.name) }

// load reads the cursor's message, and notes its sequence.
func (c *cursor) load(ctx context.Context) (p place, err error) {
	if c.stream == nil {
		if c.stream, err = try(ctx, c.store, func(ctx context.Context) (jetstream.Stream, error) {
			return c.store.js.Stream(ctx, "KV_"+cursorsBucket)
		}); err != nil {
			return p, storeFailed("opening the cursors", err)
		}
	}
	m, err := c.store.last(ctx, c.stream, c.subject())
	if err != nil {
		return p, err
	}
	if c.last = 0; m != nil {
		c.last = m.Sequence
		if err := json.Unmarshal(m.Data, &p); err != nil {
			return p, problem.StateDamaged.New("the cursor %s is damaged: %w", c.name, err)
		}
	}
	return p, nil
}

func (c *cursor) Take(ctx context.Context) (position uint64, found bool, err error) {
	var seen uint64     // message
	var since time.Time // on the monotonic clock
	for {
		p, err := c.load(ctx)
		if err != nil {
			return 0, false, err
		}
		if c.last != seen {
			seen, since = c.last, time.Now()
		}
		// Clocks differ, and step back: who has not saved for that long does not hold it, whatever was written down.
		if !c.store.shared || p.Owner == c.store.owner || time.Now().After(p.Until) || time.Since(since) > c.store.lease {
			if !c.store.shared || c.last == 0 {
				return p.Position, c.last > 0, nil
			}
			err := c.Save(ctx, p.Position)
			if !errors.Is(err, ErrLost) {
				return p.Position, true, err
			}
		}
		wait := time.NewTimer(c.store.lease / 4)
		select {
		case <-wait.C:
		case <-ctx.Done():
		}
		wait.Stop()
		if ctx.Err() != nil {
			return 0, false, ctx.Err()
		}
	}
}

func (c *cursor) Save(ctx context.Context, position uint64) error {
	data, err := json.Marshal(place{Position: position, Owner: c.store.owner, Until: time.Now().Add(c.store.lease).UTC()})
	if err != nil {
		return problem.Internal.New("cursor %s: %w", c.name, err)
	}
	sequence, err := c.store.write(ctx, c.stream, &nats.Msg{Subject: c.subject(), Data: data}, c.last)
	if err != nil {
		return lostOr(err)
	}
	c.last = sequence
	return nil
}

// Position is a cursor that nobody holds.
type Position struct{ cursor }

// Position returns the position of that name, which is made when it is first saved.
func (s *Store) Position(name string) *Position { return &Position{cursor{store: s, name: name}} }

// Load returns the position, and whether it was ever saved.
func (p *Position) Load(ctx context.Context) (position uint64, found bool, err error) {
	at, err := p.load(ctx)
	return at.Position, p.last > 0, err
}

// Save replaces the position, whoever saved it last.
func (p *Position) Save(ctx context.Context, position uint64) error {
	for {
		if _, err := p.load(ctx); err != nil {
			return err
		}
		if err := p.cursor.Save(ctx, position); !errors.Is(err, ErrLost) {
			return err
		}
	}
}
