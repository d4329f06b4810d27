package cli

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/kube"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
)

// cluster is a real API server with Istio's kinds, and a namespace shop with a Service api.
type cluster struct {
	*k8stest.Server
	client     *http.Client
	kubeconfig string // of somebody who may do everything
}

func newCluster(t *testing.T) cluster {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a Kubernetes API server")
	}
	s, err := k8stest.Start(t.Context(), t.TempDir(), k8stest.Options{Users: []string{"nobody"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(s.CA) {
		t.Fatal("the authority is no certificate")
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	t.Cleanup(transport.CloseIdleConnections)
	c := cluster{s, &http.Client{Transport: transport}, filepath.Join(t.TempDir(), "config")}
	if err := os.WriteFile(c.kubeconfig, s.Kubeconfig(s.Token(k8stest.Admin)), 0o600); err != nil {
		t.Fatal(err)
	}
	crds, err := os.ReadFile("../mesh/testdata/istio/crds.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for d := yaml.NewDecoder(bytes.NewReader(crds)); ; {
		var crd map[string]any
		if err := d.Decode(&crd); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		c.post(t, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd)
	}
	c.post(t, "/api/v1/namespaces", map[string]any{"metadata": map[string]any{"name": "shop"}})
	c.post(t, "/api/v1/namespaces/shop/services", map[string]any{"metadata": map[string]any{"name": "api"},
		"spec": map[string]any{"selector": map[string]any{"run": "api"}, "ports": []any{map[string]any{"port": 80}}}})
	for deadline := time.Now().Add(time.Minute); c.do(t, "GET", "/apis/extensions.istio.io/v1alpha1/trafficextensions", nil) != http.StatusOK; {
		if time.Now().After(deadline) {
			t.Fatal("Istio's kinds are not served")
		}
		time.Sleep(50 * time.Millisecond)
	}
	return c
}

func (c cluster) do(t *testing.T, method, path string, object any) int {
	t.Helper()
	data, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, c.URL+path, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+c.Token(k8stest.Admin))
	req.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/apply-patch+yaml")
	}
	resp, err := c.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	return resp.StatusCode
}

func (c cluster) post(t *testing.T, path string, object any) {
	t.Helper()
	if code := c.do(t, "POST", path, object); code != http.StatusCreated {
		t.Fatalf("POST %s: %d", path, code)
	}
}

func TestACommandAsksAClusterWhatItServesHoldsAndWouldTake(t *testing.T) {
	c := newCluster(t)
	doc := func(config string) string {
		return istioDocument("x", "mesh: istio\ntarget: {kind: Service, name: api}\n"+fromURL+"config: {limit: "+config+"}")
	}
	r := runWith(t, doc("1"), nil, "render", "-f", "-", "--kubeconfig", c.kubeconfig).want(t, exitOK, "kind: TrafficExtension", "run: api")
	if r.err != "" {
		t.Errorf("said %s", r.err)
	}
	var object map[string]any
	if err := yaml.Unmarshal([]byte(r.out), &object); err != nil {
		t.Fatal(err)
	}
	subject := "TrafficExtension/shop/" + object["metadata"].(map[string]any)["name"].(string)

	diff := func(config string) string {
		t.Helper()
		return runWith(t, doc(config), nil, "diff", "-f", "-", "--kubeconfig", c.kubeconfig, "--context", "test").want(t, exitOK).out
	}
	if out := diff("1"); out != subject+" would be created\n" {
		t.Errorf("printed %s", out)
	}
	c.apply(t, object)
	if out := diff("1"); out != subject+" unchanged\n" {
		t.Errorf("printed %s", out)
	}
	if out := diff("2"); out != subject+" would be updated\n" {
		t.Errorf("printed %s", out)
	}
	r = runWith(t, doc("2"), nil, "diff", "-f", "-", "--kubeconfig", c.kubeconfig, "-o", "json").want(t, exitOK)
	var changes struct{ Changes []plan.Change }
	if err := json.Unmarshal([]byte(r.out), &changes); err != nil || len(changes.Changes) != 1 || changes.Changes[0].Action != plan.Updated {
		t.Errorf("%v: %s", err, r.out)
	}

	nobody := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(nobody, c.Kubeconfig(c.Token("nobody")), 0o600); err != nil {
		t.Fatal(err)
	}
	runWith(t, doc("1"), nil, "diff", "-f", "-", "--kubeconfig", nobody).want(t, exitFailed, "meshery-filters-1063", "verb get, resource configmaps, namespace meshery-filters")
	runWith(t, doc("1"), nil, "diff", "-f", "-", "--kubeconfig", c.kubeconfig, "--context", "absent").want(t, exitUsage, `no context "absent"`)
	gone := istioDocument("x", "mesh: istio\ntarget: {kind: Service, name: gone}\n"+fromURL)
	runWith(t, gone, nil, "diff", "-f", "-", "--kubeconfig", c.kubeconfig).want(t, exitFailed, "meshery-filters-1071", "Service shop/gone")
}

// apply puts the object into the cluster as the adapter does, for the filter shop/x.
func (c cluster) apply(t *testing.T, object map[string]any) {
	t.Helper()
	k, err := kube.OpenFile(c.kubeconfig, kube.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	docs, err := filter.Decode([]byte(istioDocument("x", "mesh: istio\ntarget: {kind: Service, name: api}\n"+fromURL+"config: {limit: 1}")))
	if err != nil {
		t.Fatal(err)
	}
	f, err := mesh.Istio{}.Complete(docs[0].Filter("default"))
	if err != nil {
		t.Fatal(err)
	}
	chain := filter.Chain{Mesh: "istio", Target: f.Spec.Target}.With(f)
	target, err := k.Target(t.Context(), "istio", chain.Target)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	changes, err := target.Apply(ctx, plan.Plan{Chain: chain, Version: "1", Objects: []plan.Object{{Content: object}}})
	if err != nil || len(changes) != 1 || changes[0].Action != plan.Created {
		t.Fatal(fmt.Sprint(changes), err)
	}
	if err := target.Commit(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestWhatCannotBeAskedOfAClusterIsSaid(t *testing.T) {
	one := istioDocument("x", "mesh: istio\n"+toLabels+fromURL)
	config := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(config, []byte("clusters: 1"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		stdin string
		args  []string
		exit  int
		want  string
	}{
		"no documents":      {"", []string{"diff", "--kubeconfig", config}, exitUsage, "-f FILE"},
		"no cluster":        {one, []string{"diff", "-f", "-"}, exitUsage, "--kubeconfig FILE"},
		"a context alone":   {one, []string{"diff", "-f", "-", "--context", "x"}, exitUsage, "--kubeconfig"},
		"no such file":      {one, []string{"diff", "-f", "-", "--kubeconfig", "no/such"}, exitUsage, "no/such"},
		"no kubeconfig":     {one, []string{"diff", "-f", "-", "--kubeconfig", config}, exitUsage, "meshery-filters-1060"},
		"plain Envoy":       {strings.Replace(one, "mesh: istio\n  "+strings.TrimSuffix(toLabels, "\n"), "mesh: envoy", 1), []string{"diff", "-f", "-", "--kubeconfig", config}, exitUsage, "no mesh of a cluster"},
		"a file and a live": {one, []string{"render", "-f", "-", "--kubeconfig", config, "--cluster", "x.yaml"}, exitUsage, "give one of them"},
		"render Envoy":      {istioDocument("y", headers), []string{"render", "-f", "-", "--kubeconfig", config}, exitUsage, "envoy is none"},
		"render no such":    {one, []string{"render", "-f", "-", "--kubeconfig", "no/such"}, exitUsage, "no/such"},
	} {
		t.Run(name, func(t *testing.T) {
			if r := runWith(t, c.stdin, nil, c.args...).want(t, c.exit, c.want); r.out != "" {
				t.Errorf("printed %s", r.out)
			}
		})
	}
}

func TestFiltersGoToTheClusterThatAKubeconfigNames(t *testing.T) {
	c := newCluster(t)
	a := newAdapter(t)
	doc := put(t, t.TempDir(), "d.yaml", istioDocument("x", "mesh: istio\ntarget: {kind: Service, name: api}\n"+headers+"config: {response: {x-there: y}}"))
	on := []string{"--kubeconfig", c.kubeconfig, "--context", "test"}
	with := func(args ...string) []string { return append(args, on...) }
	runWith(t, "", nil, with("list")...).want(t, exitOK, "No filter is applied.")
	a.cli(with("apply", "-f", doc)...).want(t, exitOK, "shop/x", "is kept for Service shop/api (0 of 0 proxies) in cluster "+strings.TrimPrefix(c.URL, "https://"))
	runWith(t, "", nil, with("list")...).want(t, exitOK, "STATE", "shop/x", "istio", "Service shop/api", "builtin headers", "applied")
	r := runWith(t, "", nil, with("list", "-o", "json")...).want(t, exitOK, `"applied": true`)
	if strings.Contains(r.out, "running") {
		t.Errorf("it says what it does not know: %s", r.out)
	}
	a.cli(with("run", "filters_status")...).want(t, exitOK, "1 target has filters", "in cluster ")
	a.cli("remove", "-f", doc).want(t, exitFailed, "meshery-filters-1080")
	a.cli("apply", "-f", doc, "--context", "test").want(t, exitUsage, "--kubeconfig")
	a.cli(with("remove", "shop/x")...).want(t, exitOK, "shop/x removed from Service shop/api")

	// A kubeconfig that runs a program is for the adapter's configuration to allow.
	answer := put(t, t.TempDir(), "answer", `{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "`+c.Token(k8stest.Admin)+`"}}`)
	program := put(t, t.TempDir(), "config", strings.Replace(string(c.Kubeconfig("")), `token: ""`,
		`exec: {apiVersion: client.authentication.k8s.io/v1, command: cat, args: ["`+answer+`"], interactiveMode: Never}`, 1))
	a.cli("apply", "-f", doc, "--kubeconfig", program).want(t, exitUsage, "user.exec", "Code:   meshery-filters-1060")
	allowed := newAdapter(t, "--kubeconfig-allow", "exec")
	allowed.cli("apply", "-f", doc, "--kubeconfig", program).want(t, exitOK, "is kept for Service shop/api")
	allowed.cli("remove", "-f", doc, "--kubeconfig", program).want(t, exitOK, "shop/x removed from Service shop/api")

	// What somebody else has changed, deleted or left without an inventory is marked.
	a.cli(with("apply", "-f", doc)...).want(t, exitOK)
	name := regexp.MustCompile(`x-api-[0-9a-f]{10}`).FindString(runWith(t, "", nil, with("diff", "-f", doc)...).want(t, exitOK, "unchanged").out)
	filters := "/apis/networking.istio.io/v1alpha3/namespaces/shop/envoyfilters"
	c.do(t, "PATCH", filters+"/"+name+"?fieldManager=somebody&force=true", map[string]any{"apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter",
		"metadata": map[string]any{"name": name}, "spec": map[string]any{"priority": 77}})
	runWith(t, "", nil, with("list")...).want(t, exitOK, "drifted: EnvoyFilter/shop/"+name+" was changed by somebody")
	c.do(t, "DELETE", filters+"/"+name, nil)
	c.do(t, "POST", filters, map[string]any{"apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter",
		"metadata": map[string]any{"name": "left-behind", "labels": map[string]any{"app.kubernetes.io/managed-by": "meshery-filters"}}})
	runWith(t, "", nil, with("list")...).want(t, exitOK, "drifted: EnvoyFilter/shop/"+name+" is gone", "Orphan, which no inventory has: EnvoyFilter/shop/left-behind")
	runWith(t, "", nil, with("status")...).want(t, exitDrift, "EnvoyFilter/shop/"+name+" is gone")
	runWith(t, "", nil, with("list", "-o", "json")...).want(t, exitOK, `"orphans": [`, `"drift": [`)
	a.cli(with("remove", "shop/x")...).want(t, exitOK)
	c.do(t, "DELETE", filters+"/left-behind", nil)
	runWith(t, "", nil, with("list")...).want(t, exitOK, "No filter is applied.\n")

	// And without an adapter.
	r = runWith(t, "", nil, with("apply", "-f", doc, "--no-adapter")...).want(t, exitOK, "EnvoyFilter/shop/x-api-", "is kept for Service shop/api")
	runWith(t, "", nil, with("apply", "-f", doc, "--no-adapter", "-o", "json")...).want(t, exitOK, "is unchanged on Service shop/api", `"last":true`)
	runWith(t, "", nil, "apply", "-f", doc, "--no-adapter").want(t, exitUsage, "--kubeconfig FILE")
	envoy := put(t, t.TempDir(), "e.yaml", istioDocument("y", "mesh: envoy\n"+headers+"config: {response: {x-there: y}}"))
	runWith(t, "", nil, with("apply", "-f", envoy, "--no-adapter")...).want(t, exitFailed, "meshery-filters-1007")
	nobody := put(t, t.TempDir(), "config", string(c.Kubeconfig(c.Token("nobody"))))
	runWith(t, "", nil, "remove", "shop/x", "--no-adapter", "--kubeconfig", nobody).want(t, exitFailed, "Code:   meshery-filters-1063")
	a.cli(with("run", "filters_status")...).want(t, exitOK, "1 target has filters, 0 drifted")
	runWith(t, "", nil, with("remove", "shop/x", "--no-adapter")...).want(t, exitOK, "shop/x removed from Service shop/api")
	runWith(t, "", nil, with("undo", "shop/x", "--no-adapter")...).want(t, exitOK, "EnvoyFilter/shop/x-api-", "created")
	runWith(t, "", nil, with("history", "shop/x")...).want(t, exitOK, "removed", "Service shop/api")
	runWith(t, "", nil, with("history", "shop/y")...).want(t, exitFailed, "meshery-filters-1010")
	runWith(t, "", nil, with("remove", "shop/x", "--no-adapter")...).want(t, exitOK)
	runWith(t, "", nil, "apply", "-f", doc, "--modules-url", "http://filters.example").want(t, exitUsage, "--no-adapter")
	runWith(t, "", nil, with("list")...).want(t, exitOK, "No filter is applied.")
}
