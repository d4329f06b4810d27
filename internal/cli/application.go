package cli

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"github.com/meshery/meshery-filters/config"
	"github.com/meshery/meshery-filters/internal/imagehub"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
	"github.com/meshery/meshery-filters/templates"
)

// The name and key of the secret that the limiter's document refers to: what Image Hub's tokens are signed with.
const (
	hubSecret = "imagehub"
	hubToken  = "token-key"
)

// hubKey is the secret that imagehub.key names, else the one that the configuration has as imagehub/token-key, else a
// key that is made up once and kept sealed: with another one at each start, proxies would get another limiter, and
// refuse the tokens that users hold.
func hubKey(ctx context.Context, c config.Config, records store.Records, seal *store.Seal, component string, log *slog.Logger) (string, error) {
	if k := c.ImageHub.Key; k.Name != "" {
		return c.Secret(k.Name, k.Key)
	}
	if _, ok := c.Secrets[hubSecret][hubToken]; ok {
		return c.Secret(hubSecret, hubToken)
	}
	record := "imagehub/key"
	if c.SealKey.Name == "" {
		record += "/" + component // sealed so that no other adapter can open it
	}
	for {
		sealed, err := records.Get(ctx, record)
		if err != nil {
			return "", fmt.Errorf("read Image Hub's key: %w", err)
		}
		if sealed != nil {
			key, err := seal.Open(sealed, record)
			if err == nil {
				return string(key), nil
			}
			if !errors.Is(err, problem.Sealed) {
				return "", err
			}
			log.Warn("Image Hub gets a new key, since sealKey has changed; tokens that were signed with the old one are refused", "err", err)
		}
		key := rand.Text() + rand.Text()
		err = records.Put(ctx, record, seal.Close([]byte(key), record))
		if errors.Is(err, store.ErrStale) {
			continue // another adapter that shares the store was first
		}
		if err != nil {
			return "", fmt.Errorf("keep Image Hub's key: %w", err)
		}
		return key, nil
	}
}

// hubIn is Image Hub as clusters get it.
func hubIn(c config.ImageHub) operation.ImageHubIn {
	h := operation.ImageHubIn{ImageHub: templates.ImageHub{APIImage: c.APIImage, WebImage: c.WebImage, Image: c.Image, Host: c.Host,
		LabelNamespace: c.LabelNamespace}}
	if c.Gateway != "auto" {
		h.Gateway = operation.HubGateway(c.Gateway)
	}
	return h
}

// application runs Image Hub inside the adapter when an operation asks for it, and again after a restart. Its users
// live as long as the process.
type application struct {
	addr    string
	key     []byte // signs tokens
	records store.Records
	record  string // that Image Hub is to run, of this adapter
	log     *slog.Logger

	mu      sync.Mutex
	stop    context.CancelFunc // nil while it does not run
	stopped chan struct{}
	bound   string
}

// Start begins to listen, notes that it does, and answers with the address.
func (a *application) Start(ctx context.Context) (addr string, started bool, err error) {
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
	if err := a.records.Put(ctx, a.record, []byte(l.Addr().String())); err != nil {
		l.Close()
		return "", false, fmt.Errorf("note that it runs: %w", err)
	}
	running, stop := context.WithCancel(context.Background())
	a.stop, a.stopped, a.bound = stop, make(chan struct{}), l.Addr().String()
	go func(stopped chan struct{}) {
		defer close(stopped)
		if err := app.Run(running, l); err != nil {
			a.log.Error("Image Hub stopped", "err", err)
		}
	}(a.stopped)
	return a.bound, true, nil
}

// Addr is where it answers.
func (a *application) Addr() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.running() {
		return ""
	}
	return a.bound
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

// Resume starts it again if it ran when the adapter ended, however that was. A port that is taken now keeps Image Hub
// from running and not the adapter.
func (a *application) Resume(ctx context.Context) error {
	ran, err := a.records.Get(ctx, a.record)
	if err != nil {
		return fmt.Errorf("read whether Image Hub ran: %w", err)
	}
	if ran == nil {
		return nil
	}
	addr, _, err := a.Start(ctx)
	if err != nil {
		a.log.Error("Image Hub ran before and cannot be started again; free its address or set another, then run the operation imagehub", "err", err)
		return nil
	}
	a.log.Info("Image Hub runs again, without its users: they were in memory and have to sign up anew", "addr", addr)
	return nil
}

// Stop ends it for good and waits until it is gone.
func (a *application) Stop(ctx context.Context) (stopped bool, err error) {
	if err := a.records.Delete(ctx, a.record); err != nil {
		return false, fmt.Errorf("note that it does not run: %w", err)
	}
	return a.end(ctx)
}

// end is Stop until the next start.
func (a *application) end(ctx context.Context) (stopped bool, err error) {
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
