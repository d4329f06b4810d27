package store

import (
	"context"
	"errors"
	"iter"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

type eventLog struct {
	store  *Store
	stream jetstream.Stream
}

var _ Log = (*eventLog)(nil)

func (l *eventLog) Append(ctx context.Context, subject string, data []byte, after uint64) (uint64, error) {
	return l.store.write(ctx, l.stream, &nats.Msg{Subject: eventsSubject + subject, Data: data}, after)
}

func (l *eventLog) Of(ctx context.Context, subject string) ([]Record, error) {
	var all []Record
	for next := uint64(1); ; {
		m, err := try(ctx, l.store, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
			m, err := l.stream.GetMsg(ctx, next, jetstream.WithGetMsgSubject(eventsSubject+subject))
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				return nil, nil
			}
			return m, err
		})
		if err != nil {
			return nil, storeFailed("reading the events of "+subject, err)
		}
		if m == nil {
			return all, nil
		}
		all = append(all, Record{Position: m.Sequence, Subject: subject, Data: m.Data})
		next = m.Sequence + 1
	}
}

func (l *eventLog) Bounds(ctx context.Context) (first, next uint64, err error) {
	info, err := try(ctx, l.store, func(ctx context.Context) (*jetstream.StreamInfo, error) { return l.stream.Info(ctx) })
	if err != nil {
		return 0, 0, storeFailed("reading the events", err)
	}
	return max(info.State.FirstSeq, 1), info.State.LastSeq + 1, nil
}

func (l *eventLog) From(ctx context.Context, position uint64) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		for m, err := range l.store.follow(ctx, eventsStream, position) {
			r := Record{}
			if err == nil {
				var meta *jetstream.MsgMetadata
				if meta, err = m.Metadata(); err == nil {
					r = Record{Position: meta.Sequence.Stream, Subject: strings.TrimPrefix(m.Subject(), eventsSubject), Data: m.Data(), Last: meta.NumPending == 0}
				}
			}
			if !yield(r, err) || err != nil {
				return
			}
		}
	}
}

// follow yields a stream's messages from a sequence on, in order and without gaps, until ctx ends. It comes back by
// itself after a server was away.
func (s *Store) follow(ctx context.Context, stream string, from uint64) iter.Seq2[jetstream.Msg, error] {
	return func(yield func(jetstream.Msg, error) bool) {
		next := max(from, 1)
		for ctx.Err() == nil {
			more, err := s.followOnce(ctx, stream, &next, yield)
			if !more {
				return
			}
			if err != nil && ctx.Err() == nil {
				s.log.Debug("following again", "stream", stream, "from", next, "error", err)
			}
			if !keepTrying(ctx) {
				return
			}
		}
	}
}

func (s *Store) followOnce(ctx context.Context, stream string, next *uint64, yield func(jetstream.Msg, error) bool) (more bool, err error) {
	opening, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c, err := s.js.OrderedConsumer(opening, stream, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverByStartSequencePolicy,
		OptStartSeq: *next, InactiveThreshold: 30 * time.Second})
	if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, nats.ErrConnectionClosed) {
		yield(nil, storeFailed("following "+stream, err))
		return false, nil
	}
	if err != nil {
		return true, err
	}
	messages, err := c.Messages(jetstream.PullMaxMessages(500))
	if err != nil {
		return true, err
	}
	defer messages.Stop()
	for {
		m, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return true, err
		}
		meta, err := m.Metadata()
		if err != nil {
			return true, err
		}
		if meta.Sequence.Stream < *next {
			continue
		}
		*next = meta.Sequence.Stream + 1
		if !yield(m, nil) {
			return false, nil
		}
	}
}
