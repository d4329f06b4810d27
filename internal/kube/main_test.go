package kube

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/templates"
)

// server is the API server that all tests of this package share; each has namespaces of its own. It is nil with -short.
var server *k8stest.Server

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "kube")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if !testing.Short() {
		if server, err = k8stest.Start(context.Background(), dir, k8stest.Options{}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer server.Stop()
		if err := install(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	code := m.Run()
	admin.CloseIdleConnections()
	if server != nil {
		server.Stop()
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// admin is how the tests look at the server: by other code than the one they test.
var admin = &http.Client{}

// install gives the server the kinds of testdata/crds.yaml and the roles of templates/rbac.
func install() error {
	transport, err := trusting(server.CA)
	if err != nil {
		return err
	}
	admin.Transport = transport
	crds, err := os.ReadFile("testdata/crds.yaml")
	if err != nil {
		return err
	}
	base, _ := templates.RBAC("base")
	proof, _ := templates.RBAC("proof")
	for _, text := range []string{string(crds), base, proof} {
		for _, o := range documents(text) {
			if code, answer, err := ask("POST", collection(o), o); err != nil || code != 201 {
				return fmt.Errorf("make %v: %d %v %w", o["kind"], code, answer, err)
			}
		}
	}
	// A new kind is served a moment after it was made.
	deadline := time.Now().Add(time.Minute)
	for _, path := range []string{"/apis/extensions.istio.io/v1alpha1/wasmplugins", "/apis/consul.hashicorp.com/v1alpha1/servicedefaults"} {
		for {
			code, answer, err := ask("GET", path, nil)
			if err == nil && code == 200 {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%s is not served: %d %v %w", path, code, answer, err)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	return nil
}

func documents(text string) []map[string]any {
	var all []map[string]any
	for d := yaml.NewDecoder(strings.NewReader(text)); ; {
		var o map[string]any
		if err := d.Decode(&o); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			panic(err)
		}
		all = append(all, o)
	}
}

// plurals are the kinds that the tests make.
var plurals = map[string]string{"Namespace": "namespaces", "ServiceAccount": "serviceaccounts", "ConfigMap": "configmaps",
	"ClusterRole": "clusterroles", "ClusterRoleBinding": "clusterrolebindings", "Role": "roles", "RoleBinding": "rolebindings",
	"CustomResourceDefinition": "customresourcedefinitions", "WasmPlugin": "wasmplugins", "ServiceDefaults": "servicedefaults",
	"Deployment": "deployments", "FlowSchema": "flowschemas", "PriorityLevelConfiguration": "prioritylevelconfigurations"}

func collection(o map[string]any) string {
	path := "/apis/" + o["apiVersion"].(string)
	if o["apiVersion"] == "v1" {
		path = "/api/v1"
	}
	if ns := metadataOf(o)["namespace"]; ns != nil {
		path += "/namespaces/" + ns.(string)
	}
	return path + "/" + plurals[o["kind"].(string)]
}

// ask makes a request as somebody who may do everything.
func ask(method, path string, body any) (int, map[string]any, error) {
	return askAs(server.Token(k8stest.Admin), method, path, body)
}

func askAs(token, method, path string, body any) (int, map[string]any, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	data, err := json.Marshal(body)
	if err != nil {
		return 0, nil, err
	}
	if body == nil {
		data = nil
	}
	req, err := http.NewRequestWithContext(ctx, method, server.URL+path, bytes.NewReader(data))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	switch {
	case method == "PATCH" && strings.Contains(path, "fieldManager="):
		req.Header.Set("Content-Type", "application/apply-patch+yaml")
	case method == "PATCH":
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := admin.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, nil, err
	}
	o, err := decode(answer)
	return resp.StatusCode, o, err
}

// must is ask for what has to succeed.
func must(t *testing.T, method, path string, body any) map[string]any {
	t.Helper()
	code, o, err := ask(method, path, body)
	if err != nil || code >= 300 {
		t.Fatalf("%s %s: %d %v %v", method, path, code, o, err)
	}
	return o
}

// there gives an object, or nil.
func there(t *testing.T, path string) map[string]any {
	t.Helper()
	code, o, err := ask("GET", path, nil)
	if err != nil || code != 200 && code != 404 {
		t.Fatalf("GET %s: %d %v %v", path, code, o, err)
	}
	if code == 404 {
		return nil
	}
	return o
}

var numbers struct {
	sync.Mutex
	n int
}

// unique makes a name that no other test has.
func unique(prefix string) string {
	numbers.Lock()
	defer numbers.Unlock()
	numbers.n++
	return fmt.Sprintf("%s-%d", prefix, numbers.n)
}

// namespace makes one for a test.
func namespace(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a Kubernetes API server")
	}
	name := unique("shop")
	must(t, "POST", "/api/v1/namespaces", map[string]any{"metadata": map[string]any{"name": name}})
	return name
}

// token is a new one of a ServiceAccount, as the server gives them to Pods.
func token(t *testing.T, namespace, name string) string {
	t.Helper()
	o := must(t, "POST", "/api/v1/namespaces/"+namespace+"/serviceaccounts/"+name+"/token", map[string]any{"spec": map[string]any{}})
	return descend(o, []string{"status"})["token"].(string)
}

// account makes a ServiceAccount with the rules in every namespace and, unless inventory is false, the inventory's role.
func account(t *testing.T, ns string, inventory bool, rules ...map[string]any) string {
	t.Helper()
	name := unique("account")
	must(t, "POST", "/api/v1/namespaces/"+ns+"/serviceaccounts", map[string]any{"metadata": map[string]any{"name": name}})
	subjects := []any{map[string]any{"kind": "ServiceAccount", "namespace": ns, "name": name}}
	const group = "rbac.authorization.k8s.io"
	role := ns + "-" + name
	must(t, "POST", "/apis/"+group+"/v1/clusterroles", map[string]any{"metadata": map[string]any{"name": role}, "rules": rules})
	must(t, "POST", "/apis/"+group+"/v1/clusterrolebindings", map[string]any{"metadata": map[string]any{"name": role},
		"roleRef": map[string]any{"apiGroup": group, "kind": "ClusterRole", "name": role}, "subjects": subjects})
	if inventory {
		must(t, "POST", "/apis/"+group+"/v1/namespaces/"+defaultNamespace+"/rolebindings", map[string]any{"metadata": map[string]any{"name": role},
			"roleRef": map[string]any{"apiGroup": group, "kind": "Role", "name": "meshery-filters-inventory"}, "subjects": subjects})
	}
	return token(t, ns, name)
}

func rule(group, resource string, verbs ...string) map[string]any {
	return map[string]any{"apiGroups": []string{group}, "resources": []string{resource}, "verbs": verbs}
}

// base is a cluster as the ServiceAccount of templates/rbac/base.yaml, which has nothing else.
func base(t *testing.T) *Cluster {
	t.Helper()
	return cluster(t, server.Kubeconfig(token(t, "meshery-filters", "meshery-filters")), Options{})
}

func cluster(t *testing.T, kubeconfig []byte, o Options) *Cluster {
	t.Helper()
	o.Log = slog.New(slog.DiscardHandler)
	c, err := Open(kubeconfig, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// recorder stands between a cluster and its server, counts the requests and, at one of them, does something.
type recorder struct {
	next   http.RoundTripper
	mu     sync.Mutex
	seen   []string // "PATCH /apis/…?dryRun=All"
	before func(n int, r *http.Request) error
	after  func(n int, r *http.Request) error
}

func record(c *Cluster) *recorder {
	r := &recorder{next: c.client.Transport}
	c.client.Transport = r
	return r
}

func (r *recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	r.mu.Lock()
	line := req.Method + " " + req.URL.Path
	if dry(req) {
		line += "?dryRun"
	}
	r.seen = append(r.seen, line)
	n := len(r.seen)
	r.mu.Unlock()
	if r.before != nil {
		if err := r.before(n, req); err != nil {
			return nil, err
		}
	}
	resp, err := r.next.RoundTrip(req)
	if err == nil && r.after != nil {
		if aerr := r.after(n, req); aerr != nil {
			resp.Body.Close()
			return nil, aerr
		}
	}
	return resp, err
}

// dry says whether a request is one that changes nothing.
func dry(r *http.Request) bool {
	if r.Method == http.MethodGet || r.URL.Query().Has("dryRun") {
		return true
	}
	if r.Method != http.MethodDelete || r.GetBody == nil {
		return false
	}
	body, err := r.GetBody()
	if err != nil {
		return false
	}
	var d deletion
	return json.NewDecoder(body).Decode(&d) == nil && len(d.DryRun) > 0
}

func (r *recorder) requests() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string{}, r.seen...)
}

// cutOff gives a context that ends at the nth write that is no dry run, before or after that reached the server.
func cutOff(t *testing.T, r *recorder, n int, reached bool) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(t.Context())
	writes := 0
	cut := func(_ int, req *http.Request) error {
		if dry(req) {
			return nil
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if writes++; writes < n {
			return nil
		}
		cancel()
		return context.Canceled
	}
	if reached {
		r.after = cut
	} else {
		r.before = cut
	}
	return ctx, cancel
}

// writes are the requests that change something.
func (r *recorder) writes() []string {
	var w []string
	for _, line := range r.requests() {
		if !strings.HasPrefix(line, "GET") && !strings.HasSuffix(line, "?dryRun") {
			w = append(w, line)
		}
	}
	return w
}

// target is a workload in a namespace.
func target(ns string) filter.Target {
	return filter.Target{Kind: filter.Workload, Namespace: ns, Labels: map[string]string{"app": "web"}}
}

const someDigest = "6ff8c2a4de2b0e8b4ac4d0b0ab34dc0a0e12c4c2ef0d3e4a5c1a2b3c4d5e6f70"

// chainOf is a chain of filters with these names, and wasmPlugin what a mesh would make of one of them.
func chainOf(ns string, names ...string) filter.Chain {
	c := filter.Chain{Mesh: "istio", Target: target(ns)}
	for _, name := range names {
		c = c.With(filter.Filter{Key: filter.Key{Namespace: ns, Name: name}, Spec: filter.Spec{
			Mesh: "istio", Target: target(ns), Protocol: filter.HTTP, Config: filter.Value{V: map[string]any{"mode": "log"}},
			Module: filter.Module{URL: "https://modules.example/" + name + ".wasm", SHA256: someDigest}}})
	}
	return c
}

func wasmPlugin(ns, name string, priority int) plan.Object {
	return plan.Object{Content: map[string]any{
		"apiVersion": "extensions.istio.io/v1alpha1", "kind": "WasmPlugin",
		"metadata": map[string]any{"namespace": ns, "name": name, "labels": map[string]any{"app.kubernetes.io/managed-by": Manager}},
		"spec": map[string]any{"url": "https://modules.example/" + name + ".wasm", "sha256": someDigest, "priority": priority,
			"pluginConfig": map[string]any{"mode": "log"}, "selector": map[string]any{"matchLabels": map[string]any{"app": "web"}}},
	}}
}

func pluginPath(ns, name string) string {
	return "/apis/extensions.istio.io/v1alpha1/namespaces/" + ns + "/wasmplugins/" + name
}

// planOf is what a mesh plans for a chain of these filters.
func planOf(ns string, names ...string) plan.Plan {
	p := plan.Plan{Chain: chainOf(ns, names...), Version: "v-" + strings.Join(names, "-")}
	for i, name := range names {
		p.Objects = append(p.Objects, wasmPlugin(ns, name, 100-10*i))
	}
	return p
}

// holding is the inventory of a target that has something; one that only has what was there before is none.
func holding(t *testing.T, ns string) map[string]any {
	t.Helper()
	o := there(t, inventoryPath(ns))
	if o != nil && o["data"].(map[string]any)["objects"] == "null" {
		return nil
	}
	return o
}

func inventoryPath(ns string) string {
	return "/api/v1/namespaces/" + defaultNamespace + "/configmaps/" + inventoryName("istio", target(ns))
}

func open(t *testing.T, c *Cluster, at filter.Target) *Target {
	t.Helper()
	tg, err := c.Target(t.Context(), "istio", at)
	if err != nil {
		t.Fatal(err)
	}
	return tg
}

// applies reads the plan's target, applies the plan and commits it.
func applies(ctx context.Context, c *Cluster, p plan.Plan) ([]plan.Change, error) {
	t, err := c.Target(ctx, p.Chain.Mesh, p.Chain.Target)
	if err != nil {
		return nil, err
	}
	return t.applies(ctx, p)
}

// applies applies the plan and commits it.
func (t *Target) applies(ctx context.Context, p plan.Plan) ([]plan.Change, error) {
	changes, err := t.Apply(ctx, p)
	if err != nil {
		return nil, err
	}
	return changes, t.Commit(ctx)
}

func apply(t *testing.T, c *Cluster, p plan.Plan) []plan.Change {
	t.Helper()
	changes, err := applies(t.Context(), c, p)
	if err != nil {
		t.Fatal(err)
	}
	return changes
}

func diff(t *testing.T, c *Cluster, p plan.Plan) []plan.Change {
	t.Helper()
	changes, err := open(t, c, p.Chain.Target).Diff(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return changes
}

func same(t *testing.T, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		g, _ := json.Marshal(got)
		w, _ := json.Marshal(want)
		t.Errorf("%s:\n got %s\nwant %s", what, g, w)
	}
}

func changed(subjects string, action plan.Action) []plan.Change {
	var c []plan.Change
	for _, s := range strings.Fields(subjects) {
		c = append(c, plan.Change{Subject: s, Action: action})
	}
	return c
}

// fails checks a problem: its kind and what its text says.
func fails(t *testing.T, err error, kind *problem.Kind, says ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("got %v, want %s", err, kind)
	}
	for _, s := range says {
		if !strings.Contains(problem.Of(err).Details, s) {
			t.Errorf("%q does not say %q", problem.Of(err).Details, s)
		}
	}
}

// version is an object's resourceVersion.
func version(o map[string]any) string { v, _ := metadataOf(o)["resourceVersion"].(string); return v }

// essence is an object without what the server notes down about it.
func essence(o map[string]any) map[string]any {
	o = clone(o)
	for _, field := range []string{"resourceVersion", "managedFields", "generation"} {
		delete(metadataOf(o), field)
	}
	return o
}

func query(pairs ...string) string {
	q := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		q.Set(pairs[i], pairs[i+1])
	}
	return "?" + q.Encode()
}

func trusting(ca []byte) (*http.Transport, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, errors.New("the authority is no certificate")
	}
	return &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true}, nil
}
