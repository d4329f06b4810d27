package operation_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/consultest"
	"github.com/meshery/meshery-filters/internal/consul"
	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/templates"
)

// sidecars are what the tests of Consul share: a server, and the service web that calls api, started by the first of them.
type sidecars struct {
	*consultest.Consul
	dir      string
	web, api *consultest.Service
	modules  *consultest.Service          // that api calls, for its proxy
	handler  atomic.Pointer[http.Handler] // of modules
	stream   *consultest.Service          // which takes TCP
}

var sharedSidecars *sidecars

var startSidecars = sync.OnceValues(func() (*sidecars, error) {
	dir, err := os.MkdirTemp("", "operation")
	if err != nil {
		return nil, err
	}
	ctx := context.Background()
	s := &sidecars{dir: dir}
	if s.Consul, err = consultest.Start(ctx, filepath.Join(dir, "consul"), consultest.Options{ACL: true}); err != nil {
		return nil, err
	}
	sharedSidecars = s
	for _, e := range []map[string]any{
		{"Kind": "proxy-defaults", "Name": "global", "Config": map[string]any{"protocol": "http"}},
		{"Kind": "service-defaults", "Name": "stream", "Protocol": "tcp"},
		{"Kind": "service-intentions", "Name": "*", "Sources": []any{map[string]any{"Name": "*", "Action": "allow"}}},
	} {
		if err := s.Write(ctx, e); err != nil {
			return nil, err
		}
	}
	s.serve(http.NotFoundHandler())
	s.modules, err = s.Service(ctx, consultest.ServiceOptions{Name: "modules", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		(*s.handler.Load()).ServeHTTP(w, r)
	})})
	if err != nil {
		return nil, err
	}
	if s.stream, err = s.Service(ctx, consultest.ServiceOptions{Name: "stream"}); err != nil {
		return nil, err
	}
	if s.api, err = s.Service(ctx, consultest.ServiceOptions{Name: "api", Upstreams: []string{"modules"}}); err != nil {
		return nil, err
	}
	if s.web, err = s.Service(ctx, consultest.ServiceOptions{Name: "web", Upstreams: []string{"api"}}); err != nil {
		return nil, err
	}
	// What was just registered goes on changing the sidecars for a moment.
	begun := time.Now()
	for good := begun; time.Since(good) < 2*time.Second; {
		r, err := s.web.Get(ctx, "api", "/")
		if err == nil && r.Status == http.StatusOK {
			continue
		}
		if good = time.Now(); good.Sub(begun) > time.Minute {
			return nil, fmt.Errorf("api is not reached through the sidecars: %+v %w", r, err)
		}
	}
	return s, nil
})

func (s *sidecars) serve(h http.Handler) { s.handler.Store(&h) }

func stopSidecars() {
	if sharedSidecars != nil {
		sharedSidecars.Stop()
		os.RemoveAll(sharedSidecars.dir)
	}
}

// consulCluster is the client as the command line hands it to operations.
type consulCluster struct{ *consul.Client }

func (c consulCluster) Secret(context.Context, string, string, string) (string, error) {
	return hubKey, nil
}

func (c consulCluster) Target(ctx context.Context, mesh string, t filter.Target) (operation.ClusterTarget, error) {
	return c.Client.Target(ctx, mesh, t)
}

func (c consulCluster) Targets(ctx context.Context) (operation.ClusterTargets, error) {
	t, err := c.Client.Targets(ctx)
	return consulTargets{t}, err
}

type consulTargets struct{ *consul.Targets }

func (t consulTargets) Target(mesh string, of filter.Target) operation.ClusterTarget {
	return t.Targets.Target(mesh, of)
}

// consulRig is a Runner with the tests' Consul for its own.
type consulRig struct {
	*rig
	*sidecars
	folder string
	client consulCluster
}

func newConsulRig(t *testing.T, change ...func(*consul.Options)) *consulRig {
	t.Helper()
	return newConsulRigOf(t, func(*operation.Options) {}, change...)
}

func newConsulRigOf(t *testing.T, operations func(*operation.Options), change ...func(*consul.Options)) *consulRig {
	t.Helper()
	if testing.Short() {
		t.Skip("starts Consul and Envoys")
	}
	s, err := startSidecars()
	if err != nil {
		t.Fatal(err)
	}
	o := consul.Options{Addr: s.Addr, Token: func() (string, error) { return consultest.Management, nil }, Folder: t.TempDir(), Log: slog.New(slog.DiscardHandler),
		Admin: []string{s.api.Envoy.AdminAddr(), s.web.Envoy.AdminAddr()}}
	if err := os.Chmod(o.Folder, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range change {
		c(&o)
	}
	client, err := consul.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	r := newRig(t, func(o *operation.Options) { o.Consul = consulCluster{client} }, operations)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("Consul's log ends:\n%s", s.Log())
		}
	})
	return &consulRig{r, s, o.Folder, consulCluster{client}}
}

// onAPI is a document for the service api.
func onAPI(name string, spec ...string) string {
	return doc(name, append([]string{"mesh: consul", "target: {kind: Service, name: api}"}, spec...)...)
}

// header is what api answers with, called through the two sidecars.
func (r *consulRig) header(name string) string {
	r.t.Helper()
	got, err := r.web.Get(r.t.Context(), "api", "/")
	if err != nil || got.Status != http.StatusOK {
		r.t.Fatalf("%+v %v", got, err)
	}
	return strings.Join(got.Header.Values(name), ",")
}

// entry is what Consul keeps of a kind and name, in a form that can be compared.
func (r *consulRig) entry(kind, name string) string {
	r.t.Helper()
	e, err := r.Entry(r.t.Context(), kind, name)
	if err != nil {
		r.t.Fatal(err)
	}
	if e == nil {
		return ""
	}
	data, err := json.Marshal(e)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(data)
}

// speaks gives api an entry that says its protocol. Where one without it is made or goes, Consul has callers reach the service
// by another cluster, which they may not have yet for a request.
func (r *consulRig) speaks() {
	r.t.Helper()
	r.user(map[string]any{"Kind": "service-defaults", "Name": "api", "Protocol": "http"})
}

// user writes an entry of the user's, and takes it away when the test ends.
func (r *consulRig) user(e map[string]any) {
	r.t.Helper()
	if err := r.Write(r.t.Context(), e); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := r.Delete(context.Background(), e["Kind"].(string), e["Name"].(string)); err != nil {
			r.t.Error(err)
		}
	})
}

// calm does something under load, in which no request may fail.
func (r *consulRig) calm(do func()) {
	r.t.Helper()
	load := r.web.Load(r.t.Context(), "api")
	do()
	if n, failed := load.End(); n == 0 || len(failed) > 0 {
		r.t.Errorf("%d of %d requests failed: %v", len(failed), n, failed)
	}
}

// warned says whether a story has a warning of that kind.
func warned(events []event.Event, kind *problem.Kind) bool {
	return slices.ContainsFunc(events, func(e event.Event) bool { return e.Code == kind.Code })
}

func TestAnEntryThatWasNotThereGoesAgain(t *testing.T) {
	r := newConsulRig(t)
	r.calm(func() {
		r.ok(apply(onAPI("hello")))
		if e := r.entry("service-defaults", "api"); !strings.Contains(e, `"managed-by":"meshery-filters"`) || !strings.Contains(e, `"Protocol":"http"`) {
			t.Errorf("%s", e)
		}
		r.ok(remove(doc("hello", "mesh: consul")))
	})
	if e := r.entry("service-defaults", "api"); e != "" {
		t.Errorf("it is left: %s", e)
	}
}

func TestConsulsSidecarsRunAFilterWhileTheyServe(t *testing.T) {
	r := newConsulRig(t)
	r.speaks()
	was := r.entry("service-defaults", "api")
	r.calm(func() {
		events := r.ok(apply(onAPI("hello")))
		if last := events[len(events)-1]; !strings.Contains(last.Summary, "1 of 1 proxy") || !strings.Contains(last.Summary, "in Consul 127.0.0.1:") ||
			!strings.Contains(last.Details, "seen in each proxy itself") || warned(events, problem.NotVerified) {
			t.Errorf("%v", texts(events))
		}
		if h := r.header("x-hello"); h != "there" {
			t.Errorf("the header is %q", h)
		}
		r.ok(apply(onAPI("hello", "config: {response: {x-hello: again}}")))
		if h := r.header("x-hello"); h != "again" {
			t.Errorf("the header is %q", h)
		}
		if events := r.ok(apply(onAPI("hello", "config: {response: {x-hello: again}}"))); !strings.Contains(texts(events)[len(events)-1], "is unchanged") {
			t.Errorf("%v", texts(events))
		}
		// Each filter sets the header, so that its value tells the order: responses meet the first filter last.
		for priority, first := range map[int]string{7: "second", -7: "again"} {
			r.ok(apply(onAPI("second", "config: {response: {x-hello: second}}", fmt.Sprintf("priority: %d", priority))))
			if h := r.header("x-hello"); h != first {
				t.Errorf("with priority %d the header is %q", priority, h)
			}
		}
		r.ok(apply(onAPI("second", "config: {response: {x-second: there}}", "priority: -7")))
		if h := r.header("x-hello") + r.header("x-second"); h != "againthere" {
			t.Errorf("the headers are %q", h)
		}
		r.ok(remove(doc("hello", "mesh: consul")))
		if h := r.header("x-hello") + r.header("x-second"); h != "there" {
			t.Errorf("the headers are %q", h)
		}
		r.ok(remove(doc("second"))) // wherever it is
		if h := r.header("x-second"); h != "" {
			t.Errorf("the header is %q", h)
		}
	})
	if now := r.entry("service-defaults", "api"); now != was {
		t.Errorf("it was\n%s\nand is\n%s", was, now)
	}
	if text := r.inventory(); !strings.Contains(text, `"entries":null,"plugins":null,"revisions":[`) {
		t.Errorf("more than a history is left: %s", text)
	}
}

// inventory is what Consul keeps of the target api.
func (r *consulRig) inventory() string {
	r.t.Helper()
	var pairs []struct{ Value []byte }
	if err := r.Send(r.t.Context(), http.MethodGet, "/v1/kv/meshery-filters/?recurse=true", nil, &pairs); err != nil {
		r.t.Fatal(err)
	}
	for _, p := range pairs {
		if strings.Contains(string(p.Value), `"target":"Service default/api"`) {
			return string(p.Value)
		}
	}
	r.t.Fatalf("there is none of api among %d", len(pairs))
	return ""
}

func TestAFilterInConsulIsBroughtBack(t *testing.T) {
	r := newConsulRig(t)
	r.speaks()
	name := strings.ToLower("past-" + rand.Text()[:8]) // the history of the target outlives a test
	limited := func(value string) string {
		return onAPI(name, "config: {response: {x-past: {$secret: {name: greeting, key: token}}, x-step: '"+value+"'}}")
	}
	past := func() (changes []string, all []operation.Revision) {
		t.Helper()
		all, err := r.runner.History(t.Context(), "", name)
		if err != nil {
			t.Fatal(err)
		}
		return changesOf(all), all
	}
	step := func(want string) {
		t.Helper()
		if h := r.header("x-step"); h != want {
			t.Errorf("the header is %q and not %q", h, want)
		}
	}
	if _, err := r.runner.Submit(t.Context(), undo(name, 0)); !errors.Is(err, problem.FilterNotFound) {
		t.Errorf("one that never was: %v", err)
	}
	r.calm(func() {
		r.ok(apply(limited("first")))
		r.ok(apply(limited("second")))
		r.ok(undo(name, 0))
		step("first")
		r.ok(remove(doc(name, "mesh: consul")))
		step("")
		changes, all := past()
		if want := []string{"applied", "changed", "changed", "removed"}; !slices.Equal(changes, want) || !slices.IsSortedFunc(all, func(a, b operation.Revision) int { return int(a.Number) - int(b.Number) }) {
			t.Errorf("%v %+v", changes, all)
		}
		wide := undo(name, 0)
		wide.Namespace, wide.Body = "elsewhere", strings.Replace(wide.Body, "}", ", namespace: default}", 1)
		if _, err := r.runner.Submit(t.Context(), wide); !errors.Is(err, problem.TargetTooWide) {
			t.Errorf("from another namespace: %v", err)
		}
		r.ok(undo(name, all[1].Number))
		step("second")
		r.ok(undo(name, 0)) // it was not there
		step("")
		// A chain that proxies refuse was never there.
		before := r.inventory()
		r.fails(problem.ProxyRejected, apply(onAPI(name, "delivery: {mode: local, localPath: "+t.TempDir()+"}")))
		var was, is struct{ Revisions json.RawMessage }
		if err := errors.Join(json.Unmarshal([]byte(before), &was), json.Unmarshal([]byte(r.inventory()), &is)); err != nil || string(was.Revisions) != string(is.Revisions) {
			t.Errorf("%v: the revisions were\n%s\nand are\n%s", err, was.Revisions, is.Revisions)
		}
	})
	if text := r.inventory(); !strings.Contains(text, "$secret") || strings.Contains(text, hubKey) || strings.Contains(text, "AGFzbQ") {
		t.Errorf("%s", text)
	}
}

// lua is an extension of the user's that answers with a header.
func lua(name string) map[string]any {
	return map[string]any{"Name": "builtin/lua", "Arguments": map[string]any{"ProxyType": "connect-proxy", "Listener": "inbound",
		"Script": "function envoy_on_response(h) h:headers():add('x-" + name + "', 'theirs') end"}}
}

func TestWhatIsTheUsersInConsulStaysAsItIs(t *testing.T) {
	r := newConsulRig(t)
	r.user(map[string]any{"Kind": "service-defaults", "Name": "api", "Protocol": "http", "Meta": map[string]any{"owner": "them"},
		"UpstreamConfig":  map[string]any{"Defaults": map[string]any{"ConnectTimeoutMs": 1500}},
		"EnvoyExtensions": []any{lua("before"), lua("after")}})
	was := r.entry("service-defaults", "api")
	r.await("x-after", "theirs")
	r.calm(func() {
		r.ok(apply(onAPI("hello")))
		if h := r.header("x-before") + r.header("x-after") + r.header("x-hello"); h != "theirstheirsthere" {
			t.Errorf("the headers are %q", h)
		}
		// They add to the entry on both sides of ours.
		var e map[string]any
		if err := json.Unmarshal([]byte(r.entry("service-defaults", "api")), &e); err != nil {
			t.Fatal(err)
		}
		list := e["EnvoyExtensions"].([]any)
		if len(list) != 3 || list[2].(map[string]any)["Name"] != "builtin/wasm" {
			t.Fatalf("%v", list)
		}
		e["EnvoyExtensions"] = []any{list[0], list[2], list[1], lua("later")}
		if err := r.Write(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		r.await("x-later", "theirs")
		r.ok(apply(onAPI("hello", "config: {response: {x-hello: again}}")))
		if order := extensions(t, r.entry("service-defaults", "api")); order != "lua wasm lua lua" {
			t.Errorf("they stand as %s", order)
		}
		if h := r.header("x-hello"); h != "again" {
			t.Errorf("the header is %q", h)
		}
		e["EnvoyExtensions"] = []any{list[0], list[2], list[1]}
		e["EnvoyExtensions"].([]any)[1] = json.RawMessage(wasmOf(t, r.entry("service-defaults", "api")))
		if err := r.Write(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		r.ok(remove(doc("hello", "mesh: consul")))
		r.await("x-hello", "")
	})
	if now := r.entry("service-defaults", "api"); now != was {
		t.Errorf("it was\n%s\nand is\n%s", was, now)
	}
}

// extensions are the kinds of an entry's.
func extensions(t *testing.T, entry string) string {
	t.Helper()
	var e struct{ EnvoyExtensions []struct{ Name string } }
	if err := json.Unmarshal([]byte(entry), &e); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, x := range e.EnvoyExtensions {
		names = append(names, strings.TrimPrefix(x.Name, "builtin/"))
	}
	return strings.Join(names, " ")
}

// wasmOf is the one extension of ours that an entry has.
func wasmOf(t *testing.T, entry string) json.RawMessage {
	t.Helper()
	var e struct{ EnvoyExtensions []json.RawMessage }
	if err := json.Unmarshal([]byte(entry), &e); err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(e.EnvoyExtensions, func(x json.RawMessage) bool { return strings.Contains(string(x), "builtin/wasm") })
	if i < 0 {
		t.Fatalf("there is none: %s", entry)
	}
	return e.EnvoyExtensions[i]
}

// await calls api until it answers with a header's value; no call may fail.
func (r *consulRig) await(name, value string) {
	r.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); r.header(name) != value; {
		if time.Now().After(deadline) {
			r.t.Fatalf("the header %s is %q, and not %q", name, r.header(name), value)
		}
	}
}

func TestWhatAConsulProxyRefusesIsTakenBackWithItsOwnText(t *testing.T) {
	r := newConsulRig(t)
	r.speaks()
	r.ok(apply(onAPI("hello")))
	entry := r.entry("service-defaults", "api")
	nowhere := t.TempDir()
	_, digest := shippedModule(t)
	missing := onAPI("other", "delivery: {mode: local, localPath: "+nowhere+"}")
	r.calm(func() {
		e := r.fails(problem.ProxyRejected, apply(missing))
		if !strings.Contains(e.Details, nowhere+"/"+digest+".wasm") || !strings.Contains(e.Details, "api-sidecar-proxy at "+r.api.Envoy.AdminAddr()) ||
			!strings.Contains(e.Details, "The chain that worked before is in place again.") {
			t.Errorf("%s", e.Details)
		}
		if now := r.entry("service-defaults", "api"); now != entry {
			t.Errorf("the entry was\n%s\nand is\n%s", entry, now)
		}
		if h := r.header("x-hello") + r.header("x-other"); h != "there" {
			t.Errorf("the headers are %q", h)
		}
		// A configuration that the filter takes in its dry run, and Envoy does not: the file is another by then.
		if err := os.WriteFile(filepath.Join(nowhere, digest+".wasm"), []byte("not wasm"), 0o644); err != nil {
			t.Fatal(err)
		}
		r.fails(problem.ProxyRejected, apply(onAPI("other", "delivery: {mode: local, localPath: "+nowhere+"}", "config: {response: {x-other: b}}")))
		// The very plan that was refused is taken once the file is there.
		bytes, _ := shippedModule(t)
		if err := os.WriteFile(filepath.Join(nowhere, digest+".wasm"), bytes, 0o644); err != nil {
			t.Fatal(err)
		}
		r.ok(apply(missing))
		if h := r.header("x-hello") + r.header("x-other"); h != "therethere" {
			t.Errorf("the headers are %q", h)
		}
		r.fails(problem.ConfigRefused, apply(onAPI("other", "config: {response: 5}")))
		r.ok(remove(doc("other", "mesh: consul")))
		r.ok(remove(doc("hello", "mesh: consul")))
	})
}

func TestWithoutAnAdminAddressConsulsProxiesAreNotVerified(t *testing.T) {
	r := newConsulRig(t, func(o *consul.Options) { o.Admin = []string{"127.0.0.1:1"} })
	r.speaks()
	events := r.ok(apply(onAPI("hello")))
	i := slices.IndexFunc(events, func(e event.Event) bool { return e.Code == problem.NotVerified.Code })
	if i < 0 || !strings.Contains(events[i].Details, "knows of proxies of api that answer at no address of consul.admin") || !strings.Contains(events[i].Details, "api-sidecar-proxy on machine") ||
		!strings.Contains(events[i].Details, "nothing answers as an Envoy of Consul's at 127.0.0.1:1") {
		t.Errorf("%v", texts(events))
	}
	r.await("x-hello", "there")
	r.ok(remove(doc("hello", "mesh: consul")))
	r.await("x-hello", "")
}

func TestAServiceOfAnotherProtocolIsRefusedByConsul(t *testing.T) {
	r := newConsulRig(t)
	r.user(map[string]any{"Kind": "service-defaults", "Name": "bytes", "Protocol": "tcp"})
	r.fails(problem.ProtocolDiffers, apply(doc("hello", "mesh: consul", "target: {kind: Service, name: bytes}")))
}

func TestAnotherPartitionsServiceIsRefusedByConsul(t *testing.T) {
	r := newConsulRig(t)
	r.fails(problem.NotSupported, apply(doc("hello", "mesh: consul", "target: {kind: Service, name: api, partition: other}")))
	if e := r.entry("service-defaults", "api"); e != "" {
		t.Errorf("%s", e)
	}
}

func TestAFilterDoesNotMoveToWhatIsTheSameServiceForConsul(t *testing.T) {
	r := newConsulRigOf(t, func(o *operation.Options) { o.AllowWideTargets = true })
	r.speaks()
	r.ok(apply(onAPI("hello")))
	e := r.fails(problem.NotSupported, apply(doc("hello", "mesh: consul", "target: {kind: Service, name: api, namespace: shop}")))
	if !strings.Contains(e.Details, "default.hello stands on Service default/api already") {
		t.Errorf("%s", e.Details)
	}
	r.await("x-hello", "there")
	r.ok(remove(doc("hello", "mesh: consul")))
	r.await("x-hello", "")
}

// quoting is a Consul that quotes a secret: at 1 where its proxies are looked at, at 2 where it is read.
type quoting struct {
	consulCluster
	at *atomic.Int32
}

func (q quoting) Loaded(ctx context.Context, p plan.Plan) iter.Seq2[plan.Loaded, error] {
	if q.at.Load() == 1 {
		return func(yield func(plan.Loaded, error) bool) {
			yield(plan.Loaded{}, problem.NotVerified.New("not with %s", hubKey))
		}
	}
	return q.consulCluster.Loaded(ctx, p)
}

func (q quoting) Read(ctx context.Context, reads plan.Reads) (plan.Cluster, error) {
	if q.at.Load() == 2 {
		return plan.Cluster{}, problem.ConsulRefused.New("not with %s", hubKey)
	}
	return q.consulCluster.Read(ctx, reads)
}

func TestAListHidesTheSecretsThatAConsulQuotes(t *testing.T) {
	var at atomic.Int32
	r := newConsulRigOf(t, func(o *operation.Options) { o.Consul = quoting{o.Consul.(consulCluster), &at} })
	r.ok(apply(onAPI("hello", "config: {response: {x-key: {$secret: {name: imagehub, key: token-key}}}}")))
	for _, where := range []int32{1, 2} {
		at.Store(where)
		all, err := r.runner.List(t.Context())
		if err != nil || len(all) != 1 {
			t.Fatal(all, err)
		}
		if text := all[0].Problem + all[0].Loaded.Unverified; !strings.Contains(text, "not with [redacted]") {
			t.Errorf("%d: the list says %q", where, text)
		}
	}
	at.Store(0)
	r.ok(remove(doc("hello", "mesh: consul")))
}

func TestAWholeConsulMeshAndTheOtherDirection(t *testing.T) {
	s, err := startSidecars()
	if err != nil {
		t.Fatal(err)
	}
	r := newConsulRigOf(t, func(o *operation.Options) { o.AllowWideTargets = true },
		func(o *consul.Options) { o.Admin = append(o.Admin, s.stream.Envoy.AdminAddr()) })
	was := r.entry("proxy-defaults", "global")
	r.calm(func() {
		events := r.ok(apply(doc("everywhere", "mesh: consul", "target: {kind: Mesh}")))
		if !warned(events, problem.NotVerified) || !strings.Contains(events[len(events)-1].Summary, "2 of 2 proxies; 1 takes another protocol") {
			t.Errorf("%v", texts(events))
		}
		all, err := r.runner.List(t.Context())
		if err != nil || len(all) != 1 || all[0].Problem != "" || all[0].Loaded.String() != "2 of 2 proxies; 1 takes another protocol" {
			t.Errorf("%+v %v", all, err)
		}
		i := slices.IndexFunc(all[0].Loaded.Proxies, func(p plan.ProxyStatus) bool { return strings.HasPrefix(p.ID, "stream-sidecar-proxy") })
		if p := all[0].Loaded.Proxies[i]; p.State != plan.Apart || p.Expected || p.Detail != "its service speaks tcp, for which the chain has no filter" {
			t.Errorf("%+v", p)
		}
		r.await("x-everywhere", "there")
		// What web's sidecar does to what it sends is not what it does to what it gets.
		r.ok(apply(doc("out", "mesh: consul", "target: {kind: Service, name: web}", "match: {direction: outbound}")))
		if h := r.header("x-everywhere") + r.header("x-out"); h != "therethere" {
			t.Errorf("the headers are %q", h)
		}
		r.ok(apply(doc("out", "mesh: consul", "target: {kind: Service, name: web}", "match: {direction: inbound}")))
		if h := r.header("x-out"); h != "" {
			t.Errorf("the header is %q", h)
		}
		r.ok(remove(doc("out", "mesh: consul")))
		r.ok(remove(doc("everywhere", "mesh: consul")))
		if h := r.header("x-everywhere"); h != "" {
			t.Errorf("the header is %q", h)
		}
	})
	if now := r.entry("proxy-defaults", "global"); now != was {
		t.Errorf("it was\n%s\nand is\n%s", was, now)
	}
}

func TestConsulsProxiesFetchAModuleFromAnUpstreamOfTheirs(t *testing.T) {
	s, err := startSidecars()
	if err != nil {
		t.Fatal(err)
	}
	var blobs module.Options
	r := newConsulRigOf(t, func(o *operation.Options) {
		blobs = o.Modules.(*module.Resolver).Options
		blobs.ServedAt = s.modules.Addr
		o.Modules = module.New(blobs)
	})
	r.speaks()
	serving := module.NewServer(module.ServerOptions{Blobs: blobs.Blobs, Live: r.runner.LiveModules})
	served := func(name string, spec ...string) string {
		return onAPI(name, append(spec, "delivery: {mode: served, service: modules}", "wait: {timeout: 1m}")...)
	}
	r.calm(func() {
		// An address that gives nothing never reaches Consul.
		r.fails(problem.SourceUnproved, apply(served("hello")))
		r.serve(serving)
		r.ok(apply(served("hello")))
		if h := r.header("x-hello"); h != "there" {
			t.Errorf("the header is %q", h)
		}
		// Another module for the same filter: what runs is seen in what it does.
		probe, err := os.ReadFile(filepath.Join("..", "..", "build", "testfilters", "probe.wasm"))
		if err != nil {
			t.Fatal(err)
		}
		r.ok(apply(served("hello", "module: {inline: '"+base64.StdEncoding.EncodeToString(probe)+"'}", "config: {stamp: {header: x-probe, value: there}}")))
		if h := r.header("x-hello") + "," + r.header("x-probe"); h != ",there" {
			t.Errorf("the headers are %q", h)
		}
		r.ok(apply(served("hello")))
		if h := r.header("x-hello") + "," + r.header("x-probe"); h != "there," {
			t.Errorf("the headers are %q", h)
		}
		r.serve(http.NotFoundHandler())
		r.fails(problem.SourceUnproved, apply(served("hello", "priority: 3")))
		if h := r.header("x-hello"); h != "there" {
			t.Errorf("the header is %q", h)
		}
	})
	// The adapter gets the module, and proxies, who come through a sidecar, something else.
	r.serve(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.Header.Get("X-Request-Id") != "" {
			w.Write([]byte("something else"))
			return
		}
		serving.ServeHTTP(w, q)
	}))
	bytes, _ := shippedModule(t)
	other := base64.StdEncoding.EncodeToString(append(slices.Clone(bytes), 0, 2, 1, 'x')) // a custom section: the same with another digest
	e := r.fails(problem.ProxyRejected, apply(served("other", "module: {inline: '"+other+"'}")))
	if !strings.Contains(e.Details, "it could not fetch a module or start it, or got another than was meant") || !strings.Contains(e.Details, "is in place again") {
		t.Errorf("%s", e.Details)
	}
	r.calm(func() {
		if h := r.header("x-hello") + r.header("x-other"); h != "there" {
			t.Errorf("the headers are %q", h)
		}
		r.ok(remove(doc("hello", "mesh: consul")))
	})
}

func TestImageHubOnConsulIsNotForTheClusterThatAConnectionComesWith(t *testing.T) {
	limiter, _ := templates.ImageHubLimiter("agent")
	r := newConsulRigOf(t, func(o *operation.Options) { o.HubSidecar, o.Limiter = "127.0.0.1:2", limiter })
	for _, key := range []string{"imagehub", operation.ComponentName} {
		q := operation.Request{Operation: key, Kubeconfigs: []string{"a cluster's"}, Implied: true}
		if said := texts(r.ok(q)); !strings.Contains(strings.Join(said, " "), "at http://127.0.0.1:2/ through the sidecars of Consul") {
			t.Errorf("%s: %q", key, said)
		}
		q.Delete = true
		r.ok(q)
	}
	for _, kind := range []string{"service-defaults", "service-intentions"} {
		if e := r.entry(kind, "imagehub-api"); e != "" {
			t.Errorf("%s", e)
		}
	}
}

func TestATokenWithoutRightsChangesNothingInConsul(t *testing.T) {
	r := newConsulRig(t, func(o *consul.Options) { o.Token = func() (string, error) { return "", nil } })
	e := r.fails(problem.ConsulDenied, apply(onAPI("hello")))
	if !strings.Contains(e.Details, "Permission denied") {
		t.Errorf("%s", e.Details)
	}
	if e := r.entry("service-defaults", "api"); e != "" {
		t.Errorf("%s", e)
	}
}

// TestNamespaceAndPartitionAreInEveryRequestToConsul has a Consul that knows neither. What stands before it notes what it is
// asked for, and lets that go on without them, or as it is.
func TestNamespaceAndPartitionAreInEveryRequestToConsul(t *testing.T) {
	s, err := startSidecars()
	if err != nil {
		t.Fatal(err)
	}
	at, err := url.Parse(s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	var enterprise atomic.Bool
	var mu sync.Mutex
	asked := map[string]string{} // namespaces and partitions, by method and path
	proxy := &httputil.ReverseProxy{Rewrite: func(q *httputil.ProxyRequest) {
		q.SetURL(at)
		query := q.In.URL.Query()
		mu.Lock()
		asked[q.In.Method+" "+q.In.URL.Path] = fmt.Sprint(query["ns"], query["partition"])
		mu.Unlock()
		if enterprise.Load() {
			query.Del("ns")
			query.Del("partition")
			q.Out.URL.RawQuery = query.Encode()
		}
	}}
	before := httptest.NewServer(proxy)
	t.Cleanup(before.Close)
	r := newConsulRigOf(t, func(o *operation.Options) { o.AllowWideTargets = true },
		func(o *consul.Options) { o.Addr, o.Namespace, o.Partition, o.Admin = before.URL, "team", "west", nil })
	r.speaks()
	e := r.fails(problem.ConsulRefused, apply(onAPI("hello")))
	if !strings.Contains(e.Details, "Enterprise feature") || !strings.Contains(e.Details, "leave consul.namespace and consul.partition out") {
		t.Errorf("%s", e.Details)
	}
	enterprise.Store(true)
	r.ok(apply(onAPI("hello")))
	r.ok(apply(doc("wide", "mesh: consul", "target: {kind: Mesh}")))
	r.ok(remove(doc("hello", "mesh: consul")))
	r.ok(remove(doc("wide", "mesh: consul")))
	mu.Lock()
	defer mu.Unlock()
	for _, path := range []string{"GET /v1/config/service-defaults/api", "GET /v1/config/proxy-defaults/global", "PUT /v1/config", "GET /v1/catalog/connect/api", "GET /v1/kv/meshery-filters/"} {
		if asked[path] == "" {
			t.Errorf("nobody asked for %s: %v", path, asked)
		}
	}
	for path, is := range asked {
		want := "[team] [west]"
		if strings.Contains(path, "/proxy-defaults/") {
			want = "[] [west]" // of a partition's whole mesh
		}
		if path != "PUT /v1/config" && is != want { // which is of either kind
			t.Errorf("%s: %s", path, is)
		}
	}
}

func TestADamagedKeyInConsulIsNamedAndStopsNoOtherTarget(t *testing.T) {
	r := newConsulRig(t)
	r.speaks()
	const key = "meshery-filters/damaged"
	if err := r.Send(t.Context(), http.MethodPut, "/v1/kv/"+key, "nonsense", nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Send(context.Background(), http.MethodDelete, "/v1/kv/"+key, nil, nil); err != nil {
			t.Error(err)
		}
	})
	r.ok(apply(onAPI("hello")))
	all, err := r.runner.List(t.Context())
	if !errors.Is(err, problem.ConsulDamaged) || !strings.Contains(err.Error(), key) || len(all) != 1 || all[0].Loaded.Count(plan.Running) != 1 {
		t.Errorf("%+v %v", all, err)
	}
	past, err := r.runner.History(t.Context(), "", "hello")
	if !errors.Is(err, problem.ConsulDamaged) || len(past) == 0 {
		t.Errorf("%+v %v", past, err)
	}
	if events := r.ok(operation.Request{Operation: "filters_status"}); !warned(events, problem.ConsulDamaged) {
		t.Errorf("%v", texts(events))
	}
	if events := r.ok(remove(doc("hello", "mesh: consul"))); !warned(events, problem.ConsulDamaged) {
		t.Errorf("%v", texts(events))
	}
	for name, kind := range map[string]*problem.Kind{"hello": problem.RevisionNotFound, "other": problem.FilterNotFound} {
		if _, err := r.runner.Submit(t.Context(), undo(name, 1)); !errors.Is(err, kind) || !strings.Contains(err.Error(), key) || !strings.Contains(err.Error(), "[meshery-filters-1163]") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if events := r.ok(undo("hello", 0)); !warned(events, problem.ConsulDamaged) {
		t.Errorf("%v", texts(events))
	}
	r.ok(remove(doc("hello", "mesh: consul")))
}

func TestWhileConsulIsAwayTheRestIsTold(t *testing.T) {
	r := newConsulRig(t, func(o *consul.Options) { o.Addr = "http://127.0.0.1:1" })
	r.ok(apply(doc("hello")))
	all, err := r.runner.List(t.Context())
	if !errors.Is(err, problem.ConsulUnreachable) || len(all) != 1 || !strings.Contains(problem.Of(err).Details, "Consul 127.0.0.1:1") {
		t.Errorf("%+v %v", all, err)
	}
	past, err := r.runner.History(t.Context(), "", "hello")
	if !errors.Is(err, problem.ConsulUnreachable) || len(past) != 1 {
		t.Errorf("%+v %v", past, err)
	}
	if _, err := r.runner.History(t.Context(), "", "nothing"); !errors.Is(err, problem.ConsulUnreachable) {
		t.Error(err)
	}
}

func TestWhatAnotherAdapterTookFromConsulIsForgotten(t *testing.T) {
	r := newConsulRig(t)
	r.speaks()
	inline := variant(t, time.Now().Nanosecond())
	data, err := base64.StdEncoding.DecodeString(inline)
	if err != nil {
		t.Fatal(err)
	}
	digest := fmt.Sprintf("%x", sha256.Sum256(data))
	file := filepath.Join(r.folder, digest+".wasm")
	r.ok(apply(onAPI("hello", "module: {inline: "+inline+"}")))
	other := newConsulRig(t)
	other.ok(remove(doc("hello", "mesh: consul")))
	is := func() (live, there bool) {
		t.Helper()
		digests, err := r.runner.LiveModules(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, err = os.Stat(file)
		return digests[digest], err == nil
	}
	if live, there := is(); !live || !there {
		t.Fatalf("it is live %v and there %v before it was looked for", live, there)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.runner.SweepModules(ctx, 5*time.Millisecond, r.rig.dir.Sweep)
	}()
	defer func() { stop(); <-ended }()
	// aged has the file's mark be as old as after two days in which nobody needed it.
	aged := func() {
		t.Helper()
		marks, err := filepath.Glob(filepath.Join(r.folder, "."+digest+".*"))
		if err != nil || len(marks) != 1 {
			t.Fatalf("%v %v", marks, err)
		}
		past := time.Now().Add(-48 * time.Hour)
		if err := os.Chtimes(marks[0], past, past); err != nil {
			t.Fatal(err)
		}
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal(what)
			}
		}
	}
	aged()
	until("a module is live that no chain has", func() bool { live, _ := is(); return !live })
	// An undo goes back to it, until its history is forgotten.
	if _, there := is(); !there {
		t.Fatal("the file of a revision is gone")
	}
	if err := r.Send(t.Context(), http.MethodDelete, "/v1/kv/meshery-filters/?recurse=true", nil, nil); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if _, there := is(); !there {
			t.Fatal("the file is gone at once")
		}
		time.Sleep(10 * time.Millisecond)
	}
	aged()
	until("the file is there still", func() bool { _, there := is(); return !there })
}

func TestWhatAKilledAdapterHasBegunInConsulIsFoundByItsFilter(t *testing.T) {
	r := newConsulRig(t)
	r.user(map[string]any{"Kind": "service-defaults", "Name": "half", "Protocol": "http"})
	was := r.entry("service-defaults", "half")
	document := doc("half", "mesh: consul", "target: {kind: Service, name: half}", "module: {url: https://there/, sha256: "+strings.Repeat("a", 64)+"}",
		"delivery: {mode: local, localPath: /opt}")
	halfwayIn(t, r.client, "default", document)
	if r.entry("service-defaults", "half") == was {
		t.Fatal("nothing is begun")
	}
	r.ok(remove(document))
	if now := r.entry("service-defaults", "half"); now != was {
		t.Errorf("it was\n%s\nand is\n%s", was, now)
	}
}

// TestAFilterThatNoEntryExplainsIsNamed has a sidecar asked that another Consul configures.
func TestAFilterThatNoEntryExplainsIsNamed(t *testing.T) {
	r := newConsulRig(t)
	r.speaks()
	r.ok(apply(onAPI("hello")))
	if events := r.ok(operation.Request{Operation: "filters_status"}); warned(events, problem.OrphanFilters) || !strings.Contains(events[len(events)-1].Details, "looked at 2 of 2 proxies") {
		t.Errorf("%v", texts(events))
	}
	empty, err := consultest.Start(t.Context(), t.TempDir(), consultest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(empty.Stop)
	other := newConsulRig(t, func(o *consul.Options) { o.Addr, o.Token, o.Admin = empty.Addr, nil, append(o.Admin, "127.0.0.1:1") })
	events := other.ok(operation.Request{Operation: "filters_status"})
	i := slices.IndexFunc(events, func(e event.Event) bool { return e.Code == problem.OrphanFilters.Code })
	if i < 0 || !strings.Contains(events[i].Details, "\napi-sidecar-proxy at "+r.api.Envoy.AdminAddr()+" runs meshery.filters/default.hello") ||
		!strings.Contains(events[i].Details, "nothing answers as an Envoy of Consul's at 127.0.0.1:1") {
		t.Errorf("%v", texts(events))
	}
	if s, err := other.runner.Survey(t.Context()); err != nil || len(s.Orphans) != 1 || s.Looked != 2 || !strings.Contains(s.Missed, "127.0.0.1:1") {
		t.Errorf("%v %v", s, err)
	}
	r.ok(remove(doc("hello", "mesh: consul")))
}

func TestImageHubThatWasLeftInConsulIsNamedAndTakenAway(t *testing.T) {
	limiter, _ := templates.ImageHubLimiter("agent")
	before := newConsulRigOf(t, func(o *operation.Options) { o.HubSidecar, o.Limiter = "127.0.0.1:2", limiter })
	before.ok(operation.Request{Operation: operation.ComponentName})
	after := newConsulRig(t)
	events := after.ok(operation.Request{Operation: "imagehub"})
	says(t, events, "Service default/imagehub-api in Consul "+strings.TrimPrefix(after.Addr, "http://"))
	if !warned(events, problem.HubLeft) || !warned(events, problem.LimiterLeft) {
		t.Errorf("%v", texts(events))
	}
	if events := after.ok(operation.Request{Operation: "imagehub_rate_limit"}); !warned(events, problem.LimiterLeft) || after.order("default") == "" {
		t.Errorf("%v", texts(events))
	}
	says(t, after.ok(operation.Request{Operation: "imagehub_rate_limit", Delete: true}), "removed from ProxyGroup default", "removed from Service default/imagehub-api")
	says(t, after.ok(operation.Request{Operation: "imagehub", Delete: true}), "service imagehub-api removed", "service-defaults/imagehub-api removed")
	for _, kind := range []string{"service-defaults", "service-intentions"} {
		if e := after.entry(kind, "imagehub-api"); e != "" {
			t.Errorf("%s", e)
		}
	}
	if events := after.ok(operation.Request{Operation: operation.ComponentName}); warned(events, problem.HubLeft) || warned(events, problem.LimiterLeft) {
		t.Errorf("%v", texts(events))
	}
	// It is nowhere else, and that is found where it is alone there.
	before.ok(operation.Request{Operation: "imagehub_rate_limit"})
	after.ok(operation.Request{Operation: operation.ComponentName, Delete: true})
	after.fails(problem.FilterNotFound, operation.Request{Operation: "imagehub_rate_limit", Delete: true})
	before.ok(operation.Request{Operation: "imagehub_rate_limit"})
	says(t, after.ok(operation.Request{Operation: "imagehub_rate_limit", Delete: true}), "removed from Service default/imagehub-api")
	if e := after.entry("service-defaults", "imagehub-api"); e != "" {
		t.Errorf("%s", e)
	}
}
