package mesh

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
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

func TestWhatInventoriesKnowOfUpstreamsCountsAndNotWhatAnObjectSays(t *testing.T) {
	const modules, template = "modules:21900", "consul.hashicorp.com/connect-service-upstreams"
	for _, o := range []struct {
		story, note, bare, of string // bare: what inventories say that the Pods have from their user
		want, refused         string
	}{
		{"whose note is gone", "", "db:5432", "Service shop/api", "db:5432,modules:21900 Service shop/api", ""},
		{"whose note is of nobody", modules + " for Service shop/metrics", "db:5432", "Service shop/api", "db:5432,modules:21900 Service shop/api", ""},
		{"that is another target's, whatever the note says", modules + " for Service shop/api", "db:5432", "Service shop/metrics", "", "filters of Service shop/metrics"},
		{"that is the user's, whatever the note says", modules + " for Service shop/api", "db:5432,modules:21900", "", "", ""},
	} {
		t.Run(o.story, func(t *testing.T) {
			c, w, err := consulCase(t, "testdata/consul/upstream-that-is-ours.in.yaml")
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(w.Cluster.Objects, func(o plan.Object) bool { return o.String() == "Deployment/shop/api" })
			w.Cluster.Objects = slices.DeleteFunc(w.Cluster.Objects, func(o plan.Object) bool { return o.String() == "Deployment/shop/new" })
			d := &w.Cluster.Objects[i]
			(&unstructured.Unstructured{Object: d.Content}).SetAnnotations(map[string]string{upstreamsNote: o.note})
			bare := (&unstructured.Unstructured{Object: d.Content}).DeepCopy()
			if err := unstructured.SetNestedField(bare.Object, o.bare, "spec", "template", "metadata", "annotations", template); err != nil {
				t.Fatal(err)
			}
			d.Bare, d.For = bare.Object, o.of
			p, err := Consul{}.Plan(c, w)
			if o.refused != "" {
				if err == nil || !strings.Contains(err.Error(), o.refused) {
					t.Errorf("%v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := ""
			if len(p.Objects) == 2 {
				upstreams, _, _ := unstructured.NestedString(p.Objects[0].Content, "spec", "template", "metadata", "annotations", template)
				_, of, _ := strings.Cut((&unstructured.Unstructured{Object: p.Objects[0].Content}).GetAnnotations()[upstreamsNote], " for ")
				got = upstreams + " " + of
			}
			if got != o.want || p.Restarts != nil {
				t.Errorf("%q, and these restart: %v", got, p.Restarts)
			}
		})
	}
}

func TestAFilterOnConsulKeepsTheUpstreamThatItHasByAnother(t *testing.T) {
	c, w, err := consulCase(t, "testdata/consul/upstream-that-is-ours.in.yaml")
	if err != nil {
		t.Fatal(err)
	}
	w.Held = c
	c.Filters = slices.Clone(c.Filters)
	c.Filters[0].Spec.Delivery.UpstreamPort = 0
	if _, err := (Consul{}).Plan(c, w); !errors.Is(err, problem.UpstreamNeeded) || !strings.Contains(err.Error(), "shop/hello fetches through modules, which shop/hello asked for") {
		t.Errorf("%v", err)
	}
	c.Filters[0].Spec.Delivery.Service = "another"
	if _, err := (Consul{}).Plan(c, w); err != nil {
		t.Error(err)
	}
	c.Filters[0].Spec.Delivery.Service, w.Cluster.Kinds = "modules", nil // off Kubernetes nobody has given it any
	if _, err := (Consul{}).Plan(c, w); err != nil {
		t.Error(err)
	}
}
