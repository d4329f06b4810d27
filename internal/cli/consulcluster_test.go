package cli

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/consultest"
	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/filters"
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
	c, err := consultest.StartCluster(ctx, t.TempDir(), k8stest.Options{Users: []string{wholeUser, baseUser}})
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

// TestAnOperationOnConsulEndsWhenTheSidecarsRunIt never waits: the end of an operation is what is relied on.
func TestAnOperationOnConsulEndsWhenTheSidecarsRunIt(t *testing.T) {
	c := newConsulCluster(t)
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
