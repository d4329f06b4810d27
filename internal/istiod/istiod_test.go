package istiod_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"go.uber.org/goleak"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/istiod"
	"github.com/meshery/meshery-filters/internal/kube"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// istio is the mesh that all tests share, with two istiods; each test has namespaces of its own. It is nil with -short.
var istio *istiotest.Mesh

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "istiod")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if !testing.Short() {
		if istio, err = istiotest.Start(context.Background(), dir, istiotest.Options{Replicas: 2, Users: []string{nobody, half}}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer istio.Stop()
		if err := grant(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	code := m.Run()
	if code != 0 && istio != nil {
		fmt.Fprintln(os.Stderr, istio.Log())
	}
	if istio != nil {
		istio.Stop()
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// Users of the API server, who may read the objects that carry filters.
const (
	nobody = "nobody" // and nothing else
	half   = "half"   // and list Pods, and reach istiod, and no proxy
)

// grant gives the users their rights.
func grant() error {
	const group = "rbac.authorization.k8s.io"
	role := func(kind, namespace, name, user string, rules ...any) []map[string]any {
		meta := map[string]any{"name": name}
		if namespace != "" {
			meta["namespace"] = namespace
		}
		return []map[string]any{
			{"apiVersion": group + "/v1", "kind": kind, "metadata": meta, "rules": rules},
			{"apiVersion": group + "/v1", "kind": kind + "Binding", "metadata": meta,
				"roleRef":  map[string]any{"apiGroup": group, "kind": kind, "name": name},
				"subjects": []any{map[string]any{"apiGroup": group, "kind": "User", "name": user}}}}
	}
	rule := func(verb, group string, resources ...any) map[string]any {
		return map[string]any{"apiGroups": []any{group}, "resources": resources, "verbs": []any{verb}}
	}
	objects := []any{rule("get", "extensions.istio.io", "trafficextensions", "wasmplugins"), rule("get", "networking.istio.io", "envoyfilters")}
	return istio.Apply(context.Background(), slices.Concat(
		role("ClusterRole", "", nobody, nobody, objects...),
		role("ClusterRole", "", half, half, append(objects, rule("list", "", "pods"))...),
		role("Role", istiotest.Namespace, half, half, rule("get", "", "pods/portforward"), rule("create", "", "pods/portforward")))...)
}

// rig is a namespace with what a test applies there.
type rig struct {
	*testing.T
	cluster   *kube.Cluster
	namespace string
	dir       string // of modules
	module    []byte
	digest    string
	kind      string    // of the objects
	code      plan.Code // where the module can be had
}

var namespaces atomic.Int32

func newRig(t *testing.T, kind string) *rig {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a Kubernetes API server, istiod and Envoys")
	}
	r := &rig{T: t, cluster: clusterOf(t, k8stest.Admin), namespace: fmt.Sprintf("shop-%d", namespaces.Add(1)), dir: t.TempDir(), kind: kind}
	module, ok := filters.Builtin("headers")
	if !ok {
		t.Fatal("there is no module headers")
	}
	r.use(module)
	return r
}

// use has the rig's filters have another module.
func (r *rig) use(module []byte) {
	r.Helper()
	r.module = module
	sum := sha256.Sum256(r.module)
	r.digest = hex.EncodeToString(sum[:])
	r.code = plan.Code{Inline: r.module, Path: filepath.Join(r.dir, r.digest+".wasm")}
	if err := os.WriteFile(r.code.Path, r.module, 0o644); err != nil {
		r.Fatal(err)
	}
}

func clusterOf(t *testing.T, user string) *kube.Cluster {
	t.Helper()
	c, err := kube.Open(istio.Kubeconfig(istio.Token(user)), kube.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// sidecar is one of app api, connected to one of the istiods.
func (r *rig) sidecar(pod string, replica int) *istiotest.Proxy {
	r.Helper()
	return r.proxy(istiotest.ProxyOptions{Pod: pod, Replica: replica})
}

func (r *rig) proxy(o istiotest.ProxyOptions) *istiotest.Proxy {
	r.Helper()
	o.Namespace, o.Labels = r.namespace, map[string]string{"app": "api"}
	p, err := istio.Proxy(r.Context(), o)
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() {
		if err := p.Stop(); err != nil {
			r.Error(err)
		}
	})
	return p
}

// filter is one that sets response headers, with more of its spec.
func (r *rig) filter(name, config, more string) filter.Filter {
	r.Helper()
	read, err := filter.Read(fmt.Appendf(nil, `{apiVersion: filters.meshery.io/v1alpha1, kind: Filter, metadata: {name: %s, namespace: %s},
		spec: {mesh: istio, target: {kind: Workload, labels: {app: api}}, module: {builtin: headers}, config: %s%s}}`, name, r.namespace, config, more), r.namespace)
	if err != nil {
		r.Fatal(err)
	}
	f, err := mesh.Istio{}.Complete(read[0])
	if err != nil {
		r.Fatal(err)
	}
	f.Spec.Module.SHA256 = r.digest
	return f
}

// apply makes the target of all the rig's filters hold just these.
func (r *rig) apply(fs ...filter.Filter) plan.Plan {
	r.Helper()
	c := filter.Chain{Mesh: "istio", Target: r.filter("any", "{}", "").Spec.Target}
	for _, f := range fs {
		c.Target = f.Spec.Target
		c = c.With(f)
	}
	w := plan.World{Modules: map[string]plan.Code{r.digest: r.code}}
	for _, f := range fs {
		w.Modules[f.Spec.Module.SHA256] = r.code
	}
	var err error
	if w.Cluster, err = r.cluster.Read(r.Context(), mesh.Istio{}.Reads(c)); err != nil {
		r.Fatal(err)
	}
	w.Cluster.Kinds = slices.DeleteFunc(w.Cluster.Kinds, func(k plan.Kind) bool { return k.Kind != r.kind })
	p, err := mesh.Istio{}.Plan(c, w)
	if err != nil {
		r.Fatal(err)
	}
	target, err := r.cluster.Target(r.Context(), "istio", c.Target)
	if err != nil {
		r.Fatal(err)
	}
	changes, err := target.Apply(r.Context(), p)
	if err != nil {
		r.Fatal(err)
	}
	p.Versions = target.Versions()
	if err := target.Commit(r.Context()); err != nil {
		r.Fatal(err)
	}
	for _, c := range changes {
		if c.Action == plan.Deleted {
			p.Dropped = append(p.Dropped, c.Subject)
		}
	}
	return p
}

// await follows the proxies until they are as they should be.
func (r *rig) await(c istiod.Cluster, p plan.Plan, ok func(plan.Loaded) bool) plan.Loaded {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), time.Minute)
	defer cancel()
	var seen []string
	for l, err := range istiod.Loaded(ctx, c, p, istiod.Silence) {
		if err != nil {
			r.Fatalf("%v; before that:\n%s", err, strings.Join(seen, "\n"))
		}
		if seen = append(seen, describe(l)); ok(l) {
			return l
		}
	}
	return plan.Loaded{}
}

func describe(l plan.Loaded) string {
	var lines []string
	for _, p := range l.Proxies {
		lines = append(lines, fmt.Sprintf("%s %s %s (%t) %s", p.ID, p.State, p.Proof, p.Expected, p.Detail))
	}
	return l.String() + ": " + strings.Join(lines, "; ")
}

// run says that so many proxies run the plan, and no other is expected to.
func running(n int, proof plan.Proof) func(plan.Loaded) bool {
	return func(l plan.Loaded) bool {
		return l.Expected() == n && l.Count(plan.Running) == n && !slices.ContainsFunc(l.Proxies, func(p plan.ProxyStatus) bool { return p.Expected && p.Proof != proof })
	}
}

// header makes a request, which has to be answered with that header; empty means without.
func (r *rig) header(p *istiotest.Proxy, name, value string) {
	r.Helper()
	resp, err := p.Get(r.Context(), "/")
	if err != nil || resp.Status != http.StatusOK || resp.Header.Get(name) != value {
		r.Errorf("%s: %d, %s is %q and not %q: %v", p.Pod, resp.Status, name, resp.Header.Get(name), value, err)
	}
}

// eventually waits until requests are answered with that header.
func (r *rig) eventually(p *istiotest.Proxy, name, value string) {
	r.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		resp, err := p.Get(r.Context(), "/")
		if err == nil && resp.Header.Get(name) == value {
			return
		}
		if time.Now().After(end) {
			r.Fatalf("%s: %d, %s is %q and not %q: %v", p.Pod, resp.Status, name, resp.Header.Get(name), value, err)
		}
	}
}

func TestWhatProxiesRunIsSeenInThemTheMomentItTakesEffect(t *testing.T) {
	for _, kind := range []string{"TrafficExtension", "WasmPlugin", "EnvoyFilter"} {
		t.Run(kind, func(t *testing.T) {
			r := newRig(t, kind)
			proxies := []*istiotest.Proxy{r.sidecar("api-1", 0), r.sidecar("api-2", 1)}
			for _, step := range []struct {
				filters []filter.Filter
				a, b    string
			}{
				{[]filter.Filter{r.filter("hello", "{response: {x-a: one}}", "")}, "one", ""},
				{[]filter.Filter{r.filter("hello", "{response: {x-a: two}}", "")}, "two", ""},
				// Responses pass the chain from its end to its beginning.
				{[]filter.Filter{r.filter("hello", "{response: {x-a: two}}", ""), r.filter("last", "{response: {x-a: three, x-b: b}}", "")}, "two", "b"},
				{[]filter.Filter{r.filter("hello", "{response: {x-a: two}}", ""), r.filter("last", "{response: {x-a: three, x-b: b}}", ", priority: 5")}, "three", "b"},
				{[]filter.Filter{r.filter("last", "{response: {x-a: three, x-b: b}}", ", priority: 5")}, "three", "b"},
				{nil, "", ""},
			} {
				r.await(r.cluster, r.apply(step.filters...), running(2, plan.Seen))
				for _, p := range proxies {
					r.header(p, "x-a", step.a)
					r.header(p, "x-b", step.b)
				}
			}
		})
	}
}

// TestAfterACrashRequestsFareAsTheFailurePolicySays has a module that crashes with a request for /trap.
func TestAfterACrashRequestsFareAsTheFailurePolicySays(t *testing.T) {
	module, err := os.ReadFile(filepath.Join("..", "..", "build", "testfilters", "probe.wasm"))
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"TrafficExtension", "WasmPlugin", "EnvoyFilter"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, kind)
			r.use(module)
			p := r.sidecar("api-1", 0)
			for policy, then := range map[string]struct {
				status int
				stamp  string
			}{"closed": {http.StatusServiceUnavailable, ""}, "open": {http.StatusOK, ""}, "reload": {http.StatusOK, "reload"}} {
				config := "{stamp: {header: x-a, value: " + policy + "}, trapPath: /trap}"
				r.await(r.cluster, r.apply(r.filter("hello", config, ", failurePolicy: "+policy)), running(1, plan.Seen))
				r.header(p, "x-a", policy)
				// Envoy makes no second sandbox within a second of the first.
				select {
				case <-time.After(1500 * time.Millisecond):
				case <-t.Context().Done():
				}
				if resp, err := p.Get(t.Context(), "/trap"); err != nil || resp.Status != http.StatusServiceUnavailable {
					t.Errorf("%s: the request that crashes it: %d %v", policy, resp.Status, err)
				}
				if resp, err := p.Get(t.Context(), "/"); err != nil || resp.Status != then.status || resp.Header.Get("x-a") != then.stamp {
					t.Errorf("%s: the request after the crash: %d with %q, %v", policy, resp.Status, resp.Header.Get("x-a"), err)
				}
			}
			r.await(r.cluster, r.apply(), running(1, plan.Seen))
			r.header(p, "x-a", "")
		})
	}
}

// TestAFilterForBytesStandsBeforeTheTCPProxy has a module that is made for HTTP alone: it loads, and ends every connection.
func TestAFilterForBytesStandsBeforeTheTCPProxy(t *testing.T) {
	for _, kind := range []string{"TrafficExtension", "WasmPlugin", "EnvoyFilter"} {
		r := newRig(t, kind)
		p := r.proxy(istiotest.ProxyOptions{Pod: "api-1", TCP: true})
		r.await(r.cluster, r.apply(r.filter("hello", "{response: {x-a: one}}", ", protocol: tcp")), running(1, plan.Seen))
		if resp, err := p.Get(t.Context(), "/"); err == nil {
			t.Errorf("%s: a connection does not meet it: %+v", kind, resp)
		}
		r.await(r.cluster, r.apply(), running(1, plan.Seen))
		r.header(p, "x-a", "")
	}
}

// counted counts what a proof asks of the API server.
type counted struct {
	*kube.Cluster
	lists, dials, others atomic.Int32
}

func (c *counted) Pods(ctx context.Context, namespace string, labels map[string]string) ([]plan.Pod, error) {
	c.lists.Add(1)
	return c.Cluster.Pods(ctx, namespace, labels)
}

func (c *counted) Dial(ctx context.Context, namespace, pod string, port int) (net.Conn, error) {
	c.dials.Add(1)
	return c.Cluster.Dial(ctx, namespace, pod, port)
}

func (c *counted) Read(ctx context.Context, r plan.Reads) (plan.Cluster, error) {
	c.others.Add(1)
	return c.Cluster.Read(ctx, r)
}

func (c *counted) Annotate(ctx context.Context, ref plan.Ref, name, value string) error {
	c.others.Add(1)
	return c.Cluster.Annotate(ctx, ref, name, value)
}

func TestAProofCostsTheAPIServerTwoListsAndAConnectionToEachIstiodAndProxy(t *testing.T) {
	const istiods, proxies = 2, 2
	r := newRig(t, "TrafficExtension")
	r.sidecar("api-1", 0)
	r.sidecar("api-2", 1)
	for _, filters := range [][]filter.Filter{{r.filter("hello", "{response: {x-a: one}}", "")}, {r.filter("hello", "{response: {x-a: two}}", "")}, nil} {
		begun := time.Now()
		c := &counted{Cluster: r.cluster}
		r.await(c, r.apply(filters...), running(proxies, plan.Seen))
		lists := 2 * (1 + int32(time.Since(begun)/istiod.ListAgain))
		// A proxy that is proved is let go, and asked once more when istiod happens to push to it meanwhile.
		if c.lists.Load() > lists || c.dials.Load() > istiods+2*proxies || c.others.Load() > 0 {
			t.Errorf("%d lists, %d connections and %d other requests", c.lists.Load(), c.dials.Load(), c.others.Load())
		}
	}
}

func TestAProxyThatRefusesSaysWhy(t *testing.T) {
	for _, one := range []struct {
		kind, config, why, text string
		missing                 bool
	}{
		{"TrafficExtension", "{response: 7}", "a configuration that the filter refuses", "Unable to create Wasm plugin", false},
		{"EnvoyFilter", "{response: 7}", "a configuration that the filter refuses", "Unable to create Wasm plugin", false},
		{"TrafficExtension", "{response: {x-a: one}}", "a module that is not there", "Invalid path", true},
		{"EnvoyFilter", "{response: {x-a: one}}", "a module that is not there", "Invalid path", true},
	} {
		t.Run(one.kind+" with "+one.why, func(t *testing.T) {
			r := newRig(t, one.kind)
			p := r.sidecar("api-1", 0)
			if one.missing {
				r.code = plan.Code{Path: r.code.Path + ".gone"}
			}
			bad := r.apply(r.filter("hello", one.config, ""))
			for _, user := range []string{k8stest.Admin, half} {
				l := r.await(clusterOf(t, user), bad, func(l plan.Loaded) bool { return l.Count(plan.Rejected) == 1 })
				if got := l.Proxies[0].Detail; !strings.Contains(got, one.text) {
					t.Errorf("as %s, it says %q", user, got)
				}
			}
			r.await(r.cluster, r.apply(), running(1, plan.Seen))
			r.code = plan.Code{Inline: r.module, Path: filepath.Join(r.dir, r.digest+".wasm")}
			r.await(r.cluster, r.apply(r.filter("hello", "{response: {x-a: one}}", "")), running(1, plan.Seen))
			r.header(p, "x-a", "one")
		})
	}
}

func TestAModuleOfAnotherDigestIsNotTakenForLoaded(t *testing.T) {
	r := newRig(t, "TrafficExtension")
	served := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(r.module) }))
	defer served.Close()
	p := r.sidecar("api-1", 0)
	r.code = plan.Code{URL: served.URL + "/headers.wasm"}
	f := r.filter("hello", "{response: {x-a: one}}", "")
	f.Spec.Module.SHA256 = strings.Repeat("0", 64)
	l := r.await(r.cluster, r.apply(f), func(l plan.Loaded) bool { return l.Count(plan.Rejected) == 1 })
	if got := l.Proxies[0].Detail; !strings.Contains(got, "acknowledged") || !strings.Contains(got, "wasm.remote_load_fetch_failures rose from 0 to 1") {
		t.Errorf("it says %q", got)
	}
	if resp, err := p.Get(t.Context(), "/"); err != nil || resp.Status == http.StatusOK {
		t.Errorf("it answers all the same: %d %v", resp.Status, err)
	}
	r.await(r.cluster, r.apply(), running(1, plan.Seen))
	r.header(p, "x-a", "")
}

func TestWhatIstiosAgentMakesOfAPlanIsSeenToo(t *testing.T) {
	for _, kind := range []string{"TrafficExtension", "WasmPlugin", "EnvoyFilter"} {
		t.Run(kind, func(t *testing.T) {
			r := newRig(t, kind)
			var broken atomic.Bool
			served := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if broken.Load() {
					http.Error(w, "gone", http.StatusNotFound)
					return
				}
				_, _ = w.Write(r.module)
			}))
			defer served.Close()
			r.code = plan.Code{URL: served.URL + "/headers.wasm"}
			p := r.proxy(istiotest.ProxyOptions{Pod: "api-1", Agent: true})
			for _, value := range []string{"one", "two"} {
				r.await(r.cluster, r.apply(r.filter("hello", "{response: {x-a: "+value+"}}", "")), running(1, plan.Seen))
				r.header(p, "x-a", value)
			}
			r.await(r.cluster, r.apply(), running(1, plan.Seen))
			r.header(p, "x-a", "")

			// The agent's Envoys do not tell which configuration they accepted.
			l := r.await(r.cluster, r.apply(r.filter("refused", "{response: 7}", "")), func(l plan.Loaded) bool {
				if l.Count(plan.Running) > 0 {
					t.Error(describe(l))
				}
				return l.Count(plan.Rejected) == 1
			})
			if got := l.Proxies[0].Detail; !strings.Contains(got, "Unable to create Wasm plugin") {
				t.Errorf("it says %q", got)
			}
			r.await(r.cluster, r.apply(), running(1, plan.Seen))

			for i, why := range []string{"another digest", "no module"} {
				f := r.filter(fmt.Sprintf("bad-%d", i), "{response: {x-a: one}}", "")
				f.Spec.Module.SHA256 = strings.Repeat(fmt.Sprint(i), 64)
				broken.Store(i == 1)
				r.code = plan.Code{URL: fmt.Sprintf("%s/%d.wasm", served.URL, i)}
				l := r.await(r.cluster, r.apply(f), func(l plan.Loaded) bool { return l.Count(plan.Rejected) == 1 })
				if got := l.Proxies[0].Detail; !strings.Contains(got, "Istio's agent could not fetch its module") {
					t.Errorf("%s: it says %q", why, got)
				}
				if resp, err := p.Get(t.Context(), "/"); err != nil || resp.Status != http.StatusForbidden {
					t.Errorf("%s: it answers %d %v", why, resp.Status, err)
				}
				r.await(r.cluster, r.apply(), running(1, plan.Seen))
				r.header(p, "x-a", "")
			}
		})
	}
}

func TestAChangeOfNothingButTheImageIsSeenInProxiesThatIstiosAgentServes(t *testing.T) {
	for _, kind := range []string{"TrafficExtension", "EnvoyFilter"} {
		t.Run(kind, func(t *testing.T) {
			r := newRig(t, kind)
			p := r.proxy(istiotest.ProxyOptions{Pod: "api-1", Agent: true, Told: true})
			images := newImages(t)
			direct := func(more string) filter.Filter {
				f := r.filter("image", "{response: {x-a: one}}", ", delivery: {mode: direct}"+more)
				f.Spec.Module = filter.Module{URL: images.push(r.module), SHA256: r.digest}
				return f
			}
			r.await(r.cluster, r.apply(direct("")), running(1, plan.Seen))
			r.use(slices.Concat(r.module, []byte("\x00\x02\x01v"))) // with a section of no meaning
			f := direct("")
			images.held.Store(true) // the agent fetches for a while
			r.await(r.cluster, r.apply(f), func(l plan.Loaded) bool {
				if l.Count(plan.Running) == 1 && images.held.Load() {
					t.Errorf("it has the module already: %s", describe(l))
				}
				images.held.Store(false)
				return l.Count(plan.Running) == 1
			})
			r.header(p, "x-a", "one")
			last := r.apply(direct(", failurePolicy: open, environment: [{name: A, value: b}, {name: HOME, valueFrom: host}], rootID: headers"))
			r.await(r.cluster, last, running(1, plan.Seen))
			r.header(p, "x-a", "one")
			r.await(clusterOf(t, half), last, running(1, plan.Acknowledged))
		})
	}
}

func TestAProxyWhoseWorkersCannotConfigureAFilterDoesNotRunIt(t *testing.T) {
	module, err := os.ReadFile("../../build/testfilters/probe.wasm")
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []istiotest.ProxyOptions{{Pod: "api-1"}, {Pod: "api-1", Agent: true}} {
		for _, kind := range []string{"TrafficExtension", "EnvoyFilter"} {
			r := newRig(t, kind)
			r.use(module)
			p := r.proxy(o)
			r.await(r.cluster, r.apply(r.filter("hello", "{once: shared, stamp: {header: x-a, value: one}}", "")), func(l plan.Loaded) bool {
				if l.Count(plan.Running) > 0 {
					t.Errorf("agent %t, %s: %s", o.Agent, kind, describe(l))
				}
				return l.Proxies[0].Detail == "it acknowledged, and has 1 of the 2 sandboxes that the filters need: its workers are loading the module, or could not, which only the proxy's log tells"
			})
			r.header(p, "x-a", "")
			r.await(r.cluster, r.apply(), running(1, plan.Seen))
		}
	}
}

// images is a registry, which gives nothing while it is held.
type images struct {
	t    *testing.T
	addr string
	held atomic.Bool
}

func newImages(t *testing.T) *images {
	i := &images{t: t}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		for i.held.Load() && q.Context().Err() == nil {
			time.Sleep(10 * time.Millisecond)
		}
		inner.ServeHTTP(w, q)
	}))
	t.Cleanup(s.Close)
	i.addr = strings.TrimPrefix(s.URL, "http://")
	return i
}

// push keeps a module as an image, and gives its address.
func (i *images) push(module []byte) string {
	i.t.Helper()
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	var err error
	for _, l := range []v1.Layer{static.NewLayer([]byte("{}"), "application/vnd.module.wasm.config.v1+json"),
		static.NewLayer(module, "application/vnd.module.wasm.content.layer.v1+wasm")} {
		kind, _ := l.MediaType() // which cannot fail
		if img, err = mutate.Append(img, mutate.Addendum{Layer: l, MediaType: kind}); err != nil {
			i.t.Fatal(err)
		}
	}
	digest, err := img.Digest()
	if err != nil {
		i.t.Fatal(err)
	}
	to, err := name.NewDigest(i.addr + "/filters/headers@" + digest.String())
	if err != nil {
		i.t.Fatal(err)
	}
	if err := remote.Write(to, img, remote.WithContext(i.t.Context())); err != nil {
		i.t.Fatal(err)
	}
	return "oci://" + to.String()
}

func TestWithoutTheRightToAskProxiesTheirAcknowledgementsAreToldAsWhatTheyAre(t *testing.T) {
	r := newRig(t, "TrafficExtension")
	p := r.sidecar("api-1", 1)
	c := clusterOf(t, half)
	for _, value := range []string{"one", "two"} {
		l := r.await(c, r.apply(r.filter("hello", "{response: {x-a: "+value+"}}", "")), running(1, plan.Acknowledged))
		if got := l.Proxies[0].Detail; !strings.Contains(got, "pods/portforward") {
			t.Errorf("it says %q", got)
		}
		r.header(p, "x-a", value)
	}
	r.await(c, r.apply(), running(1, plan.Acknowledged))
	r.header(p, "x-a", "")
}

func TestWhatCannotBeVerifiedIsNamed(t *testing.T) {
	r := newRig(t, "TrafficExtension")
	r.sidecar("api-1", 0)
	p := r.apply(r.filter("hello", "{response: {x-a: one}}", ""))
	for _, err := range istiod.Loaded(t.Context(), clusterOf(t, nobody), p, istiod.Silence) {
		if !errors.Is(err, problem.NotVerified) || !errors.Is(err, problem.RightMissing) || !strings.Contains(err.Error(), "find the target's Pods") || !strings.Contains(err.Error(), r.namespace) {
			t.Errorf("%v", err)
		}
	}
	p.Chain.Target = filter.Target{Kind: filter.Mesh, Namespace: r.namespace} // in whose root there is no istiod
	for _, err := range istiod.Loaded(t.Context(), r.cluster, p, istiod.Silence) {
		if !errors.Is(err, problem.NotVerified) || !strings.Contains(err.Error(), "no istiod runs in namespace "+r.namespace) {
			t.Errorf("%v", err)
		}
	}
}

func TestAProxyThatLeavesIsGoneAndOneThatComesLaterIsNotWaitedFor(t *testing.T) {
	r := newRig(t, "TrafficExtension")
	r.sidecar("api-1", 0)
	second := r.sidecar("api-2", 1)
	p := r.apply(r.filter("hello", "{response: {x-a: one}}", ""))
	step := 0
	l := r.await(r.cluster, p, func(l plan.Loaded) bool {
		switch {
		case step == 0 && running(2, plan.Seen)(l):
			step++
			if err := second.Stop(); err != nil {
				t.Fatal(err)
			}
		case step == 1 && l.Count(plan.Gone) == 1:
			step++
			r.sidecar("api-3", 1)
		}
		return step == 2 && len(l.Proxies) == 3 && l.Proxies[2].State == plan.Running
	})
	if l.Expected() != 1 || l.Count(plan.Running) != 1 || l.Proxies[1].State != plan.Gone || l.Proxies[2].Expected {
		t.Error(describe(l))
	}
	r.apply()
}

func TestATargetWithoutProxiesHasNobodyToWaitFor(t *testing.T) {
	r := newRig(t, "TrafficExtension")
	if err := istio.Apply(t.Context(), map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": r.namespace}}); err != nil {
		t.Fatal(err)
	}
	for _, filters := range [][]filter.Filter{{r.filter("hello", "{response: {x-a: one}}", "")}, nil} {
		if l := r.await(r.cluster, r.apply(filters...), func(plan.Loaded) bool { return true }); len(l.Proxies) != 0 || l.Expected() != 0 {
			t.Error(describe(l))
		}
	}
}

func TestAFilterForAPortIsNotWaitedForWhereThatPortIsNot(t *testing.T) {
	for _, kind := range []string{"TrafficExtension", "EnvoyFilter"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel() // it waits for istiod's patience
			r := newRig(t, kind)
			p, other := r.sidecar("api-1", 0), r.proxy(istiotest.ProxyOptions{Pod: "api-2", Agent: true})
			one := r.filter("hello", "{response: {x-a: one}}", ", match: {ports: ["+p.URL[strings.LastIndex(p.URL, ":")+1:]+"]}")
			l := r.await(r.cluster, r.apply(one), running(1, plan.Seen))
			if l.Proxies[1].Expected || !strings.Contains(l.Proxies[1].Detail, "no listener") {
				t.Error(describe(l))
			}
			r.header(p, "x-a", "one")
			r.header(other, "x-a", "")
			l = r.await(r.cluster, r.apply(one, r.filter("everywhere", "{response: {x-b: b}}", "")), running(2, plan.Seen))
			if got := l.Proxies[1].Detail; !strings.Contains(got, "1 of 2 filters") {
				t.Error(describe(l))
			}
			for proxy, a := range map[*istiotest.Proxy]string{p: "one", other: ""} {
				r.header(proxy, "x-a", a)
				r.header(proxy, "x-b", "b")
			}
			r.await(r.cluster, r.apply(), running(2, plan.Seen))
		})
	}
}

// A filter whose place alone changes has the same module and configuration where it was and where it is to be.
func TestAFilterThatMovesToAnotherPortIsNotTakenForTheOneThatWasThere(t *testing.T) {
	r := newRig(t, "EnvoyFilter")
	t.Parallel() // it waits for istiod's patience
	first, second := r.sidecar("api-1", 0), r.sidecar("api-2", 0)
	port := func(p *istiotest.Proxy) string { return p.URL[strings.LastIndex(p.URL, ":")+1:] }
	for _, step := range []struct {
		match        string
		expected     int
		here, beside string // what the proxies answer with
	}{
		{"", 2, "one", "one"},
		{", match: {ports: [" + port(first) + "]}", 1, "one", ""},
		{", match: {ports: [" + port(second) + "]}", 1, "", "one"},
		{", phase: authn", 2, "one", "one"},
	} {
		// As an operation does: the first time that all are said to run it.
		l := r.await(r.cluster, r.apply(r.filter("hello", "{response: {x-a: one}}", step.match)), func(l plan.Loaded) bool { return l.Count(plan.Running) == l.Expected() })
		if l.Expected() != step.expected {
			t.Errorf("%s: %s", step.match, describe(l))
		}
		r.header(first, "x-a", step.here)
		r.header(second, "x-a", step.beside)
	}
	r.await(r.cluster, r.apply(), running(2, plan.Seen))
}

// lying is a cluster in which something else than what should be there answers at one port.
type lying struct {
	*kube.Cluster
	port int
}

func (l lying) Dial(ctx context.Context, namespace, pod string, port int) (net.Conn, error) {
	if port != l.port {
		return l.Cluster.Dial(ctx, namespace, pod, port)
	}
	here, there := net.Pipe()
	go func() {
		defer there.Close()
		for in := bufio.NewReader(there); ; {
			if _, err := http.ReadRequest(in); err != nil {
				return
			}
			if _, err := io.WriteString(there, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"); err != nil {
				return
			}
		}
	}()
	return here, nil
}

// mute is a cluster in which what is at one port takes connections, or with dial not even those, and says nothing.
type mute struct {
	*kube.Cluster
	port int
	at   string
	dial bool
}

func (m mute) Dial(ctx context.Context, namespace, pod string, port int) (net.Conn, error) {
	switch {
	case port != m.port:
		return m.Cluster.Dial(ctx, namespace, pod, port)
	case m.dial:
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp", m.at)
}

func TestWhoSaysNothingIsNamedInTime(t *testing.T) {
	const silence = 300 * time.Millisecond
	r := newRig(t, "TrafficExtension")
	r.sidecar("api-1", 0)
	p := r.apply(r.filter("hello", "{response: {x-a: one}}", ""))
	r.await(r.cluster, p, running(1, plan.Seen))
	nobody, err := net.Listen("tcp", "127.0.0.1:0") // the kernel takes its connections
	if err != nil {
		t.Fatal(err)
	}
	defer nobody.Close()
	for _, dial := range []bool{false, true} {
		here := mute{r.cluster, istiotest.MonitoringPort, nobody.Addr().String(), dial}
		t.Run(fmt.Sprintf("an istiod, to the dialling: %t", dial), func(t *testing.T) {
			const want = "ask istiod istio-system/istiod-1: it does not answer within 300ms"
			begun := time.Now()
			for l, err := range istiod.Loaded(t.Context(), here, p, silence) {
				if !errors.Is(err, problem.NotVerified) || !strings.Contains(err.Error(), want) {
					t.Errorf("%s: %v", describe(l), err)
				}
			}
			if took := time.Since(begun); took > 10*time.Second {
				t.Errorf("that took %s", took)
			}
		})
		t.Run(fmt.Sprintf("an istiod until the time is over, to the dialling: %t", dial), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), silence)
			defer cancel()
			for l, err := range istiod.Loaded(ctx, here, p, time.Hour) {
				if !errors.Is(err, problem.NotVerified) || !strings.Contains(err.Error(), "ask istiod istio-system/istiod-1: it has not answered yet") {
					t.Errorf("%s: %v", describe(l), err)
				}
			}
		})
		here.port = istiotest.AdminPort
		t.Run(fmt.Sprintf("a proxy, to the dialling: %t", dial), func(t *testing.T) {
			for l, err := range istiod.Loaded(t.Context(), here, p, silence) {
				if err != nil {
					t.Fatal(err)
				}
				if running(1, plan.Acknowledged)(l) {
					if got := l.Proxies[0].Detail; got != "its own state was not seen: it does not answer within 300ms" {
						t.Errorf("it says %q", got)
					}
					break
				}
			}
		})
	}
	t.Run("a proxy until the time is over", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		var last plan.Loaded
		for l, err := range istiod.Loaded(ctx, mute{r.cluster, istiotest.AdminPort, nobody.Addr().String(), false}, p, time.Hour) {
			if err == nil {
				last = l
			}
		}
		if waiting := last.In(plan.Waiting); len(waiting) != 1 || waiting[0].ID != r.namespace+"/api-1" {
			t.Error(describe(last))
		}
	})
	r.await(r.cluster, r.apply(), running(1, plan.Seen))
}

func TestNonsenseIsNoProof(t *testing.T) {
	r := newRig(t, "TrafficExtension")
	r.sidecar("api-1", 0)
	p := r.apply(r.filter("hello", "{response: {x-a: one}}", ""))
	t.Run("from istiod", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		for l, err := range istiod.Loaded(ctx, lying{r.cluster, istiotest.MonitoringPort}, p, istiod.Silence) {
			if !errors.Is(err, problem.NotVerified) || !strings.Contains(err.Error(), "nothing that istiod says") {
				t.Errorf("%s: %v", describe(l), err)
			}
		}
	})
	t.Run("from a proxy", func(t *testing.T) {
		l := r.await(lying{r.cluster, istiotest.AdminPort}, p, running(1, plan.Acknowledged))
		if got := l.Proxies[0].Detail; !strings.Contains(got, "its own state was not seen") {
			t.Errorf("it says %q", got)
		}
	})
	r.await(r.cluster, r.apply(), running(1, plan.Seen))
}
