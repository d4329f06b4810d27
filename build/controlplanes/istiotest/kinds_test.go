package istiotest_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/kube"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
)

// chain is one filter that gives every response a header, put where the labels are, by a module that lies in dir.
func chain(t *testing.T, kind filter.TargetKind, namespace, app, header, dir string) (filter.Chain, plan.Code) {
	t.Helper()
	module, ok := filters.Builtin("headers")
	if !ok {
		t.Fatal("there is no module headers")
	}
	sum := sha256.Sum256(module)
	digest := hex.EncodeToString(sum[:])
	read, err := filter.Read(fmt.Appendf(nil, `{apiVersion: filters.meshery.io/v1alpha1, kind: Filter, metadata: {name: hello, namespace: %s},
		spec: {mesh: istio, target: {kind: %s, labels: {app: %s}}, module: {builtin: headers}, config: {response: {%s: world}}}}`,
		namespace, kind, app, header), namespace)
	if err != nil {
		t.Fatal(err)
	}
	f, err := mesh.Istio{}.Complete(read[0])
	if err != nil {
		t.Fatal(err)
	}
	f.Spec.Module.SHA256 = digest
	path := filepath.Join(dir, digest+".wasm")
	if err := os.WriteFile(path, module, 0o644); err != nil {
		t.Fatal(err)
	}
	return filter.Chain{Mesh: "istio", Target: f.Spec.Target, Filters: []filter.Filter{f}}, plan.Code{Inline: module, Path: path}
}

func TestAChainOfEachKindTakesEffectOnLiveResponsesAndGoesAwayAgain(t *testing.T) {
	m := start(t, istiotest.Options{})
	cluster, err := kube.Open(m.Kubeconfig(m.Token(k8stest.Admin)), kube.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer cluster.Close()
	dir := t.TempDir()
	for _, kind := range []string{"TrafficExtension", "WasmPlugin", "EnvoyFilter"} {
		for _, at := range []filter.TargetKind{filter.Workload, filter.Gateway} {
			t.Run(kind+" on a "+string(at), func(t *testing.T) {
				app := strings.ToLower(kind + "-" + string(at))
				p := proxy(t, m, istiotest.ProxyOptions{Namespace: "shop", Pod: app + "-1", Labels: map[string]string{"app": app}, Gateway: at == filter.Gateway})
				other := proxy(t, m, istiotest.ProxyOptions{Namespace: "shop", Pod: app + "-other", Labels: map[string]string{"app": "other"}, Gateway: at == filter.Gateway})
				c, code := chain(t, at, "shop", app, "x-hello", dir)
				world := plan.World{Modules: map[string]plan.Code{c.Filters[0].Spec.Module.SHA256: code}}
				if world.Cluster, err = cluster.Read(t.Context(), mesh.Istio{}.Reads(c)); err != nil {
					t.Fatal(err)
				}
				world.Cluster.Kinds = slices.DeleteFunc(world.Cluster.Kinds, func(k plan.Kind) bool { return k.Kind != kind })
				awaitHeader(t, p, "x-hello", "")
				apply(t, cluster, c, world, kind)
				awaitHeader(t, p, "x-hello", "world")
				if r, err := other.Get(t.Context(), "/"); err != nil || r.Status != http.StatusOK || r.Header.Get("x-hello") != "" {
					t.Errorf("a proxy that was not chosen answers %+v %v", r, err)
				}
				c.Filters = nil
				apply(t, cluster, c, world, kind)
				awaitHeader(t, p, "x-hello", "")
			})
		}
	}
}

// apply makes a chain hold, by objects of one kind.
func apply(t *testing.T, cluster *kube.Cluster, c filter.Chain, w plan.World, kind string) {
	t.Helper()
	p, err := mesh.Istio{}.Plan(c, w)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range p.Objects {
		if o.Content["kind"] != kind {
			t.Fatalf("planned %s, and not a %s", o, kind)
		}
	}
	target, err := cluster.Target(t.Context(), "istio", c.Target)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := target.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
}

// awaitHeader makes requests until one is answered with the header's value. None may fail meanwhile.
func awaitHeader(t *testing.T, p *istiotest.Proxy, name, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		r, err := p.Get(ctx, "/")
		if err != nil || r.Status != http.StatusOK {
			t.Fatalf("%s, before %s is %q: %+v %v", p.Pod, name, value, r, err)
		}
		if r.Header.Get(name) == value {
			return
		}
	}
}
