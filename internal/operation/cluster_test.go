package operation_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/kube"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/plan"
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
	dir     string
	client  *http.Client
	options k8stest.Options // with Users, if they are others than usual
}

var startServer = sync.OnceValues(func() (*servers, error) {
	dir, err := os.MkdirTemp("", "operation")
	if err != nil {
		return nil, err
	}
	shared = &servers{dir: dir, client: &http.Client{}}
	return shared, shared.start(context.Background())
})

// newAPIServer is another one, for one test.
func newAPIServer(t *testing.T) *servers {
	t.Helper()
	s := &servers{dir: t.TempDir(), client: &http.Client{}}
	t.Cleanup(s.stop)
	if err := s.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

// start gives the server Istio's kinds, and the adapter's user its rights.
func (s *servers) start(ctx context.Context) (err error) {
	if s.options.Users == nil {
		s.options.Users = []string{adapterUser, nobody}
	}
	if s.Server, err = k8stest.Start(ctx, s.dir, s.options); err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.CA)
	s.client.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	base, _ := templates.RBAC("base")
	if err := s.post(bound(base, adapterUser), ""); err != nil {
		return err
	}
	secrets, _ := templates.RBAC("secrets")
	if err := s.post(secrets, ""); err != nil {
		return err
	}
	if err := s.make("../mesh/testdata/istio/crds.yaml", ""); err != nil {
		return err
	}
	for _, path := range []string{"/apis/extensions.istio.io/v1alpha1/trafficextensions", "/apis/networking.istio.io/v1alpha3/envoyfilters"} {
		if err := s.serves(path); err != nil {
			return err
		}
	}
	return nil
}

// bound has roles bound to a user.
func bound(roles, user string) string {
	return strings.ReplaceAll(roles, "{kind: ServiceAccount, namespace: meshery-filters, name: meshery-filters}",
		"{kind: User, apiGroup: rbac.authorization.k8s.io, name: "+user+"}")
}

// serves waits until a path is served.
func (s *servers) serves(path string) error {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		code, _, err := s.ask("GET", path, nil)
		if code == http.StatusOK {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is not served: %d %w", path, code, err)
		}
	}
}

// make makes what is in a file, of kinds that define this one if one is given.
func (s *servers) make(file, kind string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return s.post(string(text), kind)
}

func (s *servers) post(text, kind string) error {
	for d := yaml.NewDecoder(strings.NewReader(text)); ; {
		var all map[string]any
		if err := d.Decode(&all); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if spec, _ := all["spec"].(map[string]any); kind != "" {
			if names, _ := spec["names"].(map[string]any); names["kind"] != kind {
				continue
			}
		}
		if code, answer, err := s.ask("POST", collection(all), all); err != nil || code != http.StatusCreated {
			return fmt.Errorf("make %v: %d %v %w", all["kind"], code, answer["message"], err)
		}
	}
}

func (s *servers) stop() {
	if s.Server != nil {
		s.Stop()
	}
	s.client.CloseIdleConnections()
}

// shared is the server, if it was started.
var shared *servers

func stopServer() {
	if shared != nil {
		shared.stop()
		os.RemoveAll(shared.dir)
	}
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
	c := s.rigOf(t, state, "shop", adapterUser, change...)
	if code, answer, err := c.ask("POST", "/api/v1/namespaces", map[string]any{"metadata": map[string]any{"name": c.ns}}); code != http.StatusCreated {
		t.Fatal(code, answer["message"], err)
	}
	return c
}

// rigOf starts one whose requests bring the kubeconfig of a user, and names a namespace of its own, which is not there yet.
func (s *servers) rigOf(t *testing.T, state, namespace, user string, change ...func(*operation.Options)) *clusterRig {
	t.Helper()
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
	defer namespaces.Unlock()
	namespaces.n++
	return &clusterRig{rig: r, servers: s, ns: fmt.Sprintf("%s-%d", namespace, namespaces.n), kubeconfig: string(s.Kubeconfig(s.Token(user)))}
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

func (c opened) Targets(ctx context.Context) (operation.ClusterTargets, error) {
	read, err := c.Cluster.Targets(ctx)
	return allTargets{read}, err
}

type allTargets struct{ *kube.Targets }

func (a allTargets) Target(mesh string, t filter.Target) operation.ClusterTarget {
	return a.Targets.Target(mesh, t)
}

// Loaded can be replaced by a test: there are no proxies here.
func (opened) Loaded(context.Context, plan.Plan) iter.Seq2[plan.Loaded, error] {
	return func(yield func(plan.Loaded, error) bool) {
		yield(plan.Loaded{}, problem.NotVerified.New("nobody looks here"))
	}
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
		name := strings.TrimPrefix(annotations["filters.meshery.io/filter"].(string), c.ns+"/")
		if all[name] != nil {
			c.t.Fatalf("there are two %ss for %s", kind, name)
		}
		all[name] = o.(map[string]any)
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

// inventories are the ConfigMaps of the test's targets that have something.
func (c *clusterRig) inventories() (all []map[string]any) {
	c.t.Helper()
	code, list, err := c.ask("GET", "/api/v1/namespaces/meshery-filters/configmaps", nil)
	if code != http.StatusOK {
		c.t.Fatal(code, list["message"], err)
	}
	for _, o := range list["items"].([]any) {
		data, _ := o.(map[string]any)["data"].(map[string]any)
		if data["objects"] == "null" {
			continue
		}
		if target, _ := data["target"].(string); strings.Contains(target, c.ns+" ") || strings.Contains(target, " "+c.ns+"/") || strings.HasSuffix(target, c.ns) {
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

// as is a kubeconfig of a user, by another name of the server's machine where one is given, which makes it another cluster.
func (c *clusterRig) as(user, machine string) string {
	text := string(c.Kubeconfig(c.Token(user)))
	if machine != "" {
		text = strings.Replace(text, "https://127.0.0.1:", "https://"+machine+":", 1)
	}
	return text
}

func TestAClusterThatFailsNeitherStopsNorHidesTheOthers(t *testing.T) {
	c := newClusterRig(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := l.Addr().String()
	l.Close()
	q := c.apply(on("web", "hello"))
	q.Kubeconfigs = []string{
		c.as(nobody, "localhost"),
		c.kubeconfig,
		strings.ReplaceAll(c.kubeconfig, strings.TrimPrefix(c.URL, "https://"), dead),
		strings.ReplaceAll(c.kubeconfig, "user: {", "user: {exec: {apiVersion: client.authentication.k8s.io/v1, command: id, interactiveMode: Never}, "),
	}
	here := strings.TrimPrefix(c.URL, "https://")
	events := c.run(q)
	last := events[len(events)-1]
	if last.Code != problem.ClustersFailed.Code {
		t.Fatalf("%v", texts(events))
	}
	for _, want := range []string{
		"3 of 4 failed",
		"cluster " + strings.Replace(here, "127.0.0.1", "localhost", 1) + " failed: " + problem.RightMissing.Summary,
		"cluster " + dead + " failed: " + problem.ClusterUnreachable.Summary,
		"kube_configs[3] failed: " + problem.KubeconfigRefused.Summary, "user.exec",
		"Done: " + c.ns + "/hello (sha256 ", "in cluster " + here + "; requests meet " + c.ns + "/hello",
	} {
		if !strings.Contains(last.Details, want) {
			t.Errorf("the end does not say %q:\n%s", want, last.Details)
		}
	}
	if strings.Contains(strings.Join(texts(events), ""), c.Token(adapterUser)) {
		t.Error("an event has a token")
	}
	c.holds("EnvoyFilter", "hello")

	// Where it was found it is taken away, and where that cannot be asked is told.
	q.Operation = "remove_filter"
	if last := c.fails(problem.ClustersFailed, q); !strings.Contains(last.Details, c.ns+"/hello removed from") {
		t.Errorf("%s", last.Details)
	}
	c.holds("EnvoyFilter")
	status := operation.Request{Operation: "filters_status", Kubeconfigs: []string{c.kubeconfig, c.as(nobody, "localhost")}}
	if last := c.fails(problem.ClustersFailed, status); !strings.Contains(last.Details, "resource configmaps") {
		t.Errorf("%s", last.Details)
	}
}

func TestTwoClustersAreChangedSideBySide(t *testing.T) {
	c := newClusterRig(t)
	other := newAPIServer(t)
	if code, answer, err := other.ask("POST", "/api/v1/namespaces", map[string]any{"metadata": map[string]any{"name": c.ns}}); code != http.StatusCreated {
		t.Fatal(code, answer["message"], err)
	}
	q := c.apply(on("web", "hello"))
	q.Kubeconfigs = append(q.Kubeconfigs, string(other.Kubeconfig(other.Token(adapterUser))))
	events := c.ok(q)
	for _, s := range []*servers{c.servers, other} {
		name := "cluster " + strings.TrimPrefix(s.URL, "https://")
		says(t, events, name+": EnvoyFilter/"+c.ns+"/hello-web-")
		says(t, events[len(events)-1:], "in "+name)
		if code, _, err := s.ask("GET", c.pathOf(events), nil); code != http.StatusOK {
			t.Errorf("%s: %d %v", name, code, err)
		}
	}
	q.Body = doc("hello")
	q.Operation = "filters_status"
	status := strings.Join(texts(c.ok(q)), "\n") // of all targets that other tests have left, too
	for _, s := range []*servers{c.servers, other} {
		if want := "cluster " + strings.TrimPrefix(s.URL, "https://") + ": Workload " + c.ns + " {app=web}: version "; !strings.Contains(status, want) {
			t.Errorf("nothing says %q:\n%s", want, status)
		}
	}
	q.Operation = "remove_filter"
	says(t, c.ok(q), "1 filters removed from 2 targets")

	// The mesh is the one that all of them show.
	automatic := strings.Replace(on("web", "hello"), "mesh: istio", "mesh: auto", 1)
	q = c.apply(automatic)
	q.Kubeconfigs = append(q.Kubeconfigs, string(other.Kubeconfig(other.Token(adapterUser))))
	c.ok(q)
	if err := other.make("../kube/testdata/crds.yaml", "ServiceDefaults"); err != nil {
		t.Fatal(err)
	}
	fresh := newClusterRig(t) // that does not remember what the clusters served
	q.ID = ""
	if _, err := fresh.runner.Submit(t.Context(), q); !errors.Is(err, problem.MeshAmbiguous) ||
		!strings.Contains(err.Error(), "consul in cluster "+strings.TrimPrefix(other.URL, "https://")) || !strings.Contains(err.Error(), "istio in cluster") {
		t.Errorf("%v", err)
	}

	// On Consul, too, what a change that was cut off has left is found by its filter.
	entries := "/apis/consul.hashicorp.com/v1alpha1/namespaces/" + c.ns + "/servicedefaults"
	if err := other.serves(entries); err != nil {
		t.Fatal(err)
	}
	user := map[string]any{"apiVersion": "consul.hashicorp.com/v1alpha1", "kind": "ServiceDefaults", "metadata": map[string]any{"name": "web"}, "spec": map[string]any{"protocol": "http"}}
	if code, answer, err := other.ask("POST", entries, user); code != http.StatusCreated {
		t.Fatal(code, answer["message"], err)
	}
	halfway(t, other, c.ns, doc("half", "mesh: consul", "target: {kind: Service, name: web}",
		"module: {url: https://there/, sha256: "+strings.Repeat("a", 64)+"}", "delivery: {mode: local, localPath: /opt}"))
	extensions := func() any {
		_, o, _ := other.ask("GET", entries+"/web", nil)
		return o["spec"].(map[string]any)["envoyExtensions"]
	}
	if extensions() == nil {
		t.Fatal("nothing is begun")
	}
	q = fresh.request("remove_filter", doc("half", "mesh: consul", "target: {kind: Service, name: web}"))
	q.Namespace, q.Kubeconfigs = c.ns, []string{string(other.Kubeconfig(other.Token(adapterUser)))}
	fresh.ok(q)
	if left := extensions(); left != nil {
		t.Errorf("there is still %v", left)
	}
}

// halfway applies a document of Consul's to a cluster as an adapter does that is killed before it commits.
func halfway(t *testing.T, s *servers, namespace, document string) {
	t.Helper()
	pool := kube.NewPool(kube.Options{Log: slog.New(slog.DiscardHandler)})
	defer pool.Close()
	cluster, err := pool.Open(s.Kubeconfig(s.Token(adapterUser)))
	if err != nil {
		t.Fatal(err)
	}
	halfwayIn(t, opened{cluster}, namespace, document)
}

// halfwayIn is halfway in a cluster that is open.
func halfwayIn(t *testing.T, cluster operation.Cluster, namespace, document string) {
	t.Helper()
	filters, err := filter.Read([]byte(document), namespace)
	if err != nil {
		t.Fatal(err)
	}
	f, err := mesh.Consul{}.Complete(filters[0])
	if err != nil {
		t.Fatal(err)
	}
	chain := filter.Chain{Mesh: "consul", Target: f.Spec.Target}.With(f)
	target, err := cluster.Target(t.Context(), chain.Mesh, chain.Target)
	if err != nil {
		t.Fatal(err)
	}
	found, err := cluster.Read(t.Context(), mesh.Consul{}.Reads(chain))
	if err != nil {
		t.Fatal(err)
	}
	p, err := mesh.Consul{}.Plan(chain, plan.World{Cluster: found})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := target.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
}

// pathOf is that of the one EnvoyFilter that a story tells of.
func (c *clusterRig) pathOf(events []event.Event) string {
	c.t.Helper()
	for _, e := range events {
		if _, name, ok := strings.Cut(e.Summary, "EnvoyFilter/"+c.ns+"/"); ok {
			return "/apis/networking.istio.io/v1alpha3/namespaces/" + c.ns + "/envoyfilters/" + strings.Fields(name)[0]
		}
	}
	c.t.Fatalf("no EnvoyFilter in %v", texts(events))
	return ""
}

func TestWhatAClusterDoesNotTakeIsTold(t *testing.T) {
	c := newClusterRig(t)
	host := strings.TrimPrefix(c.URL, "https://")
	q := c.apply(on("web", "hello"))

	// A missing right, by name, and nothing is left behind.
	q.Kubeconfigs = []string{c.as(nobody, "")}
	if last := c.fails(problem.RightMissing, q); !strings.Contains(last.Details, host) || !strings.Contains(last.Details, "verb list, resource configmaps, namespace meshery-filters") {
		t.Errorf("%s", last.Details)
	}
	c.holds("EnvoyFilter")

	// A field that another manager has, until it is taken over by force.
	q.Kubeconfigs = []string{c.kubeconfig}
	events := c.ok(q)
	path := c.pathOf(events)
	code, o, err := c.ask("PATCH", path+"?fieldManager=somebody&force=true", map[string]any{"apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter",
		"metadata": map[string]any{"name": path[strings.LastIndex(path, "/")+1:], "namespace": c.ns}, "spec": map[string]any{"priority": 7}})
	if code != http.StatusOK {
		t.Fatal(code, o["message"], err)
	}
	if last := c.fails(problem.FieldConflict, q); !strings.Contains(last.Details, "somebody") || !strings.Contains(last.Details, ".spec.priority") {
		t.Errorf("%s", last.Details)
	}
	if now := c.holds("EnvoyFilter", "hello")["hello"]; version(now) != version(o) {
		t.Error("something was written")
	}
	status := operation.Request{Operation: "filters_status", Kubeconfigs: q.Kubeconfigs}
	says(t, c.ok(c.apply(on("web", "hello", "force: true"))), "updated")

	// What somebody deletes shows, and is put back.
	mine := "Workload " + c.ns + " {app=web}: version "
	if text := strings.Join(texts(c.ok(status)), "\n"); !strings.Contains(text, mine) || strings.Contains(text, problem.Drift.Code+" "+problem.Drift.Summary+": "+mine) {
		t.Errorf("%s", text)
	}
	if code, answer, err := c.ask("DELETE", path, nil); code != http.StatusOK {
		t.Fatal(code, answer["message"], err)
	}
	says(t, c.ok(status), mine, "somebody else has changed it; applying it again would change: EnvoyFilter/"+c.ns)
	says(t, c.ok(c.apply(on("web", "hello", "force: true"))), "created")
	c.holds("EnvoyFilter", "hello")

	// A field that Istio has no word for.
	says(t, c.ok(c.apply(on("api", "late", "phase: authz"))), problem.FieldLost.Code+" cluster "+host, c.ns+"/late: spec.phase")

	// A mesh that is not there.
	consul := c.apply(doc("late", "mesh: consul", "target: {kind: Service, name: web}", "delivery: {mode: local, localPath: /opt/filters}"))
	if last := c.fails(problem.KindNotServed, consul); !strings.Contains(last.Details, "cluster "+host) || strings.Count(last.Details, host) != 1 ||
		!strings.Contains(last.Details, "ServiceDefaults of consul.hashicorp.com") {
		t.Errorf("%s", last.Details)
	}

	// A namespace that is not there.
	q = c.apply(strings.Replace(on("web", "lost"), "{name: lost}", "{name: lost, namespace: nowhere}", 1))
	q.Namespace = "nowhere"
	if last := c.fails(problem.NamespaceUnavailable, q); !strings.Contains(last.Details, "nowhere") {
		t.Errorf("%s", last.Details)
	}
}

func TestWhatNoClusterCanTakeIsRefusedAtOnce(t *testing.T) {
	c := newClusterRig(t)
	exec := strings.ReplaceAll(c.kubeconfig, "user: {", "user: {exec: {apiVersion: client.authentication.k8s.io/v1, command: id, interactiveMode: Never}, ")
	with := func(kubeconfig string, q operation.Request) operation.Request {
		q.Kubeconfigs = []string{kubeconfig}
		return q
	}
	inRoot := c.apply(on("web", "x"))
	inRoot.Namespace = "istio-system"
	for name, q := range map[string]struct {
		kind *problem.Kind
		want string
		q    operation.Request
	}{
		"a kubeconfig that runs a program": {problem.KubeconfigRefused, "kube_configs[0]: user.exec", with(exec, c.apply(on("web", "x")))},
		"that, and no mesh":                {problem.KubeconfigRefused, "kube_configs[0]: user.exec", with(exec, c.apply(doc("x")))},
		"a removal with it":                {problem.KubeconfigRefused, "kube_configs[0]: user.exec", with(exec, c.request("remove_filter", on("web", "x")))},
		"no kubeconfig":                    {problem.ClusterMissing, "istio", operation.Request{Operation: "remove_filter", Body: on("web", "x")}},
		"the root namespace":               {problem.TargetTooWide, "istio-system is for the whole mesh", inRoot},
		"a whole mesh":                     {problem.TargetTooWide, "every proxy of the mesh", c.apply(doc("x", "mesh: istio", "target: {kind: Mesh}"))},
		"another namespace":                {problem.TargetTooWide, "the namespace other", c.apply(doc("x", "mesh: istio", "target: {kind: Service, name: api, namespace: other}"))},
		"a secret of another namespace": {problem.InvalidDocument, "read from the filter's namespace other, and its target is in " + c.ns,
			c.apply(strings.ReplaceAll(doc("x", "mesh: istio", "target: {kind: Workload, namespace: "+c.ns+", labels: {app: web}}",
				"config: {token: {$secret: {name: a, key: b}}}"), "{name: x}", "{name: x, namespace: other}"))},
		"a mesh that cannot be asked": {problem.ClusterUnauthenticated, "cluster ", with(strings.ReplaceAll(c.kubeconfig, c.Token(adapterUser), "made-up"), c.apply(doc("x")))},
	} {
		id, err := c.runner.Submit(t.Context(), q.q)
		if !errors.Is(err, q.kind) || !strings.Contains(err.Error(), q.want) {
			t.Errorf("%s: %s %v", name, id, err)
		}
	}
	// What is for plain Envoys does not ask what else a request brings.
	c.ok(with(exec, apply(doc("plain", "mesh: envoy"))))
	c.ok(with(exec, remove(doc("plain", "mesh: envoy"))))
}

func TestOnlyWhatTouchesTheSameFilterOrTargetOfTheSameClusterWaits(t *testing.T) {
	c := newClusterRig(t, func(o *operation.Options) { o.Queue = idle{o.Queue, make(chan struct{})} })
	submit := func(kubeconfig, body string) (waits bool) {
		t.Helper()
		q := c.apply(body)
		q.Kubeconfigs = []string{kubeconfig}
		id, err := c.runner.Submit(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		events, _, err := c.events.Of(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		return len(events) > 0 && strings.Contains(events[0].Summary, "Waits for operation")
	}
	other := c.as(adapterUser, "localhost")
	for i, q := range []struct {
		kubeconfig, body string
		waits            bool
	}{
		{c.kubeconfig, on("web", "a"), false},
		{other, on("web", "a"), false},
		{c.kubeconfig, on("api", "b"), false},
		{c.kubeconfig, on("web", "c"), true},
		{c.kubeconfig, on("db", "a"), true},
		{c.as(nobody, ""), on("web", "d"), true}, // another user of the same cluster
		{other, on("db", "e"), false},
	} {
		if submit(q.kubeconfig, q.body) != q.waits {
			t.Errorf("request %d waits: %v", i, !q.waits)
		}
	}
}

// failing is a cluster whose targets cannot be committed, as when a proxy rejects what was applied.
type failing struct {
	operation.Cluster
	*failure
}

// failure is on when the next chain fails, and counts those that are put back.
type failure struct {
	on   atomic.Bool
	back atomic.Int32
}

type failingTarget struct {
	operation.ClusterTarget
	*failure
}

func (c failing) Target(ctx context.Context, mesh string, t filter.Target) (operation.ClusterTarget, error) {
	read, err := c.Cluster.Target(ctx, mesh, t)
	return failingTarget{read, c.failure}, err
}

func (c failing) Targets(ctx context.Context) (operation.ClusterTargets, error) {
	read, err := c.Cluster.Targets(ctx)
	return failingTargets{read, c.failure}, err
}

type failingTargets struct {
	operation.ClusterTargets
	*failure
}

func (f failingTargets) Target(mesh string, t filter.Target) operation.ClusterTarget {
	return failingTarget{f.ClusterTargets.Target(mesh, t), f.failure}
}

func (t failingTarget) Apply(ctx context.Context, p plan.Plan) ([]plan.Change, error) {
	if p.Back {
		t.back.Add(1)
	}
	return t.ClusterTarget.Apply(ctx, p)
}

func (t failingTarget) Commit(ctx context.Context) error {
	if t.on.CompareAndSwap(true, false) {
		return problem.ProxyRejected.New("that proxy")
	}
	return t.ClusterTarget.Commit(ctx)
}

func TestWhatIsNotProvedIsTakenBackAndTheChainBeforeHoldsAgain(t *testing.T) {
	var fail failure
	c := newClusterRig(t, func(o *operation.Options) {
		open := o.Clusters
		o.Clusters = func(k []byte) (operation.Cluster, error) {
			cl, err := open(k)
			return failing{cl, &fail}, err
		}
	})
	fail.on.Store(true)
	c.fails(problem.ProxyRejected, c.apply(on("web", "a")))
	c.holds("EnvoyFilter")
	if n := len(c.inventories()); n != 0 {
		t.Errorf("%d inventories of nothing", n)
	}
	c.ok(c.apply(on("web", "a")))
	before := c.holds("EnvoyFilter", "a")["a"]["spec"]
	fail.on.Store(true)
	if last := c.fails(problem.ProxyRejected, c.apply(on("web", "a", "priority: 9"), on("web", "b"))); !strings.Contains(last.Details, "taken back") {
		t.Errorf("%s", last.Details)
	}
	if got := c.holds("EnvoyFilter", "a")["a"]["spec"]; !reflect.DeepEqual(got, before) {
		t.Errorf("it is %v, and was %v", got, before)
	}
	if n := fail.back.Load(); n != 2 {
		t.Errorf("%d chains were known as put back", n)
	}
	says(t, c.ok(c.apply(on("web", "a"))), "is unchanged")
}

func TestObjectsThatDoNotNameTheirSandboxShareOne(t *testing.T) {
	c := newClusterRig(t)
	inline := "module: {inline: " + base64.StdEncoding.EncodeToString(probe(t)) + "}"
	const first, second = "config: {once: sandbox}", "config: {once: sandbox, trapPath: /x}"
	c.ok(c.apply(on("web", "a", inline, first)))
	c.ok(c.apply(on("web", "b", inline, second)))
	const plugin = "delivery: {mode: local, localPath: /modules}"
	c.ok(c.apply(on("api", "c", inline, first, plugin)))
	c.fails(problem.SandboxSpoiled, c.apply(on("api", "d", inline, second, plugin)))
	c.holds("TrafficExtension", "c")
}

// unmoved is a cluster with one proxy, which stays where it is.
type unmoved struct{ operation.Cluster }

func (unmoved) Loaded(ctx context.Context, _ plan.Plan) iter.Seq2[plan.Loaded, error] {
	return func(yield func(plan.Loaded, error) bool) {
		if yield(plan.Loaded{Proxies: []plan.ProxyStatus{{Proxy: plan.Proxy{ID: "shop/web-1"}, Expected: true, State: plan.Waiting, Detail: "it sleeps"}}}, nil) {
			<-ctx.Done()
			yield(plan.Loaded{}, ctx.Err())
		}
	}
}

func TestWhereAProxyStaysIsTold(t *testing.T) {
	c := newClusterRig(t, func(o *operation.Options) {
		open := o.Clusters
		o.Clusters = func(k []byte) (operation.Cluster, error) {
			cl, err := open(k)
			return unmoved{cl}, err
		}
	})
	last := c.fails(problem.ProxyTimeout, c.apply(on("web", "a", "wait: {timeout: 200ms}")))
	if want := "no answer from shop/web-1\nOf shop/web-1: it sleeps"; !strings.Contains(last.Details, want) {
		t.Errorf("%q is not in %s", want, last.Details)
	}
}

func TestATrialGoesWhereTheOthersCannotFollow(t *testing.T) {
	c := newClusterRig(t, func(o *operation.Options) {
		open := o.Clusters
		o.Clusters = func(k []byte) (operation.Cluster, error) {
			cl, err := open(k)
			return crowded{cl.(opened)}, err
		}
	})
	path := c.pathOf(c.ok(c.apply(on("web", "b", "rollout: all"))))
	name := path[strings.LastIndex(path, "/")+1:]
	c.ok(c.request("remove_filter", doc("b")))
	c.ok(c.apply(on("web", "a", "rollout: all")))
	code, o, err := c.ask("PATCH", path+"?fieldManager=somebody", map[string]any{"apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter",
		"metadata": map[string]any{"name": name, "namespace": c.ns}, "spec": map[string]any{"priority": 12345}})
	if code != http.StatusCreated {
		t.Fatal(code, o["message"], err)
	}
	if last := c.fails(problem.FieldConflict, c.apply(on("web", "b"))); !strings.Contains(last.Details, "is taken back") {
		t.Errorf("%s", last.Details)
	}
	_, list, err := c.ask("GET", path[:strings.LastIndex(path, "/")], nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range list["items"].([]any) {
		if name := o.(map[string]any)["metadata"].(map[string]any)["name"].(string); strings.HasSuffix(name, "-first") {
			t.Errorf("%s stays behind", name)
		}
	}
	says(t, c.ok(c.apply(on("web", "a"))), "unchanged")
}

func TestAdaptersThatChangeTheSameTargetOfAClusterLoseNothing(t *testing.T) {
	first := newClusterRig(t)
	rigs := []*clusterRig{first, newClusterRig(t), newClusterRig(t)} // which share nothing but the cluster
	ids := make([][]string, len(rigs))
	var names []string
	for n := range 3 {
		for i, c := range rigs {
			c.ns = first.ns
			name := fmt.Sprintf("f-%d-%d", i, n)
			names = append(names, name)
			id, err := c.runner.Submit(t.Context(), c.apply(on("web", name)))
			if err != nil {
				t.Fatal(err)
			}
			ids[i] = append(ids[i], id)
		}
	}
	for i, c := range rigs {
		for _, id := range ids[i] {
			events := c.story(id)
			if last := events[len(events)-1]; last.Type == event.Error {
				t.Errorf("%v", texts(events))
			}
		}
	}
	first.holds("EnvoyFilter", names...)
	if n := len(first.inventories()); n != 1 {
		t.Errorf("%d inventories", n)
	}
}

func TestAModuleThatTheAdapterHasLostIsTakenFromTheChainThatHasIt(t *testing.T) {
	c := newClusterRig(t)
	inline := base64.StdEncoding.EncodeToString(probe(t))
	live := func() bool {
		t.Helper()
		digests, err := c.runner.LiveModules(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(probe(t))
		return digests[hex.EncodeToString(sum[:])]
	}
	c.ok(c.apply(on("web", "a", "module: {inline: "+inline+"}", "config: {}")))
	if !live() {
		t.Error("a module is not live, and a chain uses it")
	}
	fresh := newClusterRig(t) // another adapter, with nothing in its store
	fresh.ns = c.ns
	says(t, fresh.ok(fresh.apply(on("web", "b"))), "requests meet "+c.ns+"/a, "+c.ns+"/b")
	c.holds("EnvoyFilter", "a", "b")
	c.ok(c.request("remove_filter", doc("a")))
	c.ok(c.request("remove_filter", doc("b")))
	for deadline := time.Now().Add(10 * time.Second); live(); { // an operation that has ended is in the queue for a moment
		if time.Now().After(deadline) {
			t.Fatal("a module is live that nothing uses")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestTheAdaptersOwnClusterIsTheOneThatIsMeantWhateverARequestBrings(t *testing.T) {
	c := newClusterRig(t, func(o *operation.Options) {
		s, err := startServer()
		if err != nil {
			t.Fatal(err)
		}
		own, err := o.Clusters(s.Kubeconfig(s.Token(adapterUser)))
		if err != nil {
			t.Fatal(err)
		}
		o.Own = own
		o.Prepared = map[string]string{"greet": on("web", "prepared")}
	})
	ours := func(q operation.Request) operation.Request {
		q.Kubeconfigs = []string{"whatever"}
		return q
	}
	says(t, c.ok(ours(c.apply(on("web", "hello")))), "created", "is applied to")
	says(t, c.ok(ours(c.apply(doc("other", "target: {kind: Workload, labels: {app: web}}")))), "requests meet "+c.ns+"/hello, "+c.ns+"/other")
	says(t, c.ok(operation.Request{Operation: "greet", Namespace: c.ns}), "requests meet "+c.ns+"/hello, "+c.ns+"/other, "+c.ns+"/prepared")
	objects := c.holds("EnvoyFilter", "hello", "other", "prepared")

	// What the adapter lists has them, and what somebody else has changed.
	listed := func() (st operation.Status) {
		t.Helper()
		all, err := c.runner.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, st := range all {
			if st.Chain.Target.Namespace == c.ns {
				return st
			}
		}
		t.Fatalf("it is not among %d", len(all))
		return st
	}
	if st := listed(); len(st.Chain.Filters) != 3 || st.Problem != "" || st.Loaded.Unverified == "" {
		t.Errorf("%+v", st)
	}
	meta := objects["hello"]["metadata"].(map[string]any)
	path := "/apis/networking.istio.io/v1alpha3/namespaces/" + c.ns + "/envoyfilters/" + meta["name"].(string)
	if code, answer, err := c.ask("DELETE", path, nil); code != http.StatusOK {
		t.Fatal(code, answer["message"], err)
	}
	if st := listed(); !strings.Contains(st.Problem, "EnvoyFilter/"+c.ns+"/"+meta["name"].(string)+" created") {
		t.Errorf("one that is gone: %q", st.Problem)
	}
	c.ok(ours(c.apply(on("web", "hello"))))
	c.holds("EnvoyFilter", "hello", "other", "prepared")
	stranger := ours(c.apply(on("web", "hello")))
	stranger.Caller = operation.Caller{Remote: "192.0.2.7:4242", Foreign: true}
	if _, err := c.runner.Submit(t.Context(), stranger); !errors.Is(err, problem.CallerUnknown) {
		t.Errorf("a stranger who uses the adapter's rights: %v", err)
	}
	elsewhere := ours(c.request("remove_filter", strings.Replace(doc("hello"), "{name: hello}", "{name: hello, namespace: "+c.ns+"}", 1)))
	elsewhere.Namespace = "elsewhere"
	if _, err := c.runner.Submit(t.Context(), elsewhere); !errors.Is(err, problem.TargetTooWide) {
		t.Errorf("a removal from another namespace: %v", err)
	}
	c.ok(ours(c.request("remove_filter", doc("hello"), doc("other"), doc("prepared"))))
	c.holds("EnvoyFilter")
}

func TestAKubeconfigThatCameWithTheConnectionIsForDocumentsThatNameTheMesh(t *testing.T) {
	c := newClusterRig(t)
	implied := func(q operation.Request, kubeconfig string) operation.Request {
		q.Implied, q.Kubeconfigs = true, []string{kubeconfig}
		return q
	}
	c.ok(implied(c.apply(on("web", "hello")), c.kubeconfig))
	c.holds("EnvoyFilter", "hello")
	// Servers that send one with every connection send it for plain Envoys, too, whatever it is.
	says(t, c.ok(implied(c.apply(doc("plain")), "whatever")), "kept for ProxyGroup default")
	says(t, c.ok(implied(operation.Request{Operation: "filters_status"}, "whatever")), "1 target has filters")
	c.ok(implied(c.request("remove_filter", doc("plain")), "whatever"))
	c.ok(implied(c.request("remove_filter", on("web", "hello")), c.kubeconfig))
	c.holds("EnvoyFilter")
}

func TestAStrangerMayUseTheRightsThatItBrings(t *testing.T) {
	c := newClusterRig(t)
	q := c.apply(on("web", "hello"))
	q.Caller = operation.Caller{Remote: "192.0.2.7:4242", Foreign: true}
	c.ok(q)
	c.holds("EnvoyFilter", "hello")
}

// TestWhereverTheProcessIsKilledTheClusterHoldsWhatWasAskedForAtTheEnd kills a process around its requests to the
// cluster, and looks at what its successor makes of what it finds.
func TestWhereverTheProcessIsKilledTheClusterHoldsWhatWasAskedForAtTheEnd(t *testing.T) {
	if text := os.Getenv(killedVariable); text != "" {
		var k killed
		if err := json.Unmarshal([]byte(text), &k); err != nil {
			t.Fatal(err)
		}
		k.run(t)
		return
	}
	if testing.Short() {
		t.Skip("needs a Kubernetes API server")
	}
	step := int64(8)
	if underRace {
		step = 15
	}
	kills := 0
	for fuse := int64(1); ; fuse += step {
		c := newClusterRig(t)
		k := killed{Server: c.URL, CA: c.CA, Token: c.Token(adapterUser), Address: freeAddress(t), Namespace: c.ns, State: t.TempDir()}
		again := k.in(t, fuse)
		if again {
			kills++
			k.in(t, 1<<40)
		}
		if n := len(c.inventories()); n != 1 {
			t.Errorf("killed at moment %d: %d inventories", fuse, n)
		}
		c.holds("EnvoyFilter", "b", "c")
		if err := c.rig.stop(); err != nil {
			t.Fatal(err)
		}
		if !again {
			break
		}
	}
	t.Logf("%d kills", kills)
	if kills < 5 {
		t.Errorf("%d kills", kills)
	}
}

// killed is what a process is to do, and where it ends.
type killed struct {
	Server, Token string
	CA            []byte
	Address       string // where it has a gateway to the server, whose requests it counts
	Namespace     string
	State         string
	Fuse          int64
	Hub           bool // deploys Image Hub, and does nothing else
	Trial         bool // has one proxy try a filter first, and ends before it has
}

// killedVariable has a process of the tests be one of these.
const killedVariable = "OPERATION_TEST_CLUSTER"

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// in runs it in a process of its own that ends at a moment, and says whether it came to that.
func (k killed) in(t *testing.T, fuse int64) (killed bool) {
	t.Helper()
	k.Fuse = fuse
	text, err := json.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestWhereverTheProcessIsKilledTheClusterHoldsWhatWasAskedForAtTheEnd$", "-test.timeout=60s")
	child.Env = append(os.Environ(), killedVariable+"="+string(text))
	out, err := child.CombinedOutput()
	if status, ok := child.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signal() == syscall.SIGKILL {
		return true
	}
	if err != nil {
		t.Fatalf("killed at moment %d, and then: %v\n%s", fuse, err, out)
	}
	return false
}

func (k killed) run(t *testing.T) {
	f := &fuse{}
	f.left.Store(k.Fuse)
	s := gateway(t, k.Server, k.CA, k.Address, func(_ *http.Request, answer func()) {
		f.burn()
		answer()
		f.burn()
	})
	pool := kube.NewPool(kube.Options{Log: slog.New(slog.DiscardHandler)})
	defer pool.Close()
	r := startRig(t, k.State, func(o *operation.Options) {
		o.Clusters = func(kubeconfig []byte) (operation.Cluster, error) {
			c, err := pool.Open(kubeconfig)
			if k.Trial {
				return dying{crowded{opened{c}}}, err
			}
			return crowded{opened{c}}, err
		}
		o.ImageHubIn = publicHub
	})
	c := &clusterRig{rig: r, ns: k.Namespace, kubeconfig: string(s.Kubeconfig(k.Token))}
	requests := []operation.Request{
		c.apply(on("web", "a"), on("web", "b")),
		c.apply(on("web", "b", "priority: 3"), on("web", "c")),
		c.request("remove_filter", doc("a")),
	}
	if k.Hub {
		requests = []operation.Request{c.imagehub()}
	}
	if k.Trial {
		requests = requests[:1]
	}
	var ids []string
	for i, q := range requests {
		q.ID = fmt.Sprintf("op-%d", i)
		if _, err := r.runner.Submit(t.Context(), q); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, q.ID)
	}
	for _, id := range ids {
		story := r.story(id)
		if last := story[len(story)-1]; last.Type == event.Error {
			t.Errorf("%s: %v", id, texts(story))
		}
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
}

// crowded has every target have two proxies, of which one tries a chain first.
type crowded struct{ opened }

func (crowded) Connected(context.Context, plan.Plan) ([]plan.Pod, error) {
	return []plan.Pod{{Namespace: "shop", Name: "web-1"}, {Namespace: "shop", Name: "web-2"}}, nil
}

// dying ends the process when a proxy is to try a chain.
type dying struct{ crowded }

func (d dying) Loaded(ctx context.Context, p plan.Plan) iter.Seq2[plan.Loaded, error] {
	if p.Proxies != nil && p.Proxies.Only != nil {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	return d.crowded.Loaded(ctx, p)
}

// broken is a cluster that is not read as often as left says.
type broken struct {
	crowded
	left *atomic.Int32
}

func (b broken) Read(ctx context.Context, r plan.Reads) (plan.Cluster, error) {
	if b.left.Add(-1) >= 0 {
		return plan.Cluster{}, problem.ClusterAnswer.New("it is not read")
	}
	return b.crowded.Read(ctx, r)
}

func TestATrialThatAKillLeftBehindGoes(t *testing.T) {
	for _, one := range []struct {
		name    string
		refused int32 // reads, when the operation is begun again
		then    func(*clusterRig) operation.Request
		held    []string
	}{
		{"with the operation that fails when it is begun again", 1, nil, nil},
		{"with the removal of its filter", 1 << 30, func(c *clusterRig) operation.Request { return c.request("remove_filter", doc("a")) }, nil},
		{"with the next change of the target", 1 << 30, func(c *clusterRig) operation.Request { return c.apply(on("web", "c")) }, []string{"c"}},
	} {
		c := newClusterRig(t)
		k := killed{Server: c.URL, CA: c.CA, Token: c.Token(adapterUser), Address: freeAddress(t), Namespace: c.ns, State: t.TempDir(), Trial: true}
		if !k.in(t, 1<<40) {
			t.Fatal("nobody was killed")
		}
		both := "a, " + c.ns + "/b"
		c.holds("EnvoyFilter", both)
		gateway(t, k.Server, k.CA, k.Address, func(_ *http.Request, answer func()) { answer() })
		pool := kube.NewPool(kube.Options{Log: slog.New(slog.DiscardHandler)})
		t.Cleanup(pool.Close)
		var left atomic.Int32
		left.Store(one.refused)
		again := startRig(t, k.State, func(o *operation.Options) {
			o.Clusters = func(kubeconfig []byte) (operation.Cluster, error) {
				c, err := pool.Open(kubeconfig)
				return broken{crowded{opened{c}}, &left}, err
			}
		})
		story := again.story("op-0")
		if last := story[len(story)-1]; last.Type != event.Error || !strings.Contains(last.Details, "it is not read") {
			t.Errorf("%s: %v", one.name, texts(story))
		}
		if one.then != nil {
			c.holds("EnvoyFilter", both)
			if last := story[len(story)-1]; !strings.Contains(last.Details, "may be there still") {
				t.Errorf("%s: %s", one.name, last.Details)
			}
			c.ok(one.then(c))
		} else {
			says(t, story, "is taken back")
		}
		c.holds("EnvoyFilter", one.held...)
		if err := again.stop(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestARemovalOfAnotherComponentTakesNothingOfWhatIsBeingChanged(t *testing.T) {
	c := newClusterRig(t)
	from := func(component string) operation.Request {
		return c.apply(strings.Replace(on("web", "hello"), "name: hello}", "name: hello, labels: {filters.meshery.io/component: "+component+"}}", 1))
	}
	c.ok(from("WASMFilter.hello"))
	inventory := c.inventories()[0]
	inventory["data"].(map[string]any)["version"] = "" // as while another adapter applies something
	c.put(inventory)
	other := from("WASMFilter.Hello")
	other.Delete = true
	c.fails(problem.FilterNotFound, other)
	c.holds("EnvoyFilter", "hello")
	c.ok(from("WASMFilter.hello")) // what is being changed is read by other removals in the cluster
}

// gateway passes requests on to an API server, each through around.
func gateway(t *testing.T, server string, ca []byte, address string, around func(r *http.Request, answer func())) *k8stest.Server {
	t.Helper()
	to, err := url.Parse(server)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	through := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to) }, Transport: transport}
	g := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		around(r, func() { through.ServeHTTP(w, r) })
	}))
	g.Listener.Close()
	if g.Listener, err = net.Listen("tcp", address); err != nil {
		t.Fatal(err)
	}
	g.StartTLS()
	t.Cleanup(g.Close)
	return &k8stest.Server{URL: g.URL, CA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: g.Certificate().Raw})}
}

func TestAnOperationMakesFewRequestsToItsCluster(t *testing.T) {
	c := newClusterRig(t)
	if code, answer, err := c.ask("POST", "/apis/apps/v1/namespaces/"+c.ns+"/deployments", map[string]any{"metadata": map[string]any{"name": "web"},
		"spec": map[string]any{"selector": map[string]any{"matchLabels": map[string]any{"app": "web"}}, "template": map[string]any{
			"metadata": map[string]any{"labels": map[string]any{"app": "web"}},
			"spec":     map[string]any{"containers": []any{map[string]any{"name": "web", "image": "none"}}}}}}); code != http.StatusCreated {
		t.Fatal(code, answer["message"], err)
	}
	var mu sync.Mutex
	var asked []string
	fresh := func() string { // another address is another cluster, of which nothing is known
		s := gateway(t, c.URL, c.CA, "127.0.0.1:0", func(r *http.Request, answer func()) {
			mu.Lock()
			asked = append(asked, r.Method+" "+r.URL.String())
			mu.Unlock()
			answer()
		})
		return string(s.Kubeconfig(c.Token(adapterUser)))
	}
	changed := func(name string) string { return on("web", name, "config: {response: {x-other: "+name+"}}") }
	byName := doc("named", "mesh: istio", "target: {kind: Workload, name: web}")
	known := fresh()
	c.kubeconfig = known
	c.ok(c.apply(on("other", "first")))
	for _, kubeconfig := range []struct {
		what string
		of   func() string
	}{{"one that is known", func() string { return known }}, {"a new one", fresh}} {
		for _, op := range []struct {
			what string
			most int
			do   func() operation.Request
		}{
			{"making one", 3 + 4, func() operation.Request { return c.apply(on("web", "a")) }},
			{"changing one", 3 + 4, func() operation.Request { return c.apply(changed("a")) }},
			{"changing nothing", 3 + 4, func() operation.Request { return c.apply(changed("a")) }},
			{"removing one", 3 + 4, func() operation.Request { return c.request("remove_filter", doc("a")) }},
			{"making two", 2*3 + 4, func() operation.Request { return c.apply(on("web", "a"), on("web", "b")) }},
			{"changing two", 2*3 + 4, func() operation.Request { return c.apply(changed("a"), changed("b")) }},
			{"removing one of two", 2*3 + 4, func() operation.Request { return c.request("remove_filter", doc("a")) }},
			{"removing the other", 3 + 4, func() operation.Request { return c.request("remove_filter", doc("b")) }},
			// A target that has a name has to be found by it.
			{"making one for a Deployment", 3 + 4 + 1, func() operation.Request { return c.apply(byName) }},
			{"removing it", 3 + 4 + 1, func() operation.Request { return c.request("remove_filter", doc("named")) }},
		} {
			c.kubeconfig = kubeconfig.of()
			asked = nil
			c.ok(op.do())
			if t.Logf("%s, kubeconfig %s: %d requests", op.what, kubeconfig.what, len(asked)); len(asked) > op.most {
				t.Errorf("%s with %s took %d requests, and %d are enough:\n%s", op.what, kubeconfig.what, len(asked), op.most, strings.Join(asked, "\n"))
			}
		}
	}

	// With one proxy that tries a chain before the others it is no more than twice.
	crowd := newClusterRig(t, func(o *operation.Options) {
		open := o.Clusters
		o.Clusters = func(k []byte) (operation.Cluster, error) {
			cl, err := open(k)
			if err != nil {
				return nil, err
			}
			return crowded{cl.(opened)}, nil
		}
	})
	crowd.kubeconfig = fresh()
	for _, q := range []operation.Request{crowd.apply(on("web", "a")), crowd.apply(on("web", "a", "config: {response: {x-other: a}}"))} {
		asked = nil
		says(t, crowd.ok(q), "a-web-", "-first created", "a-web-", "-first removed")
		if t.Logf("one that is tried first: %d requests", len(asked)); len(asked) > 2*(3+4) {
			t.Errorf("one that is tried first took %d requests:\n%s", len(asked), strings.Join(asked, "\n"))
		}
	}
}
