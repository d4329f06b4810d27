package mesh

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/wasm/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

const crds = "testdata/istio/crds.yaml"

// installations are what clusters serve, by the names that goldens have.
func installations(t *testing.T) map[string][]plan.Kind {
	t.Helper()
	all := plan.ClusterOf(readObjects(t, crds)).Kinds
	if len(all) != 3 {
		t.Fatalf("%d kinds in %s", len(all), crds)
	}
	of := func(kinds ...schema.GroupKind) (some []plan.Kind) {
		for _, k := range all {
			if slices.Contains(kinds, k.GroupKind()) {
				some = append(some, k)
			}
		}
		return some
	}
	old := of(wasmPlugin, envoyPatch)
	for i, k := range old {
		old[i].Fields = maps.Clone(k.Fields)
		for path := range old[i].Fields {
			for _, newer := range []string{"spec.targetRefs", "spec.targetRef", "spec.type"} {
				if path == newer || strings.HasPrefix(path, newer+".") {
					delete(old[i].Fields, path)
				}
			}
		}
		if k.GroupKind() == wasmPlugin {
			old[i].Fields["spec.failStrategy"] = []string{"FAIL_CLOSE", "FAIL_OPEN"}
		}
	}
	return map[string][]plan.Kind{
		"trafficextension": of(trafficExtension, wasmPlugin, envoyPatch),
		"wasmplugin":       of(wasmPlugin, envoyPatch),
		"envoyfilter":      of(envoyPatch),
		"old":              old, // about Istio 1.18
	}
}

func name(o plan.Object) string { return (&unstructured.Unstructured{Object: o.Content}).GetName() }

func readObjects(t *testing.T, file string) (objects []plan.Object) {
	t.Helper()
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	dec := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(data), 4096)
	for {
		o := &unstructured.Unstructured{}
		err := dec.Decode(&o.Object)
		if errors.Is(err, io.EOF) {
			return objects
		}
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if o.Object != nil {
			objects = append(objects, plan.Object{Content: o.Object})
		}
	}
}

// istioCase is a file of Filter documents. Its first comment says what is special about the world:
//
//	# world: bytes=N (that modules have, 8 by default, 0: not at hand), served, path
func istioCase(t *testing.T, file string, kinds []plan.Kind) (filter.Chain, plan.World, error) {
	t.Helper()
	body, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	filters, err := filter.Read(body, "shop")
	if err != nil {
		t.Fatal(err)
	}
	w := plan.World{Modules: map[string]plan.Code{}, Cluster: plan.Cluster{Kinds: kinds, Objects: readObjects(t, "testdata/istio/cluster.yaml")}}
	first, _, _ := strings.Cut(string(body), "\n")
	special, _ := strings.CutPrefix(first, "# world: ")
	size := 8
	fmt.Sscanf(special, "bytes=%d", &size)
	c := filter.Chain{Mesh: "istio"}
	for _, f := range filters {
		if f.Spec.Module.SHA256 == "" { // the operation sets it
			f.Spec.Module.SHA256 = strings.Repeat("0123456789abcdef", 4)
		}
		f.Spec.Module.Inline = ""
		code := plan.Code{}
		if size > 0 {
			code.Inline = append([]byte("\x00asm\x01\x00\x00\x00"), make([]byte, size-8)...)
		}
		if strings.Contains(special, "served") {
			code.URL = "http://filters.meshery.svc:10017/modules/" + f.Spec.Module.SHA256 + ".wasm"
		}
		if strings.Contains(special, "path") {
			code.Path = "/var/lib/filters/" + f.Spec.Module.SHA256 + ".wasm"
		}
		w.Modules[f.Spec.Module.SHA256] = code
		f, err := Istio{}.Complete(f)
		if err != nil {
			return c, w, err
		}
		c.Target = f.Spec.Target
		c = c.With(f)
	}
	reads := Istio{}.Reads(c)
	w.Cluster.Objects = slices.DeleteFunc(w.Cluster.Objects, func(o plan.Object) bool {
		return !slices.ContainsFunc(slices.Concat(reads.Objects, reads.FirstOf), func(r plan.Ref) bool {
			_, ok := plan.Cluster{Objects: []plan.Object{o}}.Object(r)
			return ok
		})
	})
	return c, w, nil
}

func istioCases(t *testing.T) []string {
	t.Helper()
	cases, err := filepath.Glob("testdata/istio/*.in.yaml")
	if err != nil || len(cases) < 20 {
		t.Fatalf("only %d cases (%v)", len(cases), err)
	}
	return cases
}

func TestAChainOnIstioBecomesOneObjectAFilter(t *testing.T) {
	goldens := map[string]bool{}
	worlds := installations(t)
	for _, in := range istioCases(t) {
		for _, name := range slices.Sorted(maps.Keys(worlds)) {
			golden := strings.TrimSuffix(in, ".in.yaml") + "." + name + ".yaml"
			goldens[golden] = true
			t.Run(filepath.Base(golden), func(t *testing.T) {
				c, w, err := istioCase(t, in, worlds[name])
				var p plan.Plan
				if err == nil {
					p, err = Istio{}.Plan(c, w)
				}
				got := istioGolden(t, p, err)
				if *update {
					if err := os.WriteFile(golden, got, 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, rerr := os.ReadFile(golden)
				if rerr != nil || !bytes.Equal(got, want) {
					t.Errorf("%s differs; if it should, run: go test ./internal/mesh -update\n%s", golden, got)
				}
				if err != nil {
					return
				}
				again, err := Istio{}.Plan(c, w)
				if err != nil || again.Version != p.Version || !bytes.Equal(istioGolden(t, again, nil), got) {
					t.Error("the same chain in the same world gave another plan")
				}
				var addresses, sources []string
				for _, o := range p.Objects {
					addresses = append(addresses, fetched(o.Content)...)
				}
				for _, s := range p.Sources {
					sources = append(sources, s.URL)
				}
				if !slices.Equal(addresses, sources) {
					t.Errorf("proxies fetch from %v, and %v is looked at before", addresses, sources)
				}
				if len(p.Objects) != len(c.Filters) {
					t.Errorf("%d objects for %d filters", len(p.Objects), len(c.Filters))
				}
			})
		}
	}
	there, _ := filepath.Glob("testdata/istio/*.*.yaml")
	for _, file := range there {
		if !goldens[file] && !strings.HasSuffix(file, ".in.yaml") {
			if *update {
				os.Remove(file)
				continue
			}
			t.Errorf("%s belongs to no case", file)
		}
	}
}

// fetched are the addresses in an object that proxies fetch modules from.
func fetched(v any) (addresses []string) {
	switch t := v.(type) {
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(t)) {
			if u, ok := t[k].(string); ok && (k == "url" || k == "uri") && !strings.HasPrefix(u, "file://") {
				addresses = append(addresses, u)
			}
			addresses = append(addresses, fetched(t[k])...)
		}
	case []any:
		for _, e := range t {
			addresses = append(addresses, fetched(e)...)
		}
	}
	return addresses
}

// longBytes are left out of goldens: nobody reads base64.
var longBytes = regexp.MustCompile(`(inline_bytes: )([A-Za-z0-9+/=]{100,})`)

func istioGolden(t *testing.T, p plan.Plan, err error) []byte {
	t.Helper()
	if err != nil {
		var b bytes.Buffer
		pr := problem.Of(err)
		fmt.Fprintf(&b, "# refused: %s\n", pr.Kind.Code)
		for _, l := range strings.Split(pr.Details, "\n") {
			fmt.Fprintf(&b, "# %s\n", l)
		}
		return b.Bytes()
	}
	text, err := plan.Manifest(p.Objects)
	if err != nil {
		t.Fatal(err)
	}
	text = longBytes.ReplaceAllFunc(text, func(m []byte) []byte {
		return fmt.Appendf(nil, "inline_bytes: <%d characters>", len(m)-len("inline_bytes: "))
	})
	for _, l := range p.Losses {
		text = fmt.Appendf(text, "# lost: %s\n", l)
	}
	for _, o := range p.Restarts {
		text = fmt.Appendf(text, "# Pods restart: %s\n", o)
	}
	for _, o := range p.Again {
		text = fmt.Appendf(text, "# Pods restart once more: %s\n", o)
	}
	return text
}

func TestWhatIstioIsGivenIsWhatItsSchemasAllow(t *testing.T) {
	schemas := map[string]map[string]any{}
	for _, o := range readObjects(t, crds) {
		kind, _, _ := unstructured.NestedString(o.Content, "spec", "names", "kind")
		versions, _, _ := unstructured.NestedSlice(o.Content, "spec", "versions")
		schemas[kind], _, _ = unstructured.NestedMap(versions[0].(map[string]any), "schema", "openAPIV3Schema", "properties", "spec")
	}
	seen := map[string]int{}
	for _, in := range istioCases(t) {
		for name, kinds := range installations(t) {
			c, w, err := istioCase(t, in, kinds)
			if err != nil {
				continue
			}
			p, err := Istio{}.Plan(c, w)
			if err != nil {
				continue
			}
			for _, o := range p.Objects {
				u := &unstructured.Unstructured{Object: o.Content}
				seen[u.GetKind()]++
				// As JSON has it, and as a copy that the API machinery makes: both refuse other types than theirs.
				var spec any
				data, err := json.Marshal(u.DeepCopy().Object["spec"])
				if err != nil {
					t.Fatal(err)
				}
				if err := json.Unmarshal(data, &spec); err != nil {
					t.Fatal(err)
				}
				for _, mistake := range conform(schemas[u.GetKind()], spec, "spec") {
					t.Errorf("%s on %s: %s: %s", filepath.Base(in), name, o, mistake)
				}
				if errs := patchMistakes(o); len(errs) > 0 {
					t.Errorf("%s on %s: %s: %v", filepath.Base(in), name, o, errs)
				}
				if n := u.GetName(); !filter.IsDNSLabel(n) {
					t.Errorf("%s is not a DNS label", n)
				}
			}
		}
	}
	if seen["TrafficExtension"] < 10 || seen["WasmPlugin"] < 10 || seen["EnvoyFilter"] < 10 {
		t.Errorf("the cases have too few objects of a kind: %v", seen)
	}
}

func TestTheSchemaCheckFindsMistakes(t *testing.T) {
	var s map[string]any
	for _, o := range readObjects(t, crds) {
		if name(o) == "wasmplugins.extensions.istio.io" {
			versions, _, _ := unstructured.NestedSlice(o.Content, "spec", "versions")
			s, _, _ = unstructured.NestedMap(versions[0].(map[string]any), "schema", "openAPIV3Schema", "properties", "spec")
		}
	}
	for _, spec := range []string{
		`{"url": "x", "sha256": "abc"}`, `{"sha256": ""}`, `{"url": "x", "failStrategy": "FAIL"}`, `{"url": "x", "priority": "1"}`,
		`{"url": "x", "priority": 1.5}`, `{"url": "x", "match": [{"ports": [{"number": 0}]}]}`, `{"url": "x", "match": [{"ports": [{}]}]}`,
		`{"url": "x", "unknown": 1}`, `{"url": ""}`, `{"url": "x", "pluginConfig": "text"}`, `{"url": "x", "match": {}}`,
	} {
		var v any
		if err := json.Unmarshal([]byte(spec), &v); err != nil {
			t.Fatal(err)
		}
		if len(conform(s, v, "spec")) == 0 {
			t.Errorf("%s is taken", spec)
		}
	}
}

// conform says how a value breaks a schema. It knows every keyword that Istio's schemas have but the rules in CEL, and
// is stricter than an API server, which takes fields away that it does not know.
func conform(s map[string]any, v any, at string) (mistakes []string) {
	fail := func(format string, args ...any) { mistakes = append(mistakes, at+": "+fmt.Sprintf(format, args...)) }
	number := func(key string) (float64, bool) {
		switch n := s[key].(type) {
		case int64:
			return float64(n), true
		case float64:
			return n, true
		}
		return 0, false
	}
	size := -1
	for key := range s {
		switch key {
		case "type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "maxItems", "maxProperties", "required",
			"properties", "additionalProperties", "items", "oneOf", "anyOf", "not", "nullable", "format",
			"x-kubernetes-preserve-unknown-fields", "x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys":
		default:
			fail("the check does not know the keyword %s", key)
		}
	}
	if v == nil && s["nullable"] == true {
		return mistakes
	}
	switch t := s["type"]; v := v.(type) {
	case map[string]any:
		if t != nil && t != "object" {
			fail("is an object, not %v", t)
		}
		size = len(v)
		required, _ := s["required"].([]any)
		for _, r := range required {
			if _, ok := v[r.(string)]; !ok {
				fail("%s is missing", r)
			}
		}
		properties, _ := s["properties"].(map[string]any)
		for k, e := range v {
			if p, ok := properties[k].(map[string]any); ok {
				mistakes = append(mistakes, conform(p, e, at+"."+k)...)
			} else if p, ok := s["additionalProperties"].(map[string]any); ok {
				mistakes = append(mistakes, conform(p, e, at+"."+k)...)
			} else if s["x-kubernetes-preserve-unknown-fields"] != true && t != nil {
				fail("there is no field %s", k)
			}
		}
	case []any:
		if t != "array" {
			fail("is a list, not %v", t)
		}
		size = len(v)
		items, _ := s["items"].(map[string]any)
		for i, e := range v {
			mistakes = append(mistakes, conform(items, e, fmt.Sprintf("%s[%d]", at, i))...)
		}
	case string:
		if t != "string" {
			fail("is text, not %v", t)
		}
		size = len([]rune(v))
		if p, ok := s["pattern"].(string); ok && !regexp.MustCompile(p).MatchString(v) {
			fail("%q does not match %s", v, p)
		}
		if enum, ok := s["enum"].([]any); ok && !slices.Contains(enum, any(v)) {
			fail("%q is not one of %v", v, enum)
		}
	case float64:
		if t != "number" && t != "integer" || t == "integer" && v != float64(int64(v)) {
			fail("is %v, not %v", v, t)
		}
		if n, ok := number("minimum"); ok && v < n {
			fail("%v is too small", v)
		}
		if n, ok := number("maximum"); ok && v > n {
			fail("%v is too large", v)
		}
		if s["format"] == "int32" && v != float64(int32(v)) {
			fail("%v is no int32", v)
		}
	default:
		if t != nil {
			fail("is %T, not %v", v, t)
		}
	}
	for _, key := range []string{"minLength", "maxLength", "maxItems", "maxProperties"} {
		if n, ok := number(key); ok && size >= 0 && (key[:3] == "min" && size < int(n) || key[:3] == "max" && size > int(n)) {
			fail("has %d, which %s forbids", size, key)
		}
	}
	matching := func(key string) (n int) {
		for _, alternative := range s[key].([]any) {
			if len(conform(alternative.(map[string]any), v, at)) == 0 {
				n++
			}
		}
		return n
	}
	if s["oneOf"] != nil && matching("oneOf") != 1 {
		fail("oneOf does not hold")
	}
	if s["anyOf"] != nil && matching("anyOf") == 0 {
		fail("anyOf does not hold")
	}
	if not, ok := s["not"].(map[string]any); ok && len(conform(not, v, at)) == 0 {
		fail("not does not hold")
	}
	return mistakes
}

// patchMistakes reads the patches of an EnvoyFilter as istiod does, but lets no field pass that Envoy does not know.
func patchMistakes(o plan.Object) (errs []error) {
	patches, _, _ := unstructured.NestedSlice(o.Content, "spec", "configPatches")
	for _, p := range patches {
		p := p.(map[string]any)
		value, _, err := unstructured.NestedMap(p, "patch", "value")
		if err != nil {
			return append(errs, err)
		}
		data, err := json.Marshal(value)
		if err != nil {
			return append(errs, err)
		}
		var m interface {
			proto.Message
			ValidateAll() error
		}
		switch p["applyTo"] {
		case "HTTP_FILTER":
			m = &hcm.HttpFilter{}
		case "NETWORK_FILTER":
			m = &listener.Filter{}
		case "EXTENSION_CONFIG":
			m = &core.TypedExtensionConfig{}
		default:
			return append(errs, fmt.Errorf("applyTo %v", p["applyTo"]))
		}
		if err := protojson.Unmarshal(data, m); err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, m.ValidateAll())
	}
	return slices.DeleteFunc(errs, func(err error) bool { return err == nil })
}

func TestTheWorldWithoutAClusterIsThatOfIstio131(t *testing.T) {
	real := installations(t)["trafficextension"]
	if len(Istio131()) != len(real) {
		t.Fatal("another number of kinds")
	}
	for _, assumed := range Istio131() {
		k, ok := plan.Cluster{Kinds: real}.Kind(assumed.GroupKind())
		if !ok || k.GroupVersionKind != assumed.GroupVersionKind {
			t.Errorf("%s is not what the CRDs have", assumed.GroupVersionKind)
		}
		for path, values := range assumed.Fields {
			if !k.Has(path) || !slices.Equal(values, k.Fields[path]) {
				t.Errorf("%s has %s with %v", assumed.Kind, path, k.Fields[path])
			}
		}
	}
	// And it is enough: each case comes to the same plan.
	for _, in := range istioCases(t) {
		c, w, err := istioCase(t, in, real)
		if err != nil {
			continue
		}
		want, wantErr := Istio{}.Plan(c, w)
		w.Cluster.Kinds = Istio131()
		got, err := Istio{}.Plan(c, w)
		if got.Version != want.Version || (err == nil) != (wantErr == nil) {
			t.Errorf("%s: %v, %v", in, err, wantErr)
		}
	}
}

func TestAnEmptyChainOnIstioPlansNothing(t *testing.T) {
	for name, kinds := range installations(t) {
		p, err := Istio{}.Plan(filter.Chain{Mesh: "istio", Target: filter.Target{Kind: filter.Service, Namespace: "shop", Name: "gone"}},
			plan.World{Cluster: plan.Cluster{Kinds: kinds}})
		if err != nil || len(p.Objects) != 0 || p.Version == "" {
			t.Errorf("%s: %v %v", name, p.Objects, err)
		}
	}
}

func TestPrioritiesKeepTheChainsOrderWithTheUsersNumbersWhereTheySuffice(t *testing.T) {
	const most, least = 1<<31 - 1, -1 << 31
	for _, c := range []struct {
		reason   string
		user     []int
		phases   []filter.Phase
		byPhase  bool
		expected []int64
	}{
		{"distinct numbers stay", []int{30, 20, -5}, nil, true, []int64{30, 20, -5}},
		{"equal ones count up from the last", []int{0, 0, 0}, nil, true, []int64{2, 1, 0}},
		{"a gap takes what was raised", []int{5, 0, 0}, nil, true, []int64{5, 1, 0}},
		{"each phase counts for itself", []int{0, 0, 0}, []filter.Phase{filter.Authn, "", ""}, true, []int64{0, 1, 0}},
		{"but patches count over all", []int{0, 0, 10}, []filter.Phase{filter.Authn, filter.Authz, ""}, false, []int64{12, 11, 10}},
		{"the top leaves room", []int{most, most}, nil, true, []int64{most, most - 1}},
		{"the bottom does", []int{least, least}, nil, true, []int64{-most + 1, -most}},
	} {
		var filters []filter.Filter
		for i, p := range c.user {
			f := filter.Filter{Spec: filter.Spec{Priority: p}}
			if c.phases != nil {
				f.Spec.Phase = c.phases[i]
			}
			filters = append(filters, f)
		}
		if got := priorities(filters, c.byPhase); !slices.Equal(got, c.expected) {
			t.Errorf("%s: %v, want %v", c.reason, got, c.expected)
		}
	}
}

func TestObjectNamesAreLabelsThatNoOtherFilterOrTargetHas(t *testing.T) {
	long := strings.Repeat("a", 63)
	names := map[string]string{}
	for _, k := range []filter.Key{{Namespace: "shop", Name: "rate-limit"}, {Namespace: "infra", Name: "rate-limit"}, {Namespace: "shop", Name: long},
		{Namespace: "shop", Name: long[:62] + "b"}, {Namespace: "shop", Name: long[:30] + "-" + long[:20]}} {
		for _, target := range []filter.Target{
			{Kind: filter.Service, Namespace: "shop", Name: "api"}, {Kind: filter.Gateway, Namespace: "shop", Name: "api"},
			{Kind: filter.Service, Namespace: "shop", Name: strings.Repeat("x.", 120) + "y"}, {Kind: filter.Mesh, Namespace: "istio-system"},
			{Kind: filter.Workload, Namespace: "shop", Labels: map[string]string{"app": "Web_1.2"}},
			{Kind: filter.Workload, Namespace: "shop", Labels: map[string]string{"app": ""}},
			{Kind: filter.Namespace, Namespace: "shop"},
		} {
			n := objectName(k, target)
			if !filter.IsDNSLabel(n) {
				t.Errorf("%s is not a DNS label", n)
			}
			if other, twice := names[n]; twice {
				t.Errorf("%s is %s on %s, and %s", n, k, target, other)
			}
			names[n] = k.String() + " on " + target.String()
		}
	}
	if n := objectName(filter.Key{Namespace: "shop", Name: "rate-limit"}, filter.Target{Kind: filter.Service, Namespace: "shop", Name: "api"}); !strings.HasPrefix(n, "rate-limit-api-") {
		t.Error(n)
	}
}

func TestAPlanSaysInWhichPodsItsProxiesAre(t *testing.T) {
	const edge = "gateway.networking.k8s.io/gateway-name"
	for _, one := range []struct {
		target filter.Target
		want   *plan.Selection
		why    string
	}{
		{filter.Target{Kind: filter.Workload, Namespace: "shop", Labels: map[string]string{"app": "api"}},
			&plan.Selection{Namespace: "shop", Labels: map[string]string{"app": "api"}, Role: "sidecar"}, "by labels"},
		{filter.Target{Kind: filter.Workload, Namespace: "shop", Name: "api"},
			&plan.Selection{Namespace: "shop", Labels: map[string]string{"app": "api"}, Role: "sidecar"}, "by the Deployment's selector"},
		{filter.Target{Kind: filter.Workload, Namespace: IstioRoot, Labels: map[string]string{"app": "api"}},
			&plan.Selection{Labels: map[string]string{"app": "api"}, Role: "sidecar"}, "the root namespace holds for all"},
		{filter.Target{Kind: filter.Namespace, Namespace: "shop"}, &plan.Selection{Namespace: "shop", Role: "sidecar"}, "all of a namespace"},
		{filter.Target{Kind: filter.Mesh, Namespace: "mesh-root"}, &plan.Selection{Role: "sidecar"}, "all"},
		{filter.Target{Kind: filter.Gateway, Namespace: "edge", Labels: map[string]string{"istio": "web"}},
			&plan.Selection{Namespace: "edge", Labels: map[string]string{"istio": "web"}, Role: "router"}, "a gateway by labels"},
		{filter.Target{Kind: filter.Gateway, Namespace: "shop", Name: "web"},
			&plan.Selection{Namespace: "shop", Labels: map[string]string{edge: "web"}, Role: "router"}, "a Gateway of the Gateway API"},
		{filter.Target{Kind: filter.Service, Namespace: "shop", Name: "catalogue"},
			&plan.Selection{Namespace: "shop", Labels: map[string]string{edge: "waypoint"}, Role: "waypoint"}, "the waypoint before a Service"},
		{filter.Target{Kind: filter.Workload, Namespace: "shop", Name: "gone"}, nil, "a target that is gone"},
	} {
		w := plan.World{Cluster: plan.Cluster{Kinds: Istio131(), Objects: readObjects(t, "testdata/istio/cluster.yaml")}}
		p, err := Istio{}.Plan(filter.Chain{Mesh: "istio", Target: one.target}, w)
		if err != nil || !reflect.DeepEqual(p.Proxies, one.want) {
			t.Errorf("%s: %+v %v", one.why, p.Proxies, err)
		}
	}
}
