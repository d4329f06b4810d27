package consul

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	prefix       = "meshery-filters/" // of the keys of inventories
	maxInventory = 500 << 10          // bytes; Consul keeps values of at most 512 KiB

	maxInventories = 128 << 20 // bytes of all together
)

// inventory is what we put into Consul for one target, as it is in the key-value store.
type inventory struct {
	Target  string       `json:"target"` // for people
	Chain   filter.Chain `json:"chain"`
	Version string       `json:"version"` // of the plan that holds; empty while one is being applied, or was when it was cut off
	// Entries are those that have extensions of ours, and Plugins the names of these; while a plan is being applied, all that
	// there may be.
	Entries []string `json:"entries"`
	Plugins []string `json:"plugins"`

	Revisions plan.History `json:"revisions,omitempty"`

	index uint64 // 0: it is not there
}

func inventoryKey(mesh string, t filter.Target) string {
	sum := sha256.Sum256([]byte(filter.Chain{Mesh: mesh, Target: t}.ID()))
	return prefix + hex.EncodeToString(sum[:8])
}

// pair is a key with its value.
type pair struct {
	Key         string
	Value       []byte
	ModifyIndex uint64
}

func (c *Client) read(p pair) (v inventory, err error) {
	if err := json.Unmarshal(p.Value, &v); err != nil {
		return v, problem.ConsulDamaged.New("%s: the key %s: %w", c, p.Key, err)
	}
	if inventoryKey(v.Chain.Mesh, v.Chain.Target) != p.Key {
		return v, problem.ConsulDamaged.New("%s: the key %s is not the one of the target that it is about, %q", c, p.Key, clean(v.Target))
	}
	v.index = p.ModifyIndex
	return v, nil
}

// inventory reads a target's, which is empty where there is none.
func (c *Client) inventory(ctx context.Context, mesh string, t filter.Target) (inventory, error) {
	var pairs []pair
	found, err := c.get(ctx, call{path: "/v1/kv/" + inventoryKey(mesh, t)}, &pairs)
	if err != nil {
		return inventory{}, err
	}
	if !found || len(pairs) == 0 {
		return inventory{Target: t.String(), Chain: filter.Chain{Mesh: mesh, Target: t}}, nil
	}
	return c.read(pairs[0])
}

// inventories reads all of them, and says by key which cannot be read.
func (c *Client) inventories(ctx context.Context) (all []inventory, damaged map[string]error, err error) {
	pairs, err := c.pairs(ctx)
	if err != nil {
		return nil, nil, err
	}
	damaged = map[string]error{}
	for _, p := range pairs {
		v, err := c.read(p)
		if err != nil {
			damaged[p.Key] = err
			continue
		}
		all = append(all, v)
	}
	slices.SortFunc(all, func(a, b inventory) int { return cmp.Compare(a.Chain.ID(), b.Chain.ID()) })
	return all, damaged, nil
}

// pairs reads all keys that inventories have, at once if they are few, and one by one otherwise.
func (c *Client) pairs(ctx context.Context) (pairs []pair, err error) {
	all := call{path: "/v1/kv/" + prefix, query: url.Values{"recurse": {"true"}}, whole: true}
	if _, err := c.get(ctx, all, &pairs); !errors.Is(err, errTooLarge) {
		return pairs, err
	}
	var keys []string
	all.query = url.Values{"keys": {"true"}}
	if _, err := c.get(ctx, all, &keys); err != nil {
		return nil, err
	}
	pairs = make([]pair, len(keys))
	var size atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, key := range keys {
		g.Go(func() error {
			var one []pair
			found, err := c.get(ctx, call{path: "/v1/kv/" + (&url.URL{Path: key}).EscapedPath(), whole: true}, &one)
			if err != nil || !found || len(one) == 0 { // somebody has just deleted it
				return err
			}
			if pairs[i] = one[0]; size.Add(int64(len(one[0].Value))) > maxInventories {
				return problem.ConsulRefused.New("%s: the values below %s have more than %d MiB; `consul kv delete` those of targets whose history nobody needs",
					c, prefix, maxInventories>>20)
			}
			return nil
		})
	}
	err = g.Wait()
	return slices.DeleteFunc(pairs, func(p pair) bool { return p.Key == "" }), err
}

// keep makes an inventory the one that there is, provided that nobody has changed it since it was read.
func (c *Client) keep(ctx context.Context, v inventory) (inventory, error) {
	path := "/v1/kv/" + inventoryKey(v.Chain.Mesh, v.Chain.Target)
	if len(v.Entries) == 0 && len(v.Chain.Filters) == 0 && len(v.Revisions) == 0 {
		if v.index == 0 {
			return v, nil
		}
		done, err := c.swap(ctx, call{method: http.MethodDelete, path: path}, v.index)
		if err == nil && !done {
			err = problem.ChainChanged.New("%s: the chain of %s", c, v.Chain.Target)
		}
		v.index = 0
		return v, err
	}
	v.Chain.Filters = slices.Clone(v.Chain.Filters)
	for i := range v.Chain.Filters {
		v.Chain.Filters[i].Spec.Module.Inline = ""
	}
	if len(canonical(v)) > maxInventory {
		v.Revisions = nil
	}
	if size := len(canonical(v)); size > maxInventory {
		return v, problem.NotSupported.New("the inventory of %s would have %d KiB, and %d is the most; its filters' configurations are too large", v.Chain.Target, size>>10, maxInventory>>10)
	}
	done, err := c.swap(ctx, call{method: http.MethodPut, path: path, body: v}, v.index)
	if err != nil {
		return v, err
	}
	if !done {
		return v, problem.ChainChanged.New("%s: the chain of %s", c, v.Chain.Target)
	}
	// The answer does not tell the index.
	now, err := c.inventory(ctx, v.Chain.Mesh, v.Chain.Target)
	if err == nil && canonical(now) != canonical(v) {
		err = problem.ChainChanged.New("%s: the chain of %s", c, v.Chain.Target)
	}
	return now, err
}
