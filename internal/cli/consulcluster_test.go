package cli

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/build/controlplanes/consultest"
	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/build/controlplanes/stack"
	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/templates"
)

// consulCluster is a real API server and Consul, with the sidecars of the services api, which is in the Pod shop/api-1, and
// web, which calls it.
type consulCluster struct {
	*consultest.Cluster
	web *consultest.Service
}

func newConsulCluster(t *testing.T) consulCluster {
	t.Helper()
	if testing.Short() {
		t.Skip("starts a Kubernetes API server, Consul and Envoys")
	}
	ctx := t.Context()
	c, err := consultest.StartCluster(ctx, t.TempDir(), k8stest.Options{Users: []string{wholeUser, baseUser}, ControllerManager: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("Consul's log ends:\n%s", c.Consul.Log())
		}
		c.Stop()
	})
	grant(t, c.Server)
	api, err := c.Consul.Service(ctx, consultest.ServiceOptions{Name: "api"})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Pod(ctx, "shop", "api-1", map[string]string{"app": "api"}, api); err != nil {
		t.Fatal(err)
	}
	web, err := c.Consul.Service(ctx, consultest.ServiceOptions{Name: "web", Upstreams: []string{"api"}})
	if err != nil {
		t.Fatal(err)
	}
	err = c.Apply(ctx, map[string]any{"apiVersion": "v1", "kind": "Service", "metadata": map[string]any{"namespace": "shop", "name": "api"},
		"spec": map[string]any{"selector": map[string]any{"app": "api"}, "ports": []any{map[string]any{"port": 80}}}})
	if err != nil {
		t.Fatal(err)
	}
	return consulCluster{c, web}
}

// entry is a ServiceDefaults of the user's.
func (c consulCluster) entry(t *testing.T, spec map[string]any) {
	t.Helper()
	if err := c.Apply(t.Context(), map[string]any{"apiVersion": "consul.hashicorp.com/v1alpha1", "kind": "ServiceDefaults",
		"metadata": map[string]any{"namespace": "shop", "name": "api"}, "spec": spec}); err != nil {
		t.Fatal(err)
	}
}

// spec is what the cluster has of the service's entry; nil: there is none.
func (c consulCluster) spec(t *testing.T) map[string]any {
	t.Helper()
	var list struct {
		Items []struct {
			Metadata map[string]any
			Spec     map[string]any
		}
	}
	if err := c.Get(t.Context(), "/apis/consul.hashicorp.com/v1alpha1/namespaces/shop/servicedefaults", &list); err != nil {
		t.Fatal(err)
	}
	for _, o := range list.Items {
		if o.Metadata["name"] == "api" && o.Metadata["deletionTimestamp"] == nil {
			return o.Spec
		}
	}
	return nil
}

// answer checks what the service answers with through both sidecars, without waiting. A connection between them that was
// open before a change is closed with one more request, which meets the chain that it began with.
func (c consulCluster) answer(t *testing.T, there, lua string) {
	t.Helper()
	_, _ = c.web.Get(t.Context(), "api", "/")
	r, err := c.web.Get(t.Context(), "api", "/")
	if err != nil || r.Status != http.StatusOK || r.Header.Get("X-There") != there || r.Header.Get("X-Lua") != lua {
		t.Errorf("it answers %d with %q and %q, %v, and should with %q and %q", r.Status, r.Header.Get("X-There"), r.Header.Get("X-Lua"), err, there, lua)
	}
}

// await waits until the service answers with a header.
func (c consulCluster) await(t *testing.T, header, value string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		r, err := c.web.Get(t.Context(), "api", "/")
		if err == nil && r.Status == http.StatusOK && r.Header.Get(header) == value && (header == "" || r.Header.Get("Server") == "envoy") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d %v %v", r.Status, r.Header, err)
		}
	}
}

// lua is an extension of the user's that adds to the header x-lua.
func lua(letter string) map[string]any {
	return map[string]any{"name": "builtin/lua", "arguments": map[string]any{"proxyType": "connect-proxy", "listener": "inbound",
		"script": fmt.Sprintf("function envoy_on_response(h) h:headers():replace('x-lua', (h:headers():get('x-lua') or '') .. '%s') end", letter)}}
}

// TestConsulOnKubernetes has one cluster for all that is tried there.
func TestConsulOnKubernetes(t *testing.T) {
	c := newConsulCluster(t)
	t.Run("sidecars fetch modules through an upstream", c.fetchesThroughAnUpstream)
	t.Run("an operation ends when the sidecars run it", c.endsWhenTheSidecarsRunIt) // and stops Consul in the end
}

// endsWhenTheSidecarsRunIt never waits: the end of an operation is what is relied on.
func (c consulCluster) endsWhenTheSidecarsRunIt(t *testing.T) {
	module, _ := filters.Builtin("headers")
	sum := sha256.Sum256(module)
	files, digest := t.TempDir(), hex.EncodeToString(sum[:])
	put(t, files, digest+".wasm", string(module))
	a := newAdapter(t, "--allow-wide-targets")
	dir, whole, base := t.TempDir(), c.as(t, wholeUser), c.as(t, baseUser)
	on := func(target, name, value, path string) string {
		return put(t, dir, "d.yaml", istioDocument(name, "mesh: consul\ntarget: {kind: "+target+"}\n"+headers+
			"delivery: {mode: local, localPath: "+path+"}\nconfig: {response: {x-there: "+value+"}}"))
	}
	doc := func(name, value, path string) string { return on("Service, name: api", name, value, path) }

	// Of a service that nothing is said of Consul would take the filter, and give it to no proxy.
	a.cli("apply", "-f", doc("x", "none", files), "--kubeconfig", whole).want(t, exitFailed, "its protocol is tcp, which is Consul's default", "set protocol: http in ServiceDefaults shop/api")
	if c.spec(t) != nil {
		t.Error("there is an entry")
	}

	theirs := map[string]any{"protocol": "http", "envoyExtensions": []any{lua("a"), lua("b")}}
	c.entry(t, theirs)
	c.await(t, "X-Lua", "ba") // a response meets the last first
	theirs = c.spec(t)
	load := c.web.Load(t.Context(), "api")
	a.cli("apply", "-f", doc("x", "one", files), "--kubeconfig", whole).want(t, exitOK, "ServiceDefaults/shop/api updated", "1 of 1 proxy", "seen in each proxy itself")
	c.answer(t, "one", "ba")
	a.cli("apply", "-f", doc("x", "two", files), "--kubeconfig", whole).want(t, exitOK, "updated", "1 of 1 proxy", "seen in each proxy itself")
	c.answer(t, "two", "ba")
	a.cli("run", "filters_status", "--kubeconfig", whole).want(t, exitOK, "1 of 1 proxy run version", "0 drifted")

	// What the user adds behind ours stays there when ours changes.
	now := c.spec(t)
	now["envoyExtensions"] = append(now["envoyExtensions"].([]any), lua("c"))
	c.entry(t, now)
	c.await(t, "X-Lua", "cba")
	a.cli("apply", "-f", doc("x", "three", files), "--kubeconfig", whole).want(t, exitOK, "updated", "1 of 1 proxy")
	c.answer(t, "three", "cba")
	if list := c.spec(t)["envoyExtensions"].([]any); len(list) != 4 || list[2].(map[string]any)["name"] != "builtin/wasm" {
		t.Errorf("%v", list)
	}

	// What the proxy refuses is taken back, and the proxy has what it had.
	a.cli("apply", "-f", doc("y", "four", "/there/is/no/such"), "--kubeconfig", whole).want(t, exitFailed, "a proxy rejected the configuration", "Invalid path", "is in place again")
	c.answer(t, "three", "cba")
	// What it refused, it takes when that is mended.
	late := t.TempDir()
	unmended := doc("x", "four", late)
	a.cli("apply", "-f", unmended, "--kubeconfig", whole).want(t, exitFailed, "Invalid path", "is in place again")
	put(t, late, digest+".wasm", string(module))
	a.cli("apply", "-f", unmended, "--kubeconfig", whole).want(t, exitOK, "1 of 1 proxy")
	c.answer(t, "four", "cba")
	runWith(t, "", nil, "list", "--kubeconfig", whole, "-o", "json").want(t, exitOK, "x")

	// Without the right to look, what was applied is applied, and that nobody looked is told.
	a.cli("apply", "-f", doc("x", "five", files), "--kubeconfig", base).want(t, exitOK, "not verified", "nothing proves that proxies run it", "verb list, resource pods")
	a.cli("apply", "-f", doc("x", "five", files), "--kubeconfig", whole).want(t, exitOK, "is unchanged and runs on", "1 of 1 proxy")
	c.answer(t, "five", "cba")

	a.cli("remove", "shop/x", "--kubeconfig", whole).want(t, exitOK, "removed from", "1 of 1 proxy")
	c.answer(t, "", "cba")
	if asked, failed := load.End(); len(failed) > 0 || asked < 50 {
		t.Errorf("of %d requests meanwhile %d failed: %v", asked, len(failed), failed)
	}
	theirs["envoyExtensions"] = append(theirs["envoyExtensions"].([]any), lua("c"))
	if got := c.spec(t); !reflect.DeepEqual(got, theirs) {
		t.Errorf("the user's entry is %v, and was %v", got, theirs)
	}

	// An entry that was not there is made, and goes again; its protocol is that of the whole mesh.
	ctx := t.Context()
	const entries = "/apis/consul.hashicorp.com/v1alpha1/namespaces/"
	if err := c.Apply(ctx, map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": "operators"}},
		map[string]any{"apiVersion": "consul.hashicorp.com/v1alpha1", "kind": "ProxyDefaults", "metadata": map[string]any{"namespace": "operators", "name": "global"},
			"spec": map[string]any{"config": map[string]any{"protocol": "http"}}}); err != nil {
		t.Fatal(err)
	}
	if err := c.Send(ctx, http.MethodDelete, entries+"shop/servicedefaults/api", nil); err != nil {
		t.Fatal(err)
	}
	c.await(t, "X-Lua", "")
	a.cli("apply", "-f", doc("x", "six", files), "--kubeconfig", whole).want(t, exitOK, "ServiceDefaults/shop/api created", "1 of 1 proxy")
	c.answer(t, "six", "")
	a.cli("remove", "shop/x", "--kubeconfig", whole).want(t, exitOK, "ServiceDefaults/shop/api removed", "1 of 1 proxy")
	c.answer(t, "", "")
	if got := c.spec(t); got != nil {
		t.Errorf("there is an entry: %v", got)
	}

	// The whole mesh has its filters in the entry that is there, in whatever namespace. Consul gives them to no service of
	// another protocol, which is not waited for.
	if err := c.Apply(ctx, map[string]any{"apiVersion": "consul.hashicorp.com/v1alpha1", "kind": "ServiceDefaults",
		"metadata": map[string]any{"namespace": "shop", "name": "web"}, "spec": map[string]any{"protocol": "tcp"}}); err != nil {
		t.Fatal(err)
	}
	if err := c.Pod(ctx, "shop", "web-1", map[string]string{"app": "web"}, c.web); err != nil {
		t.Fatal(err)
	}
	a.cli("apply", "-f", on("Mesh", "all", "seven", files), "--kubeconfig", whole).want(t, exitOK, "ProxyDefaults/operators/global updated", "1 of 1 proxy; 1 takes another protocol")
	c.answer(t, "seven", "")
	a.cli("remove", "shop/all", "--kubeconfig", whole).want(t, exitOK, "ProxyDefaults/operators/global updated", "2 of 2 proxies")
	c.answer(t, "", "")

	// Designs are deployed and undeployed by the same end.
	conn := dialDesigner(t, a)
	for method, d := range designers {
		filter := func(name, header string) string {
			return d.component("WASMFilter", name, fmt.Sprintf(`{"mesh":"consul","target":{"kind":"Service","name":"api"},"module":{"builtin":"headers"},`+
				`"delivery":{"mode":"local","localPath":%q},"config":"{\"response\":{\"%s\":\"design\"}}"}`, files, header))
		}
		for _, remove := range []bool{false, true} {
			want := map[bool]string{false: "design"}[remove]
			lines := d.deploy(t, conn, remove, []string{string(c.Kubeconfig(c.Token(wholeUser)))}, filter("one", "x-there"), filter("two", "x-lua"))
			if len(lines) != 2 || !strings.Contains(lines[0], "1 of 1 proxy") || !strings.Contains(lines[1], "1 of 1 proxy") {
				t.Fatalf("%s, removal %v:\n%s", method, remove, strings.Join(lines, "\n"))
			}
			c.answer(t, want, want)
		}
	}

	// What Consul does not take does not stay.
	nonsense := map[string]any{"protocol": "http", "envoyExtensions": []any{map[string]any{"name": "builtin/nonsense"}}}
	c.entry(t, nonsense)
	a.cli("apply", "-f", doc("x", "eight", files), "--kubeconfig", whole).want(t, exitFailed, "Consul does not take the entry", "ConsulAgentError", "builtin/nonsense")
	c.answer(t, "", "")
	if got := c.spec(t); !reflect.DeepEqual(got, nonsense) {
		t.Errorf("the user's entry is %v", got)
	}

	// A sidecar that has lost Consul runs on what is taken away.
	c.entry(t, map[string]any{"protocol": "http", "envoyExtensions": []any{}})
	a.cli("apply", "-f", doc("x", "nine", files), "--kubeconfig", whole).want(t, exitOK, "1 of 1 proxy")
	runWith(t, "", nil, "list", "--kubeconfig", whole, "--proxies", "-n", "shop").want(t, exitOK, "shop/x", "Looked at 2 of 2 proxies")
	c.Consul.Cut()
	for _, o := range []struct {
		method string
		body   map[string]any
	}{{http.MethodDelete, nil}, {http.MethodPatch, map[string]any{"metadata": map[string]any{"finalizers": nil}}}} {
		if err := c.Send(ctx, o.method, entries+"shop/servicedefaults/api", o.body); err != nil {
			t.Fatal(err)
		}
	}
	runWith(t, "", nil, "list", "--kubeconfig", whole, "--proxies").want(t, exitOK, "drifted: ServiceDefaults/shop/api is gone",
		"Orphan, which no resource explains: shop/api-1 runs meshery.filters/shop.x (sha256 9805f1b18a94…, "+files, "Looked at 2 of 2 proxies")
}

// as writes the kubeconfig of a user.
func (c consulCluster) as(t *testing.T, user string) (file string) {
	t.Helper()
	return put(t, t.TempDir(), "config", string(c.Kubeconfig(c.Token(user))))
}

// fetchesThroughAnUpstream has Kubernetes' own controllers bring Pods to life and down, which get the upstream on request.
func (c consulCluster) fetchesThroughAnUpstream(t *testing.T) {
	ctx := t.Context()
	var now, served atomic.Pointer[http.Handler]
	give := func(h http.Handler) { now.Store(&h) }
	answers := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { (*served.Load()).ServeHTTP(w, r) })
	missing := http.NotFoundHandler()
	give(missing)
	modules, err := c.Consul.Service(ctx, consultest.ServiceOptions{Name: "modules", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		(*now.Load()).ServeHTTP(w, r)
	})})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Consul.Service(ctx, consultest.ServiceOptions{Name: "elsewhere", At: strings.TrimPrefix(modules.Addr, "http://")}); err != nil {
		t.Fatal(err)
	}
	ports, err := stack.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	a := newAdapter(t, "--modules-addr", "127.0.0.1:"+ports[0], "--modules-url", modules.Addr, "--allow-loopback-modules")
	var server http.Handler = httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "127.0.0.1:" + ports[0]})
	served.Store(&server)
	whole, base := c.as(t, wholeUser), c.as(t, baseUser)
	dir := t.TempDir()
	of := func(name, target, value, delivery string) string {
		return put(t, dir, name+".yaml", istioDocument(name, "mesh: consul\ntarget: {kind: Service, name: "+target+"}\n"+headers+
			"delivery: {"+delivery+"}\nconfig: {response: {x-there: "+value+"}}\nwait: {timeout: 1m}"))
	}
	const plain, asking = "mode: served, service: modules", "mode: served, service: modules, upstreamPort: 21900"
	c.entry(t, map[string]any{"protocol": "http"})
	speaks := func(name string) map[string]any { // HTTP, so that the sidecar of modules marks what others ask
		return map[string]any{"apiVersion": "consul.hashicorp.com/v1alpha1", "kind": "ServiceDefaults",
			"metadata": map[string]any{"namespace": "shop", "name": name}, "spec": map[string]any{"protocol": "http"}}
	}
	service := map[string]any{"apiVersion": "v1", "kind": "Service", "metadata": map[string]any{"namespace": "shop", "name": "cart"},
		"spec": map[string]any{"selector": map[string]any{"app": "cart"}, "ports": []any{map[string]any{"port": 80}}}}
	labels := map[string]any{"app": "cart"}
	deployment := map[string]any{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": map[string]any{"namespace": "shop", "name": "cart"},
		"spec": map[string]any{"selector": map[string]any{"matchLabels": labels}, "template": map[string]any{
			"metadata": map[string]any{"labels": labels, "annotations": map[string]any{"consul.hashicorp.com/connect-inject": "true",
				"consul.hashicorp.com/connect-service-upstreams": "api:4000"}},
			"spec": map[string]any{"containers": []any{map[string]any{"name": "main", "image": "none"}}}}}}
	role, _ := templates.RBAC("upstreams")
	var upstreams map[string]any
	if err := yaml.Unmarshal([]byte(role), &upstreams); err != nil {
		t.Fatal(err)
	}
	may := map[string]any{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": map[string]any{"namespace": "shop", "name": "upstreams"},
		"roleRef":  map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "meshery-filters-upstreams"},
		"subjects": []any{map[string]any{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": wholeUser}}}
	if err := c.Apply(ctx, speaks("cart"), speaks("modules"), speaks("elsewhere"), service, deployment, upstreams, may); err != nil {
		t.Fatal(err)
	}
	var buyer *consultest.Service
	c.passing(t, "cart", 1)
	if buyer, err = c.Consul.Service(ctx, consultest.ServiceOptions{Name: "buyer", Upstreams: []string{"cart"}}); err != nil {
		t.Fatal(err)
	}
	if err := buyer.Reaches(ctx, "cart", "/"); err != nil {
		t.Fatal(err)
	}
	const at = "/apis/apps/v1/namespaces/shop/deployments/cart"
	maker := func() (spec, annotations any) {
		t.Helper()
		var o struct {
			Metadata struct{ Annotations map[string]any }
			Spec     map[string]any
		}
		if err := c.Get(ctx, at, &o); err != nil {
			t.Fatal(err)
		}
		delete(o.Metadata.Annotations, "deployment.kubernetes.io/revision")
		return o.Spec, o.Metadata.Annotations
	}
	there := func(value string) {
		t.Helper()
		_, _ = buyer.Get(ctx, "cart", "/")
		r, err := buyer.Get(ctx, "cart", "/")
		if err != nil || r.Status != http.StatusOK || r.Header.Get("X-There") != value {
			t.Errorf("it answers %d with %q, %v, and should with %q", r.Status, r.Header.Get("X-There"), err, value)
		}
	}
	spec, annotations := maker()
	untouched := func() {
		t.Helper()
		if s, n := maker(); !reflect.DeepEqual(s, spec) || !reflect.DeepEqual(n, annotations) {
			t.Errorf("the Deployment was\n%v %v\nand is\n%v %v", spec, annotations, s, n)
		}
	}

	load := buyer.Load(ctx, "cart")
	// What the adapter does not get at that address, it does not offer, and restarts nothing for.
	a.cli("apply", "-f", of("x", "cart", "one", asking), "--kubeconfig", whole).want(t, exitFailed, "meshery-filters-1090")
	give(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "something else") }))
	a.cli("apply", "-f", of("x", "cart", "one", asking), "--kubeconfig", whole).want(t, exitFailed, "meshery-filters-1090")
	give(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	a.cli("apply", "-f", of("x", "cart", "one", asking), "--kubeconfig", whole).want(t, exitFailed, "meshery-filters-1090")
	give(answers)
	// Nothing is touched that the document does not ask for, and nothing without the right.
	a.cli("apply", "-f", of("x", "cart", "one", plain), "--kubeconfig", whole).want(t, exitFailed, "meshery-filters-1157", "has no upstream modules", "delivery.upstreamPort")
	a.cli("apply", "-f", of("x", "api", "one", asking), "--kubeconfig", whole).want(t, exitFailed, "meshery-filters-1158", "Pod shop/api-1 is made by no Deployment")
	a.cli("apply", "-f", of("x", "cart", "one", asking), "--kubeconfig", base).want(t, exitFailed, "verb list", "namespace shop")
	run(t, "diff", "-f", of("x", "cart", "one", asking), "--kubeconfig", whole, "--modules-url", modules.Addr).want(t, exitOK,
		"Warning: Deployment/shop/cart gets an upstream, which restarts its Pods", "Deployment/shop/cart would be updated, which restarts its Pods", "ServiceDefaults/shop/cart would be updated")
	untouched()
	there("")

	a.cli("apply", "-f", of("x", "cart", "one", asking), "--kubeconfig", whole).want(t, exitOK, "Deployment/shop/cart gets an upstream, which restarts its Pods",
		"Deployment/shop/cart updated, which restarts its Pods", "ServiceDefaults/shop/cart updated", "1 of 1 proxy", "seen in each proxy itself")
	there("one")
	given, _ := maker()
	a.cli("apply", "-f", of("x", "cart", "two", plain+", upstreamPort: 21900"), "--kubeconfig", whole).want(t, exitOK, "1 of 1 proxy")
	there("two")
	if now, _ := maker(); !reflect.DeepEqual(now, given) {
		t.Errorf("another configuration has changed the Pods' template from\n%v to\n%v", given, now)
	}
	if asked, failed := load.End(); len(failed) > 0 || asked < 50 {
		t.Errorf("of %d requests meanwhile %d failed: %v", asked, len(failed), failed)
	}

	// The adapter gets the modules, and sidecars get something else, nothing, or no answer.
	spoiled := map[string]http.HandlerFunc{} // by path
	var documents []string
	for i, h := range []http.HandlerFunc{func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "something else") },
		missing.ServeHTTP, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }} {
		name := fmt.Sprint("y-", i)
		module, digest := another(name)
		spoiled["/modules/"+digest+".wasm"] = h
		documents = append(documents, strings.Replace(istioDocument(name, "mesh: consul\ntarget: {kind: Service, name: cart}\n"+headers+
			"delivery: {"+asking+"}\nconfig: {response: {x-there: y}}\nwait: {timeout: 2m}"), headers, "module: {inline: "+module+"}\n", 1))
	}
	give(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if h := spoiled[r.URL.Path]; h != nil && r.Header.Get("X-Request-Id") != "" {
			h(w, r)
			return
		}
		answers(w, r)
	}))
	a.cli("apply", "-f", put(t, dir, "y.yaml", strings.Join(documents, "---\n")), "--kubeconfig", whole).want(t, exitFailed,
		"a proxy rejected the configuration", "it could not fetch a module or start it, or got another than was meant", "is in place again")
	there("two")
	give(answers)

	load = buyer.Load(ctx, "cart")
	// Another service takes its place, while the Pods keep the one that they need until then. What the Deployment itself says
	// of that may be gone: the inventory knows.
	if err := c.Send(ctx, http.MethodPatch, at, map[string]any{"metadata": map[string]any{"annotations": map[string]any{"filters.meshery.io/upstreams": nil}}}); err != nil {
		t.Fatal(err)
	}
	elsewhere := of("x", "cart", "moved", "mode: served, service: elsewhere, upstreamPort: 21900")
	a.cli("apply", "-f", elsewhere, "--kubeconfig", whole).want(t, exitFailed, "meshery-filters-1158", "its upstream modules:21900 has that port, and stays until no sidecar needs it any more")
	there("two")
	elsewhere = of("x", "cart", "moved", "mode: served, service: elsewhere, upstreamPort: 21901")
	run(t, "diff", "-f", elsewhere, "--kubeconfig", whole, "--modules-url", modules.Addr).want(t, exitOK,
		"Deployment/shop/cart gets an upstream, which restarts its Pods", "Deployment/shop/cart loses another one as soon as no sidecar needs it, which restarts its Pods once more")
	a.cli("apply", "-f", elsewhere, "--kubeconfig", whole).want(t, exitOK, "Deployment/shop/cart gets an upstream, which restarts its Pods",
		"Deployment/shop/cart loses an upstream that nothing needs any more, which restarts its Pods", "1 of 1 proxy", "seen in each proxy itself")
	there("moved")
	template := func() map[string]any {
		spec, _ := maker()
		return spec.(map[string]any)["template"].(map[string]any)["metadata"].(map[string]any)["annotations"].(map[string]any)
	}
	if got := template()["consul.hashicorp.com/connect-service-upstreams"]; got != "api:4000,elsewhere:21901" {
		t.Errorf("the Pods' upstreams are %s", got)
	}
	a.cli("apply", "-f", of("x", "cart", "unasked", "mode: served, service: elsewhere"), "--kubeconfig", whole).want(t, exitFailed, "meshery-filters-1175", "which shop/x asked for")
	there("moved")
	a.cli("remove", "shop/x", "--kubeconfig", whole).want(t, exitOK, "ServiceDefaults/shop/cart updated", "Deployment/shop/cart updated, which restarts its Pods", "removed from")
	there("")
	untouched()

	// Pods that do not come up with it are taken back, and what serves goes on.
	c.Hold("modules")
	if err := c.Send(ctx, http.MethodPatch, at, map[string]any{"spec": map[string]any{"progressDeadlineSeconds": 1}}); err != nil {
		t.Fatal(err)
	}
	spec, annotations = maker()
	a.cli("apply", "-f", of("x", "cart", "three", asking), "--kubeconfig", whole).want(t, exitFailed, "meshery-filters-1159", "Deployment/shop/cart", "is taken back",
		"Deployment/shop/cart has again what it had, which restarts its Pods")
	there("")
	untouched()
	if asked, failed := load.End(); len(failed) > 0 || asked < 50 {
		t.Errorf("of %d requests meanwhile %d failed: %v", asked, len(failed), failed)
	}

	// StatefulSets and DaemonSets restart their Pods as well, here for a module that its author serves. Sidecars speak plain HTTP
	// to whatever their upstreams lead to, and a terminating gateway speaks TLS for them.
	module, _ := filters.Builtin("headers")
	digest := sha256.Sum256(module)
	var gives atomic.Pointer[[]byte]
	wrong := []byte("something else")
	gives.Store(&wrong)
	author := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(*gives.Load()) }))
	defer author.Close()
	if err := c.Consul.Outside(ctx, "author", author.Listener.Addr().String(), authorities, "example.com"); err != nil {
		t.Fatal(err)
	}
	direct := put(t, dir, "s.yaml", strings.Replace(istioDocument("s", "mesh: consul\ntarget: {kind: Service, name: stock}\n"+headers+
		"delivery: {mode: direct, service: author, upstreamPort: 21900}\nconfig: {response: {x-there: direct}}\nwait: {timeout: 1m}"),
		headers, fmt.Sprintf("module: {url: %q, sha256: %x}\n", author.URL+"/headers.wasm", digest), 1))
	c.Hold("")
	stock := map[string]any{"app": "stock"}
	if err := c.Apply(ctx, speaks("stock"), map[string]any{"apiVersion": "v1", "kind": "Service", "metadata": map[string]any{"namespace": "shop", "name": "stock"},
		"spec": map[string]any{"selector": stock, "ports": []any{map[string]any{"port": 80}}}}); err != nil {
		t.Fatal(err)
	}
	const sets = "/apis/apps/v1/namespaces/shop/"
	specOf := func(plural string) (spec any) {
		t.Helper()
		var o map[string]any
		if err := c.Get(ctx, sets+plural+"/stock", &o); err != nil {
			t.Fatal(err)
		}
		return o["spec"]
	}
	specs := map[string]any{}
	for plural, kind := range map[string]string{"statefulsets": "StatefulSet", "daemonsets": "DaemonSet"} {
		labels := map[string]any{"app": "stock", "of": plural}
		spec := map[string]any{"selector": map[string]any{"matchLabels": labels}, "template": map[string]any{
			"metadata": map[string]any{"labels": labels, "annotations": map[string]any{"consul.hashicorp.com/connect-inject": "true"}},
			"spec":     map[string]any{"containers": []any{map[string]any{"name": "main", "image": "none"}}}}}
		if kind == "StatefulSet" {
			spec["replicas"] = 2
		}
		if err := c.Apply(ctx, map[string]any{"apiVersion": "apps/v1", "kind": kind, "metadata": map[string]any{"namespace": "shop", "name": "stock"}, "spec": spec}); err != nil {
			t.Fatal(err)
		}
		specs[plural] = specOf(plural)
	}
	c.passing(t, "stock", 3)
	shopper, err := c.Consul.Service(ctx, consultest.ServiceOptions{Name: "shopper", Upstreams: []string{"stock"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := shopper.Reaches(ctx, "stock", "/"); err != nil {
		t.Fatal(err)
	}
	load = shopper.Load(ctx, "stock")
	a.cli("apply", "-f", direct, "--kubeconfig", whole).want(t, exitFailed, "meshery-filters-1090")
	gives.Store(&module)
	a.cli("apply", "-f", direct, "--kubeconfig", whole).want(t, exitOK, "StatefulSet/shop/stock updated, which restarts its Pods", "DaemonSet/shop/stock updated, which restarts its Pods",
		"3 of 3 proxies", "seen in each proxy itself")
	if r, err := shopper.Get(ctx, "stock", "/"); err != nil || r.Header.Get("X-There") != "direct" {
		t.Errorf("%d %v %v", r.Status, r.Header, err)
	}
	a.cli("remove", "shop/s", "--kubeconfig", whole).want(t, exitOK, "StatefulSet/shop/stock updated, which restarts its Pods", "removed from")
	if asked, failed := load.End(); len(failed) > 0 || asked < 50 {
		t.Errorf("of %d requests meanwhile %d failed: %v", asked, len(failed), failed)
	}
	for plural, before := range specs {
		if now := specOf(plural); !reflect.DeepEqual(now, before) {
			t.Errorf("of the %s the spec was\n%v\nand is\n%v", plural, before, now)
		}
		if err := c.Send(ctx, http.MethodDelete, sets+plural+"/stock", nil); err != nil {
			t.Fatal(err)
		}
	}

	// Nothing of it is left to what follows.
	if err := c.Send(ctx, http.MethodPatch, at, map[string]any{"spec": map[string]any{"replicas": 0}}); err != nil {
		t.Fatal(err)
	}
	const entries = "/apis/consul.hashicorp.com/v1alpha1/namespaces/shop/servicedefaults"
	for _, name := range []string{"api", "cart", "modules", "elsewhere", "stock"} {
		if err := c.Send(ctx, http.MethodDelete, entries+"/"+name, nil); err != nil {
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		var pods, left struct{ Items []any }
		err := errors.Join(c.Get(ctx, "/api/v1/namespaces/shop/pods?labelSelector=app+in+(cart,stock)", &pods), c.Get(ctx, entries, &left))
		if err == nil && len(pods.Items)+len(left.Items) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("there are still %v and %v: %v", pods, left, err)
		}
	}
}

// passing waits until a service has so many instances that others call.
func (c consulCluster) passing(t *testing.T, service string, instances int) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		var registered []any
		err := c.Consul.Send(t.Context(), http.MethodGet, "/v1/health/connect/"+service+"?passing", nil, &registered)
		if err == nil && len(registered) == instances {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d Pods of %s have come up: %v", len(registered), service, err)
		}
	}
}

// another is the shipped module with another digest, in base64.
func another(name string) (module, digest string) {
	data, _ := filters.Builtin("headers")
	data = slices.Concat(data, []byte{0, byte(len(name) + 1), byte(len(name))}, []byte(name)) // a custom section
	sum := sha256.Sum256(data)
	return base64.StdEncoding.EncodeToString(data), hex.EncodeToString(sum[:])
}
