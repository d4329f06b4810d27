// Package istiotest runs a real istiod against a real API server, and stock Envoys that istiod configures, for tests. The
// programs are what `make controlplanes` and `make envoy` have built and installed.
//
// Nothing redirects traffic: requests go to a proxy's own port on the loopback interface, and from there to an upstream
// of this process. The Pods are objects whose ports the node's stand-in forwards to where things really listen; their
// addresses are identities only.
package istiotest

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/build/controlplanes/stack"
	"github.com/meshery/meshery-filters/internal/envoy"
)

const (
	// Namespace is the mesh's root, where istiod's Pods are.
	Namespace = "istio-system"
	// Version is what the proxies say they are of.
	Version = "1.31.0"

	startTimeout  = 3 * time.Minute  // of istiod or a proxy, on a machine that is busy with other things
	listenTimeout = 40 * time.Second // of a proxy on one port
	pollInterval  = 20 * time.Millisecond
	attempts      = 4 // a port that was free may be taken before it is used
	node          = "node-1"
)

// The ports by which a Pod's parts are known.
const (
	AdminPort      = 15000 // of a proxy
	MonitoringPort = 15014 // of istiod
)

// Options say what a Mesh is like.
type Options struct {
	// Users and APIServerArgs are k8stest's.
	Users         []string
	APIServerArgs []string
	// Replicas of istiod. Default: 1. Proxies connect to the first, unless they say otherwise.
	Replicas int
	// Without are the kinds whose CustomResourceDefinitions are left out.
	Without []string
	// GatewayAPI has the cluster serve the Gateway API, and istiod configure its gateways and waypoints. Nobody makes their
	// Deployments and Services.
	GatewayAPI bool
}

// Mesh is an API server, its istiods and their proxies. It is safe for concurrent use. Whoever started it calls Stop.
type Mesh struct {
	*k8stest.Server

	dir      string
	folder   string // of Istio's programs
	binary   envoy.Binary
	kubelet  *k8stest.Kubelet
	upstream *httptest.Server
	env      []string // of istiods

	gatewayAPI bool

	mu      sync.Mutex
	istiods []*istiod
	proxies []*Proxy
	stops   []func()          // how what is between istiods and proxies ends
	ports   map[string]string // of Pods: namespace/name:port to where it listens
	pods    int
}

type istiod struct {
	*stack.Process
	xds string // host:port
}

// Start runs everything until istiod is ready. Files are kept in dir, which is made and not removed.
func Start(ctx context.Context, dir string, o Options) (_ *Mesh, err error) {
	folder, err := stack.Folder(ctx, "istio")
	if err != nil {
		return nil, err
	}
	binary, err := envoy.Find(ctx, "")
	if err != nil {
		return nil, err
	}
	server, err := k8stest.Start(ctx, filepath.Join(dir, "kubernetes"), k8stest.Options{Users: o.Users, APIServerArgs: o.APIServerArgs})
	if err != nil {
		return nil, err
	}
	m := &Mesh{Server: server, dir: dir, folder: folder, binary: binary, ports: map[string]string{}, env: environment, gatewayAPI: o.GatewayAPI}
	defer func() {
		if err != nil {
			m.Stop()
		}
	}()
	m.upstream = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s\n", r.Method, r.URL.Path)
	}))
	if m.kubelet, err = server.StartKubelet(ctx, node, m.forward); err != nil {
		return nil, err
	}
	kinds := []string{"crds.yaml"}
	if o.GatewayAPI {
		m.env = slices.Concat(environment, gatewayEnvironment) // the last of a name counts
		kinds = append(kinds, "gateway-api.yaml")
	}
	for _, file := range kinds {
		crds, err := os.ReadFile(filepath.Join(folder, file))
		if err != nil {
			return nil, err
		}
		if err := m.Install(ctx, crds, o.Without...); err != nil {
			return nil, err
		}
	}
	if err := m.Apply(ctx, namespace(Namespace), map[string]any{
		// Without certificates a proxy would wait for them for ever.
		"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
		"metadata": map[string]any{"name": "default", "namespace": Namespace},
		"spec":     map[string]any{"mtls": map[string]any{"mode": "DISABLE"}},
	}); err != nil {
		return nil, err
	}
	for n := range max(o.Replicas, 1) {
		if err := m.startIstiod(ctx, "istiod-"+strconv.Itoa(n+1)); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// Stop ends every part, the last started first, and waits until they are gone.
func (m *Mesh) Stop() {
	m.mu.Lock()
	proxies, istiods, stops := m.proxies, m.istiods, m.stops
	m.mu.Unlock()
	for _, p := range proxies {
		_ = p.Stop() // one that cannot be stopped ends with this process
	}
	for _, stop := range stops {
		stop()
	}
	for _, i := range istiods {
		i.Stop()
	}
	if m.kubelet != nil {
		m.kubelet.Stop()
	}
	if m.upstream != nil {
		m.upstream.Close()
	}
	m.Server.Stop()
}

// collections are what there may be of in a namespace with proxies, by their paths in the API, less namespaces/NAME.
var collections = []string{
	"api/v1/pods", "api/v1/services", "api/v1/secrets", "api/v1/configmaps", "api/v1/serviceaccounts", "apis/apps/v1/deployments",
	"apis/discovery.k8s.io/v1/endpointslices",
	"apis/networking.istio.io/v1/sidecars", "apis/networking.istio.io/v1/gateways", "apis/networking.istio.io/v1/virtualservices",
	"apis/networking.istio.io/v1/serviceentries", "apis/networking.istio.io/v1/workloadentries", "apis/networking.istio.io/v1alpha3/envoyfilters",
	"apis/extensions.istio.io/v1alpha1/wasmplugins", "apis/extensions.istio.io/v1alpha1/trafficextensions",
	"apis/gateway.networking.k8s.io/v1/gateways", "apis/gateway.networking.k8s.io/v1/httproutes",
}

// Clear stops every proxy, and deletes what the namespaces hold: for the next of several that use the mesh one after the
// other. In Namespace what istiod itself needs stays. Nobody else may use the mesh meanwhile.
func (m *Mesh) Clear(ctx context.Context, namespaces ...string) error {
	m.mu.Lock()
	proxies, stops := m.proxies, m.stops
	m.proxies, m.stops = nil, nil
	m.mu.Unlock()
	for _, p := range proxies {
		if err := p.Stop(); err != nil {
			return err
		}
	}
	for _, stop := range stops {
		stop()
	}
	for _, ns := range namespaces {
		for _, collection := range collections {
			api, kind := path.Split(collection)
			at := "/" + api + "namespaces/" + ns + "/" + kind
			switch {
			case !m.gatewayAPI && strings.Contains(api, "gateway.networking"):
				continue
			case ns != Namespace:
			case kind == "pods":
				at += "?labelSelector=" + podLabel
			case strings.HasPrefix(api, "api/") && kind != "services":
				continue // istiod's
			}
			// No node ends its Pods.
			if err := m.Send(ctx, http.MethodDelete, at, map[string]any{"gracePeriodSeconds": 0}); err != nil {
				return fmt.Errorf("clear %s of %s: %w", kind, ns, err)
			}
		}
	}
	return nil
}

// Log is the ends of istiods' logs.
func (m *Mesh) Log() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var b strings.Builder
	for _, i := range m.istiods {
		b.WriteString(i.Log())
	}
	return b.String()
}

func namespace(name string) map[string]any {
	return map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": name}}
}

// pod makes a Pod that runs, as far as the API server knows, and says where its ports are.
func (m *Mesh) pod(ctx context.Context, ns, name string, labels map[string]string, ports map[int]string) (ip string, err error) {
	m.mu.Lock()
	m.pods++
	ip = fmt.Sprintf("10.244.%d.%d", m.pods/250, m.pods%250+1)
	for port, at := range ports {
		m.ports[fmt.Sprintf("%s/%s:%d", ns, name, port)] = at
	}
	m.mu.Unlock()
	o := map[string]any{"apiVersion": "v1", "kind": "Pod",
		"metadata": map[string]any{"namespace": ns, "name": name, "labels": labels},
		"spec":     map[string]any{"nodeName": node, "containers": []any{map[string]any{"name": "main", "image": "none"}}}}
	if err := m.Apply(ctx, namespace(ns), o); err != nil {
		return "", err
	}
	o["status"] = map[string]any{"phase": "Running", "podIP": ip, "podIPs": []any{map[string]any{"ip": ip}},
		"conditions": []any{map[string]any{"type": "Ready", "status": "True"}}}
	return ip, m.Send(ctx, http.MethodPatch, k8stest.Path(o)+"/status", map[string]any{"status": o["status"]})
}

func (m *Mesh) forward(ns, pod string, port int) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	at, ok := m.ports[fmt.Sprintf("%s/%s:%d", ns, pod, port)]
	if !ok {
		return "", fmt.Errorf("nothing listens on port %d of %s/%s", port, ns, pod)
	}
	return at, nil
}

// environment has istiod do without what needs certificates, a webhook, another program or Istio's own Envoy.
var environment = []string{
	"POD_NAMESPACE=" + Namespace, "CLUSTER_ID=Kubernetes", "REVISION=default",
	"ENABLE_CA_SERVER=false", "PILOT_CERT_PROVIDER=none", "INJECT_ENABLED=false", "INJECTION_WEBHOOK_CONFIG_NAME=",
	"VALIDATION_WEBHOOK_CONFIG_NAME=", "PILOT_ENABLE_GATEWAY_API=false", "PILOT_ENABLE_GATEWAY_API_STATUS=false",
	"PILOT_ENABLE_AMBIENT=false", "PILOT_ENABLE_ALPN_FILTER=false", "PILOT_ENABLE_METADATA_EXCHANGE=false",
	"PILOT_DISABLE_MX_ALPN=true",
}

// gatewayEnvironment is for the Gateway API.
var gatewayEnvironment = []string{"PILOT_ENABLE_GATEWAY_API=true", "PILOT_ENABLE_AMBIENT=true", "AMBIENT_ENABLE_STATUS=false",
	"PILOT_ENABLE_SENDING_HBONE=false",                                                  // which takes certificates
	"AMBIENT_ENABLE_MULTI_NETWORK_WAYPOINT=false", "AMBIENT_ENABLE_MULTI_NETWORK=false", // which take Istio's own Envoy
	"PILOT_ENABLE_GATEWAY_API_DEPLOYMENT_CONTROLLER=false"}

// startIstiod runs a replica until it is ready, and makes its Pod.
func (m *Mesh) startIstiod(ctx context.Context, name string) error {
	dir := filepath.Join(m.dir, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	files := map[string]string{"kubeconfig": string(m.Kubeconfig(m.Token(k8stest.Admin))),
		"mesh.yaml": "rootNamespace: " + Namespace + "\n", "networks.yaml": "networks: {}\n"}
	for file, text := range files {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for n := 1; ; n++ {
		ports, err := stack.FreePorts(4)
		if err != nil {
			return err
		}
		at := func(i int) string { return "127.0.0.1:" + ports[i] }
		p, err := stack.Run(filepath.Join(m.folder, "pilot-discovery"), "pilot-discovery", append([]string{"POD_NAME=" + name}, m.env...),
			"discovery", "--kubeconfig="+filepath.Join(dir, "kubeconfig"), "--meshConfig="+filepath.Join(dir, "mesh.yaml"),
			"--networksConfig="+filepath.Join(dir, "networks.yaml"), "--registries=Kubernetes", "--domain=cluster.local",
			"--httpAddr="+at(0), "--grpcAddr="+at(1), "--httpsAddr=", "--secureGRPCAddr=", "--monitoringAddr="+at(2),
			"--ctrlz_port="+ports[3])
		if err != nil {
			return err
		}
		err = p.Await(ctx, func(ctx context.Context) error { return ready(ctx, "http://"+at(0)+"/ready") })
		if err != nil {
			p.Stop()
			if n < attempts && strings.Contains(err.Error(), "address already in use") {
				continue
			}
			return err
		}
		m.mu.Lock()
		m.istiods = append(m.istiods, &istiod{Process: p, xds: at(1)})
		m.mu.Unlock()
		_, err = m.pod(ctx, Namespace, name, map[string]string{"app": "istiod", "istio": "pilot"}, map[int]string{MonitoringPort: at(2)})
		return err
	}
}

// ready takes only 200 for an answer, and does not ask for long.
func ready(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	resp, err := fetch(ctx, url)
	if err == nil && resp.Status != http.StatusOK {
		err = fmt.Errorf("%s: status %d: %s", url, resp.Status, resp.Body)
	}
	return err
}

// Response is an answer to a request.
type Response struct {
	Status int
	Header http.Header
	Body   string // at most 64 KiB of it
}

// fetch asks by a connection of its own.
func fetch(ctx context.Context, url string) (Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return Response{}, err
	}
	transport := &http.Transport{DisableKeepAlives: true}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return Response{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return Response{resp.StatusCode, resp.Header, string(body)}, err
}
