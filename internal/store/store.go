// Package store keeps what must survive the process in NATS JetStream, behind interfaces that say nothing of it. Several
// adapters may share one store.
package store

import (
	"context"
	"iter"
	"time"
)

// Blobs holds bytes by their SHA-256 digest in hexadecimal. Bytes that were put are verified whenever they are got.
type Blobs interface {
	// Put stores the bytes once and returns their digest.
	Put(ctx context.Context, data []byte) (digest string, err error)
	// Touch says whether a blob is there, and keeps it there for as long as blobs are kept that nothing refers to. It comes
	// before whatever will refer to the blob.
	Touch(ctx context.Context, digest string) (there bool, err error)
	// Get returns the bytes, which are shared and must not be changed. A digest that is not there gives
	// problem.ModuleUnavailable, damaged bytes problem.StateDamaged.
	Get(ctx context.Context, digest string) ([]byte, error)
}

// Records holds small values by key. What Put returned from is on disk.
type Records interface {
	// Get returns nil and no error for a key that is not there.
	Get(ctx context.Context, key string) ([]byte, error)
	// Put fails with problem.StoreFailed when another adapter has changed the key since this one last read or wrote it.
	Put(ctx context.Context, key string, value []byte) error
	// Delete of a key that is not there is no error. It fails as Put does.
	Delete(ctx context.Context, key string) error
	// All returns every record by key.
	All(ctx context.Context) (map[string][]byte, error)
	// Changes yields the keys that other adapters have changed since the store was opened, soon after they did, until ctx
	// ends; some may be yielded that nobody has changed.
	Changes(ctx context.Context) iter.Seq2[string, error]
	// History returns what the keys that begin with the prefix held, oldest first: the last 10 values of each.
	History(ctx context.Context, prefix string) ([]Revision, error)
}

// Revision is a value that a record had.
type Revision struct {
	Key    string
	Number uint64 // grows with each change of any record
	Time   time.Time
	Value  []byte // nil where the record was deleted
}

// Entry is an operation that was accepted.
type Entry struct {
	ID   string   // of the operation: [A-Za-z0-9_-]{1,128}
	Keys []string // what it touches: entries that share a key run one after the other, in the order they came
	Data []byte
	// Digest tells whether an entry that came again with the same id is the same.
	Digest string
	// Secret has the data overwritten on disk, and not only let go of, when the entry is done.
	Secret bool
}

// Queue holds accepted operations until they are done. Entries that share no key run side by side, over all adapters that
// share the queue.
type Queue interface {
	// Put accepts an entry, and returns the id of the entry it waits for, if any. An id that is in the queue, or was
	// within the last day, is accepted again without effect when the digest is the same, and is else
	// problem.OperationExists. problem.QueueFull when there are too many, problem.ShuttingDown after Close.
	Put(ctx context.Context, e Entry) (behind string, again bool, err error)
	// Known says whether an entry with that id and digest is, or was, accepted, as Put does.
	Known(ctx context.Context, id, digest string) (bool, error)
	// Next waits for an entry that may run and claims it. It returns problem.ShuttingDown after Close, and ctx's error when
	// ctx ends.
	Next(ctx context.Context) (Claim, error)
	// Depth counts the entries that wait, and those that an adapter runs.
	Depth() (waiting, running int)
	// Held returns every entry that is not done.
	Held(ctx context.Context) ([]Entry, error)
	// Close stops accepting and giving. What is not done stays.
	Close()
}

// Claim is the right to run one entry. It ends with Done or Release, also when it is lost.
type Claim interface {
	Entry() Entry
	// Attempt counts the claims of this entry that did not end, because their process did: 1 at first.
	Attempt() int
	// Lost is closed when another adapter has the entry now, or may claim it.
	Lost() <-chan struct{}
	// Hold makes sure that the claim holds; ErrLost when it does not. It comes before every effect.
	Hold(ctx context.Context) error
	// Done takes the entry out of the queue; ErrLost when another adapter has it.
	Done(ctx context.Context) error
	// Release lets others have the entry, as if it had not been claimed.
	Release(ctx context.Context) error
}

// Log is what was told, in one order over all subjects. Positions grow by one.
type Log interface {
	// Append adds to a subject, [A-Za-z0-9_-]{1,128}, whose last record must be at the position after; 0 when there must be
	// none. It returns ErrStale when that is not so.
	Append(ctx context.Context, subject string, data []byte, after uint64) (position uint64, err error)
	// Of returns all records of a subject that are left.
	Of(ctx context.Context, subject string) ([]Record, error)
	// From yields the records from a position on, or from the oldest that is left, and waits for more until ctx ends.
	From(ctx context.Context, position uint64) iter.Seq2[Record, error]
	// Bounds are the position of the oldest record that is left, and that of the next.
	Bounds(ctx context.Context) (first, next uint64, err error)
}

// Record is one of a Log.
type Record struct {
	Position uint64
	Subject  string
	Data     []byte
	// Last says that no more were there when it was read.
	Last bool
}

// Cursor remembers a position for one reader at a time, over all adapters that share the store.
type Cursor interface {
	// Take waits until no other adapter has the cursor, and returns its position; found says whether it was ever saved.
	Take(ctx context.Context) (position uint64, found bool, err error)
	// Save moves the cursor, and keeps it from others for a while; ErrLost when another adapter has it.
	Save(ctx context.Context, position uint64) error
}
