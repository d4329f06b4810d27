package istiotest

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/stack"
	"github.com/meshery/meshery-filters/internal/envoy"
)

// ProxyOptions say what a proxy is like.
type ProxyOptions struct {
	// Namespace and Pod name it. Both must be set.
	Namespace, Pod string
	// Labels of the Pod, by which filters choose it.
	Labels map[string]string
	// Gateway is a proxy at the edge, and not a sidecar.
	Gateway bool
	// GatewayAPI is the name of a Gateway of the Gateway API, of Istio's class, that is made, with this proxy at the edge as
	// the only one that stands for it. The Pod has the labels that Istio gives it.
	GatewayAPI string
	// Upstream is where its requests go, host:port. It has to answer GET /healthz with 200. Default: one of this process.
	Upstream string
	// Replica of istiod that it connects to, from 0. Default: the first.
	Replica int
	// Agent puts Istio's agent between the Envoy and istiod, as in a cluster: it is what fetches modules. It takes a user
	// who may have a mount namespace of their own.
	Agent bool
	// Told has Istio's agent let its Envoy tell which configurations it accepted, which it does not do by itself.
	Told bool
	// TCP has a sidecar take its requests for bytes.
	TCP bool
	// Relay has it connect to istiod through this process, so that Cut takes istiod away from it.
	Relay bool

	waypoint bool
}

// podLabel is what every proxy's Pod has.
const podLabel = "istiotest/pod"

// kind is what istiod calls such a proxy.
func (o ProxyOptions) kind() string {
	switch {
	case o.waypoint:
		return "waypoint"
	case o.Gateway:
		return "router"
	}
	return "sidecar"
}

// Proxy is an Envoy that istiod configures, before an upstream.
type Proxy struct {
	Namespace, Pod string
	// URL is where its listener takes requests: http://127.0.0.1:PORT.
	URL string
	// Envoy that runs without an agent; nil with one.
	Envoy *envoy.Process

	running process
	relay   *relay // nil without one
}

// process is what runs a proxy.
type process interface {
	Stop() error
	Done() <-chan struct{}
	Err() error
}

// bare is an Envoy without an agent.
type bare struct{ *envoy.Process }

func (b bare) Stop() error { return b.Process.Stop(context.Background()) }

// Proxy runs one until requests through it are answered, and makes the Pod, and what istiod needs to know of it.
func (m *Mesh) Proxy(ctx context.Context, o ProxyOptions) (_ *Proxy, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	o.Gateway = o.Gateway || o.GatewayAPI != ""
	// The first label chooses this Pod alone, whatever labels others share, and the second all that Istio injects.
	labels := map[string]string{podLabel: o.Pod, "service.istio.io/canonical-name": o.Pod}
	for k, v := range o.Labels {
		labels[k] = v
	}
	if o.GatewayAPI != "" {
		labels["gateway.networking.k8s.io/gateway-name"] = o.GatewayAPI
		labels["gateway.networking.k8s.io/gateway-class-name"] = "istio"
		labels["gateway.istio.io/managed"] = "istio.io-gateway-controller"
	}
	ip, err := m.pod(ctx, o.Namespace, o.Pod, labels, nil)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	xds := m.istiods[o.Replica].xds
	m.mu.Unlock()
	p := &Proxy{Namespace: o.Namespace, Pod: o.Pod}
	if o.Relay {
		if p.relay, err = newRelay(xds); err != nil {
			return nil, err
		}
		xds = p.relay.listener.Addr().String()
		defer func() {
			if err != nil {
				p.Cut()
			}
		}()
	}
	dir := filepath.Join(m.dir, o.Namespace, o.Pod+"-"+ip) // a Pod of that name may have been there before
	var admin string
	if o.Agent {
		p.running, admin, err = m.agent(ctx, dir, o, labels, ip, xds)
	} else {
		p.Envoy, err = m.bare(ctx, dir, o, labels, ip, xds)
	}
	if err != nil {
		return nil, err
	}
	if p.Envoy != nil {
		p.running, admin = bare{p.Envoy}, p.Envoy.AdminAddr()
	}
	m.mu.Lock()
	m.proxies = append(m.proxies, p)
	m.ports[fmt.Sprintf("%s/%s:%d", o.Namespace, o.Pod, AdminPort)] = admin
	m.mu.Unlock()
	for n := 1; ; n++ {
		err = m.listen(ctx, p, o)
		if err == nil {
			return p, nil
		}
		if n == attempts || ctx.Err() != nil || p.running.Err() != nil {
			return nil, fmt.Errorf("%s/%s does not answer requests: %w; istiod's log ends:\n%s", o.Namespace, o.Pod, err, m.Log())
		}
	}
}

// listen gives a proxy a listener on a free port, and waits until requests are answered there.
func (m *Mesh) listen(ctx context.Context, p *Proxy, o ProxyOptions) error {
	ctx, cancel := context.WithTimeout(ctx, listenTimeout)
	defer cancel()
	ports, err := stack.FreePorts(1)
	if err != nil {
		return err
	}
	objects, err := m.route(o, ports[0])
	if err != nil {
		return err
	}
	if err := m.Apply(ctx, objects...); err != nil {
		return err
	}
	p.URL = "http://127.0.0.1:" + ports[0]
	for {
		r, err := p.Get(ctx, "/healthz")
		if err == nil && r.Status == http.StatusOK {
			return nil
		}
		select {
		case <-p.running.Done():
			return p.running.Err()
		case <-ctx.Done():
			return fmt.Errorf("port %s: %w: %d %w", ports[0], ctx.Err(), r.Status, err)
		case <-time.After(pollInterval):
		}
	}
}

// Get makes a request through the proxy by a connection of its own: an older one stays on the chain that it began with.
func (p *Proxy) Get(ctx context.Context, path string) (Response, error) {
	return fetch(ctx, p.URL+path)
}

// Cut takes istiod away from a proxy with a relay, for good.
func (p *Proxy) Cut() {
	if p.relay != nil {
		p.relay.cut()
	}
}

// Stop ends the Envoy and waits until it is gone. Its Pod stays.
func (p *Proxy) Stop() error {
	defer p.Cut()
	return p.running.Stop()
}

// bare starts an Envoy that asks istiod itself.
func (m *Mesh) bare(ctx context.Context, dir string, o ProxyOptions, labels map[string]string, ip, xds string) (*envoy.Process, error) {
	config, err := bootstrap(o, labels, ip, xds)
	if err != nil {
		return nil, err
	}
	return envoy.Start(ctx, m.binary, envoy.ProcessOptions{Bootstrap: config, Concurrency: 1, Dir: dir})
}

// route is what has istiod give the proxy a listener on a port, with the upstream behind it.
func (m *Mesh) route(o ProxyOptions, port string) ([]map[string]any, error) {
	upstream := cmp.Or(o.Upstream, m.upstream.Listener.Addr().String())
	var texts []string
	protocol := "HTTP"
	if o.TCP {
		protocol = "TCP"
	}
	if !o.Gateway {
		texts = append(texts, fmt.Sprintf(`{"apiVersion": "networking.istio.io/v1", "kind": "Sidecar", "metadata": {"namespace": %q, "name": %q},
			"spec": {"workloadSelector": {"labels": {"istiotest/pod": %q}},
				"ingress": [{"port": {"number": %s, "protocol": %q, "name": "in"}, "bind": "127.0.0.1", "captureMode": "NONE", "defaultEndpoint": %q}],
				"egress": [{"hosts": ["./none.invalid"]}]}}`, o.Namespace, o.Pod, o.Pod, port, protocol, upstream))
	} else {
		address, upstreamPort, _ := strings.Cut(upstream, ":")
		host := o.Pod + "." + o.Namespace + ".upstream.invalid"
		texts = append(texts, fmt.Sprintf(`{"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"namespace": %q, "name": %q},
			"spec": {"hosts": [%q], "location": "MESH_EXTERNAL", "resolution": "STATIC", "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
				"endpoints": [{"address": %q, "ports": {"http": %s}}]}}`, o.Namespace, o.Pod, host, address, upstreamPort))
		if o.GatewayAPI != "" {
			return decode(append(texts, gatewayAPI(o, port, host)...))
		}
		texts = append(texts,
			fmt.Sprintf(`{"apiVersion": "networking.istio.io/v1", "kind": "Gateway", "metadata": {"namespace": %q, "name": %q},
				"spec": {"selector": {"istiotest/pod": %q}, "servers": [{"port": {"number": %s, "protocol": "HTTP", "name": "http"}, "bind": "127.0.0.1", "hosts": ["*"]}]}}`,
				o.Namespace, o.Pod, o.Pod, port),
			fmt.Sprintf(`{"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"namespace": %q, "name": %q},
				"spec": {"hosts": ["*"], "gateways": [%q], "http": [{"route": [{"destination": {"host": %q, "port": {"number": 80}}}]}]}}`,
				o.Namespace, o.Pod, o.Pod, host))
	}
	return decode(texts)
}

// gatewayAPI is a Gateway with the Service that Istio makes of it, and its route.
func gatewayAPI(o ProxyOptions, port, host string) []string {
	return []string{
		fmt.Sprintf(`{"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"namespace": %q, "name": %q},
			"spec": {"gatewayClassName": "istio", "listeners": [{"name": "http", "port": %s, "protocol": "HTTP"}]}}`, o.Namespace, o.GatewayAPI, port),
		fmt.Sprintf(`{"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": %q, "name": "%s-istio"},
			"spec": {"selector": {"gateway.networking.k8s.io/gateway-name": %q}, "ports": [{"name": "http", "port": %s}]}}`, o.Namespace, o.GatewayAPI, o.GatewayAPI, port),
		fmt.Sprintf(`{"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"namespace": %q, "name": %q},
			"spec": {"parentRefs": [{"name": %q}], "rules": [{"backendRefs": [
				{"group": "networking.istio.io", "kind": "Hostname", "name": %q, "port": 80}]}]}}`, o.Namespace, o.Pod, o.GatewayAPI, host),
	}
}

func decode(texts []string) (objects []map[string]any, err error) {
	for _, text := range texts {
		var o map[string]any
		if err := json.Unmarshal([]byte(text), &o); err != nil {
			return nil, fmt.Errorf("decode an object: %w", err)
		}
		objects = append(objects, o)
	}
	return objects, nil
}

// bootstrap has an Envoy ask istiod for everything, in clear, as the Pod's proxy.
func bootstrap(o ProxyOptions, labels map[string]string, ip, xds string) ([]byte, error) {
	host, port, _ := strings.Cut(xds, ":")
	number, err := strconv.Atoi(port)
	if err != nil {
		return nil, fmt.Errorf("read istiod's address %s: %w", xds, err)
	}
	ads := map[string]any{"ads": map[string]any{}, "resource_api_version": "V3"}
	return json.Marshal(map[string]any{
		"node": map[string]any{
			"id":      strings.Join([]string{o.kind(), ip, o.Pod + "." + o.Namespace, o.Namespace + ".svc.cluster.local"}, "~"),
			"cluster": o.Pod + "." + o.Namespace,
			"metadata": map[string]any{"NAMESPACE": o.Namespace, "NAME": o.Pod, "LABELS": labels, "INTERCEPTION_MODE": "NONE",
				"CLUSTER_ID": "Kubernetes", "MESH_ID": "cluster.local", "ISTIO_VERSION": Version, "INSTANCE_IPS": ip},
		},
		"admin": map[string]any{"address": socket("127.0.0.1", 0)},
		"dynamic_resources": map[string]any{"cds_config": ads, "lds_config": ads, "ads_config": map[string]any{
			"api_type": "DELTA_GRPC", "transport_api_version": "V3", "set_node_on_first_message_only": true,
			"grpc_services": []any{map[string]any{"envoy_grpc": map[string]any{"cluster_name": "xds-grpc"}}}}},
		"static_resources": map[string]any{"clusters": []any{map[string]any{
			"name": "xds-grpc", "type": "STATIC", "connect_timeout": "5s",
			"typed_extension_protocol_options": map[string]any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": map[string]any{
				"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
				"explicit_http_config": map[string]any{"http2_protocol_options": map[string]any{}}}},
			"load_assignment": map[string]any{"cluster_name": "xds-grpc", "endpoints": []any{map[string]any{
				"lb_endpoints": []any{map[string]any{"endpoint": map[string]any{"address": socket(host, number)}}}}}},
		}}},
	})
}

func socket(host string, port int) map[string]any {
	return map[string]any{"socket_address": map[string]any{"address": host, "port_value": port}}
}
