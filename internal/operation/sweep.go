package operation

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/store"
)

// Sweep deletes modules; store.Store does. It asks which are referred to.
type Sweep func(ctx context.Context, referred func(context.Context) (map[string]bool, error)) (store.Swept, error)

// SweepModules deletes, again and again until ctx ends, the modules that no accepted operation, no chain and no kept
// revision of one refers to. Those that the program ships stay, since operations name them without their digest.
func (r *Runner) SweepModules(ctx context.Context, every time.Duration, sweep Sweep) {
	next := time.NewTicker(every)
	defer next.Stop()
	for {
		select {
		case <-next.C:
		case <-ctx.Done():
			return
		}
		swept, err := sweep(ctx, r.referred)
		if err != nil && ctx.Err() == nil {
			r.Log.Warn("modules that nothing refers to stay", "err", err)
		}
		if len(swept.Deleted) > 0 {
			r.Log.Info("modules that nothing referred to are deleted", "modules", len(swept.Deleted), "bytes", swept.Freed, "sha256", swept.Deleted)
		}
	}
}

// LiveModules collects the digests of the modules that chains use, or accepted operations are about to. Operations come
// first: one that ends meanwhile has then left its modules to a chain.
func (r *Runner) LiveModules(ctx context.Context) (map[string]bool, error) {
	digests, shipped := map[string]bool{}, r.Modules.Shipped()
	entries, err := r.Queue.Held(ctx)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		var j job
		if err := json.Unmarshal(e.Data, &j); err != nil {
			return nil, fmt.Errorf("read operation %s: %w", e.ID, err)
		}
		for _, f := range j.Filters {
			if m := f.Spec.Module; m.Builtin != "" {
				digests[shipped[m.Builtin]] = true
			} else {
				digests[strings.ToLower(m.SHA256)] = true
			}
		}
	}
	for _, b := range r.Backends {
		chains, err := b.List(ctx)
		if err != nil {
			return nil, fmt.Errorf("list chains: %w", err)
		}
		for _, c := range chains {
			use(digests, c.Filters)
		}
	}
	return digests, nil
}

// referred collects the digests of the modules that are needed: those that are live, that revisions of chains had, and
// that the program ships.
func (r *Runner) referred(ctx context.Context) (map[string]bool, error) {
	digests, err := r.LiveModules(ctx)
	if err != nil {
		return nil, err
	}
	for _, digest := range r.Modules.Shipped() {
		digests[digest] = true
	}
	for _, b := range r.Backends {
		revisions, err := b.History(ctx)
		if err != nil {
			return nil, err
		}
		for _, rev := range revisions {
			use(digests, rev.Chain.Filters)
		}
	}
	return digests, nil
}

func use(digests map[string]bool, filters []filter.Filter) {
	for _, f := range filters {
		digests[f.Spec.Module.SHA256] = true
	}
}
