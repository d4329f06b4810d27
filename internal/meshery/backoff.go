package meshery

import (
	"context"
	"math/rand/v2"
	"time"
)

// backoff waits longer and longer, without end, and never exactly as long as others that failed with it.
type backoff struct {
	min, max time.Duration
	next     time.Duration
}

// reset has the next wait be short again.
func (b *backoff) reset() { b.next = 0 }

// wait returns early when ctx ends.
func (b *backoff) wait(ctx context.Context) {
	b.next = min(max(2*b.next, b.min), b.max)
	pause(ctx, b.next)
}

// pause waits for half to all of a duration, or for the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d/2 + rand.N(d/2+1))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
