package istiotest

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	sfshttp "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/build/controlplanes/stack"
)

const (
	waypointPort = 15008         // of a waypoint, by which everybody knows it
	servicePort  = 80            // of the Service behind it
	waypointIP   = "10.96.77.10" // of its Service
	serviceIP    = "10.96.77.20"
)

// Waypoint is one, by Istio's agent, before a Service whose requests go to an upstream of this process.
type Waypoint struct {
	Namespace, Pod string
	// Admin is the address of its Envoy's admin interface.
	Admin string

	at     string // where it takes connections
	client *http.Client
}

// Waypoint runs the waypoint of a Gateway, and makes that and the Service. There can be one in a Mesh, which needs the
// GatewayAPI.
//
// It is a stock Envoy, which lacks some of Istio's own: what istiod sends is changed on the way. It is without the filters
// that find out who a peer is, has Envoy's type of a text where istiod names one of Istio's, listens on a free port of the
// loopback interface, and has the upstream in the place of the Service's Pod.
func (m *Mesh) Waypoint(ctx context.Context, namespaceName, gateway, service string) (*Waypoint, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	ports, err := stack.FreePorts(1)
	if err != nil {
		return nil, err
	}
	port, err := strconv.Atoi(ports[0])
	if err != nil {
		return nil, err
	}
	o := ProxyOptions{Namespace: namespaceName, Pod: gateway + "-1", Agent: true, waypoint: true}
	labels := map[string]string{"gateway.networking.k8s.io/gateway-name": gateway, "gateway.networking.k8s.io/gateway-class-name": "istio-waypoint",
		"gateway.istio.io/managed": "istio.io-mesh-controller"}
	ip, err := m.pod(ctx, o.Namespace, o.Pod, labels, nil)
	if err != nil {
		return nil, err
	}
	behind, err := m.pod(ctx, o.Namespace, service+"-1", map[string]string{"app": service}, nil)
	if err != nil {
		return nil, err
	}
	objects, err := decode(waypointObjects(o.Namespace, gateway, service, behind))
	if err != nil {
		return nil, err
	}
	if err := m.Apply(ctx, objects...); err != nil {
		return nil, err
	}
	if err := m.Send(ctx, http.MethodPatch, k8stest.Path(objects[0])+"/status", map[string]any{"status": map[string]any{
		"addresses": []any{map[string]any{"type": "IPAddress", "value": waypointIP}}}}); err != nil {
		return nil, err
	}
	ca, err := newAuthority()
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	xds := m.istiods[0].xds
	m.mu.Unlock()
	relayed, err := m.between(xds, stockEnvoy{port: uint32(port), pod: behind, upstream: m.upstream.Listener.Addr().String()})
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(m.dir, o.Namespace, o.Pod+"-"+ip)
	if err := ca.write(filepath.Join(dir, "lib", "etc", "certs"), "spiffe://cluster.local/ns/"+o.Namespace+"/sa/"+gateway); err != nil {
		return nil, err
	}
	running, admin, err := m.agent(ctx, dir, o, labels, ip, relayed)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	m.proxies = append(m.proxies, &Proxy{Namespace: o.Namespace, Pod: o.Pod, running: running})
	m.ports[fmt.Sprintf("%s/%s:%d", o.Namespace, o.Pod, AdminPort)] = admin
	m.mu.Unlock()
	cert, err := ca.issue("spiffe://cluster.local/ns/" + o.Namespace + "/sa/client")
	if err != nil {
		return nil, err
	}
	w := &Waypoint{Namespace: o.Namespace, Pod: o.Pod, Admin: admin, at: "127.0.0.1:" + ports[0]}
	// Names of Istio's certificates are not hosts'.
	w.client = &http.Client{Transport: &http.Transport{ForceAttemptHTTP2: true, DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true}}}
	for {
		r, err := w.Get(ctx, "/healthz")
		if err == nil && r.Status == http.StatusOK {
			return w, nil
		}
		select {
		case <-running.Done():
			return nil, running.Err()
		case <-ctx.Done():
			return nil, fmt.Errorf("the waypoint does not answer requests: %w: %d %w; istiod's log ends:\n%s", ctx.Err(), r.Status, err, m.Log())
		case <-time.After(pollInterval):
		}
	}
}

// Get makes a request to the Service through the waypoint, as a ztunnel does: in a tunnel of HTTP/2, with a connection of
// its own.
func (w *Waypoint) Get(ctx context.Context, path string) (Response, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	up, out := io.Pipe()
	defer out.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodConnect, "https://"+w.at, up)
	if err != nil {
		return Response{}, err
	}
	req.Host = net.JoinHostPort(serviceIP, strconv.Itoa(servicePort))
	tunnel, err := w.client.Do(req)
	if err != nil {
		return Response{}, err
	}
	defer tunnel.Body.Close()
	if tunnel.StatusCode != http.StatusOK {
		return Response{}, fmt.Errorf("the waypoint makes no tunnel: %s", tunnel.Status)
	}
	inner, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://service"+path, nil)
	if err != nil {
		return Response{}, err
	}
	if err := inner.Write(out); err != nil {
		return Response{}, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(tunnel.Body), inner)
	if err != nil {
		return Response{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return Response{resp.StatusCode, resp.Header, string(body)}, err
}

// waypointObjects are the Gateway, first, with the Service that Istio makes of it, and the Service behind it.
func waypointObjects(ns, gateway, service, pod string) []string {
	return []string{
		fmt.Sprintf(`{"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"namespace": %q, "name": %q},
			"spec": {"gatewayClassName": "istio-waypoint", "listeners": [{"name": "mesh", "port": %d, "protocol": "HBONE"}]}}`, ns, gateway, waypointPort),
		fmt.Sprintf(`{"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": %q, "name": %q},
			"spec": {"clusterIP": %q, "selector": {"gateway.networking.k8s.io/gateway-name": %q}, "ports": [{"name": "mesh", "port": %d, "appProtocol": "hbone"}]}}`,
			ns, gateway, waypointIP, gateway, waypointPort),
		fmt.Sprintf(`{"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": %q, "name": %q, "labels": {"istio.io/use-waypoint": %q}},
			"spec": {"clusterIP": %q, "selector": {"app": %q}, "ports": [{"name": "http", "port": %d}]}}`, ns, service, gateway, serviceIP, service, servicePort),
		fmt.Sprintf(`{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
			"metadata": {"namespace": %q, "name": %q, "labels": {"kubernetes.io/service-name": %q}}, "ports": [{"name": "http", "port": %d}],
			"endpoints": [{"addresses": [%q], "conditions": {"ready": true}, "targetRef": {"kind": "Pod", "namespace": %q, "name": "%s-1"}}]}`,
			ns, service, service, servicePort, pod, ns, service),
	}
}

// between is between a proxy and istiod, and changes what is sent to the proxy.
type between struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	istiod discovery.AggregatedDiscoveryServiceClient
	stockEnvoy
}

// between runs one until Stop, and says where.
func (m *Mesh) between(xds string, change stockEnvoy) (string, error) {
	conn, err := grpc.NewClient(xds, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		return "", err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", errors.Join(err, conn.Close())
	}
	s := grpc.NewServer()
	discovery.RegisterAggregatedDiscoveryServiceServer(s, &between{istiod: discovery.NewAggregatedDiscoveryServiceClient(conn), stockEnvoy: change})
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stops = append(m.stops, func() {
		s.Stop()
		<-served
		_ = conn.Close()
	})
	return l.Addr().String(), nil
}

// DeltaAggregatedResources is what Istio's agent asks for.
func (r *between) DeltaAggregatedResources(proxy discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	ctx, cancel := context.WithCancel(proxy.Context())
	defer cancel()
	istiod, err := r.istiod.DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	asked := make(chan error, 1)
	go func() {
		defer cancel()
		for {
			q, err := proxy.Recv()
			if err == nil {
				err = istiod.Send(q)
			}
			if err != nil {
				asked <- err
				return
			}
		}
	}()
	for {
		a, err := istiod.Recv()
		if err == nil {
			if err = r.adapt(a); err == nil {
				err = proxy.Send(a)
			}
		}
		if err != nil {
			return err // which ends the other direction, too
		}
	}
}

// stockEnvoy is what istiod's resources are made to fit.
type stockEnvoy struct {
	port          uint32 // that the waypoint listens on
	pod, upstream string // the address of the Pod behind it, and where its requests go
}

func (e stockEnvoy) adapt(r *discovery.DeltaDiscoveryResponse) error {
	for _, res := range r.Resources {
		m, err := res.Resource.UnmarshalNew()
		if err != nil {
			continue // of a kind that is Istio's own
		}
		switch m := m.(type) {
		case *listener.Listener:
			err = e.listener(m)
		case *endpoint.ClusterLoadAssignment:
			err = e.endpoints(m)
		default:
			continue
		}
		if err != nil {
			return err
		}
		if res.Resource, err = anypb.New(m); err != nil {
			return err
		}
	}
	return nil
}

func (e stockEnvoy) listener(l *listener.Listener) error {
	if s := l.GetAddress().GetSocketAddress(); s.GetPortValue() == waypointPort {
		s.Address, s.PortSpecifier = "127.0.0.1", &core.SocketAddress_PortValue{PortValue: e.port}
	}
	for _, chain := range l.FilterChains {
		for _, f := range chain.Filters {
			h := &hcm.HttpConnectionManager{}
			if f.GetTypedConfig().UnmarshalTo(h) != nil {
				continue
			}
			h.HttpFilters = slices.DeleteFunc(h.HttpFilters, func(f *hcm.HttpFilter) bool { return strings.HasSuffix(f.Name, "_peer_metadata") })
			for _, f := range h.HttpFilters {
				state := &sfshttp.Config{}
				if f.GetTypedConfig().UnmarshalTo(state) != nil {
					continue
				}
				for _, v := range state.OnRequestHeaders {
					v.FactoryKey = strings.Replace(v.FactoryKey, "istio.hashable_string", "envoy.hashable_string", 1)
				}
				typed, err := anypb.New(state)
				if err != nil {
					return err
				}
				f.ConfigType = &hcm.HttpFilter_TypedConfig{TypedConfig: typed}
			}
			typed, err := anypb.New(h)
			if err != nil {
				return err
			}
			f.ConfigType = &listener.Filter_TypedConfig{TypedConfig: typed}
		}
	}
	return nil
}

func (e stockEnvoy) endpoints(c *endpoint.ClusterLoadAssignment) error {
	host, text, _ := strings.Cut(e.upstream, ":")
	port, err := strconv.Atoi(text)
	if err != nil {
		return fmt.Errorf("read the upstream's address %s: %w", e.upstream, err)
	}
	for _, l := range c.Endpoints {
		for _, at := range l.LbEndpoints {
			if s := at.GetEndpoint().GetAddress().GetSocketAddress(); s.GetAddress() == e.pod {
				s.Address, s.PortSpecifier = host, &core.SocketAddress_PortValue{PortValue: uint32(port)}
			}
		}
	}
	return nil
}

// authority issues certificates as Istio's does.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority() (authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return authority{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{Organization: []string{"cluster.local"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return authority{}, err
	}
	cert, err := x509.ParseCertificate(der)
	return authority{cert, key}, err
}

func (a authority) issue(identity string) (tls.Certificate, error) {
	uri, err := url.Parse(identity)
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: []*url.URL{uri}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	return tls.Certificate{Certificate: [][]byte{der, a.cert.Raw}, PrivateKey: key}, err
}

// write puts an identity where Istio's agent looks for files.
func (a authority) write(dir, identity string) error {
	c, err := a.issue(identity)
	if err != nil {
		return err
	}
	key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		return err
	}
	block := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	root := block("CERTIFICATE", a.cert.Raw)
	for name, data := range map[string][]byte{
		"cert-chain.pem": slices.Concat(block("CERTIFICATE", c.Certificate[0]), root), "key.pem": block("PRIVATE KEY", key), "root-cert.pem": root,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}
