package istiod_test

import (
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
	"github.com/meshery/meshery-filters/internal/istiod"
	"github.com/meshery/meshery-filters/internal/kube"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/survey"
)

func (r *rig) survey(c *kube.Cluster) (plan.Survey, error) {
	p := istiod.ProxiesOf(c)
	defer p.Close()
	return survey.Look(r.Context(), p, r.namespace)
}

// users are objects that somebody else has applied, each with a filter that sets a header of its name.
func (r *rig) users(kind, name, filter, header string) map[string]any {
	meta := map[string]any{"namespace": r.namespace, "name": name}
	if kind == "TrafficExtension" {
		return map[string]any{"apiVersion": "extensions.istio.io/v1alpha1", "kind": kind, "metadata": meta, "spec": map[string]any{
			"wasm":  map[string]any{"url": "file://" + r.code.Path, "pluginConfig": map[string]any{"response": map[string]any{header: "there"}}},
			"match": []any{map[string]any{"mode": "SERVER"}}}}
	}
	config := map[string]any{"name": filter, "vm_config": map[string]any{"runtime": "envoy.wasm.runtime.v8", "code": map[string]any{"local": map[string]any{"filename": r.code.Path}}},
		"configuration": map[string]any{"@type": "type.googleapis.com/google.protobuf.StringValue", "value": `{"response": {"` + header + `": "there"}}`}}
	return map[string]any{"apiVersion": "networking.istio.io/v1alpha3", "kind": kind, "metadata": meta, "spec": map[string]any{"configPatches": []any{map[string]any{
		"applyTo": "HTTP_FILTER", "match": map[string]any{"context": "SIDECAR_INBOUND"},
		"patch": map[string]any{"operation": "INSERT_FIRST", "value": map[string]any{"name": filter, "typed_config": map[string]any{
			"@type": "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm", "config": config}}}}}}}
}

func TestAProxyWithoutItsControlPlaneRunsOrphansAndWhatIsExplainedIsNone(t *testing.T) {
	r := newRig(t, "EnvoyFilter")
	t.Parallel() // it waits for istiod's patience
	alone := r.proxy(istiotest.ProxyOptions{Pod: "api-1", Relay: true})
	connected := r.sidecar("api-2", 1)
	r.await(r.cluster, r.apply(r.filter("hello", "{response: {x-a: one}}", "")), running(2, plan.Seen))
	stay := []map[string]any{r.users("EnvoyFilter", "audit", "corp.audit", "x-audit"), r.users("TrafficExtension", "plug.in", "", "x-plugin")}
	gone := []map[string]any{r.users("EnvoyFilter", "old", "corp.old", "x-old"), r.users("TrafficExtension", "older", "", "x-older")}
	if err := istio.Apply(t.Context(), slices.Concat(stay, gone)...); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*istiotest.Proxy{alone, connected} {
		for _, header := range []string{"x-audit", "x-plugin", "x-old", "x-older"} {
			r.eventually(p, header, "there")
		}
	}
	silent := map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"namespace": r.namespace, "name": "api-3",
		"labels": map[string]any{"service.istio.io/canonical-name": "api"}},
		"spec": map[string]any{"nodeName": "node-1", "containers": []any{map[string]any{"name": "main", "image": "none"}}}}
	if err := istio.Apply(t.Context(), silent); err != nil {
		t.Fatal(err)
	}
	if err := istio.Send(t.Context(), http.MethodPatch, "/api/v1/namespaces/"+r.namespace+"/pods/api-3/status",
		map[string]any{"status": map[string]any{"phase": "Running"}}); err != nil {
		t.Fatal(err)
	}

	s, err := r.survey(r.cluster)
	if err != nil || len(s.Orphans) > 0 || s.Proxies != 3 || s.Looked != 2 || !strings.Contains(s.Missed, r.namespace+"/api-3: ") {
		t.Errorf("while all is explained: %+v %v", s, err)
	}
	s, err = r.survey(clusterOf(t, half))
	if err != nil || s.Looked != 0 || s.Proxies != 3 || strings.Count(s.Missed, "pods/portforward") != 1 || !strings.Contains(s.Missed, "(3 proxies)") {
		t.Errorf("without the right to ask proxies: %+v %v", s, err)
	}
	if s, err = r.survey(clusterOf(t, nobody)); !errors.Is(err, problem.RightMissing) {
		t.Errorf("without the right to list Pods: %+v %v", s, err)
	}

	alone.Cut()
	if err := istio.Delete(t.Context(), gone...); err != nil {
		t.Fatal(err)
	}
	r.apply()
	s, err = r.survey(r.cluster)
	if err != nil || s.Looked != 2 {
		t.Errorf("it is not looked at: %s %v", s, err)
	}
	for _, header := range []string{"x-old", "x-older", "x-audit"} { // or there would be nothing to find
		r.header(alone, header, "there")
	}
	r.header(alone, "x-a", "one")
	r.header(connected, "x-a", "")
	wants := []string{"corp.old", "extensions.istio.io/trafficextension/" + r.namespace + ".older", "meshery.filters/" + r.namespace + ".hello-api-"}
	if len(s.Orphans) != len(wants) {
		t.Fatalf("orphans are %v", s.Orphans)
	}
	for i, want := range wants {
		o := s.Orphans[i]
		if o.Proxy != r.namespace+"/api-1" || !strings.HasPrefix(o.Name, want) || o.SHA256 != r.digest || o.Source != map[bool]string{true: "inline", false: r.code.Path}[i == 2] {
			t.Errorf("%s: %+v", want, o)
		}
	}
	if err := istio.Delete(t.Context(), stay...); err != nil {
		t.Fatal(err)
	}
}
