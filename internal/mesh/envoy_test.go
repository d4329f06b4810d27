package mesh

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// world knows every module that the cases name, with bytes short enough for a golden file.
func world(c filter.Chain) plan.World {
	w := plan.World{Modules: map[string]plan.Code{}, Proxies: []plan.Proxy{{ID: "a", Version: "1.40.0"}}}
	for _, f := range c.Filters {
		w.Modules[f.Spec.Module.SHA256] = plan.Code{Inline: []byte("\x00asm\x01\x00\x00\x00")}
	}
	return w
}

func chain(t *testing.T, file string) filter.Chain {
	t.Helper()
	body, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	filters, err := filter.Read(body, "shop")
	if err != nil {
		t.Fatal(err)
	}
	c := filter.Chain{Mesh: "envoy", Target: filter.Target{Kind: filter.ProxyGroup, Name: DefaultGroup}}
	for _, f := range filters {
		f, err := Envoy{}.Complete(f)
		if err != nil {
			t.Fatal(err)
		}
		c.Target = f.Spec.Target
		c = c.With(f)
	}
	return c
}

func TestAChainBecomesOneResource(t *testing.T) {
	cases, _ := filepath.Glob("testdata/envoy/*.in.yaml")
	if len(cases) < 4 {
		t.Fatalf("only %d cases", len(cases))
	}
	for _, in := range cases {
		t.Run(filepath.Base(in), func(t *testing.T) {
			c := chain(t, in)
			p, err := Envoy{}.Plan(c, world(c))
			if err != nil {
				t.Fatal(err)
			}
			raw, err := protojson.Marshal(p.Resources[0])
			if err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer // protojson spaces its output at random; encoding/json does not
			if err := json.Indent(&got, raw, "", "  "); err != nil {
				t.Fatal(err)
			}
			got.WriteByte('\n')
			for _, l := range p.Losses {
				got.WriteString("lost: " + l.String() + "\n")
			}
			golden := strings.TrimSuffix(in, ".in.yaml") + ".out.json"
			if *update {
				if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil || !bytes.Equal(got.Bytes(), want) {
				t.Errorf("%s differs; if it should, run: go test ./internal/mesh -update\n%s", golden, got.String())
			}
			again, err := Envoy{}.Plan(c, world(c))
			if err != nil || again.Version != p.Version || !bytes.Equal(again.Resources[0].Value, p.Resources[0].Value) {
				t.Error("the same chain in the same world gave another plan")
			}
		})
	}
}

func TestAVersionChangesWithWhatProxiesGet(t *testing.T) {
	versions := map[string]string{}
	see := func(name string, c filter.Chain) {
		p, err := Envoy{}.Plan(c, world(c))
		if err != nil {
			t.Fatal(err)
		}
		for other, v := range versions {
			if v == p.Version {
				t.Errorf("%s and %s have the same version", name, other)
			}
		}
		versions[name] = p.Version
	}
	c := chain(t, "testdata/envoy/two-filters-by-phase.in.yaml")
	see("two filters", c)
	see("one filter", c.Without(c.Filters[0].Key))
	see("none", filter.Chain{Mesh: "envoy", Target: c.Target})
	f := c.Filters[0]
	f.Spec.Config = filter.Value{V: "other"}
	see("another configuration", c.With(f))
}

func TestWhatPlainEnvoyCannotDoIsRefused(t *testing.T) {
	head := "apiVersion: filters.meshery.io/v1alpha1\nkind: Filter\nmetadata: {name: x}\nspec:\n  module: {builtin: headers}\n"
	for spec, want := range map[string]string{
		"  target: {kind: Service, name: web}":                "spec.target.kind",
		"  protocol: tcp":                                     "spec.protocol",
		"  delivery: {mode: direct}":                          "spec.delivery.mode",
		"  target: {kind: ProxyGroup, name: x, namespace: y}": "spec.target.namespace",
		"  target: {kind: ProxyGroup, name: x, partition: y}": "spec.target.partition",
		"  protocol: tcp\n  target: {kind: Mesh}":             "spec.protocol",
	} {
		filters, err := filter.Read([]byte(head+spec), "")
		if err != nil {
			t.Fatal(err)
		}
		_, err = Envoy{}.Complete(filters[0])
		if !errors.Is(err, problem.NotSupported) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", spec, err)
		}
	}
}

func TestAnOlderProxyIsNamedWithItsVersion(t *testing.T) {
	c := chain(t, "testdata/envoy/two-filters-by-phase.in.yaml")
	w := world(c)
	w.Proxies = append(w.Proxies, plan.Proxy{ID: "old-1", Version: "1.38.2"})
	_, err := Envoy{}.Plan(c, w)
	if !errors.Is(err, problem.ProxyTooOld) || !strings.Contains(err.Error(), "old-1") || !strings.Contains(err.Error(), "1.38.2") {
		t.Errorf("%v", err)
	}
	w.Proxies = []plan.Proxy{{ID: "new", Version: "2.0.0"}, {ID: "dev", Version: "1.41.0-dev"}, {ID: "silent"}}
	if _, err := (Envoy{}).Plan(c, w); err != nil {
		t.Errorf("newer and silent proxies: %v", err)
	}
}

func TestAMeshThatIsNotBuiltIsRefusedWithThoseThatAre(t *testing.T) {
	_, err := Find("kuma")
	if !errors.Is(err, problem.MeshNotSupported) || !strings.Contains(err.Error(), "envoy") {
		t.Errorf("%v", err)
	}
}
