package consul

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	wasm "github.com/envoyproxy/go-control-plane/envoy/extensions/wasm/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

// fetcher is an Envoy that fetches modules.
type fetcher struct {
	t       *testing.T
	process *envoy.Process
	listens string // file with its listener
	modules *httptest.Server
	bytes   []byte // of a module
	number  int    // of listeners so far
}

// newFetcher starts one that keeps an old listener for so many seconds, with the counters that belong to it.
func newFetcher(t *testing.T, drain int) *fetcher {
	t.Helper()
	if testing.Short() {
		t.Skip("starts Envoy")
	}
	binary, err := envoy.Find(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	f := &fetcher{t: t, listens: filepath.Join(t.TempDir(), "listeners.json")}
	f.bytes, _ = filters.Builtin("headers")
	f.modules = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write(slices.Concat(f.bytes, section(strings.TrimPrefix(r.URL.Path, "/"))))
	}))
	t.Cleanup(f.modules.Close)
	f.put(nil)
	host, port, _ := strings.Cut(f.modules.Listener.Addr().String(), ":")
	bootstrap := fmt.Sprintf(`{"node": {"id": "a", "cluster": "a"}, "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
		"dynamic_resources": {"lds_config": {"path_config_source": {"path": %q}}},
		"static_resources": {"clusters": [{"name": "modules", "load_assignment": {"cluster_name": "modules", "endpoints": [{"lb_endpoints": [{"endpoint":
		{"address": {"socket_address": {"address": %q, "port_value": %s}}}}]}]}}]}}`, f.listens, host, port)
	f.process, err = envoy.Start(t.Context(), binary, envoy.ProcessOptions{Bootstrap: []byte(bootstrap), Dir: t.TempDir(), Concurrency: 1,
		Args: []string{"--drain-strategy", "immediate", "--drain-time-s", fmt.Sprint(drain)}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.process.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return f
}

// section makes another module of the same one.
func section(name string) []byte {
	if name == "" {
		return nil
	}
	return slices.Concat([]byte{0, byte(len(name) + 1), byte(len(name))}, []byte(name))
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// fetched is an extension whose module has the name, and another digest when it is spoiled.
func (f *fetcher) fetched(plugin, name string, spoiled bool) map[string]any {
	sum := digest(slices.Concat(f.bytes, section(name)))
	if spoiled {
		sum = digest([]byte(name))
	}
	return extension(plugin, sum, map[string]any{"remote": map[string]any{"httpURI": map[string]any{"uri": f.modules.URL + "/" + name}, "sha256": sum}})
}

// read is one whose module is a file.
func (f *fetcher) read(plugin string) map[string]any {
	file := filepath.Join(filepath.Dir(f.listens), digest(f.bytes)+".wasm")
	if err := os.WriteFile(file, f.bytes, 0o644); err != nil {
		f.t.Fatal(err)
	}
	return extension(plugin, "", map[string]any{"local": map[string]any{"filename": file}})
}

func extension(plugin, sum string, code map[string]any) map[string]any {
	return map[string]any{"name": "builtin/wasm", "required": true, "arguments": map[string]any{"protocol": "http", "listenerType": "inbound",
		"pluginConfig": map[string]any{"name": plugins + "shop." + plugin, "configuration": `{"response": {"x-a": "b"}}`,
			"vmConfig": map[string]any{"vmID": plugin + sum, "runtime": "v8", "code": code}}}}
}

// put gives the proxy a listener for what comes in, with these plugins and the user's behind them, and one for what goes out,
// which stays as it is when its plugins do.
func (f *fetcher) put(in []map[string]any, out ...map[string]any) {
	f.t.Helper()
	f.number++
	resources := []any{f.listener("public_listener", "INBOUND", fmt.Sprint("number-", f.number), in), f.listener("upstream", "OUTBOUND", "out", out)}
	data, err := json.Marshal(map[string]any{"version_info": fmt.Sprint(f.number), "resources": resources})
	if err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(f.listens+".new", data, 0o600); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Rename(f.listens+".new", f.listens); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fetcher) listener(name, direction, mark string, extensions []map[string]any) map[string]any {
	f.t.Helper()
	var list []any
	for _, e := range extensions {
		w, err := wantOf(e)
		if err != nil {
			f.t.Fatal(err)
		}
		p := proto.Clone(w.plugin).(*wasm.PluginConfig)
		if remote := p.GetVmConfig().GetCode().GetRemote(); remote != nil {
			remote.HttpUri.HttpUpstreamType, remote.HttpUri.Timeout = &core.HttpUri_Cluster{Cluster: "modules"}, durationpb.New(5*time.Second)
		}
		data, err := protojson.Marshal(p)
		if err != nil {
			f.t.Fatal(err)
		}
		list = append(list, map[string]any{"name": p.Name, "typed_config": map[string]any{
			"@type": "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm", "config": json.RawMessage(data)}})
	}
	list = append(list, map[string]any{"name": "router", "typed_config": map[string]any{"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}})
	manager := map[string]any{"@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
		"stat_prefix": mark, "http_filters": list,
		"route_config": map[string]any{"virtual_hosts": []any{map[string]any{"name": "all", "domains": []any{"*"},
			"routes": []any{map[string]any{"match": map[string]any{"prefix": "/"}, "direct_response": map[string]any{"status": 200}}}}}}}
	return map[string]any{"@type": "type.googleapis.com/envoy.config.listener.v3.Listener", "name": name, "traffic_direction": direction,
		"address":       map[string]any{"socket_address": map[string]any{"address": "127.0.0.1", "port_value": 0}},
		"filter_chains": []any{map[string]any{"filters": []any{map[string]any{"name": "http", "typed_config": manager}}}}}
}

// answers says what a request gets.
func (f *fetcher) answers() int {
	f.t.Helper()
	addr, err := f.process.ListenerAddr(f.t.Context(), "public_listener")
	if err != nil {
		f.t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + addr)
	if err != nil {
		f.t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

func (f *fetcher) get(ctx context.Context, path string, _ int64) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+f.process.AdminAddr()+path, nil)
	if err != nil {
		return 0, nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, body, err
}

// active waits until the last listener that was put takes the traffic, and if it has to be alone no other is left.
func (f *fetcher) active(alone bool) {
	f.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, dump, err := f.get(f.t.Context(), "/config_dump?resource=dynamic_listeners", 0)
		_, stats, err2 := f.get(f.t.Context(), "/stats?filter=draining", 0)
		active, _, warming := bytes.Cut(dump, []byte("warming_state"))
		left := !bytes.Contains(stats, []byte("total_filter_chains_draining: 0\n")) || !bytes.Contains(stats, []byte("total_listeners_draining: 0\n"))
		if err == nil && err2 == nil && bytes.Contains(active, fmt.Appendf(nil, `"number-%d"`, f.number)) && !warming && (!alone || !left) {
			return
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("%v %v\n%s\n%s", err, err2, dump, stats)
		}
	}
}

// planFor is the plan of these extensions.
func planFor(mine ...map[string]any) (p plan.Plan) {
	var list []any
	for _, e := range mine {
		list = append(list, e)
		p.Chain.Filters = append(p.Chain.Filters, filter.Filter{Key: filter.Key{Namespace: "shop", Name: strings.TrimPrefix(pluginOf(e), plugins+"shop.")}})
	}
	p.Objects = []plan.Object{{Content: map[string]any{"spec": map[string]any{"envoyExtensions": list}}}}
	return p
}

// users makes an extension the user's, which lets requests pass that it fails for.
func users(e map[string]any) map[string]any {
	e["required"] = false
	e["arguments"].(map[string]any)["pluginConfig"].(map[string]any)["name"] = "theirs"
	return e
}

// badly makes a module refuse its configuration.
func badly(e map[string]any) map[string]any {
	e["arguments"].(map[string]any)["pluginConfig"].(map[string]any)["configuration"] = "none"
	return e
}

func outbound(e map[string]any) map[string]any {
	e["arguments"].(map[string]any)["listenerType"] = "outbound"
	return e
}

// offer puts listeners, and gives the proof of a plan for what was there before.
func (f *fetcher) offer(p plan.Plan, put func()) *Proof {
	f.t.Helper()
	var err error
	if p.Before, err = before(f.t.Context(), p, []asked{{"a", f.get}}, nil); err != nil || len(p.Before) != 1 {
		f.t.Fatalf("%+v %v", p.Before, err)
	}
	put()
	return NewProof(p, "a")
}

// verdict looks, and when that tells nothing yet, once more as if the proxy had had its time.
func (f *fetcher) verdict(x *Proof) (state plan.ProxyState, detail string) {
	f.t.Helper()
	for deadline := time.Now().Add(settling / 5); ; time.Sleep(20 * time.Millisecond) {
		state, detail, err := x.Look(f.t.Context(), f.get)
		if err != nil {
			f.t.Fatal(err)
		}
		if state != plan.Waiting || time.Now().After(deadline) && x.there.IsZero() {
			return state, detail
		}
		if time.Now().After(deadline) {
			x.there = time.Now().Add(-2 * settling)
		}
	}
}

const (
	missed  = "it could not fetch a module or start it"
	unknown = "does not show in its counters"
)

// TestWhatAnEnvoyFetchedIsProvedThoughItsCountersAreGone looks only when all is over: the counters have then gone with the
// listener that they belonged to.
func TestWhatAnEnvoyFetchedIsProvedThoughItsCountersAreGone(t *testing.T) {
	t.Parallel()
	f := newFetcher(t, 0)
	theirs := func(spoiled bool) map[string]any { // another each time: what Envoy has already, it makes a new sandbox of
		return users(f.fetched("theirs", fmt.Sprint("theirs-", f.number), spoiled))
	}
	type list = []map[string]any
	for i, c := range []struct {
		name   string
		mine   list
		theirs map[string]any
		state  plan.ProxyState
		detail string
		status int
	}{
		{"it fetches it", list{f.fetched("x", "one", false)}, nil, plan.Running, "", 200},
		{"it fetches another", list{f.fetched("x", "two", false)}, nil, plan.Running, "", 200},
		{"it cannot fetch it", list{f.fetched("x", "three", true)}, nil, plan.Rejected, missed, 503},
		{"it cannot fetch one of two", list{f.fetched("x", "one", false), f.fetched("y", "four", true)}, nil, plan.Rejected, missed, 503},
		{"it reads one and cannot fetch the other", list{f.read("x"), f.fetched("y", "five", true)}, nil, plan.Rejected, missed, 503},
		{"it reads one and fetches the other", list{f.read("x"), f.fetched("y", "six", false)}, nil, plan.Running, "", 200},
		{"it fetches it and cannot start it", list{badly(f.fetched("x", "seven", false))}, nil, plan.Rejected, missed, 503},
		{"it fetches beside the user's", list{f.fetched("x", "eight", false)}, theirs(false), plan.Running, "", 200},
		{"it cannot fetch beside the user's", list{f.fetched("x", "nine", true)}, theirs(false), plan.Running, unknown, 503},
		{"it reads one and cannot fetch the other, beside the user's", list{f.read("x"), f.fetched("y", "ten", true)}, theirs(false), plan.Running, unknown, 503},
		{"it reads it beside the user's that it cannot fetch", list{f.read("x")}, theirs(true), plan.Running, "", 200},
		{"it fetches it beside the user's that it cannot fetch", list{f.fetched("x", "eleven", false)}, theirs(true), plan.Running, unknown, 200},
	} {
		with := func(mine list) list {
			if c.theirs != nil {
				return append(slices.Clone(mine), c.theirs)
			}
			return mine
		}
		// The counters are those of a listener that goes.
		f.put(nil)
		f.active(true)
		f.put(with(list{f.fetched("before", fmt.Sprint("before-", i), false)}))
		f.active(false)
		x := f.offer(planFor(c.mine...), func() { f.put(with(c.mine)) })
		f.active(true)
		state, detail := f.verdict(x)
		if status := f.answers(); state != c.state || !strings.Contains(detail, c.detail) || (c.detail == "") != (detail == "") || status != c.status {
			_, stats, _ := f.get(t.Context(), "/stats?filter=wasm", 0)
			t.Errorf("%s: %s (%s), and it answers %d\nbefore %+v\nnow\n%s", c.name, state, detail, status, x.before, stats)
		}
	}
	t.Run("another configuration beside the user's that it cannot fetch", func(t *testing.T) {
		mine, theirs := f.fetched("x", "one", false), theirs(true)
		f.put(list{mine, theirs})
		f.active(true)
		mine["arguments"].(map[string]any)["pluginConfig"].(map[string]any)["configuration"] = `{"response": {"x-a": "c"}}`
		x := f.offer(planFor(mine), func() { f.put(list{mine, theirs}) })
		f.active(true)
		if state, detail := f.verdict(x); state != plan.Running || f.answers() != 200 {
			t.Errorf("%s (%s), and it answers %d", state, detail, f.answers())
		}
	})
	t.Run("the same once more", func(t *testing.T) {
		mine, theirs := f.fetched("x", "nine", true), theirs(false)
		for _, chain := range []list{{mine}, {mine, theirs}} {
			f.put(chain)
			f.active(true)
			x := f.offer(planFor(mine), func() {})
			if state, detail := f.verdict(x); proofOf(state, detail) == plan.Seen || f.answers() != 503 {
				t.Errorf("%d plugins: %s (%s), and it answers %d", len(chain), state, detail, f.answers())
			}
		}
	})
}

// TestWhatAnEnvoyFetchedIsProvedBesideOldListeners looks at once: what is about to go counts, too.
func TestWhatAnEnvoyFetchedIsProvedBesideOldListeners(t *testing.T) {
	t.Parallel()
	f := newFetcher(t, 600)
	one, two, three := f.fetched("x", "one", false), f.fetched("y", "two", false), f.fetched("z", "three", false)
	out := outbound(f.fetched("o", "four", false))
	again := f.fetched("x", "one", false)
	again["arguments"].(map[string]any)["pluginConfig"].(map[string]any)["configuration"] = `{"response": {"x-a": "c"}}`
	type list = []map[string]any
	for _, c := range []struct {
		name    string
		in, out list
		state   plan.ProxyState
		detail  string
		status  int
	}{
		{"the first", list{one}, nil, plan.Running, "", 200},
		{"a second", list{one, two}, nil, plan.Running, "", 200},
		{"a third", list{one, two, three}, nil, plan.Running, "", 200},
		{"one in the other direction", list{one, two, three}, list{out}, plan.Running, "", 200},
		{"another module", list{f.fetched("x", "five", false)}, list{out}, plan.Running, "", 200},
		{"two of one module", list{f.fetched("x", "six", false), f.fetched("y", "six", false)}, list{out}, plan.Running, "", 200},
		{"none in its direction", nil, list{out}, plan.Running, "", 200},
		{"the first again", list{one}, list{out}, plan.Running, "", 200},
		{"another configuration", list{again}, list{out}, plan.Running, "", 200},
		{"it cannot start it", list{badly(f.fetched("x", "seven", false))}, list{out}, plan.Running, unknown, 503},
		{"it cannot fetch it", list{f.fetched("x", "eight", true)}, list{out}, plan.Rejected, missed, 503},
		{"it can", list{f.fetched("x", "nine", false)}, list{out}, plan.Running, "", 200},
	} {
		x := f.offer(planFor(slices.Concat(c.in, c.out)...), func() { f.put(c.in, c.out...) })
		f.active(false)
		state, detail := f.verdict(x)
		if status := f.answers(); state != c.state || !strings.Contains(detail, c.detail) || (c.detail == "") != (detail == "") || status != c.status {
			_, stats, _ := f.get(t.Context(), "/stats?filter=wasm", 0)
			t.Errorf("%s: %s (%s), and it answers %d\nbefore %+v\nnow\n%s", c.name, state, detail, status, x.before, stats)
		}
	}
	// A proxy that is started anew has the name of the one before.
	old := f.offer(planFor(one, two), func() {})
	g := newFetcher(t, 600)
	for _, chain := range []list{{g.fetched("x", "one", false), g.fetched("y", "two", false)}, {g.fetched("x", "one", false), g.fetched("y", "none", true)}} {
		p := planFor(chain...)
		p.Before = map[string]plan.Fetching{"a": *old.before}
		g.put(chain)
		g.active(false)
		state, detail := g.verdict(NewProof(p, "a"))
		if status := g.answers(); (proofOf(state, detail) == plan.Seen) != (status == 200) || state == plan.Waiting {
			t.Errorf("%s (%s), and it answers %d", state, detail, status)
		}
	}
}
