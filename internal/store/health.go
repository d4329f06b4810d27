package store

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/meshery/meshery-filters/internal/problem"
)

// ailment is why nothing can be kept.
type ailment struct {
	err   error
	since time.Time
}

const (
	lookEvery = 2 * time.Second // at whether things can be kept
	// brief is how long an external store may be away before callers are told so at once: an election takes as long.
	brief = 8 * time.Second
)

// Watch looks again and again at whether what is handed over can be kept, until ctx ends, and tells when that changes:
// why not, or nil. It mends what can be mended: an embedded JetStream that could not write goes on when there is room.
func (s *Store) Watch(ctx context.Context, changed func(error)) {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for {
		err := s.check(ctx)
		if ctx.Err() != nil {
			return
		}
		was := s.ailing.Load()
		switch {
		case err != nil && was == nil:
			s.log.Error("nothing can be kept, so no operation is accepted", "error", err)
			s.ailing.Store(&ailment{asAway(err), time.Now()})
			changed(err)
		case err == nil && was != nil:
			s.log.Info("operations are accepted again")
			s.ailing.Store(nil)
			changed(nil)
		}
		if err == nil && s.syncs {
			if err := s.mark(ctx); err != nil && ctx.Err() == nil {
				s.log.Warn("how far the streams have come is not noted", "error", err)
			}
		}
		select {
		case <-look.C:
		case <-s.suspect:
		case <-ctx.Done():
			return
		}
	}
}

// check tells what keeps the store from keeping anything.
func (s *Store) check(ctx context.Context) error {
	if s.shared {
		ctx, cancel := context.WithTimeout(ctx, 2*lookEvery)
		defer cancel()
		_, err := s.js.Stream(ctx, operationsStream)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return s.missing(operationsStream, err)
		}
		if err != nil {
			return away(err)
		}
		return nil
	}
	if err := s.dir.probe(); err != nil {
		return err
	}
	err := s.server.Health()
	if err == nil {
		return nil
	}
	s.log.Warn("JetStream is started again, since it does not take anything after a failure", "failure", err)
	if err := s.server.Restart(); err != nil {
		return err
	}
	if err := s.server.Health(); err != nil {
		return problem.StateDamaged.New("%s: %w", s.dir.Path(), err)
	}
	return nil
}

// ails returns at once what callers would else wait for in vain.
func (s *Store) ails() error {
	a := s.ailing.Load()
	if a == nil || s.shared && time.Since(a.since) < brief {
		return nil
	}
	return a.err
}

func away(err error) error {
	return problem.StoreAway.New("the JetStream of storeURL does not answer: %w", passing{err})
}

// probe writes and removes a file, to find out whether that can be done.
func (d *Dir) probe() error {
	const name, size = tempPrefix + "probe", 256 << 10
	err := d.root.Remove(name)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = d.root.WriteFile(name, make([]byte, size), 0o600)
	}
	if rerr := d.root.Remove(name); err == nil {
		err = rerr
	}
	if err != nil {
		return d.failed("writing to", "", err)
	}
	return nil
}
