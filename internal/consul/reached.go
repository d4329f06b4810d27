package consul

import (
	"context"
	"encoding/json"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Reached looks whether the sidecars of a plan's Pods have the upstreams that their filters fetch modules through, and is
// problem.UpstreamMissing when some have not: Consul would then stop configuring them at all. What cannot be looked at, since a
// right is missing or no Service tells the Pods, is taken for reached, and so is a whole mesh, of which Consul does not say who
// gets the filters.
func Reached(ctx context.Context, c Cluster, p plan.Plan) error {
	needs := map[string]bool{}
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
	if len(services) == 0 || p.Proxies == nil || p.Chain.Target.Kind == filter.Mesh {
		return nil
	}
	pods, err := c.Pods(ctx, p.Proxies.Namespace, p.Proxies.Labels)
	if err != nil {
		return ctx.Err()
	}
	missing := make([]string, len(pods))
	var g errgroup.Group
	g.SetLimit(podParallel)
	for i, pod := range pods {
		g.Go(func() error {
			client := sidecarClient(c.Dial, pod)
			defer client.CloseIdleConnections()
			for begun := time.Now(); ; { // one that has just started may not have them yet
				lacks := ""
				for _, service := range services {
					asking, cancel := context.WithTimeout(ctx, podTimeout)
					has, err := hasUpstream(asking, func(ctx context.Context, path string, most int64) (int, []byte, error) {
						return get(ctx, client, path, most)
					}, service)
					if cancel(); err == nil && !has {
						lacks = service
					}
				}
				if lacks == "" {
					return nil
				}
				if time.Since(begun) > podSettling {
					missing[i] = "the sidecar of Pod " + pod.String() + " has no upstream " + lacks
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
	missing = slices.DeleteFunc(missing, func(s string) bool { return s == "" })
	if len(missing) > 0 {
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
