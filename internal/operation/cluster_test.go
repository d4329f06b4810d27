package operation_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/kube"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/templates"
)

// users of the API server: the adapter has the rights of templates/rbac/base.yaml, and nobody has none.
const (
	adapterUser = "adapter"
	nobody      = "nobody"
)

// servers are what the tests of clusters share: one API server with Istio's kinds, started by the first of them.
type servers struct {
	*k8stest.Server
	dir    string
	client *http.Client
}

var startServer = sync.OnceValues(func() (*servers, error) {
	dir, err := os.MkdirTemp("", "operation")
	if err != nil {
		return nil, err
	}
	s := &servers{dir: dir, client: &http.Client{}}
	shared = s
	if s.Server, err = k8stest.Start(context.Background(), dir, k8stest.Options{Users: []string{adapterUser, nobody}}); err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.CA)
	s.client.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	crds, err := os.ReadFile("../mesh/testdata/istio/crds.yaml")
	if err != nil {
		return nil, err
	}
	base, _ := templates.RBAC("base")
	for _, text := range []string{string(crds), strings.ReplaceAll(base, "{kind: ServiceAccount, namespace: meshery-filters, name: meshery-filters}",
		"{kind: User, apiGroup: rbac.authorization.k8s.io, name: "+adapterUser+"}")} {
		for d := yaml.NewDecoder(strings.NewReader(text)); ; {
			var o map[string]any
			if err := d.Decode(&o); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return nil, err
			}
			if code, answer, err := s.ask("POST", collection(o), o); err != nil || code != http.StatusCreated {
				return nil, fmt.Errorf("make %v: %d %v %w", o["kind"], code, answer["message"], err)
			}
		}
	}
	for _, path := range []string{"/apis/extensions.istio.io/v1alpha1/trafficextensions", "/apis/networking.istio.io/v1alpha3/envoyfilters"} {
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
			code, _, err := s.ask("GET", path, nil)
			if code == http.StatusOK {
				break
			}
			if time.Now().After(deadline) {
				return nil, fmt.Errorf("%s is not served: %d %w", path, code, err)
			}
		}
	}
	return s, nil
})

// shared is the server, if it was started.
var shared *servers

func stopServer() {
	if shared == nil {
		return
	}
	if shared.Server != nil {
		shared.Stop()
	}
	shared.client.CloseIdleConnections()
	os.RemoveAll(shared.dir)
}

var plurals = map[string]string{"Namespace": "namespaces", "ServiceAccount": "serviceaccounts", "ClusterRole": "clusterroles", "ClusterRoleBinding": "clusterrolebindings",
	"Role": "roles", "RoleBinding": "rolebindings", "CustomResourceDefinition": "customresourcedefinitions"}

func collection(o map[string]any) string {
	path := "/apis/" + o["apiVersion"].(string)
	if o["apiVersion"] == "v1" {
		path = "/api/v1"
	}
	if ns := o["metadata"].(map[string]any)["namespace"]; ns != nil {
		path += "/namespaces/" + ns.(string)
	}
	return path + "/" + plurals[o["kind"].(string)]
}

// ask makes a request as somebody who may do everything.
func (s *servers) ask(method, path string, body any) (int, map[string]any, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var data []byte
	if body != nil {
		var err error
		if data, err = json.Marshal(body); err != nil {
			return 0, nil, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, s.URL+path, bytes.NewReader(data))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+s.Token(k8stest.Admin))
	req.Header.Set("Content-Type", "application/json")
	if method == "PATCH" {
		req.Header.Set("Content-Type", "application/apply-patch+yaml")
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	var answer map[string]any
	text, err := io.ReadAll(resp.Body)
	if err == nil {
		_ = json.Unmarshal(text, &answer)
	}
	return resp.StatusCode, answer, err
}

// clusterRig is a rig whose requests bring kubeconfigs, and a namespace of the test's own.
type clusterRig struct {
	*rig
	*servers
	ns         string
	kubeconfig string // of the adapter's user
}

var namespaces struct {
	sync.Mutex
	n int
}

func newClusterRig(t *testing.T, change ...func(*operation.Options)) *clusterRig {
	t.Helper()
	return startClusterRig(t, t.TempDir(), change...)
}

func startClusterRig(t *testing.T, state string, change ...func(*operation.Options)) *clusterRig {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a Kubernetes API server")
	}
	s, err := startServer()
	if err != nil {
		t.Fatal(err)
	}
	pool := kube.NewPool(kube.Options{Log: slog.New(slog.DiscardHandler)})
	t.Cleanup(pool.Close)
	r := startRig(t, state, append([]func(*operation.Options){func(o *operation.Options) {
		o.Clusters = func(kubeconfig []byte) (operation.Cluster, error) {
			c, err := pool.Open(kubeconfig)
			if err != nil {
				return nil, err
			}
			return opened{c}, nil
		}
	}}, change...)...)
	namespaces.Lock()
	namespaces.n++
	ns := fmt.Sprintf("shop-%d", namespaces.n)
	namespaces.Unlock()
	c := &clusterRig{rig: r, servers: s, ns: ns, kubeconfig: string(s.Kubeconfig(s.Token(adapterUser)))}
	if code, answer, err := c.ask("POST", "/api/v1/namespaces", map[string]any{"metadata": map[string]any{"name": ns}}); code != http.StatusCreated {
		t.Fatal(code, answer["message"], err)
	}
	return c
}

// opened is a cluster as operations want it.
type opened struct{ *kube.Cluster }

func (c opened) Target(ctx context.Context, mesh string, t filter.Target) (operation.ClusterTarget, error) {
	read, err := c.Cluster.Target(ctx, mesh, t)
	if err != nil {
		return nil, err
	}
	return read, nil
}

// apply asks for documents of the test's namespace.
func (c *clusterRig) apply(docs ...string) operation.Request {
	return c.request("apply_filter", docs...)
}

func (c *clusterRig) request(op string, docs ...string) operation.Request {
	return operation.Request{Operation: op, Namespace: c.ns, Body: strings.Join(docs, "---\n"), Kubeconfigs: []string{c.kubeconfig}}
}

// on is a document for the pods with the label app.
func on(app, name string, spec ...string) string {
	return doc(name, append([]string{"mesh: istio", "target: {kind: Workload, labels: {app: " + app + "}}"}, spec...)...)
}

// objects are what is in the test's namespace of a kind, by the filter that each is for.
func (c *clusterRig) objects(kind string) map[string]map[string]any {
	c.t.Helper()
	path := map[string]string{"EnvoyFilter": "networking.istio.io/v1alpha3/namespaces/%s/envoyfilters",
		"TrafficExtension": "extensions.istio.io/v1alpha1/namespaces/%s/trafficextensions"}[kind]
	code, list, err := c.ask("GET", "/apis/"+fmt.Sprintf(path, c.ns), nil)
	if code != http.StatusOK {
		c.t.Fatal(code, list["message"], err)
	}
	all := map[string]map[string]any{}
	for _, o := range list["items"].([]any) {
		meta := o.(map[string]any)["metadata"].(map[string]any)
		annotations := meta["annotations"].(map[string]any)
		all[strings.TrimPrefix(annotations["filters.meshery.io/filter"].(string), c.ns+"/")] = o.(map[string]any)
	}
	return all
}

// holds checks which filters have objects of a kind.
func (c *clusterRig) holds(kind string, names ...string) map[string]map[string]any {
	c.t.Helper()
	objects := c.objects(kind)
	ok := len(objects) == len(names)
	for _, n := range names {
		ok = ok && objects[n] != nil
	}
	if !ok {
		c.t.Fatalf("there are the %ss %v, and should be %v", kind, keys(objects), names)
	}
	return objects
}

func keys[V any](m map[string]V) (all []string) {
	for k := range m {
		all = append(all, k)
	}
	return all
}

// inventories are the ConfigMaps of the test's targets.
func (c *clusterRig) inventories() (all []map[string]any) {
	c.t.Helper()
	code, list, err := c.ask("GET", "/api/v1/namespaces/meshery-filters/configmaps", nil)
	if code != http.StatusOK {
		c.t.Fatal(code, list["message"], err)
	}
	for _, o := range list["items"].([]any) {
		data, _ := o.(map[string]any)["data"].(map[string]any)
		if target, _ := data["target"].(string); strings.Contains(target, c.ns+" ") || strings.HasSuffix(target, c.ns) {
			all = append(all, o.(map[string]any))
		}
	}
	return all
}

// says checks that a story has these texts, in this order.
func says(t *testing.T, events []event.Event, want ...string) {
	t.Helper()
	lines := texts(events)
	at := 0
	for _, w := range want {
		for at < len(lines) && !strings.Contains(lines[at], w) {
			at++
		}
		if at == len(lines) {
			t.Fatalf("nothing says %q in its place:\n%s", w, strings.Join(lines, "\n"))
		}
	}
}

func version(o map[string]any) string {
	return o["metadata"].(map[string]any)["resourceVersion"].(string)
}

func TestFiltersAreAppliedToAClusterAndTakenAway(t *testing.T) {
	c := newClusterRig(t)
	host := strings.TrimPrefix(c.URL, "https://")
	q := c.apply(on("web", "hello"))
	events := c.ok(q)
	says(t, events, "accepted its configuration in a dry run", "cluster "+host+": EnvoyFilter/"+c.ns+"/hello-web-", "created",
		problem.NotVerified.Code, "is applied to Workload "+c.ns+" {app=web} (not verified) in cluster "+host)
	was := version(c.holds("EnvoyFilter", "hello")["hello"])
	if n := len(c.inventories()); n != 1 {
		t.Fatalf("%d inventories", n)
	}

	// Again: nothing is written.
	events = c.ok(q)
	says(t, events, "is unchanged on Workload "+c.ns+" {app=web}")
	if now := version(c.holds("EnvoyFilter", "hello")["hello"]); now != was {
		t.Errorf("what is unchanged was written: %s, then %s", was, now)
	}

	// A second one, the order of both, and the first one away.
	says(t, c.ok(c.apply(on("web", "second"))), "created", "requests meet "+c.ns+"/hello, "+c.ns+"/second")
	says(t, c.ok(c.apply(on("web", "second", "priority: 5"))), "updated", "requests meet "+c.ns+"/second, "+c.ns+"/hello")
	c.holds("EnvoyFilter", "hello", "second")
	says(t, c.ok(c.request("remove_filter", doc("hello"))), "EnvoyFilter/"+c.ns+"/hello-web-", "removed", c.ns+"/hello removed from", "requests meet "+c.ns+"/second")
	c.holds("EnvoyFilter", "second")

	// Moving it, and deleting by the operation that applied it.
	says(t, c.ok(c.apply(on("api", "second"))), "created", "removed", "it moved to Workload "+c.ns+" {app=api}")
	c.holds("EnvoyFilter", "second")
	q = c.apply(on("api", "second"))
	q.Delete = true
	says(t, c.ok(q), c.ns+"/second removed from Workload "+c.ns+" {app=api}", "no filter is left there")
	c.holds("EnvoyFilter")
	if n := len(c.inventories()); n != 0 {
		t.Errorf("%d inventories are left", n)
	}
	if e := c.fails(problem.FilterNotFound, q); !strings.Contains(e.Details, c.ns+"/second") {
		t.Errorf("%s", e.Details)
	}
}
