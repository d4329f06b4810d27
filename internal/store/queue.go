package store

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/meshery/meshery-filters/internal/problem"
)

// DefaultQueueLength is how many entries a queue holds when nothing else is said.
const DefaultQueueLength = 1000

const (
	digestHeader = "Filters-Digest" // of an entry, and of the mark that is left where one was
	doneHeader   = "Filters-Done"   // of that mark
	keysHeader   = "Filters-Keys"   // of an entry, as JSON
	secretHeader = "Filters-Secret" // of an entry
)

// queue mirrors the operations' stream. Its order is the order of acceptance, which every adapter sees alike, so each
// finds by itself which entries may run; of those that try to claim one the stream lets the first through.
//
// A message that replaces an entry's, the mark, ends it. A claim is a message of its own, which replaces the claim
// before it and is refused when that is not the one its writer knew.
type queue struct {
	store  *Store
	stream jetstream.Stream
	max    int
	floor  uint64 // entries before it were done when this process began
	stop   func() // ends the mirror

	mu      sync.Mutex
	back    []uint64 // sequences of entries before the floor
	held    []*held  // in order of acceptance
	claims  map[string]claimed
	applied uint64 // sequence up to which the stream is mirrored
	closed  bool
	// changed is closed, and replaced, when something has changed.
	changed chan struct{}
}

type held struct {
	Entry
	sequence uint64
	mine     bool // this process runs it, or tries to claim it
}

// claimed is who has an entry, as the last message about it said.
type claimed struct {
	Owner   string `json:"owner"` // empty: nobody
	Attempt int    `json:"attempt"`
	Beat    uint64 `json:"beat,omitempty"`   // tells one renewal from the next
	Done    bool   `json:"done,omitempty"`   // the owner has ended it, and only the mark is missing
	Digest  string `json:"digest,omitempty"` // of the entry, when Done

	sequence uint64
	seen     time.Time // by this process's clock
}

var _ Queue = (*queue)(nil)

func openQueue(ctx context.Context, s *Store, stream jetstream.Stream, max int) (*queue, error) {
	info, err := try(ctx, s, func(ctx context.Context) (*jetstream.StreamInfo, error) { return stream.Info(ctx) })
	if err != nil {
		return nil, storeFailed("reading the queue", err)
	}
	q := &queue{store: s, stream: stream, max: max, claims: map[string]claimed{}, changed: make(chan struct{})}
	if !s.shared {
		marks, err := s.dir.marks()
		if err != nil {
			return nil, err
		}
		if floor := marks[floorMark]; floor <= info.State.LastSeq+1 { // else the streams were begun anew
			q.floor = floor
		}
	}
	following, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	q.stop = func() { cancel(); <-ended }
	go func() {
		defer close(ended)
		for m, err := range s.follow(following, operationsStream, 1) {
			if err != nil {
				s.log.Error("the queue is not followed any more", "error", err)
				q.Close()
				return
			}
			q.apply(m)
		}
	}()
	// The last messages may have been deleted, so the last sequence need not come.
	last := info.State.LastSeq
	for info.State.Msgs > 0 {
		m, err := try(ctx, s, func(ctx context.Context) (*jetstream.RawStreamMsg, error) { return stream.GetMsg(ctx, last) })
		if err == nil {
			err = q.reached(ctx, m.Sequence)
		}
		if err == nil {
			break
		}
		if !errors.Is(err, jetstream.ErrMsgNotFound) {
			q.stop()
			return nil, storeFailed("reading the queue", err)
		}
		if last--; last < info.State.FirstSeq {
			break
		}
	}
	if err := q.markErased(ctx); err != nil {
		q.stop()
		return nil, err
	}
	q.dropBack(ctx)
	return q, nil
}

// dropBack deletes entries that were done and are there again: JetStream notes nowhere that the mark has replaced an entry, and
// finds the entry when it was killed after the mark had expired. Those that it does not come to are dropped at the next start.
func (q *queue) dropBack(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	q.mu.Lock()
	back := q.back
	q.mu.Unlock()
	for _, sequence := range back {
		if err := q.deleteMsg(ctx, sequence, q.stream.DeleteMsg); err != nil {
			q.store.log.Debug("what was done long ago is still there", "error", err)
			return
		}
	}
}

// deleteMsg deletes a message unless that was done before.
func (q *queue) deleteMsg(ctx context.Context, sequence uint64, do func(context.Context, uint64) error) error {
	_, err := try(ctx, q.store, func(ctx context.Context) (struct{}, error) {
		err := do(ctx, sequence)
		var api *jetstream.APIError
		if errors.Is(err, jetstream.ErrMsgNotFound) || errors.As(err, &api) && api.ErrorCode == noSuchMessage {
			err = nil
		}
		return struct{}{}, err
	})
	return err
}

// first is the sequence before which every entry is done.
func (q *queue) first() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.held) > 0 {
		return q.held[0].sequence
	}
	return q.applied + 1
}

// markErased leaves the mark of entries that were erased by a process which then ended.
func (q *queue) markErased(ctx context.Context) error {
	q.mu.Lock()
	erased := map[string]claimed{}
	for id, c := range q.claims {
		if c.Done && !slices.ContainsFunc(q.held, func(h *held) bool { return h.ID == id }) && (!q.store.shared || time.Since(c.seen) > q.store.lease) {
			erased[id] = c
		}
	}
	q.mu.Unlock()
	for id, c := range erased {
		h := &held{Entry: Entry{ID: id, Digest: c.Digest}}
		if err := (&claim{queue: q, held: h, now: c}).mark(ctx); err != nil && !errors.Is(err, ErrStale) {
			return err
		}
	}
	return nil
}

// reached waits until the stream is mirrored that far.
func (q *queue) reached(ctx context.Context, sequence uint64) error {
	for {
		q.mu.Lock()
		done, changed := q.applied >= sequence, q.changed
		q.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// apply mirrors a message.
func (q *queue) apply(m jetstream.Msg) {
	meta, err := m.Metadata()
	if err != nil {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.applied = meta.Sequence.Stream
	if id, ok := strings.CutPrefix(m.Subject(), claimSubject); ok {
		var c claimed
		if json.Unmarshal(m.Data(), &c) == nil {
			c.sequence, c.seen = meta.Sequence.Stream, time.Now()
			q.claim(id, c)
		}
	} else if id := strings.TrimPrefix(m.Subject(), entrySubject); m.Headers().Get(doneHeader) != "" {
		q.drop(id)
	} else if meta.Sequence.Stream < q.floor {
		q.back = append(q.back, meta.Sequence.Stream)
	} else if !slices.ContainsFunc(q.held, func(h *held) bool { return h.ID == id }) {
		q.held = append(q.held, &held{Entry: entryOf(id, m.Headers(), m.Data()), sequence: meta.Sequence.Stream})
	}
	q.wake()
}

// drop forgets an entry that is done. The lock is held.
func (q *queue) drop(id string) {
	q.held = slices.DeleteFunc(q.held, func(h *held) bool { return h.ID == id })
	delete(q.claims, id)
}

// claim notes a claim unless a newer one is known. The lock is held.
func (q *queue) claim(id string, c claimed) {
	if q.claims[id].sequence < c.sequence {
		q.claims[id] = c
	}
}

func entryOf(id string, h nats.Header, data []byte) Entry {
	e := Entry{ID: id, Data: bytes.Clone(data), Digest: h.Get(digestHeader), Secret: h.Get(secretHeader) != ""}
	_ = json.Unmarshal([]byte(h.Get(keysHeader)), &e.Keys) // this package wrote it
	return e
}

// Put names the last of the entries that share a key with e: once that one is done, so are the others.
func (q *queue) Put(ctx context.Context, e Entry) (behind string, again bool, err error) {
	if err := ctx.Err(); err != nil {
		return "", false, err
	}
	keys, err := json.Marshal(e.Keys)
	if err != nil {
		return "", false, problem.Internal.New("keys of operation %s: %w", e.ID, err)
	}
	m := &nats.Msg{Subject: entrySubject + e.ID, Data: e.Data, Header: nats.Header{digestHeader: {e.Digest}, keysHeader: {string(keys)}}}
	if e.Secret {
		m.Header.Set(secretHeader, "1")
	}
	if known, err := q.Known(ctx, e.ID, e.Digest); known || err != nil {
		return "", known, err
	}
	q.mu.Lock()
	full, closed := len(q.held) >= q.max, q.closed
	q.mu.Unlock()
	switch {
	case closed:
		return "", false, problem.ShuttingDown.New("operation %s was not accepted", e.ID)
	case full:
		return "", false, problem.QueueFull.New("%d operations are waiting or running, the most that the adapter takes", q.max)
	}
	// Whoever has been told that it is accepted must find it so: a caller that gives up does not undo it.
	sequence, err := q.store.write(context.WithoutCancel(ctx), q.stream, m, 0)
	if errors.Is(err, ErrStale) { // it came twice at the same time
		known, err := q.accepted(ctx, e.ID, e.Digest)
		return "", known, err
	}
	if err != nil {
		return "", false, err
	}
	if err := q.reached(ctx, sequence); err != nil {
		return "", false, err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, h := range slices.Backward(q.held) {
		if h.sequence < sequence && slices.ContainsFunc(h.Keys, func(key string) bool { return slices.Contains(e.Keys, key) }) {
			return h.ID, false, nil
		}
	}
	return "", false, nil
}

// accepted is Known of an entry that is there, though the replica that is asked may lag behind.
func (q *queue) accepted(ctx context.Context, id, digest string) (bool, error) {
	waiting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		known, err := q.Known(waiting, id, digest)
		if known || err != nil {
			return known, err
		}
		if !keepTrying(waiting) {
			return false, problem.StoreFailed.New("operation %s was accepted and is gone", id)
		}
	}
}

// Known looks for the entry, or the mark of one that is done.
func (q *queue) Known(ctx context.Context, id, digest string) (bool, error) {
	last, err := q.store.last(ctx, q.stream, entrySubject+id)
	if err != nil {
		return false, err
	}
	known := ""
	q.mu.Lock()
	if c := q.claims[id]; c.Done {
		known = c.Digest
	}
	q.mu.Unlock()
	if last != nil {
		known = last.Header.Get(digestHeader)
	} else if known == "" {
		return false, nil
	}
	if known != digest {
		return false, problem.OperationExists.New("%s", id)
	}
	return true, nil
}

func (q *queue) Next(ctx context.Context) (Claim, error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if q.store.ails() != nil { // whatever began now would wait, and could not tell
			keepTrying(ctx)
			q.mu.Lock()
			closed := q.closed
			q.mu.Unlock()
			if !closed {
				continue
			}
		}
		h, was, changed, err := q.begin()
		if err != nil {
			return nil, err
		}
		if h != nil {
			c, err := q.take(ctx, h, was)
			if c != nil {
				return c, nil
			}
			if err != nil && !errors.Is(err, ErrStale) && ctx.Err() == nil {
				q.store.log.Warn("an operation cannot be begun", "operation", h.ID, "error", err)
				keepTrying(ctx)
			}
			continue
		}
		look := time.NewTimer(q.store.lease / 3) // a claim runs out without a message
		select {
		case <-changed:
		case <-look.C:
		case <-ctx.Done():
		}
		look.Stop()
	}
}

// begin reserves the first entry that may run for one worker of this process, or says what to wait for.
func (q *queue) begin() (*held, claimed, <-chan struct{}, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil, claimed{}, nil, problem.ShuttingDown.New("no operation is begun any more")
	}
	taken := map[string]bool{}
	for _, h := range q.held {
		was := q.claims[h.ID]
		// What this process has claimed and no worker of it runs was given up: the claim ran out, or its end was not kept.
		free := !h.mine && (was.Owner == "" || was.Owner == q.store.owner || !q.store.shared || time.Since(was.seen) > q.store.lease)
		for _, key := range h.Keys {
			free = free && !taken[key]
		}
		if free {
			h.mine = true
			return h, was, nil, nil
		}
		for _, key := range h.Keys {
			taken[key] = true
		}
	}
	return nil, claimed{}, q.changed, nil
}

// take claims an entry. It returns nil when another was first, and when the entry had ended and only lacked its mark.
func (q *queue) take(ctx context.Context, h *held, was claimed) (Claim, error) {
	c := &claim{queue: q, held: h, lost: make(chan struct{}), quit: make(chan struct{}), now: was}
	next := claimed{Owner: q.store.owner, Attempt: was.Attempt + 1}
	if was.Owner == q.store.owner { // which has not ended since
		next.Attempt = was.Attempt
	}
	if was.Done {
		next = claimed{Owner: q.store.owner, Attempt: was.Attempt, Done: true, Digest: h.Digest}
	}
	err := c.set(ctx, next)
	if err == nil && was.Done {
		err = c.mark(ctx)
	}
	if errors.Is(err, ErrStale) {
		err = cmp.Or(q.forgetExpired(ctx, h.ID, was), err)
	}
	if err != nil || was.Done {
		q.free(h)
		return nil, err
	}
	if q.store.shared {
		c.beats.Go(c.beat)
	}
	return c, nil
}

// forgetExpired has the next claim written as the first, if the one that is known is gone: of what expires, as when the clock
// steps forward, no message tells.
func (q *queue) forgetExpired(ctx context.Context, id string, was claimed) error {
	last, err := q.store.last(ctx, q.stream, claimSubject+id)
	if err != nil || last != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if c := q.claims[id]; c.sequence == was.sequence {
		c.sequence = 0
		q.claims[id] = c
	}
	return nil
}

func (q *queue) free(h *held) {
	q.mu.Lock()
	defer q.mu.Unlock()
	h.mine = false
	q.wake()
}

func (q *queue) Depth() (waiting, running int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, h := range q.held {
		if q.claims[h.ID].Owner != "" {
			running++
		} else {
			waiting++
		}
	}
	return waiting, running
}

func (q *queue) Held(ctx context.Context) ([]Entry, error) {
	info, err := try(ctx, q.store, func(ctx context.Context) (*jetstream.StreamInfo, error) { return q.stream.Info(ctx) })
	if err != nil {
		return nil, storeFailed("reading the queue", err)
	}
	waiting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	// The last messages may have been deleted, and then do not come.
	for last := info.State.LastSeq; last >= info.State.FirstSeq && info.State.Msgs > 0; last-- {
		_, err := try(waiting, q.store, func(ctx context.Context) (*jetstream.RawStreamMsg, error) { return q.stream.GetMsg(ctx, last) })
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err == nil {
			err = q.reached(waiting, last)
		}
		if err != nil {
			return nil, storeFailed("reading the queue", err)
		}
		break
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	all := make([]Entry, len(q.held))
	for i, h := range q.held {
		all[i] = h.Entry
	}
	return all, nil
}

func (q *queue) Close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.wake()
}

// wake lets everybody who waits look again. The lock is held.
func (q *queue) wake() {
	close(q.changed)
	q.changed = make(chan struct{})
}

type claim struct {
	queue *queue
	held  *held
	lost  chan struct{}
	quit  chan struct{} // closed when the claim has ended
	beats sync.WaitGroup
	end   sync.Once

	mu   sync.Mutex // held while the claim is written
	now  claimed
	gone bool
}

var _ Claim = (*claim)(nil)

func (c *claim) Entry() Entry          { return c.held.Entry }
func (c *claim) Attempt() int          { return c.now.Attempt }
func (c *claim) Lost() <-chan struct{} { return c.lost }

// set replaces the claim's message.
func (c *claim) set(ctx context.Context, next claimed) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone {
		return ErrLost
	}
	next.Beat = c.now.Beat + 1
	data, err := json.Marshal(next)
	if err != nil {
		return problem.Internal.New("claim %s: %w", c.held.ID, err)
	}
	ttl := eventsAge
	if next.Done {
		ttl = rememberedIDs
	}
	next.sequence, err = c.queue.store.write(ctx, c.queue.stream, &nats.Msg{Subject: claimSubject + c.held.ID, Data: data}, c.now.sequence,
		jetstream.WithMsgTTL(ttl))
	if errors.Is(err, ErrStale) {
		c.lose()
		return ErrStale
	}
	if err != nil {
		return err
	}
	next.seen = time.Now()
	c.now = next
	c.queue.mu.Lock()
	defer c.queue.mu.Unlock()
	c.queue.claim(c.held.ID, next)
	return nil
}

// lose notes that the claim is another's. The lock is held.
func (c *claim) lose() {
	if !c.gone {
		c.gone = true
		close(c.lost)
	}
}

// beat renews the claim while it is held. One that could not be renewed is given up before another may take it.
func (c *claim) beat() {
	renew := time.NewTicker(c.queue.store.lease / 4)
	defer renew.Stop()
	for {
		select {
		case <-c.quit:
			return
		case <-renew.C:
		}
		ctx, cancel := context.WithTimeout(context.Background(), c.queue.store.lease/4)
		err := c.Hold(ctx)
		cancel()
		if errors.Is(err, ErrLost) {
			return
		}
	}
}

func (c *claim) Hold(ctx context.Context) error {
	c.mu.Lock()
	now, gone := c.now, c.gone
	c.mu.Unlock()
	if gone {
		return ErrLost
	}
	if !c.queue.store.shared {
		return nil // the state directory has one owner, and so has what is claimed
	}
	err := c.set(ctx, claimed{Owner: now.Owner, Attempt: now.Attempt})
	if errors.Is(err, ErrStale) {
		return ErrLost
	}
	if err != nil && time.Since(now.seen) > c.queue.store.lease*2/3 {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.lose()
		return ErrLost
	}
	return err
}

// finish stops the renewals and lets the process's workers have what is free.
func (c *claim) finish() {
	c.end.Do(func() {
		close(c.quit)
		c.beats.Wait()
	})
}

func (c *claim) Done(ctx context.Context) error {
	c.finish()
	if c.queue.store.shared || c.held.Secret {
		// From here on the entry is not run again, whatever is missing of the rest.
		if err := c.set(ctx, claimed{Owner: c.now.Owner, Attempt: c.now.Attempt, Done: true, Digest: c.held.Digest}); err != nil {
			c.queue.free(c.held)
			return lostOr(err)
		}
	}
	if err := c.mark(ctx); err != nil {
		c.queue.free(c.held)
		return lostOr(err)
	}
	return nil
}

func lostOr(err error) error {
	if errors.Is(err, ErrStale) {
		return ErrLost
	}
	return err
}

// mark replaces the entry by the mark that it is done.
func (c *claim) mark(ctx context.Context) error {
	q, after := c.queue, c.held.sequence
	if c.held.Secret {
		// A message that is replaced stays on disk for a while; this one is overwritten there.
		if err := q.deleteMsg(ctx, c.held.sequence, q.stream.SecureDeleteMsg); err != nil {
			return storeFailed("erasing operation "+c.held.ID, err)
		}
		after = 0
	}
	if _, err := q.store.write(ctx, q.stream, &nats.Msg{Subject: entrySubject + c.held.ID,
		Header: nats.Header{digestHeader: {c.held.Digest}, doneHeader: {"1"}}}, after, jetstream.WithMsgTTL(rememberedIDs)); err != nil {
		return err
	}
	if !q.store.shared {
		// Where others may not yet have seen the mark, the claim stays until it runs out, and keeps them from claiming.
		_ = q.stream.DeleteMsg(ctx, c.now.sequence)
	}
	// The mirror need not see the mark, which the clock may have expired.
	q.mu.Lock()
	defer q.mu.Unlock()
	q.drop(c.held.ID)
	q.wake()
	return nil
}

const noSuchMessage = 10057 // JetStream's code for a message that cannot be deleted because it is not there

func (c *claim) Release(ctx context.Context) error {
	c.finish()
	defer c.queue.free(c.held)
	return lostOr(c.set(ctx, claimed{Attempt: c.now.Attempt - 1}))
}
