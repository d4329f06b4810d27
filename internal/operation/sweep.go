package operation

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/store"
)

// Sweep deletes modules; store.Store does. It asks which are referred to.
type Sweep func(ctx context.Context, referred func(context.Context) (map[string]bool, error)) (store.Swept, error)

// SweepModules deletes, again and again until ctx ends, the modules that no accepted operation, no chain and no kept
// revision of one refers to. Those that the program ships stay, since operations name them without their digest.
func (r *Runner) SweepModules(ctx context.Context, every time.Duration, sweep Sweep) {
	next := time.NewTicker(every)
	defer next.Stop()
	var left map[string]string
	for {
		select {
		case <-next.C:
		case <-ctx.Done():
			return
		}
		var err error
		if left, err = r.forget(ctx, left); err != nil && ctx.Err() == nil {
			r.Log.Warn("modules are not compared with the inventories of the adapter's own cluster and Consul", "err", err)
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
	r.mu.Lock()
	for digest := range r.inUse {
		digests[digest] = true
	}
	r.mu.Unlock()
	for _, b := range r.Backends {
		chains, err := b.List(ctx)
		if err != nil {
			return nil, fmt.Errorf("list chains: %w", err)
		}
		for _, c := range chains {
			use(digests, c.Filters)
		}
	}
	return digests, r.used(ctx, func(u used) []string { return u.Modules }, digests)
}

// fileGrace is how long a module that proxies read as a file is there when no chain and no revision has it any more. A proxy
// that was cut off from its control plane, or is restarted from what it had, may still read it.
const fileGrace = 24 * time.Hour

// forget makes the records of the adapter's own cluster and Consul what their inventories say, since somebody may have
// changed chains there without this adapter, and has modules go that were put where their proxies read them. A record is
// written before its chain is there: modules of one are forgotten only if that was left at the sweep before, and nothing was
// under way while the inventories were read. It returns those that are left now.
func (r *Runner) forget(ctx context.Context, before map[string]string) (left map[string]string, err error) {
	left = map[string]string{}
	for _, c := range []Cluster{r.Own, r.Consul} {
		if c != nil {
			err = errors.Join(err, r.forgetIn(ctx, c, "", before, left))
		}
	}
	return left, err
}

// forgetBrought is forget for a cluster that an operation brings, when such operations come to it one after the other. What
// others have put there is not served for that: whoever brings a cluster says what is in it. Nor is anything forgotten of a
// target that has no past there: another cluster may be at the address.
func (r *Runner) forgetBrought(ctx context.Context, c Cluster, operation string) error {
	r.mu.Lock()
	before := r.left[c.String()]
	r.mu.Unlock()
	left := map[string]string{}
	err := r.forgetIn(ctx, c, operation, before, left)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.left[c.String()] = left; len(left) == 0 {
		delete(r.left, c.String())
	}
	return err
}

// forgetIn is forget for one cluster; operation is the one that brings it, or empty.
func (r *Runner) forgetIn(ctx context.Context, c Cluster, operation string, before, left map[string]string) error {
	quiet := func() (bool, error) {
		under, err := r.Queue.Held(ctx)
		return !slices.ContainsFunc(under, func(e store.Entry) bool { return e.ID != operation }), err
	}
	later := func(err error) error {
		for key, data := range before {
			left[key] = data
		}
		return err
	}
	if ok, err := quiet(); !ok || err != nil {
		return later(err)
	}
	records, err := r.Records.All(ctx)
	if err != nil {
		return later(err)
	}
	targets, err := c.Targets(ctx)
	if err != nil {
		return later(err)
	}
	if d, ok := targets.(interface{ Damaged() []error }); ok && len(d.Damaged()) > 0 {
		return later(joined(d.Damaged())) // what they have is not known
	}
	if ok, err := quiet(); !ok || err != nil {
		return later(err)
	}
	there, past, needed := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, rev := range targets.Revisions() {
		use(needed, rev.Chain.Filters)
		past[usedRecord(c.String(), rev.Chain, nil).key] = true
	}
	for _, chain := range targets.Chains() {
		use(needed, chain.Filters)
		revisions := slices.DeleteFunc(targets.Revisions(), func(rev plan.Revision) bool { return rev.Chain.ID() != chain.ID() })
		u := usedRecord(c.String(), chain, revisions)
		if there[u.key] = true; operation != "" {
			continue
		}
		if err := u.put(ctx, r.Records); err != nil {
			return later(err)
		}
	}
	for key, data := range records {
		var u used
		if !strings.HasPrefix(key, usedPrefix) || there[key] || operation != "" && !past[key] || json.Unmarshal(data, &u) != nil || u.Cluster != c.String() || len(u.Modules) == 0 {
			continue
		}
		if before[key] != string(data) {
			left[key] = string(data)
			continue
		}
		u.key, u.Kept, u.Modules = key, slices.Concat(u.Kept, u.Modules), nil
		if err := u.put(ctx, r.Records); err != nil {
			return err
		}
	}
	folder, ok := c.(Folder)
	if !ok {
		return nil
	}
	deleted, err := folder.SweepModules(ctx, needed, fileGrace)
	if len(deleted) > 0 {
		r.Log.Info("modules that nothing referred to are deleted where proxies read them", "cluster", c.String(), "sha256", deleted)
	}
	return err
}

// using has a module live until done is called: that of an image, whose digest is not in the document.
func (r *Runner) using(digest string) (done func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inUse[digest]++
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.inUse[digest]--; r.inUse[digest] == 0 {
			delete(r.inUse, digest)
		}
	}
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
	return digests, r.used(ctx, func(u used) []string { return u.Kept }, digests)
}

func use(digests map[string]bool, filters []filter.Filter) {
	for _, f := range filters {
		digests[f.Spec.Module.SHA256] = true
	}
}

// used is a record of the modules that a chain in a cluster uses. The cluster itself can be asked only with the kubeconfig
// of a request.
type used struct {
	Cluster string   `json:"cluster"`
	Target  string   `json:"target"`
	Modules []string `json:"modules"` // sha256
	// Kept are those that its revisions have besides, for whoever brings one back.
	Kept []string `json:"kept,omitempty"`

	key string
}

// usedPrefix begins the keys of these records.
const usedPrefix = "clusters/"

func usedRecord(cluster string, c filter.Chain, revisions []plan.Revision) used {
	u := used{Cluster: cluster, Target: c.Target.String()}
	sum := sha256.Sum256([]byte(cluster + "|" + c.ID()))
	u.key = usedPrefix + hex.EncodeToString(sum[:16])
	for _, f := range c.Filters {
		u.Modules = append(u.Modules, f.Spec.Module.SHA256)
	}
	for _, rev := range revisions {
		for _, f := range rev.Chain.Filters {
			if d := f.Spec.Module.SHA256; !slices.Contains(u.Modules, d) && !slices.Contains(u.Kept, d) {
				u.Kept = append(u.Kept, d)
			}
		}
	}
	return u
}

// put keeps the record, or drops it when there is nothing in it.
func (u used) put(ctx context.Context, records store.Records) error {
	if len(u.Modules)+len(u.Kept) == 0 {
		return u.drop(ctx, records)
	}
	data, err := json.Marshal(u)
	if err != nil {
		return err
	}
	was, err := records.Get(ctx, u.key)
	if err != nil || string(was) == string(data) {
		return err
	}
	return records.Put(ctx, u.key, data)
}

func (u used) drop(ctx context.Context, records store.Records) error {
	if was, err := records.Get(ctx, u.key); err != nil || was == nil {
		return err
	}
	return records.Delete(ctx, u.key)
}

// used adds what records say of modules of chains in clusters.
func (r *Runner) used(ctx context.Context, modules func(used) []string, digests map[string]bool) error {
	records, err := r.Records.All(ctx)
	if err != nil {
		return err
	}
	for key, data := range records {
		if !strings.HasPrefix(key, usedPrefix) {
			continue
		}
		var u used
		if err := json.Unmarshal(data, &u); err != nil {
			return fmt.Errorf("read %s: %w", key, err)
		}
		for _, m := range modules(u) {
			digests[m] = true
		}
	}
	return nil
}
