package consul

import (
	"context"
	"encoding/json"
	"fmt"
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

// beforehand bounds what is asked of all proxies before something is offered to them, and beforeOne what is asked of one. Those
// that are late are left out.
const (
	beforehand = 20 * time.Second
	beforeOne  = 5 * time.Second
)

// Before looks at the sidecars of a plan's Pods before it is offered: whether they have the upstreams that its modules are
// fetched through, else it is problem.UpstreamMissing, and what they say of fetching. What cannot be looked at, since a right
// is missing or no Service tells the Pods, is left out.
func Before(ctx context.Context, c Cluster, p plan.Plan) (map[string]plan.Fetching, error) {
	if p.Proxies == nil {
		return nil, nil
	}
	w := newPodWatch(c, p)
	defer w.close()
	if err := w.list(ctx); err != nil {
		return nil, ctx.Err()
	}
	var proxies []asked
	for _, s := range w.sidecars {
		proxies = append(proxies, asked{s.pod.String(), s.get})
	}
	return before(ctx, p, proxies, upstreams(p))
}

// Before asks the plan's proxies what they say of fetching, before it is offered. Those that do not answer are left out.
func (c *Client) Before(ctx context.Context, p plan.Plan) (map[string]plan.Fetching, error) {
	w := &watch{client: c, plan: p}
	if err := w.begin(ctx); err != nil {
		return nil, ctx.Err()
	}
	var proxies []asked
	for _, p := range w.proxies {
		proxies = append(proxies, asked{p.name(), c.ask(p.addr)})
	}
	return before(ctx, p, proxies, nil)
}

// asked is a proxy that can be asked.
type asked struct {
	name string
	get  Get
}

// before asks proxies what they have, and whether that is an upstream for each of the services.
func before(ctx context.Context, p plan.Plan, proxies []asked, services []string) (map[string]plan.Fetching, error) {
	found := map[string]plan.Fetching{}
	var missing []string
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(podParallel)
	all, cancel := context.WithTimeout(ctx, beforehand)
	defer cancel()
	for _, a := range proxies {
		g.Go(func() error {
			asking, cancel := context.WithTimeout(all, beforeOne)
			defer cancel()
			f, _, err := look(asking, a.get)
			if err == nil {
				f.Started, err = startedAt(asking, a.get)
			}
			if err != nil {
				return nil
			}
			lacks := a.lacks(all, services)
			mu.Lock()
			defer mu.Unlock()
			found[a.name] = f
			if lacks != "" {
				missing = append(missing, fmt.Sprintf("the sidecar of Pod %s has no upstream %s", a.name, lacks))
			}
			return nil
		})
	}
	_ = g.Wait()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if slices.Sort(missing); len(missing) > 0 {
		return nil, problem.UpstreamMissing.New("%s: %s", p.Chain.Target, strings.Join(missing[:min(len(missing), 10)], "; "))
	}
	return found, nil
}

// lacks names a service that the proxy has no upstream for; empty: none, or it cannot be asked.
func (a asked) lacks(ctx context.Context, services []string) string {
	for begun := time.Now(); ; { // one that has just started may not have them yet
		lacks := ""
		for _, service := range services {
			asking, cancel := context.WithTimeout(ctx, beforeOne)
			has, err := hasUpstream(asking, a.get, service)
			if cancel(); err != nil {
				return ""
			}
			if !has {
				lacks = service
			}
		}
		if lacks == "" || time.Since(begun) > podSettling {
			return lacks
		}
		select {
		case <-ctx.Done():
			return ""
		case <-time.After(podFirstPause):
		}
	}
}

// upstreams are the services that a plan's proxies fetch modules through: without an upstream for one of them Consul would stop
// giving them anything at all. It passes over a whole mesh, of which Consul does not say who gets the filters.
func upstreams(p plan.Plan) []string {
	needs := map[string]bool{}
	for _, s := range p.Sources {
		f, _ := p.Chain.Find(s.Filter)
		needs[f.Spec.Delivery.Service] = p.Chain.Target.Kind != filter.Mesh
	}
	for _, f := range p.Chain.Filters {
		if f.Spec.Delivery.UpstreamPort != 0 { // the plan itself gives it to them
			delete(needs, f.Spec.Delivery.Service)
		}
	}
	maps.DeleteFunc(needs, func(_ string, needed bool) bool { return !needed })
	return slices.Sorted(maps.Keys(needs))
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
