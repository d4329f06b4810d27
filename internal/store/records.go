package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	maxKey       = 512 // bytes
	operationKey = "KV-Operation"
	deleted      = "DEL"
)

// recordsInKV writes only over the revision that it knows of, so that a writer who was cut off finds out.
type recordsInKV struct {
	store  *Store
	kv     jetstream.KeyValue
	stream jetstream.Stream // of the bucket
	opened uint64           // the last revision of any key when the store was opened

	mu        sync.Mutex
	revisions map[string]uint64 // by key, as last read or written
	own       map[string]uint64 // by key, as last written by this process
	newest    uint64            // the last revision of any key that this process has written or heard of
}

var _ Records = (*recordsInKV)(nil)

func checkKey(ctx context.Context, key string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if key == "" || len(key) > maxKey || !utf8.ValidString(key) {
		return problem.StoreFailed.New("the key %.*q is not 1 to %d bytes of UTF-8", maxKey, key, maxKey)
	}
	return nil
}

// encodeKey makes any key one that JetStream takes: letters, digits, dashes and underscores stay, other bytes become
// =XX.
func encodeKey(key string) string {
	var b strings.Builder
	for _, c := range []byte(key) {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '/' {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "=%02X", c)
		}
	}
	return b.String()
}

func decodeKey(text string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] != '=' {
			b.WriteByte(text[i])
			continue
		}
		var c byte
		if i+3 > len(text) {
			return "", problem.StoreFailed.New("the key %q is not one that was written", text)
		}
		if _, err := fmt.Sscanf(text[i+1:i+3], "%02X", &c); err != nil {
			return "", problem.StoreFailed.New("the key %q is not one that was written", text)
		}
		b.WriteByte(c)
		i += 2
	}
	return b.String(), nil
}

func subjectOf(key string) string { return "$KV." + recordsBucket + "." + encodeKey(key) }

// current reads a key and notes its revision. The lock is held.
func (r *recordsInKV) current(ctx context.Context, key string) ([]byte, error) {
	m, err := r.store.last(ctx, r.stream, subjectOf(key))
	if err != nil || m == nil {
		r.revisions[key] = 0
		return nil, err
	}
	r.revisions[key] = m.Sequence
	if m.Header.Get(operationKey) != "" {
		return nil, nil
	}
	return append([]byte{}, m.Data...), nil
}

func (r *recordsInKV) Get(ctx context.Context, key string) ([]byte, error) {
	if err := checkKey(ctx, key); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.current(ctx, key)
}

func (r *recordsInKV) Put(ctx context.Context, key string, value []byte) error {
	if len(value) > maxValue {
		return problem.StoreFailed.New("the record %q has %d bytes and may have %d", key, len(value), maxValue)
	}
	return r.set(ctx, key, &nats.Msg{Data: value})
}

func (r *recordsInKV) Delete(ctx context.Context, key string) error {
	return r.set(ctx, key, &nats.Msg{Header: nats.Header{operationKey: {deleted}}})
}

func (r *recordsInKV) set(ctx context.Context, key string, m *nats.Msg) error {
	if err := checkKey(ctx, key); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	revision, known := r.revisions[key]
	if !known {
		value, err := r.current(ctx, key)
		if err != nil {
			return err
		}
		if revision = r.revisions[key]; value == nil && m.Header.Get(operationKey) == deleted {
			return nil
		}
	}
	m.Subject = subjectOf(key)
	sequence, err := r.store.write(ctx, r.stream, m, revision)
	if errors.Is(err, ErrStale) {
		return r.changed(key)
	}
	if err != nil {
		return err
	}
	r.revisions[key], r.own[key] = sequence, sequence
	r.newest = max(r.newest, sequence)
	return nil
}

func (r *recordsInKV) changed(key string) error {
	return problem.StoreFailed.New("another adapter has changed the record %q since this one read it: %w", key, ErrStale)
}

func (r *recordsInKV) All(ctx context.Context) (map[string][]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	// It may be read from a replica that lags behind the one that told of a change, or took it. Older chains would be taken for
	// newer ones of others, and nothing would tell of the newest again.
	for deadline := time.Now().Add(patience); ; {
		all, revisions, newest := map[string][]byte{}, map[string]uint64{}, uint64(0)
		if err := r.each(ctx, func(rev Revision) {
			newest = max(newest, rev.Number)
			revisions[rev.Key] = rev.Number
			if rev.Value != nil {
				all[rev.Key] = rev.Value
			} else {
				delete(all, rev.Key)
			}
		}); err != nil {
			return nil, err
		}
		if newest >= r.newest {
			maps.Copy(r.revisions, revisions)
			return all, nil
		}
		if time.Now().After(deadline) {
			return nil, r.store.unanswered(fmt.Errorf("reading the records: what is read ends with revision %d, and there is %d", newest, r.newest))
		}
		wait := time.NewTimer(20 * time.Millisecond)
		select {
		case <-wait.C:
		case <-ctx.Done():
		}
		wait.Stop()
	}
}

func (r *recordsInKV) History(ctx context.Context, prefix string) ([]Revision, error) {
	var all []Revision
	err := r.each(ctx, func(rev Revision) {
		if strings.HasPrefix(rev.Key, prefix) {
			all = append(all, rev)
		}
	}, jetstream.IncludeHistory())
	return all, err
}

func (r *recordsInKV) Changes(ctx context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for m, err := range r.store.follow(ctx, "KV_"+recordsBucket, r.opened+1) {
			if err != nil {
				if ctx.Err() == nil {
					yield("", err)
				}
				return
			}
			meta, err := m.Metadata()
			if err != nil {
				continue
			}
			key, err := decodeKey(strings.TrimPrefix(m.Subject(), "$KV."+recordsBucket+"."))
			if err != nil {
				continue
			}
			// What was read only may be unknown to those who follow.
			r.mu.Lock()
			own := r.own[key] >= meta.Sequence.Stream
			r.newest = max(r.newest, meta.Sequence.Stream)
			r.mu.Unlock()
			if !own && !yield(key, nil) {
				return
			}
		}
	}
}

// each visits what the bucket holds now, in the order it was written.
func (r *recordsInKV) each(ctx context.Context, visit func(Revision), o ...jetstream.WatchOpt) error {
	reading, cancel := context.WithCancel(ctx) // the watcher lives as long, and not only as long as a try
	defer cancel()
	w, err := try(ctx, r.store, func(context.Context) (jetstream.KeyWatcher, error) {
		return r.kv.WatchAll(reading, o...)
	})
	if err != nil {
		return storeFailed("reading the records", err)
	}
	defer w.Stop()
	silence := time.NewTimer(patience) // of a server that is gone; others wait behind the lock
	defer silence.Stop()
	for {
		select {
		case e, open := <-w.Updates():
			if !open { // as when a consumer could not be made again; what came is not all
				return cmp.Or(ctx.Err(), r.store.unanswered(errors.New("reading the records was broken off")))
			}
			silence.Reset(patience)
			if e == nil {
				return nil
			}
			key, err := decodeKey(e.Key())
			if err != nil {
				return err
			}
			rev := Revision{Key: key, Number: e.Revision(), Time: e.Created()}
			if e.Operation() == jetstream.KeyValuePut {
				rev.Value = append([]byte{}, e.Value()...)
			}
			visit(rev)
		case <-silence.C:
			return r.store.unanswered(fmt.Errorf("reading the records: nothing came for %s", patience))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
