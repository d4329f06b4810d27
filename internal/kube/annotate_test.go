package kube

import (
	"testing"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

func TestAnAnnotationIsBesideThePlan(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	p := planOf(ns, "headers")
	apply(t, c, p)
	ref := plan.Ref{GroupKind: schema.GroupKind{Group: "extensions.istio.io", Kind: "WasmPlugin"}, Namespace: ns, Name: "headers"}
	for _, value := range []string{"1", "2"} {
		before := version(there(t, pluginPath(ns, "headers")))
		if err := c.Annotate(t.Context(), ref, "example.com/pushed", value); err != nil {
			t.Fatal(err)
		}
		o := there(t, pluginPath(ns, "headers"))
		same(t, "annotation", descend(o, []string{"metadata", "annotations"})["example.com/pushed"], any(value))
		if version(o) == before {
			t.Error("the object has its old version")
		}
	}
	same(t, "applied again", apply(t, c, p), changed("WasmPlugin/"+ns+"/headers", plan.Unchanged))
	same(t, "removed", apply(t, c, planOf(ns)), changed("WasmPlugin/"+ns+"/headers", plan.Deleted))
	fails(t, c.Annotate(t.Context(), ref, "example.com/pushed", "3"), problem.ChainChanged, "WasmPlugin/"+ns+"/headers")
	without := cluster(t, server.Kubeconfig(account(t, ns, false)), Options{})
	fails(t, without.Annotate(t.Context(), ref, "example.com/pushed", "4"), problem.RightMissing, "verb patch", "wasmplugins.extensions.istio.io")
	ref.Kind = "Nothing"
	fails(t, c.Annotate(t.Context(), ref, "example.com/pushed", "5"), problem.KindNotServed, "Nothing")
}
