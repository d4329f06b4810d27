package mesh

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

const consulCRDs = "../../build/controlplanes/consultest/crds.yaml"

// consulCase is a file of Filter documents. Its first comment says what is special about the world, and NAME.world.yaml
// holds the objects that there are instead of those of cluster.yaml:
//
//	# world: served, path, machines (and not Kubernetes)
func consulCase(t *testing.T, file string) (filter.Chain, plan.World, error) {
	t.Helper()
	body, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	filters, err := filter.Read(body, "shop")
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(body), "\n")
	special, _ := strings.CutPrefix(first, "# world: ")
	objects := readObjects(t, strings.TrimSuffix(file, ".in.yaml")+".world.yaml")
	if objects == nil {
		objects = readObjects(t, "testdata/consul/cluster.yaml")
	}
	w := plan.World{Modules: map[string]plan.Code{}, Cluster: plan.Cluster{Objects: objects}}
	if !strings.Contains(special, "machines") {
		w.Cluster.Kinds = plan.ClusterOf(readObjects(t, consulCRDs)).Kinds
	}
	c := filter.Chain{Mesh: "consul"}
	for _, f := range filters {
		code := plan.Code{Inline: []byte("\x00asm\x01\x00\x00\x00")}
		if strings.Contains(special, "served") {
			code.URL = "http://filters.meshery.svc:10017/modules/" + f.Spec.Module.SHA256 + ".wasm"
		}
		if strings.Contains(special, "path") {
			code.Path = "/var/lib/filters/" + f.Spec.Module.SHA256 + ".wasm"
		}
		w.Modules[f.Spec.Module.SHA256] = code
		f, err := Consul{}.Complete(f)
		if err != nil {
			return c, w, err
		}
		c.Target = f.Spec.Target
		c = c.With(f)
	}
	return c, w, nil
}

func consulCases(t *testing.T) []string {
	t.Helper()
	cases, err := filepath.Glob("testdata/consul/*.in.yaml")
	if err != nil || len(cases) < 15 {
		t.Fatalf("only %d cases (%v)", len(cases), err)
	}
	return cases
}

func TestAChainOnConsulBecomesTheExtensionsOfOneEntry(t *testing.T) {
	files := []string{"testdata/consul/cluster.yaml"}
	for _, in := range consulCases(t) {
		golden := strings.TrimSuffix(in, ".in.yaml") + ".yaml"
		files = append(files, in, golden, strings.TrimSuffix(in, ".in.yaml")+".world.yaml")
		t.Run(filepath.Base(golden), func(t *testing.T) {
			c, w, err := consulCase(t, in)
			before, merr := json.Marshal(w.Cluster)
			if merr != nil {
				t.Fatal(merr)
			}
			var p plan.Plan
			if err == nil {
				p, err = Consul{}.Plan(c, w)
			}
			got := istioGolden(t, p, err)
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if want, rerr := os.ReadFile(golden); rerr != nil || !bytes.Equal(got, want) {
				t.Errorf("%s differs; if it should, run: go test ./internal/mesh -update\n%s", golden, got)
			}
			if err != nil {
				return
			}
			for _, o := range p.Objects {
				if !slices.ContainsFunc(c.Filters, func(f filter.Filter) bool { return Carries(o, f.Key) }) {
					t.Errorf("%s does not tell which filters it is for", o)
				}
			}
			if again, err := (Consul{}).Plan(c, w); err != nil || again.Version != p.Version || !reflect.DeepEqual(again.Objects, p.Objects) {
				t.Error("the same chain in the same world gave another plan")
			}
			if after, err := json.Marshal(w.Cluster); err != nil || !bytes.Equal(before, after) {
				t.Error("planning changed the world")
			}
			if len(ourExtensions(p)) != len(c.Filters) {
				t.Errorf("%d objects with %d extensions of ours for %d filters", len(p.Objects), len(ourExtensions(p)), len(c.Filters))
			}
			var addresses, sources []string
			for _, e := range ourExtensions(p) {
				addresses = append(addresses, fetched(e)...)
			}
			for _, s := range p.Sources {
				sources = append(sources, s.URL)
			}
			if !slices.Equal(addresses, sources) {
				t.Errorf("proxies fetch from %v, and %v is looked at before", addresses, sources)
			}
		})
	}
	there, _ := filepath.Glob("testdata/consul/*")
	for _, file := range there {
		if !slices.Contains(files, file) {
			t.Errorf("%s belongs to no case", file)
		}
	}
}

func ourExtensions(p plan.Plan) (ours []any) {
	for _, o := range p.Objects {
		list, _, _ := unstructured.NestedSlice(o.Content, "spec", "envoyExtensions")
		for _, e := range list {
			if ownExtension(e) {
				ours = append(ours, e)
			}
		}
	}
	return ours
}

func TestAnEntryOfTheUsersIsSharedAndKeepsAllThatIsTheirs(t *testing.T) {
	for file, shared := range map[string]bool{
		"between-the-users-own": true, "local-path": true, "whole-mesh-with-an-entry": true,
		"entry-that-is-ours": false, "protocol-of-the-whole-mesh": false, "whole-mesh": false,
	} {
		c, w, err := consulCase(t, "testdata/consul/"+file+".in.yaml")
		if err != nil {
			t.Fatal(err)
		}
		p, err := Consul{}.Plan(c, w)
		if err != nil {
			t.Fatal(err)
		}
		if p.Objects[0].Shared != shared {
			t.Errorf("%s: shared is %v", file, p.Objects[0].Shared)
		}
		if !shared {
			continue
		}
		u := &unstructured.Unstructured{Object: p.Objects[0].Content}
		had, ok := w.Cluster.Object(plan.Ref{GroupKind: u.GroupVersionKind().GroupKind(), Name: u.GetName()})
		if !ok {
			t.Fatalf("%s: the entry is not there", file)
		}
		theirs := func(o plan.Object) any {
			content := withExtensions(o.Content, nil)
			if spec := content["spec"].(map[string]any); len(spec["envoyExtensions"].([]any)) == 0 {
				delete(spec, "envoyExtensions")
			}
			return content
		}
		if without, want := theirs(p.Objects[0]), theirs(had); !reflect.DeepEqual(without, want) {
			t.Errorf("%s: without ours it is %v and not %v", file, without, want)
		}
	}
}

func TestAnEmptyChainOnConsulPlansNothing(t *testing.T) {
	c, w, err := consulCase(t, "testdata/consul/between-the-users-own.in.yaml")
	if err != nil {
		t.Fatal(err)
	}
	full, err := Consul{}.Plan(c, w)
	if err != nil {
		t.Fatal(err)
	}
	c.Filters = nil
	p, err := Consul{}.Plan(c, w)
	if err != nil || len(p.Objects) != 0 || p.Version == full.Version {
		t.Errorf("%v, %v", p.Objects, err)
	}
	// Where the service is gone, what was there can be taken away all the same.
	if _, err := (Consul{}).Plan(c, plan.World{}); err != nil {
		t.Error(err)
	}
}

func TestAConsulPlansVersionIsOfWhatIsOurs(t *testing.T) {
	c, w, err := consulCase(t, "testdata/consul/between-the-users-own.in.yaml")
	if err != nil {
		t.Fatal(err)
	}
	version := func() string {
		t.Helper()
		p, err := Consul{}.Plan(c, w)
		if err != nil {
			t.Fatal(err)
		}
		return p.Version
	}
	before := version()
	spec := w.Cluster.Objects[0].Content["spec"].(map[string]any)
	spec["maxInboundConnections"] = int64(5)
	if version() != before {
		t.Error("a setting of the user's changed it")
	}
	c.Filters[0].Spec.RootID = "another"
	if version() == before {
		t.Error("another filter did not")
	}
}

func TestAConsulPlanSaysInWhichPodsItsProxiesAre(t *testing.T) {
	for file, want := range map[string]*plan.Selection{
		"local-path":     {Namespace: "shop", Labels: map[string]string{"app": "api", injectedLabel: "injected"}, Role: "sidecar"},
		"whole-mesh":     {Labels: map[string]string{injectedLabel: "injected"}, Role: "sidecar"},
		"off-kubernetes": nil,
		"tcp":            nil, // there is no Service of that name
	} {
		c, w, err := consulCase(t, "testdata/consul/"+file+".in.yaml")
		if err != nil {
			t.Fatal(err)
		}
		p, err := Consul{}.Plan(c, w)
		if err != nil || !reflect.DeepEqual(p.Proxies, want) {
			t.Errorf("%s: %+v, %v", file, p.Proxies, err)
		}
	}
}
