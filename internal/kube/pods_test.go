package kube

import (
	"slices"
	"testing"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

func TestPodsAreThoseThatRunAndHaveTheLabels(t *testing.T) {
	ns := namespace(t)
	run := func(name, phase string, labels map[string]string) {
		must(t, "POST", "/api/v1/namespaces/"+ns+"/pods", map[string]any{
			"metadata": map[string]any{"name": name, "labels": labels},
			"spec":     map[string]any{"nodeName": "none", "containers": []any{map[string]any{"name": "main", "image": "none"}}}})
		must(t, "PATCH", "/api/v1/namespaces/"+ns+"/pods/"+name+"/status", map[string]any{"status": map[string]any{"phase": phase}})
	}
	both := map[string]string{"app": "api", "track": "stable"}
	run("api-1", "Running", both)
	run("api-2", "Running", both)
	run("api-old", "Succeeded", both)
	run("api-canary", "Running", map[string]string{"app": "api", "track": "canary"})
	run("api-leaving", "Running", both)
	// A Pod on a node that does not answer goes when that node says so.
	must(t, "DELETE", "/api/v1/namespaces/"+ns+"/pods/api-leaving", nil)
	_, err := cluster(t, server.Kubeconfig(account(t, ns, false)), Options{}).Pods(t.Context(), ns, both)
	fails(t, err, problem.RightMissing, "list", "pods", ns)
	c := base(t)
	for _, one := range []struct {
		selector string
		want     []string
	}{{"app=api,track=stable", []string{"api-1", "api-2"}}, {"app=api", []string{"api-1", "api-2", "api-canary"}},
		{"", []string{"api-1", "api-2", "api-canary"}}, {"app=web", nil}, {"track", []string{"api-1", "api-2", "api-canary"}}, {"none", nil}} {
		got, err := c.pods(t.Context(), ns, one.selector, 2) // so that the list comes in parts
		var names []string
		for _, p := range got {
			if p.Namespace != ns {
				t.Errorf("%s is in another namespace", p)
			}
			names = append(names, p.Name)
		}
		if err != nil || !slices.Equal(names, one.want) {
			t.Errorf("%s: %v %v", one.selector, names, err)
		}
	}
	if two, err := c.Pods(t.Context(), ns, both); err != nil || len(two) != 2 {
		t.Errorf("with both labels: %v %v", two, err)
	}
	if all, err := c.Pods(t.Context(), "", both); err != nil || !slices.Contains(all, plan.Pod{Namespace: ns, Name: "api-1"}) {
		t.Errorf("in all namespaces: %v %v", all, err)
	}
}
