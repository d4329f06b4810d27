package plan

import (
	"encoding/json"
	"reflect"
	"testing"

	"k8s.io/apimachinery/pkg/runtime/schema"
)

func TestASchemaGivesItsPathsAndTheirEnumerations(t *testing.T) {
	var s map[string]any
	if err := json.Unmarshal([]byte(`{"type": "object", "properties": {"spec": {"properties": {
		"failStrategy": {"type": "string", "enum": ["FAIL_CLOSE", "FAIL_OPEN"]},
		"match": {"type": "array", "items": {"properties": {"ports": {"items": {"properties": {"number": {"type": "integer"}}}}}}},
		"odd": true}}}}`), &s); err != nil {
		t.Fatal(err)
	}
	k := Kind{Fields: Fields(s)}
	want := map[string][]string{"spec": nil, "spec.failStrategy": {"FAIL_CLOSE", "FAIL_OPEN"}, "spec.match": nil,
		"spec.match.ports": nil, "spec.match.ports.number": nil}
	if !reflect.DeepEqual(k.Fields, want) {
		t.Errorf("%v", k.Fields)
	}
	if !k.Has("spec.match.ports") || k.Has("spec.targetRefs") {
		t.Error("Has is wrong")
	}
	if !k.Takes("spec.failStrategy", "FAIL_OPEN") || k.Takes("spec.failStrategy", "FAIL_RELOAD") || k.Takes("spec.match", "x") {
		t.Error("Takes is wrong")
	}
}

func TestASchemaThatNestsWithoutEndIsLeft(t *testing.T) {
	s := map[string]any{}
	s["properties"] = map[string]any{"again": s}
	if n := len(Fields(s)); n == 0 || n > maxSchemaDepth+1 {
		t.Errorf("%d fields", n)
	}
}

func TestObjectsAndKindsAreFoundWhateverTheirVersion(t *testing.T) {
	gk := schema.GroupKind{Group: "gateway.networking.k8s.io", Kind: "Gateway"}
	o := Object{Content: map[string]any{"apiVersion": "gateway.networking.k8s.io/v1beta1",
		"kind": "Gateway", "metadata": map[string]any{"namespace": "shop", "name": "web"}}}
	c := Cluster{Kinds: []Kind{{GroupVersionKind: gk.WithVersion("v1")}}, Objects: []Object{o}}
	if got, ok := c.Object(Ref{gk, "shop", "web"}); !ok || got.String() != "Gateway/shop/web" {
		t.Errorf("%v %v", got, ok)
	}
	for _, r := range []Ref{{gk, "shop", "api"}, {gk, "other", "web"}, {schema.GroupKind{Group: "networking.istio.io", Kind: "Gateway"}, "shop", "web"}} {
		if _, ok := c.Object(r); ok {
			t.Errorf("%v was found", r)
		}
	}
	if k, ok := c.Kind(gk); !ok || k.Version != "v1" {
		t.Errorf("%v %v", k, ok)
	}
	if _, ok := c.Kind(schema.GroupKind{Kind: "Gateway"}); ok {
		t.Error("a kind of another group was found")
	}
}
