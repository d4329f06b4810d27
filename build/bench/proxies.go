package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/internal/envoy"
)

// workers is the number of worker threads of every Envoy, so that figures of machines with more cores compare.
const workers = 2

const upstreamBootstrap = `
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
static_resources:
  listeners:
  - name: ` + envoy.ListenerName + `
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: upstream
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {prefix: "/"}
                direct_response: {status: 200, body: {inline_string: "ok"}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
`

// proxy is a running Envoy.
type proxy struct {
	*envoy.Process
	addr string // of its listener
	dir  string
}

func (b *bench) startEnvoy(ctx context.Context, bootstrap []byte) (*proxy, error) {
	dir, err := os.MkdirTemp(b.dir, "envoy-")
	if err != nil {
		return nil, err
	}
	process, err := envoy.Start(ctx, b.envoy, envoy.ProcessOptions{Bootstrap: bootstrap, Dir: dir, Concurrency: workers, LogLevel: "error"})
	if err != nil {
		return nil, err
	}
	p := &proxy{Process: process, dir: dir}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if p.addr, err = p.ListenerAddr(ctx, envoy.ListenerName); err == nil {
		err = p.Ready(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return p, nil
}

func (p *proxy) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return errors.Join(p.Stop(ctx), os.RemoveAll(p.dir))
}

// startGroup starts Envoys with a slot, that belong together.
func (b *bench) startGroup(ctx context.Context, group string, n int, xdsAddr, upstream string) (proxies []*proxy, err error) {
	for i := range n {
		bootstrap, err := slotted(group, fmt.Sprintf("%s-%d", group, i), xdsAddr, upstream)
		if err == nil {
			var p *proxy
			if p, err = b.startEnvoy(ctx, bootstrap); err == nil {
				proxies = append(proxies, p)
				continue
			}
		}
		return nil, errors.Join(err, stopAll(proxies))
	}
	return proxies, nil
}

func stopAll(proxies []*proxy) error {
	var errs []error
	for _, p := range proxies {
		errs = append(errs, p.stop())
	}
	return errors.Join(errs...)
}

// slotted is the bootstrap that the project gives to operators.
func slotted(group, id, xdsAddr, upstream string) ([]byte, error) {
	return envoy.Bootstrap{Group: group, NodeID: id, XDSAddr: xdsAddr, Listen: "127.0.0.1:0", Upstream: upstream, Admin: "127.0.0.1:0"}.YAML()
}

// withFilter is the same bootstrap with another filter, or none, in the slot's place and without xDS.
func withFilter(id, upstream, filter string) ([]byte, error) {
	text, err := slotted("static", id, upstream, upstream)
	if err != nil {
		return nil, err
	}
	var bootstrap map[string]any
	if err := yaml.Unmarshal(text, &bootstrap); err != nil {
		return nil, fmt.Errorf("read the bootstrap: %w", err)
	}
	delete(bootstrap, "dynamic_resources")
	replaced := 0
	replaceSlot(bootstrap, filter, &replaced)
	if replaced != 1 {
		return nil, fmt.Errorf("the bootstrap has %d slots", replaced)
	}
	return yaml.Marshal(bootstrap)
}

func replaceSlot(node any, filter string, replaced *int) {
	switch n := node.(type) {
	case []any:
		for _, v := range n {
			replaceSlot(v, filter, replaced)
		}
	case map[string]any:
		for k, v := range n {
			filters, ok := v.([]any)
			if k != "http_filters" || !ok {
				replaceSlot(v, filter, replaced)
				continue
			}
			var kept []any
			for _, f := range filters {
				if m, _ := f.(map[string]any); m["name"] != envoy.SlotName {
					kept = append(kept, f)
					continue
				}
				*replaced++
				if filter != "" {
					var other any
					if yaml.Unmarshal([]byte(filter), &other) == nil {
						kept = append(kept, other)
					}
				}
			}
			n[k] = kept
		}
	}
}
