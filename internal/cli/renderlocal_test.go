package cli

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/filters"
)

func istioDocument(name, spec string) string {
	return "apiVersion: filters.meshery.io/v1alpha1\nkind: Filter\nmetadata: {name: " + name + ", namespace: shop}\nspec:\n  " +
		strings.ReplaceAll(spec, "\n", "\n  ") + "\n"
}

const (
	toLabels = "target: {kind: Workload, labels: {app: api}}\n"
	fromURL  = "module: {url: 'https://example.com/x.wasm', sha256: 1111111111111111111111111111111111111111111111111111111111111111}\ndelivery: {mode: direct}\n"
	headers  = "module: {builtin: headers}\n"
	stamp    = "config: {response: {x-stamp: here}}"
)

func TestRenderingForIstioPrintsTheObjectsAndNothingElse(t *testing.T) {
	// No adapter runs anywhere: nothing is asked of one.
	r := runWith(t, istioDocument("x", toLabels+fromURL+"vmID: shared\nconfig: {y: 'n'}"), nil, "render", "-f", "-", "--mesh", "istio")
	r.want(t, exitOK)
	const want = `---
apiVersion: extensions.istio.io/v1alpha1
kind: TrafficExtension
metadata:
  annotations:
    filters.meshery.io/filter: shop/x
    filters.meshery.io/sha256: "1111111111111111111111111111111111111111111111111111111111111111"
  labels:
    app.kubernetes.io/managed-by: meshery-filters
  name: x-api-11a89872ba
  namespace: shop
spec:
  match:
    - mode: SERVER
  priority: 0
  selector:
    matchLabels:
      app: api
  wasm:
    failStrategy: FAIL_CLOSE
    imagePullPolicy: IfNotPresent
    pluginConfig:
      "y": "n"
    sha256: "1111111111111111111111111111111111111111111111111111111111111111"
    url: https://example.com/x.wasm
`
	if r.out != want {
		t.Errorf("printed\n%s", r.out)
	}
	if r.err != "Warning: a field has no effect on this mesh: shop/x: spec.vmID: a TrafficExtension does not name its sandbox\n" {
		t.Errorf("said %q", r.err)
	}
	// A document that names the mesh needs no flag.
	named := runWith(t, istioDocument("x", "mesh: istio\n"+toLabels+fromURL+"config: {y: 'n'}"), nil, "render", "-f", "-").want(t, exitOK)
	if named.out != want || named.err != "" {
		t.Errorf("printed\n%s\nsaid %q", named.out, named.err)
	}
}

func TestRenderingForIstioCarriesTheBytesThemselves(t *testing.T) {
	dir := t.TempDir()
	builtin, _ := filters.Builtin("headers")
	if err := os.WriteFile(filepath.Join(dir, "h.wasm"), builtin, 0o644); err != nil {
		t.Fatal(err)
	}
	doc := filepath.Join(dir, "doc.yaml")
	body := istioDocument("b", toLabels+headers+stamp) + "---\n" + istioDocument("a", toLabels+"module: {file: h.wasm}\n"+stamp)
	if err := os.WriteFile(doc, []byte(body), 0o644); err != nil {
		t.Fatal(err)
	}
	r := run(t, "render", "-f", doc, "--mesh", "istio", "-o", "json").want(t, exitOK)
	var list struct {
		Kind  string
		Items []map[string]any
	}
	if err := json.Unmarshal([]byte(r.out), &list); err != nil || list.Kind != "List" || len(list.Items) != 2 {
		t.Fatalf("%v: %s", err, r.out)
	}
	yamlOut := run(t, "render", "-f", doc, "--mesh", "istio").want(t, exitOK)
	dec := yaml.NewDecoder(strings.NewReader(yamlOut.out))
	for i, name := range []string{"shop/a", "shop/b"} {
		var o map[string]any
		if err := dec.Decode(&o); err != nil {
			t.Fatal(err)
		}
		for form, o := range map[string]map[string]any{"json": list.Items[i], "yaml": o} {
			at := func(v any, path ...any) any {
				for _, p := range path {
					switch p := p.(type) {
					case string:
						v = v.(map[string]any)[p]
					case int:
						v = v.([]any)[p]
					}
				}
				return v
			}
			if at(o, "metadata", "annotations", "filters.meshery.io/filter") != name {
				t.Errorf("%s: object %d is %v", form, i, o["metadata"])
			}
			text, _ := at(o, "spec", "configPatches", 0, "patch", "value", "typed_config", "config", "vm_config", "code", "local", "inline_bytes").(string)
			if got, err := base64.StdEncoding.DecodeString(text); err != nil || !bytes.Equal(got, builtin) {
				t.Errorf("%s: %s carries %d bytes, %v", form, name, len(got), err)
			}
		}
	}
}

func TestRenderingForIstioKnowsOfTheClusterWhatItIsGiven(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	doc := file("doc.yaml", istioDocument("x", "mesh: istio\ntarget: {kind: Service, name: api}\n"+fromURL))
	run(t, "render", "-f", doc).want(t, exitFailed, "Service shop/api", "meshery-filters-1071", "--cluster")
	run(t, "render", "-f", doc, "--cluster", "/does/not/exist.yaml").want(t, exitUsage, "--cluster: open /does/not/exist.yaml")

	const service = `{"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1", "kind": "Service",
		"metadata": {"name": "api", "namespace": "shop"}, "spec": {"selector": {"run": "api"}}}]}`
	r := run(t, "render", "-f", doc, "--cluster", file("service.json", service)).want(t, exitOK, "kind: TrafficExtension")
	if !strings.Contains(r.out, "matchLabels:\n      run: api\n") {
		t.Error(r.out)
	}
	runWith(t, service, nil, "render", "-f", doc, "--cluster", "-").want(t, exitOK, "run: api")

	crds, err := os.ReadFile("../mesh/testdata/istio/crds.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var plugins []string
	for _, crd := range strings.Split(string(crds), "---\n") {
		if !strings.Contains(crd, "kind: TrafficExtension\n") {
			plugins = append(plugins, crd)
		}
	}
	if len(plugins) != 3 { // the comment, and two kinds
		t.Fatalf("%d pieces", len(plugins))
	}
	all := strings.Join(append(plugins, service), "---\n")
	run(t, "render", "-f", doc, "--cluster", file("plugins.yaml", all)).want(t, exitOK, "kind: WasmPlugin")

	other := `{"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "things.example.com"},
		"spec": {"group": "example.com", "names": {"kind": "Thing"}, "versions": [{"name": "v1", "served": true, "storage": true}]}}`
	run(t, "render", "-f", doc, "--cluster", file("other.yaml", other+"\n---\n"+service)).want(t, exitFailed, "meshery-filters-1073")
}

func TestWhatCannotBeRenderedForIstioIsSaid(t *testing.T) {
	one := istioDocument("x", "mesh: istio\n"+toLabels+fromURL)
	plain := istioDocument("y", headers)
	for name, c := range map[string]struct {
		stdin string
		args  []string
		exit  int
		want  string
	}{
		"a deletion":             {one, []string{"--delete"}, exitUsage, "--delete"},
		"two meshes":             {one + "---\n" + plain, nil, exitUsage, "one mesh at a time"},
		"another mesh":           {one, []string{"--mesh", "envoy"}, exitUsage, "--mesh is envoy"},
		"a mesh nobody knows":    {plain, []string{"--mesh", "linkerd"}, exitFailed, "knows envoy, istio"},
		"both on standard input": {one, []string{"--cluster", "-"}, exitUsage, "cannot both be standard input"},
		"a cluster for Envoy":    {plain, []string{"--cluster", "x.yaml"}, exitUsage, "envoy is none"},
		"no such cluster file":   {one, []string{"--cluster", "no/such.yaml"}, exitUsage, "no/such.yaml"},
		"a cluster that is none": {one, []string{"--cluster", "render.go"}, exitUsage, "kubectl get -o yaml"},
		"objects without kinds":  {one, []string{"--cluster", "testdata/output/list.yaml"}, exitUsage, "no kind or no name"},
		"a secret": {istioDocument("x", "mesh: istio\n"+toLabels+headers+"config: {key: {$secret: {name: a, key: b}}}"), nil,
			exitFailed, "nobody resolves secrets"},
		"a configuration that the filter refuses": {istioDocument("x", "mesh: istio\n"+toLabels+headers+"config: {nonsense: 1}"), nil,
			exitUsage, "meshery-filters-1014"},
		"no target":        {istioDocument("x", "mesh: istio\n"+headers), nil, exitUsage, "no default target"},
		"a builtin nobody": {istioDocument("x", "mesh: istio\n"+toLabels+"module: {builtin: nope}"), nil, exitUsage, "headers, ratelimit"},
	} {
		t.Run(name, func(t *testing.T) {
			r := runWith(t, c.stdin, nil, append([]string{"render", "-f", "-"}, c.args...)...).want(t, c.exit, c.want)
			if r.out != "" {
				t.Errorf("printed %s", r.out)
			}
		})
	}
}

func TestAnEntryOfConsulsIsRenderedSoThatItCanBeApplied(t *testing.T) {
	body := istioDocument("x", "mesh: consul\ntarget: {kind: Service, name: api}\n"+headers+"delivery: {mode: local, localPath: /opt/filters}\nconfig: {response: {x-there: one}}\n")
	runWith(t, body, nil, "render", "-f", "-").want(t, exitFailed, "set protocol: http in ServiceDefaults shop/api", "what --cluster gives it")
	there := put(t, t.TempDir(), "cluster.yaml", `apiVersion: consul.hashicorp.com/v1alpha1
kind: ServiceDefaults
metadata: {name: api, namespace: shop, uid: u-1, resourceVersion: "41", generation: 3, managedFields: [{manager: me}], labels: {team: shop}}
spec: {protocol: http, envoyExtensions: [{name: builtin/lua}]}
status: {conditions: [{type: Synced, status: "True"}]}
`)
	r := runWith(t, body, nil, "render", "-f", "-", "--cluster", there).want(t, exitOK, "team: shop", "name: builtin/lua", "name: meshery.filters/shop.x", "protocol: http")
	for _, servers := range []string{"resourceVersion", "uid", "generation", "managedFields", "status"} {
		if strings.Contains(r.out, servers) {
			t.Errorf("it has %s:\n%s", servers, r.out)
		}
	}
}

func TestRenderingKnowsWhereAnAdapterServesModules(t *testing.T) {
	body := istioDocument("x", "mesh: istio\n"+toLabels+headers+"phase: authz\n"+stamp)
	runWith(t, body, nil, "render", "-f", "-").want(t, exitOK, "kind: EnvoyFilter", "Warning: a field has no effect")
	r := runWith(t, body, nil, "render", "-f", "-", "--modules-url", "http://filters.example:10018").want(t, exitOK,
		"kind: TrafficExtension", "phase: AUTHZ", "url: http://filters.example:10018/modules/")
	if r.err != "" {
		t.Errorf("said %s", r.err)
	}
	runWith(t, body, nil, "render", "-f", "-", "--modules-url", "filters.example").want(t, exitUsage, "--modules-url")
}
