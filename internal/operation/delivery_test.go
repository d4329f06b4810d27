package operation_test

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
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

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
)

// answering is an HTTP server whose handler can be exchanged while it runs, and that counts what it is asked.
type answering struct {
	*httptest.Server
	handler atomic.Pointer[http.Handler]
	asked   atomic.Int64
}

func (a *answering) set(h http.Handler) { a.handler.Store(&h) }

func newAnswering(t *testing.T, secure bool) *answering {
	t.Helper()
	a := &answering{}
	a.set(http.NotFoundHandler())
	a.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.asked.Add(1)
		(*a.handler.Load()).ServeHTTP(w, r)
	}))
	a.Config.ErrorLog = log.New(io.Discard, "", 0)
	if secure {
		a.StartTLS()
	} else {
		a.Start()
	}
	t.Cleanup(a.Close)
	return a
}

// shippedModule is the builtin headers and its digest.
func shippedModule(t *testing.T) ([]byte, string) {
	t.Helper()
	data, ok := filters.Builtin("headers")
	if !ok {
		t.Fatal("there is no module headers")
	}
	sum := sha256.Sum256(data)
	return data, hex.EncodeToString(sum[:])
}

// newServedRig is a clusterRig whose modules proxies can fetch at a server's address, and what that server answers with.
func newServedRig(t *testing.T) (*clusterRig, *answering, http.Handler) {
	t.Helper()
	at := newAnswering(t, false)
	var blobs module.Options
	c := newClusterRig(t, func(o *operation.Options) {
		blobs = o.Modules.(*module.Resolver).Options
		blobs.ServedAt = at.URL
		o.Modules = module.New(blobs)
	})
	serving := module.NewServer(module.ServerOptions{Blobs: blobs.Blobs, Live: c.runner.LiveModules})
	at.set(serving)
	return c, at, serving
}

func TestAModuleIsFetchedAsProxiesWillBeforeTheirClusterHearsOfIt(t *testing.T) {
	c, at, serving := newServedRig(t)
	bytes, digest := shippedModule(t)
	address := at.URL + "/modules/" + digest + ".wasm"
	served := "delivery: {mode: served}"

	// The bytes of a module that travels are nobody's to fetch.
	c.ok(c.apply(on("inline", "inline")))
	if n := at.asked.Load(); n != 0 {
		t.Errorf("the address was asked %d times for a module that travels", n)
	}

	// Nothing, something else, and an address to go to: none of it reaches the cluster.
	for name, h := range map[string]http.Handler{
		"status 404":    http.NotFoundHandler(),
		"wanted sha256": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "other bytes") }),
		"leads to":      http.RedirectHandler("/elsewhere", http.StatusFound),
		"more than":     http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 21<<20)) }),
		"ended its answer": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "9")
			w.Write(bytes[:5])
		}),
		"has " + fmt.Sprint(99<<20): http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", fmt.Sprint(99<<20)) }),
	} {
		at.set(h)
		e := c.fails(problem.SourceUnproved, c.apply(on("web", "hello", served)))
		if !strings.Contains(e.Details, name) || !strings.Contains(e.Details, address) || !strings.Contains(e.Details, c.ns+"/hello") {
			t.Errorf("it does not say %q and %s: %s", name, address, e.Details)
		}
	}
	c.holds("TrafficExtension")

	// It is there.
	at.set(serving)
	before := at.asked.Load()
	c.ok(c.apply(on("web", "hello", served), on("web", "again", served)))
	if n := at.asked.Load() - before; n != 1 {
		t.Errorf("the one address of two filters was asked %d times", n)
	}
	spec := c.holds("TrafficExtension", "hello", "again")["hello"]["spec"].(map[string]any)["wasm"].(map[string]any)
	if spec["url"] != address || spec["sha256"] != digest {
		t.Errorf("%v", spec)
	}

	// The server goes: what is changed then is not, and what is there stays.
	was := version(c.holds("TrafficExtension", "hello", "again")["hello"])
	at.set(http.NotFoundHandler())
	c.fails(problem.SourceUnproved, c.apply(on("web", "hello", served, "priority: 7")))
	if now := version(c.holds("TrafficExtension", "hello", "again")["hello"]); now != was {
		t.Errorf("a refused change was written: %s, then %s", was, now)
	}
	// A filter can be taken away all the same.
	c.ok(c.request("remove_filter", doc("hello")))
	c.holds("TrafficExtension", "again")
}

func TestWithoutAnAddressServedIsRefusedWithWhatToDo(t *testing.T) {
	c := newClusterRig(t)
	e := c.fails(problem.NoDelivery, c.apply(on("web", "hello", "delivery: {mode: served}")))
	if !strings.Contains(e.Details, "served: ") || !strings.Contains(e.Remedy, "modulesURL") {
		t.Errorf("%s\n%s", e.Details, e.Remedy)
	}
}

func TestAnAuthorsOwnAddressIsLookedAtEachTime(t *testing.T) {
	bytes, digest := shippedModule(t)
	at := newAnswering(t, true)
	at.set(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(bytes) }))
	c := newClusterRig(t, func(o *operation.Options) {
		m := o.Modules.(*module.Resolver).Options
		m.AllowLoopback, m.RootCAs = true, x509.NewCertPool()
		m.RootCAs.AddCert(at.Certificate())
		o.Modules = module.New(m)
	})
	direct := []string{"module: {url: '" + at.URL + "/headers.wasm?signature=s3cret', sha256: '" + digest + "'}", "delivery: {mode: direct}"}
	c.ok(c.apply(on("web", "hello", direct...)))
	was := version(c.holds("TrafficExtension", "hello")["hello"])
	if n := at.asked.Load(); n != 2 {
		t.Errorf("asked %d times: once to keep the module, once to see what proxies will get", n)
	}
	// What is stored here still is not there any more.
	at.set(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "a newer release") }))
	e := c.fails(problem.SourceUnproved, c.apply(on("web", "hello", append(direct, "priority: 3")...)))
	if !strings.Contains(e.Details, digest) || strings.Contains(e.Details, "s3cret") {
		t.Errorf("%s", e.Details)
	}
	if now := version(c.holds("TrafficExtension", "hello")["hello"]); now != was {
		t.Errorf("a refused change was written: %s, then %s", was, now)
	}
}

// pushImage puts a module into a registry as an image that Istio reads, and returns its address and digest.
func pushImage(t *testing.T, at *answering, module []byte) (address, digest string) {
	t.Helper()
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	for _, l := range []v1.Layer{static.NewLayer([]byte("{}"), "application/vnd.module.wasm.config.v1+json"),
		static.NewLayer(module, "application/vnd.module.wasm.content.layer.v1+wasm")} {
		mt, err := l.MediaType()
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.Append(img, mutate.Addendum{Layer: l, MediaType: mt}); err != nil {
			t.Fatal(err)
		}
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	address = strings.TrimPrefix(at.URL, "https://") + "/filters/headers"
	to, err := name.ParseReference(address + ":1")
	if err != nil {
		t.Fatal(err)
	}
	transport := at.Client().Transport.(*http.Transport).Clone()
	defer transport.CloseIdleConnections()
	if err := remote.Write(to, img, remote.WithTransport(overTLS{transport}), remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	return "oci://" + address, d.String()
}

// overTLS asks a registry on this machine over TLS, which the library does not.
type overTLS struct{ inner http.RoundTripper }

func (o overTLS) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL.Scheme = "https"
	return o.inner.RoundTrip(r)
}

func TestAnImageIsServedByItsModulesDigestOrFetchedByProxiesByItsOwn(t *testing.T) {
	bytes, digest := shippedModule(t)
	images, at := newAnswering(t, true), newAnswering(t, false)
	images.set(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	address, image := pushImage(t, images, bytes)
	var m module.Options
	c := newClusterRig(t, func(o *operation.Options) {
		m = o.Modules.(*module.Resolver).Options
		m.AllowLoopback, m.RootCAs, m.ServedAt = true, x509.NewCertPool(), at.URL
		m.RootCAs.AddCert(images.Certificate())
		o.Modules = module.New(m)
	})
	at.set(module.NewServer(module.ServerOptions{Blobs: m.Blobs, Live: c.runner.LiveModules}))
	wasm := func(filter string) map[string]any {
		return c.objects("TrafficExtension")[filter]["spec"].(map[string]any)["wasm"].(map[string]any)
	}
	// The document does not say the module's digest: the module is live while the operation runs all the same.
	c.ok(c.apply(on("web", "tagged", "module: {url: '"+address+":1'}", "delivery: {mode: served}")))
	if spec := wasm("tagged"); spec["url"] != at.URL+"/modules/"+digest+".wasm" || spec["sha256"] != digest {
		t.Errorf("%v", spec)
	}
	c.ok(c.apply(on("api", "pinned", "module: {url: '"+address+"@"+image+"'}", "delivery: {mode: direct}")))
	if spec := wasm("pinned"); spec["url"] != address+"@"+image || spec["sha256"] != nil {
		t.Errorf("%v", spec)
	}
	// A proxy could get another module by a tag than the one that was tried.
	c.fails(problem.NoDelivery, c.apply(on("api", "tag", "module: {url: '"+address+":1'}", "delivery: {mode: direct}")))
	images.set(http.NotFoundHandler())
	e := c.fails(problem.SourceUnproved, c.apply(on("api", "pinned", "module: {url: '"+address+"@"+image+"', sha256: '"+digest+"'}", "delivery: {mode: direct}", "priority: 2")))
	if !strings.Contains(e.Details, "status 404") {
		t.Errorf("%s", e.Details)
	}
}

func TestAnImageIsPulledWithASecretOfTheFiltersNamespace(t *testing.T) {
	bytes, digest := shippedModule(t)
	const password = "hunter2-of-the-registry"
	images := newAnswering(t, true)
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	images.set(inner)
	address, image := pushImage(t, images, bytes)
	images.set(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, ok := r.BasicAuth(); !ok || u != "robot" || p != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	c := newClusterRig(t, func(o *operation.Options) {
		m := o.Modules.(*module.Resolver).Options
		m.AllowLoopback, m.RootCAs = true, x509.NewCertPool()
		m.RootCAs.AddCert(images.Certificate())
		m.Secret = func(string, string) (string, error) { t.Error("the adapter's own secrets were asked"); return "", nil }
		o.Modules = module.New(m)
	})
	pinned := func(secret string) operation.Request {
		return c.apply(on("api", "private", "module: {url: '"+address+"@"+image+"', pullSecret: "+secret+"}", "delivery: {mode: direct}"))
	}
	if e := c.fails(problem.RightMissing, pinned("registry")); !strings.Contains(e.Details, "verb get, resource secrets, namespace "+c.ns+", for Secret/"+c.ns+"/registry") {
		t.Errorf("%s", e.Details)
	}
	c.readsSecrets()
	if e := c.fails(problem.ClusterSecret, pinned("registry")); !strings.Contains(e.Details, "there is no Secret/"+c.ns+"/registry") {
		t.Errorf("%s", e.Details)
	}
	host, _, _ := strings.Cut(address, "/filters")
	auths := func(password string) map[string]string {
		return map[string]string{".dockerconfigjson": fmt.Sprintf(`{"auths": {%q: {"username": "robot", "password": %q}}}`, strings.TrimPrefix(host, "oci://"), password)}
	}
	c.secret("wrong", auths("something else"))
	if e := c.fails(problem.ModuleUnavailable, pinned("wrong")); !strings.Contains(e.Details, "status 401") {
		t.Errorf("%s", e.Details)
	}
	c.secret("registry", auths(password))
	for _, line := range texts(c.ok(pinned("registry"))) {
		if strings.Contains(line, password) {
			t.Errorf("told: %s", line)
		}
	}
	spec := c.objects("TrafficExtension")["private"]["spec"].(map[string]any)["wasm"].(map[string]any)
	if spec["url"] != address+"@"+image || spec["imagePullSecret"] != "registry" {
		t.Errorf("%v", spec)
	}
	// The module is kept, and what proxies will do is tried each time.
	c.secret("registry", auths("changed"))
	again := pinned("registry")
	again.Body = strings.Replace(again.Body, "pullSecret:", "sha256: '"+digest+"', pullSecret:", 1)
	if e := c.fails(problem.SourceUnproved, again); !strings.Contains(e.Details, "status 401") {
		t.Errorf("%s", e.Details)
	}
}

// readsSecrets lets the adapter's user read those of the test's namespace.
func (c *clusterRig) readsSecrets() {
	c.t.Helper()
	if err := c.post(`{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {name: secrets, namespace: `+c.ns+`},
		roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: meshery-filters-secrets},
		subjects: [{kind: User, apiGroup: rbac.authorization.k8s.io, name: `+adapterUser+`}]}`, ""); err != nil {
		c.t.Fatal(err)
	}
}

// secret makes a Secret of the test's namespace hold these.
func (c *clusterRig) secret(name string, entries map[string]string) {
	c.t.Helper()
	data := map[string][]byte{}
	for k, v := range entries {
		data[k] = []byte(v)
	}
	code, answer, err := c.ask("PATCH", "/api/v1/namespaces/"+c.ns+"/secrets/"+name+"?fieldManager=test&force=true",
		map[string]any{"apiVersion": "v1", "kind": "Secret", "metadata": map[string]any{"name": name}, "data": data})
	if code != http.StatusOK && code != http.StatusCreated {
		c.t.Fatal(code, answer["message"], err)
	}
}

func TestReferencesOfAFilterInAClusterAreResolvedFromItsSecrets(t *testing.T) {
	const value, later = "a value that only the cluster has", "what the cluster has in its place"
	state := t.TempDir()
	c := startClusterRig(t, state)
	q := c.apply(on("web", "hello", "config: {response: {x-token: {$secret: {name: greeting, key: token}}}}"))
	fails := func(kind *problem.Kind, want string) {
		t.Helper()
		if e := c.fails(kind, q); !strings.Contains(e.Details, want) || !strings.Contains(e.Details, c.ns+"/hello") {
			t.Errorf("no %q in: %s", want, e.Details)
		}
		c.holds("EnvoyFilter")
	}
	fails(problem.RightMissing, "verb get, resource secrets, namespace "+c.ns+", for Secret/"+c.ns+"/greeting")
	c.readsSecrets()
	fails(problem.ClusterSecret, "there is no Secret/"+c.ns+"/greeting")
	c.secret("greeting", map[string]string{"other": value})
	fails(problem.ClusterSecret, "Secret/"+c.ns+"/greeting has no key token")
	c.secret("greeting", map[string]string{"token": "\xff"})
	fails(problem.ClusterSecret, "the key token of Secret/"+c.ns+"/greeting is no text")
	c.secret("greeting", map[string]string{"token": value})

	holds := func(want string) {
		t.Helper()
		object, err := json.Marshal(c.holds("EnvoyFilter", "hello"))
		if err != nil || !strings.Contains(string(object), want) {
			t.Errorf("the object does not have it: %v %s", err, object)
		}
	}
	events := c.ok(q)
	says(t, events, "accepted its configuration in a dry run", "created")
	holds(value)
	says(t, c.ok(q), "is unchanged on")
	c.secret("greeting", map[string]string{"token": later})
	events = append(events, c.ok(q)...)
	says(t, events, "updated")
	holds(later)
	says(t, c.ok(operation.Request{Operation: "filters_status", Kubeconfigs: []string{c.kubeconfig}}), c.ns+"/hello (builtin headers")

	// It is in the object, and nowhere else.
	inventory, err := json.Marshal(c.inventories())
	if err != nil || !strings.Contains(string(inventory), "$secret") {
		t.Errorf("the inventory has no reference: %v %s", err, inventory)
	}
	kept := []string{string(inventory), strings.Join(texts(events), "\n")}
	if err := c.rig.stop(); err != nil {
		t.Fatal(err)
	}
	if err := filepath.WalkDir(state, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		kept = append(kept, string(data))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if len(kept) < 10 {
		t.Fatalf("%d texts were looked at", len(kept))
	}
	for _, text := range kept {
		if strings.Contains(text, value) || strings.Contains(text, later) {
			t.Errorf("a secret is kept or told in: %.200s", text)
		}
	}
}

func TestModulesOfAClustersChainsAreServedAfterARestart(t *testing.T) {
	_, digest := shippedModule(t)
	state := t.TempDir()
	c := startClusterRig(t, state)
	live := func(c *clusterRig, want bool) {
		t.Helper()
		if all, err := c.runner.LiveModules(t.Context()); err != nil || all[digest] != want {
			t.Errorf("live: %v, %v; want %v", all, err, want)
		}
	}
	live(c, false)
	c.ok(c.apply(on("web", "hello")))
	live(c, true)
	if err := c.rig.stop(); err != nil {
		t.Fatal(err)
	}
	again := startClusterRig(t, state)
	again.ns = c.ns
	live(again, true)
	again.ok(again.request("remove_filter", doc("hello")))
	live(again, false)

	// What is taken away without this adapter it notices when it looks at the cluster twice.
	again.ok(again.apply(on("web", "hello")))
	other := newClusterRig(t)
	other.ns = c.ns
	other.ok(other.request("remove_filter", doc("hello")))
	look := func() {
		again.ok(operation.Request{Operation: "filters_status", Kubeconfigs: []string{again.kubeconfig}})
	}
	look()
	live(again, true)
	for deadline := time.Now().Add(20 * time.Second); ; { // an operation that has ended is in the queue for a moment
		look()
		if all, err := again.runner.LiveModules(t.Context()); err != nil || !all[digest] {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a module is live that nothing uses")
		}
	}
	// And a chain that is there is not forgotten.
	again.ok(again.apply(on("web", "hello")))
	for range 3 {
		look()
	}
	live(again, true)
}
