package mesh

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

// apiServer is a real API server, spoken to as kubectl does.
type apiServer struct {
	*k8stest.Server
	client *http.Client
}

func newAPIServer(t *testing.T) apiServer {
	t.Helper()
	s, err := k8stest.Start(t.Context(), t.TempDir(), k8stest.Options{})
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
	return apiServer{s, &http.Client{Transport: transport}}
}

func (s apiServer) call(t *testing.T, method, path, contentType string, body []byte) (int, map[string]any) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, s.URL+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+s.Token(k8stest.Admin))
	req.Header.Set("Content-Type", contentType)
	resp, err := s.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var answer map[string]any
	if resp.StatusCode == http.StatusNotFound && !json.Valid(data) { // nothing is served there
		return resp.StatusCode, nil
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		t.Fatalf("%s %s: %v: %.200s", method, path, err, data)
	}
	return resp.StatusCode, answer
}

// apply puts a manifest of one object to a dry run, as `kubectl apply --server-side --dry-run=server` does.
func (s apiServer) apply(t *testing.T, o plan.Object, manifest []byte) (int, map[string]any) {
	t.Helper()
	u := &unstructured.Unstructured{Object: o.Content}
	return s.call(t, http.MethodPatch, pathOf(u)+"?dryRun=All&fieldManager=meshery-filters&fieldValidation=Strict", "application/apply-patch+yaml", manifest)
}

func pathOf(u *unstructured.Unstructured) string {
	return fmt.Sprintf("/apis/%s/namespaces/%s/%s/%s", u.GetAPIVersion(), u.GetNamespace(), plural(u.GetKind()), u.GetName())
}

func plural(kind string) string {
	if p := strings.ToLower(kind); strings.HasSuffix(p, "s") {
		return p
	}
	return strings.ToLower(kind) + "s"
}

// install makes a kind of a file and waits until it is served.
func (s apiServer) install(t *testing.T, file, kind string) {
	t.Helper()
	for _, crd := range readObjects(t, file) {
		if k, _, _ := unstructured.NestedString(crd.Content, "spec", "names", "kind"); k != kind {
			continue
		}
		data, err := json.Marshal(crd.Content)
		if err != nil {
			t.Fatal(err)
		}
		const path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
		if code, answer := s.call(t, http.MethodPost, path, "application/json", data); code != http.StatusCreated {
			t.Fatalf("%s: %d %v", kind, code, answer["message"])
		}
		served := fmt.Sprintf("/apis/%s/%s", plan.ClusterOf([]plan.Object{crd}).Kinds[0].GroupVersion(), plural(kind))
		for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
			code, answer := s.call(t, http.MethodGet, served, "application/json", nil)
			if code == http.StatusOK {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s is not served: %d %v", kind, code, answer)
			}
		}
	}
	t.Fatalf("%s is not in %s", kind, file)
}

// kinds reads what the server serves, from the server.
func (s apiServer) kinds(t *testing.T) []plan.Kind {
	t.Helper()
	code, list := s.call(t, http.MethodGet, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", "application/json", nil)
	if code != http.StatusOK {
		t.Fatalf("list: %d %v", code, list["message"])
	}
	var objects []plan.Object
	for _, item := range list["items"].([]any) {
		crd := item.(map[string]any)
		crd["kind"] = "CustomResourceDefinition" // lists leave it out
		objects = append(objects, plan.Object{Content: crd})
	}
	return plan.ClusterOf(objects).Kinds
}

func TestARealAPIServerTakesEveryGolden(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a Kubernetes API server")
	}
	s := newAPIServer(t)
	for _, ns := range []string{"shop", "data", "ambient", "istio-ingress", "istio-system"} {
		body := fmt.Appendf(nil, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": %q}}`, ns)
		if code, answer := s.call(t, http.MethodPost, "/api/v1/namespaces", "application/json", body); code != http.StatusCreated {
			t.Fatalf("namespace %s: %d %v", ns, code, answer["message"])
		}
	}
	// An installation after the other: the kinds come one by one, the way Istio grew.
	for _, step := range []struct{ kind, installation string }{
		{"EnvoyFilter", "envoyfilter"}, {"WasmPlugin", "wasmplugin"}, {"TrafficExtension", "trafficextension"},
	} {
		s.install(t, crds, step.kind)
		kinds := s.kinds(t)
		taken := map[string]int{}
		for _, in := range istioCases(t) {
			c, w, err := istioCase(t, in, kinds)
			if err != nil {
				continue
			}
			p, err := Istio{}.Plan(c, w)
			golden := strings.TrimSuffix(in, ".in.yaml") + "." + step.installation + ".yaml"
			want, rerr := os.ReadFile(golden)
			if rerr != nil {
				t.Fatal(rerr)
			}
			if !bytes.Equal(istioGolden(t, p, err), want) {
				t.Errorf("with the kinds as the server tells them, the plan is not %s", golden)
			}
			if err != nil {
				continue
			}
			trial, err := Istio{}.Try(plan.Plan{Chain: filter.Chain{Mesh: c.Mesh, Target: c.Target}}, p, c, w, plan.Pod{Namespace: "shop", Name: "api-1"})
			if err != nil {
				t.Fatal(err)
			}
			objects := p.Objects
			if trial != nil {
				objects = slices.Concat(objects, trial.Proof.Objects)
			}
			for _, o := range objects {
				manifest, err := plan.Manifest([]plan.Object{o})
				if err != nil {
					t.Fatal(err)
				}
				code, answer := s.apply(t, o, manifest)
				if code != http.StatusOK && code != http.StatusCreated {
					t.Errorf("%s: %s: %d %v", filepath.Base(golden), o, code, answer["message"])
					continue
				}
				u := &unstructured.Unstructured{Object: o.Content}
				taken[u.GetKind()]++
				// As it was meant: nothing taken away, nothing made up, no text that became something else.
				if !reflect.DeepEqual(answer["spec"], asJSON(t, o.Content["spec"])) {
					t.Errorf("%s: %s is kept as %v", filepath.Base(golden), o, answer["spec"])
				}
				got := &unstructured.Unstructured{Object: answer}
				if !reflect.DeepEqual(got.GetLabels(), u.GetLabels()) || !reflect.DeepEqual(got.GetAnnotations(), u.GetAnnotations()) {
					t.Errorf("%s: %s is kept with %v and %v", filepath.Base(golden), o, got.GetLabels(), got.GetAnnotations())
				}
			}
		}
		if taken[step.kind] < 10 {
			t.Errorf("%s: only %v were applied", step.installation, taken)
		}
		t.Logf("%s: %v accepted", step.installation, taken)
	}

	// And a mistake is one.
	c, w, err := istioCase(t, "testdata/istio/workload-by-labels.in.yaml", s.kinds(t))
	if err != nil {
		t.Fatal(err)
	}
	p, err := Istio{}.Plan(c, w)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := plan.Manifest(p.Objects)
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range [][2]string{{"priority: 0", "prority: 0"}, {"mode: SERVER", "mode: SERVANT"}, {"url: https:", "url: gopher:"}} {
		wrong := bytes.Replace(manifest, []byte(change[0]), []byte(change[1]), 1)
		if code, answer := s.apply(t, p.Objects[0], wrong); bytes.Equal(wrong, manifest) || code < 400 {
			t.Errorf("%s was taken: %d %v", change[1], code, answer["spec"])
		}
	}

	t.Run("Consul", s.takesConsul)
}

// takesConsul has the server take what Consul is given. Of what is shared, the user's own object is there first, and is
// changed as a whole.
func (s apiServer) takesConsul(t *testing.T) {
	for _, kind := range []string{"ServiceDefaults", "ProxyDefaults"} {
		s.install(t, consulCRDs, kind)
	}
	for _, ns := range []string{"operators", "consul"} {
		body := fmt.Appendf(nil, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": %q}}`, ns)
		if code, answer := s.call(t, http.MethodPost, "/api/v1/namespaces", "application/json", body); code != http.StatusCreated {
			t.Fatalf("namespace %s: %d %v", ns, code, answer["message"])
		}
	}
	kinds := s.kinds(t)
	taken := map[bool]int{}
	for _, in := range consulCases(t) {
		c, w, err := consulCase(t, in)
		if err != nil {
			continue
		}
		if len(w.Cluster.Kinds) > 0 {
			w.Cluster.Kinds = kinds
		}
		p, err := Consul{}.Plan(c, w)
		if err != nil {
			continue
		}
		s.takesMakers(t, in, p)
		o := p.Objects[len(p.Objects)-1]
		u := &unstructured.Unstructured{Object: o.Content}
		method, path, media, made := http.MethodPatch, pathOf(u), "application/apply-patch+yaml", http.StatusCreated
		if o.Shared {
			user, _ := w.Cluster.Object(plan.Ref{GroupKind: u.GroupVersionKind().GroupKind(), Name: u.GetName()})
			theirs := (&unstructured.Unstructured{Object: user.Content}).DeepCopy()
			for _, servers := range []string{"resourceVersion", "uid", "generation"} {
				unstructured.RemoveNestedField(theirs.Object, "metadata", servers)
			}
			data, err := json.Marshal(theirs.Object)
			if err != nil {
				t.Fatal(err)
			}
			code, answer := s.call(t, http.MethodPost, strings.TrimSuffix(path, "/"+u.GetName())+"?fieldValidation=Strict", "application/json", data)
			if code != http.StatusCreated {
				t.Fatalf("%s: the user's own: %d %v", filepath.Base(in), code, answer["message"])
			}
			answer["spec"] = o.Content["spec"]
			u = &unstructured.Unstructured{Object: answer}
			method, media, made = http.MethodPut, "application/json", http.StatusOK
		}
		data, err := json.Marshal(u.Object)
		if err != nil {
			t.Fatal(err)
		}
		for _, dry := range []string{"&dryRun=All", ""} {
			code, answer := s.call(t, method, path+"?fieldManager=meshery-filters&fieldValidation=Strict"+dry, media, data)
			if code != made || !reflect.DeepEqual(answer["spec"], asJSON(t, o.Content["spec"])) {
				t.Errorf("%s: %d %v: %v", filepath.Base(in), code, answer["message"], answer["spec"])
			}
		}
		taken[o.Shared]++
		if code, answer := s.call(t, http.MethodDelete, path, "application/json", nil); code != http.StatusOK {
			t.Fatalf("%s: delete: %d %v", filepath.Base(in), code, answer["message"])
		}
		// And a mistake is one.
		wrong := bytes.Replace(data, []byte(`"arguments":`), []byte(`"argument":`), 1)
		if code, answer := s.call(t, method, path+"?fieldManager=meshery-filters&fieldValidation=Strict&dryRun=All", media, wrong); code < 400 {
			t.Errorf("%s: a field that nobody knows was taken: %v", filepath.Base(in), answer["spec"])
		}
	}
	if taken[true] < 5 || taken[false] < 3 {
		t.Errorf("only %v were applied", taken)
	}
}

// takesMakers has the server take what makes Pods with the upstreams that they are given, which changes nothing else.
func (s apiServer) takesMakers(t *testing.T, in string, p plan.Plan) {
	t.Helper()
	for _, o := range p.Objects[:len(p.Objects)-1] {
		u := &unstructured.Unstructured{Object: o.Content}
		path := pathOf(u)
		theirs := (&unstructured.Unstructured{Object: o.Read}).DeepCopy()
		for _, servers := range []string{"resourceVersion", "uid"} {
			unstructured.RemoveNestedField(theirs.Object, "metadata", servers)
		}
		data, err := json.Marshal(theirs.Object)
		if err != nil {
			t.Fatal(err)
		}
		code, before := s.call(t, http.MethodPost, strings.TrimSuffix(path, "/"+u.GetName())+"?fieldValidation=Strict", "application/json", data)
		if code != http.StatusCreated {
			t.Fatalf("%s: the user's own: %d %v", filepath.Base(in), code, before["message"])
		}
		want := (&unstructured.Unstructured{Object: before}).DeepCopy()
		want.SetAnnotations(u.GetAnnotations())
		annotations, _, _ := unstructured.NestedStringMap(o.Content, "spec", "template", "metadata", "annotations")
		if err := unstructured.SetNestedStringMap(want.Object, annotations, "spec", "template", "metadata", "annotations"); err != nil {
			t.Fatal(err)
		}
		if data, err = json.Marshal(want.Object); err != nil {
			t.Fatal(err)
		}
		for _, dry := range []string{"&dryRun=All", ""} {
			code, answer := s.call(t, http.MethodPut, path+"?fieldManager=meshery-filters&fieldValidation=Strict"+dry, "application/json", data)
			got := &unstructured.Unstructured{Object: answer}
			if code != http.StatusOK || !reflect.DeepEqual(answer["spec"], want.Object["spec"]) || !reflect.DeepEqual(got.GetAnnotations(), want.GetAnnotations()) {
				t.Errorf("%s: %d %v: %v", filepath.Base(in), code, answer["message"], answer)
			}
		}
		if code, answer := s.call(t, http.MethodDelete, path, "application/json", nil); code != http.StatusOK {
			t.Fatalf("%s: delete: %d %v", filepath.Base(in), code, answer["message"])
		}
	}
}

// asJSON is a value as a JSON decoder gives it.
func asJSON(t *testing.T, v any) (out any) {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &out); err != nil {
		t.Fatal(err)
	}
	return out
}
