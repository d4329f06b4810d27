package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/internal/envoy"
)

// workers is the number of worker threads of every Envoy, so that figures of machines with more cores compare.
const workers = 2

// static is an Envoy as envoy.Bootstrap makes it, but without xDS and with these HTTP filters in the slot's place.
func static(filters string, w way, upstream string) []byte {
	host, port, _ := strings.Cut(upstream, ":")
	return fmt.Appendf(nil, `
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
static_resources:
  listeners:
  - name: %s
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          use_remote_address: true
          normalize_path: true
          merge_slashes: true
          route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: "/"}, %s}]}]}
          http_filters: [%s {name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
  clusters: [{name: upstream, load_assignment: {cluster_name: upstream, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: %s, port_value: %s}}}}]}]}}]
`, envoy.ListenerName, w.action, filters, host, port)
}

// proxy is a running Envoy.
type proxy struct {
	*envoy.Process
	listener string // its address
	dir      string
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
	if p.listener, err = p.ListenerAddr(ctx, envoy.ListenerName); err == nil {
		err = p.Ready(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, stopAll([]*proxy{p}))
	}
	return p, nil
}

// way is how requests that pass are answered.
type way struct{ name, answerer, action string }

var (
	byEnvoy    = way{"itself", "Envoy itself", `direct_response: {status: 200, body: {inline_string: "ok"}}`}
	byUpstream = way{"upstream", "an upstream", "route: {cluster: upstream}"} // as envoy.Bootstrap has it
)

// startSlotted starts an Envoy with the bootstrap that the project gives to operators, but for the way of answering.
func (b *bench) startSlotted(ctx context.Context, group, id, xdsAddr, upstream string, w way) (*proxy, error) {
	bootstrap, err := envoy.Bootstrap{Group: group, NodeID: id, XDSAddr: xdsAddr, Listen: "127.0.0.1:0", Upstream: upstream, Admin: "127.0.0.1:0"}.YAML()
	if err != nil {
		return nil, err
	}
	if bytes.Count(bootstrap, []byte(byUpstream.action)) != 1 {
		return nil, fmt.Errorf("the bootstrap does not have one %s", byUpstream.action)
	}
	return b.startEnvoy(ctx, bytes.Replace(bootstrap, []byte(byUpstream.action), []byte(w.action), 1))
}

func stopAll(proxies []*proxy) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var errs []error
	for _, p := range proxies {
		errs = append(errs, p.Stop(ctx), os.RemoveAll(p.dir))
	}
	return errors.Join(errs...)
}
