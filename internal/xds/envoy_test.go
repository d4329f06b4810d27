package xds

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

// realEnvoy is an Envoy of the group edge, in front of an upstream that always answers 200.
type realEnvoy struct {
	t    *testing.T
	p    *envoy.Process
	addr string
}

func (r *rig) startEnvoy(id, upstream string) *realEnvoy {
	t := r.t
	t.Helper()
	if testing.Short() {
		t.Skip("it runs real Envoys")
	}
	bin, err := envoy.Find(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	yaml, err := envoy.Bootstrap{Group: edge.Name, NodeID: id, XDSAddr: r.addr, Listen: "127.0.0.1:0", Admin: "127.0.0.1:0", Upstream: upstream}.YAML()
	if err != nil {
		t.Fatal(err)
	}
	p, err := envoy.Start(t.Context(), bin, envoy.ProcessOptions{Bootstrap: yaml, Dir: t.TempDir(), Concurrency: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return &realEnvoy{t: t, p: p}
}

func (e *realEnvoy) ready() {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), patience)
	defer cancel()
	if err := e.p.Ready(ctx); err != nil {
		e.t.Fatal(err)
	}
	var err error
	if e.addr, err = e.p.ListenerAddr(ctx, envoy.ListenerName); err != nil {
		e.t.Fatal(err)
	}
}

// runs fails the test unless Envoy itself says that it runs the plan.
func (e *realEnvoy) runs(p plan.Plan) {
	e.t.Helper()
	s, err := e.p.Admin().SlotConfig(e.t.Context())
	if err != nil {
		e.t.Fatal(err)
	}
	var names []string
	for _, f := range s.Filters {
		names = append(names, f.Name)
	}
	if s.Version != p.Version || fmt.Sprint(names) != fmt.Sprint(p.Chain.Names()) {
		e.t.Fatalf("config_dump says version %s of %v, want %s of %v", s.Version, names, p.Version, p.Chain.Names())
	}
}

// updated is when Envoy last took a chain, as config_dump says.
func (e *realEnvoy) updated() string {
	e.t.Helper()
	resp, err := http.Get("http://" + e.p.AdminAddr() + "/config_dump?resource=ecds_filters")
	if err != nil {
		e.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		e.t.Fatal(err)
	}
	at := regexp.MustCompile(`"last_updated": "([^"]+)"`).FindSubmatch(body)
	if at == nil {
		e.t.Fatal("config_dump has no last_updated")
	}
	return string(at[1])
}

// rejected is how many chains Envoy rejected, by its own count.
func (e *realEnvoy) rejected() uint64 {
	e.t.Helper()
	stats, err := e.p.Admin().Stats(e.t.Context(), `extension_config_discovery.*\.update_rejected$`)
	if err != nil || len(stats) != 1 {
		e.t.Fatal(stats, err)
	}
	for _, n := range stats {
		return n
	}
	return 0
}

// header sends a request and returns a header of the response.
func (e *realEnvoy) header(name string) string {
	e.t.Helper()
	resp, err := http.Get("http://" + e.addr)
	if err != nil {
		e.t.Fatal(err)
	}
	resp.Body.Close()
	return resp.Header.Get(name)
}

// load sends requests to the Envoy until stop is called, every other one on a new connection, and counts those that
// were not answered with 200 within a second.
type load struct {
	sent, failed atomic.Int64
	first        atomic.Value // string: what was wrong with the first that failed
	stop         func()
}

func (e *realEnvoy) load() *load {
	l := &load{}
	ctx, cancel := context.WithCancel(e.t.Context())
	kept, fresh := &http.Transport{}, &http.Transport{DisableKeepAlives: true}
	var wg sync.WaitGroup
	for i, tr := range []*http.Transport{kept, fresh} {
		wg.Go(func() {
			c := &http.Client{Transport: tr, Timeout: time.Second}
			tick := time.NewTicker(4 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				resp, err := c.Get("http://" + e.addr)
				if err == nil {
					resp.Body.Close()
					if resp.StatusCode != http.StatusOK {
						err = fmt.Errorf("%s", resp.Status)
					}
				}
				l.sent.Add(1)
				if err != nil && l.failed.Add(1) == 1 {
					l.first.Store(fmt.Sprintf("connection kind %d: %v", i, err))
				}
			}
		})
	}
	l.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		kept.CloseIdleConnections()
		fresh.CloseIdleConnections()
	})
	e.t.Cleanup(l.stop)
	return l
}

// wasm makes a filter of a built module, whose configuration is JSON.
func (r *rig) wasm(file, name, config string) filter.Filter {
	r.t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", file))
	if err != nil {
		r.t.Fatal(err)
	}
	digest, err := r.dir.Blobs().Put(r.t.Context(), data)
	if err != nil {
		r.t.Fatal(err)
	}
	var v filter.Value
	if err := json.Unmarshal([]byte(config), &v); err != nil {
		r.t.Fatal(err)
	}
	return filter.Document{Metadata: filter.Metadata{Name: name}, Spec: filter.Spec{Target: edge, Config: v,
		Module: filter.Module{Builtin: name, SHA256: digest}}}.Filter("shop")
}

func TestRealEnvoysTakeRefuseKeepAndDropAChainWhileRequestsFlow(t *testing.T) {
	upstream := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer upstream.Close()
	defer http.DefaultClient.CloseIdleConnections()
	r := newRig(t)
	backend := strings.TrimPrefix(upstream.URL, "http://")
	envoys := []*realEnvoy{r.startEnvoy("a", backend), r.startEnvoy("b", backend)}
	a, b := envoys[0], envoys[1]
	empty := r.plan(all)
	var loads []*load
	for _, e := range envoys {
		e.ready()
		loads = append(loads, e.load())
	}
	r.await(empty, "a=running b=running")
	for _, e := range envoys {
		e.runs(empty)
	}
	if g := r.b.Groups(); g[0].Proxies[0].Version == "" || g[0].Proxies[0].Version[0] != '1' {
		t.Fatalf("Envoy's version is read as %q", g[0].Proxies[0].Version)
	}

	chain := filter.Chain{Mesh: "envoy", Target: edge}.With(r.wasm("filters/headers.wasm", "headers", `{"response":{"x-chain":"1"}}`))
	first := r.put(r.planOf(chain, all))
	r.await(first, "a=running b=running")
	chain = chain.With(r.wasm("build/testfilters/probe.wasm", "probe", `{"stamp":{"header":"x-probe","value":"2"}}`))
	good := r.planOf(chain, canary)
	r.apply(good)
	r.await(good, "a=running b=running")
	r.commit(good)
	for _, e := range envoys {
		e.runs(good)
		if e.header("x-chain") != "1" || e.header("x-probe") != "2" {
			t.Fatal("a response lacks a filter's header")
		}
	}

	bad := r.planOf(chain.With(r.wasm("build/testfilters/probe.wasm", "probe", `{"refuse":"not today"}`)), canary)
	r.apply(bad)
	l := r.awaitFunc(bad, "a=rejected b=held", func(l plan.Loaded) bool { return describe(l) == "a=rejected b=held" })
	if text := l.In(plan.Rejected)[0].Detail; !strings.Contains(text, "shop/probe") && !strings.Contains(text, "Wasm") {
		t.Fatalf("Envoy's text is %q", text)
	} else {
		t.Logf("Envoy's text: %s", text)
	}
	r.apply(good)
	r.await(good, "a=running b=running")
	for _, e := range envoys {
		e.runs(good)
	}

	before := []string{a.updated(), b.updated()}
	r.stop()
	for _, e := range envoys {
		if e.header("x-probe") != "2" {
			t.Fatal("the chain is gone with the adapter")
		}
	}
	r.start()
	eventually(t, "both Envoys are back", func() bool { return r.has("a") && r.has("b") })
	late := r.startEnvoy("c", backend) // starts while the group is held
	r.awaitMember("c", true)
	if g := r.b.Groups(); !g[0].Held {
		t.Fatalf("the group is not held: %+v", g[0])
	}
	stored, err := r.committed()
	if err != nil {
		t.Fatal(err)
	}
	again := r.put(r.planOf(stored, canary))
	r.await(again, "a=running b=running c=running")
	late.ready()
	late.runs(good)
	joined := late.updated()
	for i, e := range envoys {
		e.runs(good)
		if now := e.updated(); now != before[i] {
			t.Errorf("the restart changed the proxy: updated %s and again %s", before[i], now)
		}
	}

	r.stop()
	r.start()
	eventually(t, "all Envoys are back", func() bool { return r.has("a") && r.has("b") && r.has("c") })
	r.await(r.put(r.planOf(stored, all)), "a=running b=running c=running")
	if now := late.updated(); now != joined {
		t.Errorf("the restart changed a proxy that had begun with the chain: updated %s and again %s", joined, now)
	}

	last := r.put(r.plan(all))
	r.await(last, "a=running b=running c=running")
	for _, e := range envoys {
		e.runs(last)
		if e.header("x-chain") != "" || e.header("x-probe") != "" {
			t.Error("the chain was removed and still acts")
		}
	}
	if ra, rb := a.rejected(), b.rejected(); ra != 1 || rb != 0 {
		t.Errorf("the bad chain was rejected %d times by the canary and %d times by the other", ra, rb)
	}
	for i, l := range loads {
		l.stop()
		t.Logf("envoy %d: %d requests, %d failed", i, l.sent.Load(), l.failed.Load())
		if l.failed.Load() > 0 {
			t.Errorf("%d of %d requests failed, the first by %v", l.failed.Load(), l.sent.Load(), l.first.Load())
		}
	}
	if late := r.lateRejections(); len(late) > 0 {
		t.Errorf("late rejections: %+v", late)
	}
}

func TestRealEnvoysRefuseTheSameChainEveryTimeItIsOffered(t *testing.T) {
	upstream := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer upstream.Close()
	defer http.DefaultClient.CloseIdleConnections()
	r := newRig(t)
	a := r.startEnvoy("a", strings.TrimPrefix(upstream.URL, "http://"))
	a.ready()
	good := r.put(r.planOf(filter.Chain{Mesh: "envoy", Target: edge}.With(r.wasm("filters/headers.wasm", "headers", `{"response":{"x-chain":"1"}}`)), all))
	r.await(good, "a=running")
	bad := r.planOf(filter.Chain{Mesh: "envoy", Target: edge}.With(r.wasm("build/testfilters/probe.wasm", "probe", `{"refuse":"not today"}`)), all)
	for n := range uint64(4) { // with nothing in between
		r.apply(bad)
		r.await(bad, "a=rejected")
		eventually(t, "Envoy counts one more rejection", func() bool { return a.rejected() == n+1 })
	}
	r.commit(bad) // as if it had been accepted by others
	r.apply(bad)
	eventually(t, "Envoy rejects it once more", func() bool { return a.rejected() == 5 })
	r.await(bad, "a=rejected")

	r.stop() // and the next adapter knows nothing of all this
	r.start()
	eventually(t, "the Envoy is back", func() bool { return r.has("a") })
	stored, err := r.committed()
	if err != nil {
		t.Fatal(err)
	}
	r.put(r.planOf(stored, all))
	r.await(bad, "a=rejected")
	if a.header("x-chain") != "1" {
		t.Error("the chain that worked last does not act")
	}
	r.apply(good)
	r.await(good, "a=running")
	a.runs(good)
}

func TestARealEnvoyWhoseFirstChainIsRefusedIsNotTakenForRunningByTheNextAdapter(t *testing.T) {
	r := newRig(t)
	bad := r.put(r.planOf(filter.Chain{Mesh: "envoy", Target: edge}.With(r.wasm("build/testfilters/probe.wasm", "probe", `{"refuse":"not today"}`)), all))
	a := r.startEnvoy("a", "127.0.0.1:1")
	r.await(bad, "a=rejected")
	for n := range uint64(2) {
		r.stop()
		r.start()
		eventually(t, "the Envoy is back", func() bool { return r.has("a") })
		stored, err := r.committed()
		if err != nil {
			t.Fatal(err)
		}
		r.put(r.planOf(stored, all))
		r.await(bad, "a=rejected")
		eventually(t, "Envoy counts one more rejection", func() bool { return a.rejected() == n+2 })
	}
	good := r.put(r.plan(all))
	r.await(good, "a=running")
	a.ready()
}

// This is why a dry run configures modules more than once.
func TestARealEnvoyAcceptsWhatItsWorkersCannotConfigure(t *testing.T) {
	upstream := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer upstream.Close()
	defer http.DefaultClient.CloseIdleConnections()
	r := newRig(t)
	a := r.startEnvoy("a", strings.TrimPrefix(upstream.URL, "http://"))
	a.ready()
	put := func(once, header, value string) {
		t.Helper()
		probe := r.wasm("build/testfilters/probe.wasm", "probe", fmt.Sprintf(`{"once": %q, "stamp": {"header": %q, "value": "1"}}`, once, header))
		p := r.put(r.planOf(filter.Chain{Mesh: "envoy", Target: edge}.With(probe), all))
		r.await(p, "a=running")
		a.runs(p)
		eventually(t, header+" is "+value, func() bool { return a.header(header) == value })
	}
	put("sandbox", "x-first", "1")
	put("sandbox", "x-second", "")
	if a.header("x-first") != "" {
		t.Error("the chain before acts still")
	}
	p := r.put(r.plan(all))
	r.await(p, "a=running")
	put("shared", "x-third", "")
}
