package consul

import (
	"context"
	"encoding/json"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Before looks at the sidecars of a plan's Pods before it is offered: whether they have the upstreams that its modules are
// fetched through, else it is problem.UpstreamMissing, and what they say of fetching. What cannot be looked at, since a right
// is missing or no Service tells the Pods, is left out.
func Before(ctx context.Context, c Cluster, p plan.Plan) (map[string]plan.Before, error) {
	if p.Proxies == nil {
		return nil, nil
	}
	w := newPodWatch(c, p)
	defer w.close()
	if err := w.list(ctx); err != nil {
		return nil, ctx.Err()
	}
	if err := w.reached(ctx); err != nil {
		return nil, err
	}
	var proxies []asked
	for _, s := range w.sidecars {
		proxies = append(proxies, asked{s.pod.String(), s.get})
	}
	return before(ctx, proxies, podParallel, podTimeout)
}

// Before asks the plan's proxies what they say of fetching, before it is offered. Those that do not answer are left out.
func (c *Client) Before(ctx context.Context, p plan.Plan) (map[string]plan.Before, error) {
	w := &watch{client: c, plan: p}
	if err := w.begin(ctx); err != nil {
		return nil, ctx.Err()
	}
	var proxies []asked
	for _, p := range w.proxies {
		proxies = append(proxies, asked{p.name(), c.ask(p.addr)})
	}
	return before(ctx, proxies, parallel, within)
}

// asked is a proxy that can be asked.
type asked struct {
	name string
	get  Get
}

// before asks so many proxies at once, and each for so long at most.
func before(ctx context.Context, proxies []asked, parallel int, within time.Duration) (map[string]plan.Before, error) {
	found := map[string]plan.Before{}
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(parallel)
	for _, p := range proxies {
		g.Go(func() error {
			asking, cancel := context.WithTimeout(ctx, within)
			defer cancel()
			if b, _, err := look(asking, p.get); err == nil {
				mu.Lock()
				defer mu.Unlock()
				found[p.name] = b
			}
			return nil
		})
	}
	_ = g.Wait()
	return found, ctx.Err()
}

// reached says whether the sidecars have the upstreams that their filters fetch modules through; to those that have not,
// Consul would stop giving anything at all. A whole mesh is passed over: Consul does not say who of it gets the filters.
func (w *podWatch) reached(ctx context.Context) error {
	p, needs := w.plan, map[string]bool{}
	for _, s := range p.Sources {
		f, _ := p.Chain.Find(s.Filter)
		needs[f.Spec.Delivery.Service] = true
	}
	for _, f := range p.Chain.Filters {
		if f.Spec.Delivery.UpstreamPort != 0 { // the plan itself gives it to them
			delete(needs, f.Spec.Delivery.Service)
		}
	}
	services := slices.Sorted(maps.Keys(needs))
	if p.Chain.Target.Kind == filter.Mesh {
		return nil
	}
	var missing []string
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(podParallel)
	for _, s := range w.sidecars {
		g.Go(func() error {
			for begun := time.Now(); ; { // one that has just started may not have them yet
				lacks := ""
				for _, service := range services {
					asking, cancel := context.WithTimeout(ctx, podTimeout)
					has, err := hasUpstream(asking, s.get, service)
					if cancel(); err == nil && !has {
						lacks = service
					}
				}
				if lacks == "" {
					return nil
				}
				if time.Since(begun) > podSettling {
					mu.Lock()
					defer mu.Unlock()
					missing = append(missing, "the sidecar of Pod "+s.pod.String()+" has no upstream "+lacks)
					return nil
				}
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(podFirstPause):
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if slices.Sort(missing); len(missing) > 0 {
		return problem.UpstreamMissing.New("%s: %s", p.Chain.Target, strings.Join(missing[:min(len(missing), 10)], "; "))
	}
	return nil
}

// hasUpstream says whether a proxy has a cluster that leads to a service, or to a subset of it.
func hasUpstream(ctx context.Context, get Get, service string) (bool, error) {
	name := `([^.]+\.)?` + regexp.QuoteMeta(service) + `\..*` // which is matched with the whole name
	body, err := page(ctx, get, "/config_dump?resource=dynamic_active_clusters&name_regex="+url.QueryEscape(name), maxDump)
	if err != nil {
		return false, err
	}
	var dump struct {
		Configs []json.RawMessage `json:"configs"`
	}
	if err := json.Unmarshal(body, &dump); err != nil {
		return false, err
	}
	return len(dump.Configs) > 0, nil
}
