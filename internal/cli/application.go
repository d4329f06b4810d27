package cli

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"github.com/meshery/meshery-filters/internal/imagehub"
)

// application runs Image Hub inside the adapter when an operation asks for it. Its users live as long as it does.
type application struct {
	addr string
	key  []byte // signs tokens; also the secret imagehub/token-key that the limiter's document refers to
	log  *slog.Logger

	mu      sync.Mutex
	stop    context.CancelFunc // nil while it does not run
	stopped chan struct{}
	bound   string
}

// Start begins to listen and answers with the address.
func (a *application) Start(context.Context) (addr string, started bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.running() {
		return a.bound, false, nil
	}
	app, err := imagehub.New(imagehub.Options{Key: a.key, Log: a.log})
	if err != nil {
		return "", false, err
	}
	l, err := net.Listen("tcp", a.addr)
	if err != nil {
		return "", false, fmt.Errorf("listen: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	a.stop, a.stopped, a.bound = stop, make(chan struct{}), l.Addr().String()
	go func(stopped chan struct{}) {
		defer close(stopped)
		if err := app.Run(ctx, l); err != nil {
			a.log.Error("Image Hub stopped", "err", err)
		}
	}(a.stopped)
	return a.bound, true, nil
}

// running says whether the application answers; a.mu is held.
func (a *application) running() bool {
	if a.stop == nil {
		return false
	}
	select {
	case <-a.stopped:
		return false
	default:
		return true
	}
}

// Stop ends it and waits until it is gone.
func (a *application) Stop(ctx context.Context) (stopped bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.running() {
		return false, nil
	}
	a.stop()
	select {
	case <-a.stopped:
		return true, nil
	case <-ctx.Done():
		return false, fmt.Errorf("it still answers calls: %w", ctx.Err())
	}
}
