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

// fetching is an Envoy that fetches modules, and lets go of an old listener at once, with the counters that belong to it.
type fetcher struct {
	t       *testing.T
	process *envoy.Process
	listens string // file with its listener
	modules *httptest.Server
	bytes   []byte // of a module
	number  int    // of listeners so far
}

func newFetcher(t *testing.T) *fetcher {
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
		Args: []string{"--drain-strategy", "immediate", "--drain-time-s", "1"}})
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

// put has the proxy's listener have these plugins, and the user's behind them.
func (f *fetcher) put(extensions []map[string]any, users ...map[string]any) {
	f.t.Helper()
	var list []any
	for _, e := range slices.Concat(extensions, users) {
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
	f.number++
	manager := map[string]any{"@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
		"stat_prefix": fmt.Sprint("number-", f.number), "http_filters": list,
		"route_config": map[string]any{"virtual_hosts": []any{map[string]any{"name": "all", "domains": []any{"*"},
			"routes": []any{map[string]any{"match": map[string]any{"prefix": "/"}, "direct_response": map[string]any{"status": 200}}}}}}}
	data, err := json.Marshal(map[string]any{"version_info": fmt.Sprint(f.number), "resources": []any{map[string]any{
		"@type": "type.googleapis.com/envoy.config.listener.v3.Listener", "name": "public_listener", "traffic_direction": "INBOUND",
		"address":       map[string]any{"socket_address": map[string]any{"address": "127.0.0.1", "port_value": 0}},
		"filter_chains": []any{map[string]any{"filters": []any{map[string]any{"name": "http", "typed_config": manager}}}}}}})
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

// TestWhatAnEnvoyFetchedIsProvedThoughItsCountersAreGone looks only when all is over: the counters have then gone with the
// listener that they belonged to.
func TestWhatAnEnvoyFetchedIsProvedThoughItsCountersAreGone(t *testing.T) {
	t.Parallel()
	f := newFetcher(t)
	plain := func(mine []map[string]any) plan.Plan {
		p := plan.Plan{}
		var list []any
		for _, e := range mine {
			list = append(list, e)
			name := e["arguments"].(map[string]any)["pluginConfig"].(map[string]any)["name"].(string)
			p.Chain.Filters = append(p.Chain.Filters, filter.Filter{Key: filter.Key{Namespace: "shop", Name: strings.TrimPrefix(name, plugins+"shop.")}})
		}
		p.Objects = []plan.Object{{Content: map[string]any{"spec": map[string]any{"envoyExtensions": list}}}}
		return p
	}
	users := f.fetched("users", "users", false)
	for i, c := range []struct {
		name   string
		mine   []map[string]any
		users  bool // they have one of their own
		want   plan.ProxyState
		proof  plan.Proof
		detail string
	}{
		{name: "it fetches it", mine: []map[string]any{f.fetched("x", "one", false)}, want: plan.Running, proof: plan.Seen},
		{name: "it fetches another", mine: []map[string]any{f.fetched("x", "two", false)}, want: plan.Running, proof: plan.Seen},
		{name: "it cannot fetch it", mine: []map[string]any{f.fetched("x", "three", true)}, want: plan.Rejected, detail: "has 0 sandboxes where the filters need 2"},
		{name: "it cannot fetch one of two", mine: []map[string]any{f.fetched("x", "one", false), f.fetched("y", "four", true)}, want: plan.Rejected,
			detail: "has 3 sandboxes where the filters need 4"},
		{name: "it reads one and cannot fetch the other", mine: []map[string]any{f.read("x"), f.fetched("y", "five", true)}, want: plan.Rejected,
			detail: "has 3 sandboxes where the filters need 4"},
		{name: "it reads one and fetches the other", mine: []map[string]any{f.read("x"), f.fetched("y", "six", false)}, want: plan.Running, proof: plan.Seen},
		{name: "it fetches beside the user's", mine: []map[string]any{f.fetched("x", "seven", false)}, users: true, want: plan.Running, proof: plan.Seen},
		{name: "it cannot fetch beside the user's", mine: []map[string]any{f.fetched("x", "eight", true)}, users: true, want: plan.Running, proof: plan.Acknowledged,
			detail: "was not seen"},
	} {
		// The counters are those of a listener that goes.
		f.put(nil)
		f.active(true)
		var with []map[string]any
		if c.users {
			with = []map[string]any{users}
		}
		f.put([]map[string]any{f.fetched("before", fmt.Sprint("before-", i), false)}, with...)
		f.active(false)
		p := plain(c.mine)
		before, _, err := look(t.Context(), f.get)
		if err != nil {
			t.Fatal(err)
		}
		p.Before = map[string]plan.Before{"a": before}
		f.put(c.mine, with...)
		f.active(true)
		x := NewProof(p, "a")
		state, detail, err := x.Look(t.Context(), f.get)
		if err != nil {
			t.Fatal(err)
		}
		if proofOf(state, detail) != plan.Seen {
			if state != plan.Waiting {
				t.Errorf("%s: before it may have settled it is %s: %s", c.name, state, detail)
			}
			x.there = x.there.Add(-2 * settling)
			if state, detail, err = x.Look(t.Context(), f.get); err != nil {
				t.Fatal(err)
			}
		}
		if state != c.want || proofOf(state, detail) != c.proof || !strings.Contains(detail, c.detail) {
			_, stats, _ := f.get(t.Context(), "/stats?filter=wasm", 0)
			t.Errorf("%s: %s (%s)\nbefore it %+v\nnow\n%s", c.name, state, detail, before, stats)
		}
	}
}
