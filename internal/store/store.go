// Package store keeps what must survive the process, behind interfaces small enough to be served by a folder or by
// NATS JetStream.
package store

import "context"

// Blobs holds bytes by their SHA-256 digest in hexadecimal. Bytes that were put are verified whenever they are got.
type Blobs interface {
	// Put stores the bytes once and returns their digest.
	Put(ctx context.Context, data []byte) (digest string, err error)
	// Get returns the bytes, which are shared and must not be changed. A digest that is not there gives
	// problem.ModuleUnavailable, damaged bytes problem.StoreFailed.
	Get(ctx context.Context, digest string) ([]byte, error)
}

// Records holds small values by key. What Put returned from is on disk.
type Records interface {
	// Get returns nil and no error for a key that is not there.
	Get(ctx context.Context, key string) ([]byte, error)
	Put(ctx context.Context, key string, value []byte) error
	// Delete of a key that is not there is no error.
	Delete(ctx context.Context, key string) error
	// All returns every record by key.
	All(ctx context.Context) (map[string][]byte, error)
}

// Entry is an operation that was accepted.
type Entry struct {
	ID   string   // of the operation
	Keys []string // what it touches: entries that share a key run one after the other, in the order they came
	Data []byte
}

// Queue holds accepted operations until they are done. Entries that share no key run side by side.
type Queue interface {
	// Put accepts an entry, and returns the id of the entry it waits for, if any. problem.QueueFull when there are too
	// many, problem.ShuttingDown after Close.
	Put(ctx context.Context, e Entry) (behind string, err error)
	// Next waits for an entry that may run. done must be called when it ended. It returns problem.ShuttingDown after
	// Close once nothing is left, and ctx's error when ctx ends.
	Next(ctx context.Context) (e Entry, done func(), err error)
	// Close stops accepting. Entries not yet begun are returned by Drain.
	Close()
	// Drain takes every entry that has not begun out of the queue.
	Drain() []Entry
}
