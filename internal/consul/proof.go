package consul

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	wasm "github.com/envoyproxy/go-control-plane/envoy/extensions/wasm/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	plugins  = "meshery.filters/" // begins the names of plugins that are ours
	maxDump  = 64 << 20           // bytes of a proxy's listeners
	maxStats = 1 << 20

	// warming is how far a proxy is that is fetching a module, or waits for something else before it takes a listener.
	warming = "its listener does not take traffic yet"

	// again is the time in which a proxy refuses once more what it has refused before, which its dump does not tell apart.
	again = 3 * time.Second
)

// pluginName is what a filter's plugin is called in entries and in proxies.
func pluginName(k filter.Key) string { return plugins + k.Namespace + "." + k.Name }

// Get asks a proxy's admin interface for one page of at most so many bytes.
type Get func(ctx context.Context, path string, most int64) (status int, body []byte, err error)

// Proof watches one proxy with one plan. It is not safe for concurrent use.
type Proof struct {
	all    []want
	wide   bool     // the plan is for a whole mesh, so that a proxy gets what is for its service's protocol
	wants  []want   // of all, those that the proxy gets
	gone   []string // plugins that must not be there
	err    error
	before *plan.Fetching // nil until the first look, unless the plan has it

	begun         time.Time // with the first look
	refusedBefore bool      // the proxy had refused such a chain when it was first looked at
	there         time.Time // when all plugins were first seen as they are wanted
}

// want is one plugin that the proxy has to have.
type want struct {
	direction string // of the listener, as Envoy calls it
	protocol  string
	plugin    *wasm.PluginConfig
}

// NewProof is for one proxy that the plan's objects are for, of which the plan's Before speaks by this name.
func NewProof(p plan.Plan, name string) *Proof {
	x := &Proof{wide: p.Chain.Target.Kind == filter.Mesh}
	if before, ok := p.Before[name]; ok {
		x.before = &before
	}
	for _, k := range p.Gone {
		x.gone = append(x.gone, pluginName(k))
	}
	for _, o := range p.Objects {
		for _, e := range extensionsOf(o.Content) {
			if !isOf(e, p.Chain.Filters) {
				continue
			}
			w, err := wantOf(e)
			if err != nil {
				x.err = problem.Internal.New("%s: %w", o, err)
			}
			x.all = append(x.all, w)
		}
	}
	x.wants = x.all
	return x
}

// Look says how far the proxy is, and why it is not further. It runs the plan when the listeners that take its traffic
// have every plugin, in the plan's order, with the plan's module and configuration, and none that is gone, and when the modules
// that it fetches itself are seen to be loaded: a listener takes traffic without them, too. It has rejected the plan when it
// says that it refused a listener with one of its plugins, or when it could not fetch a module. The detail is then the proxy's
// own text, which may quote its configuration, resolved secrets included. A detail of a proxy that runs the plan says what
// could not be seen of it. Of the chain of a whole mesh it has to have what is for its service's protocol; when that is nothing,
// it is apart.
func (x *Proof) Look(ctx context.Context, get Get) (state plan.ProxyState, detail string, err error) {
	if x.err != nil {
		return "", "", x.err
	}
	if x.begun.IsZero() && x.before != nil {
		started, err := startedAt(ctx, get)
		if err != nil {
			return "", "", err
		}
		if started.Sub(x.before.Started) > another { // what counted before is gone
			x.before = nil
		}
	}
	b, listeners, err := look(ctx, get)
	if err != nil {
		return "", "", err
	}
	s, err := statsOf(ctx, get)
	if err != nil {
		return "", "", err
	}
	state, detail = x.judge(b, listeners, s)
	return state, detail, nil
}

// proofOf is how it is known that a proxy runs a plan.
func proofOf(state plan.ProxyState, detail string) plan.Proof {
	switch {
	case state != plan.Running:
		return ""
	case detail != "":
		return plan.Acknowledged
	}
	return plan.Seen
}

// fetching says whether a proxy of a plan may be about to fail to fetch a module. That is to be seen soon, since Envoy forgets
// it together with the listener that was there before.
func fetching(p plan.Plan, l plan.Loaded) bool {
	return len(p.Sources) > 0 && slices.ContainsFunc(l.Proxies, func(s plan.ProxyStatus) bool { return s.Detail == warming })
}

// page takes a page that is not found for an empty one: there is nothing of that kind.
func page(ctx context.Context, get Get, path string, most int64) ([]byte, error) {
	status, body, err := get(ctx, path, most)
	switch {
	case err != nil:
		return nil, err
	case status == http.StatusNotFound:
		return []byte("{}"), nil
	case status != http.StatusOK:
		return nil, fmt.Errorf("it answers %d to %s", status, path)
	}
	return body, nil
}

// judge is what the proxy's answers come to: listeners, what it had said of fetching right before it told them, and right after.
func (x *Proof) judge(b plan.Fetching, listeners []envoy.Listener, s wasmStats) (plan.ProxyState, string) {
	if i := slices.IndexFunc(listeners, isPublic); x.wide && i >= 0 && listeners[i].Protocol != "" {
		x.wants = slices.DeleteFunc(slices.Clone(x.all), func(w want) bool { return w.protocol != listeners[i].Protocol })
		if len(x.wants) == 0 && len(x.all) > 0 && x.missing(listeners) == "" {
			return plan.Apart, fmt.Sprintf("its service speaks %s, for which the chain has no filter", listeners[i].Protocol)
		}
	}
	missing := x.missing(listeners)
	if x.before == nil {
		if missing == "" && b.Fetched+b.Hits == 0 { // it has all of it already, and never had a module
			b.Failed = 0
		}
		x.before = &b
	}
	// Envoy's counters go with the listener that they were first needed for, and begin anew.
	for was, is := range map[*uint64]uint64{&x.before.Created: s.Created, &x.before.Hits: s.Hits, &x.before.Fetched: s.Fetched, &x.before.Failed: s.Failed} {
		if is < *was {
			*was = 0
		}
	}
	refused := x.refused(listeners)
	if x.begun.IsZero() {
		x.begun, x.refusedBefore = time.Now(), refused != ""
	}
	if missing != "" {
		x.there = time.Time{}
		switch {
		case refused != "" && x.refusedBefore && time.Since(x.begun) < again:
			return plan.Waiting, "it refused the same before: " + refused
		case refused != "":
			return plan.Rejected, refused
		}
		return plan.Waiting, missing
	}
	if x.there.IsZero() {
		x.there = time.Now()
	}
	return x.loaded(listeners, s, time.Since(x.there) > settling)
}

// isPublic says whether a listener is the one that takes what others send to the proxy's service.
func isPublic(l envoy.Listener) bool { return strings.HasPrefix(l.Name, "public_listener") }

// missing says what is not as it should be in the listeners that take traffic; empty: nothing.
func (x *Proof) missing(listeners []envoy.Listener) string {
	found := make([]bool, len(x.wants))
	for _, l := range listeners {
		for _, chain := range slices.Concat(l.Active, l.Warming) {
			last := -1
			for _, p := range chain {
				if slices.Contains(x.gone, p.GetName()) {
					return p.GetName() + " is still there"
				}
				i := x.find(p)
				switch {
				case i < 0:
					continue
				case x.wants[i].direction != l.Direction:
					return p.GetName() + " is still in listeners of the other direction"
				case !x.wants[i].is(p):
					return p.GetName() + " has another module or configuration"
				case i < last:
					return "the filters stand in another order"
				}
				last, found[i] = i, true
			}
		}
		for _, chain := range l.Warming {
			if slices.ContainsFunc(chain, func(p *wasm.PluginConfig) bool { return x.find(p) >= 0 }) {
				return warming
			}
		}
	}
	if i := slices.Index(found, false); i >= 0 {
		return x.wants[i].plugin.GetName() + " is in none of its listeners"
	}
	return ""
}

// refused is the proxy's text of a listener that it refused and that has a plugin as it is wanted. One with other plugins
// stays in its dump after Consul has gone back to what the proxy runs, of which Consul then has nothing to tell it.
func (x *Proof) refused(listeners []envoy.Listener) string {
	for _, l := range listeners {
		for _, p := range slices.Concat(l.Failed...) {
			if i := x.find(p); i >= 0 && x.wants[i].is(p) {
				return l.Error
			}
		}
	}
	return ""
}

func (x *Proof) find(p *wasm.PluginConfig) int {
	return slices.IndexFunc(x.wants, func(w want) bool { return w.plugin.GetName() == p.GetName() })
}

// is compares a plugin with the one that is wanted. Of where its module comes from, the file counts, or address and digest.
func (w want) is(p *wasm.PluginConfig) bool {
	code, other := w.plugin.GetVmConfig().GetCode(), p.GetVmConfig().GetCode()
	if code.GetLocal().GetFilename() != other.GetLocal().GetFilename() || code.GetRemote().GetSha256() != other.GetRemote().GetSha256() ||
		code.GetRemote().GetHttpUri().GetUri() != other.GetRemote().GetHttpUri().GetUri() {
		return false
	}
	p = proto.Clone(p).(*wasm.PluginConfig)
	if p.GetVmConfig() != nil {
		p.GetVmConfig().Code = nil
	}
	mine := proto.Clone(w.plugin).(*wasm.PluginConfig)
	mine.GetVmConfig().Code = nil
	return proto.Equal(mine, p)
}

// wantOf is the plugin that Consul makes of an extension.
func wantOf(e map[string]any) (w want, err error) {
	data, err := json.Marshal(e)
	if err != nil {
		return w, err
	}
	var x struct {
		Required  bool
		Arguments struct {
			ListenerType string
			Protocol     string
			PluginConfig struct {
				Name, RootID, Configuration string
				VMConfig                    struct {
					VMID, Runtime, Configuration string
					Code                         struct {
						Local  struct{ Filename string }
						Remote struct {
							HTTPURI struct{ URI string }
							SHA256  string
						}
					}
					EnvironmentVariables *struct {
						HostEnvKeys []string
						KeyValues   map[string]string
					}
				}
			}
		}
	}
	if err := json.Unmarshal(data, &x); err != nil { // whatever the case of its names, as Consul
		return w, fmt.Errorf("read an extension: %w", err)
	}
	c := x.Arguments.PluginConfig
	vm := &wasm.VmConfig{VmId: c.VMConfig.VMID, Runtime: "envoy.wasm.runtime." + c.VMConfig.Runtime, Code: &core.AsyncDataSource{}}
	if file := c.VMConfig.Code.Local.Filename; file != "" {
		vm.Code.Specifier = &core.AsyncDataSource_Local{Local: &core.DataSource{Specifier: &core.DataSource_Filename{Filename: file}}}
	} else {
		remote := c.VMConfig.Code.Remote
		vm.Code.Specifier = &core.AsyncDataSource_Remote{Remote: &core.RemoteDataSource{HttpUri: &core.HttpUri{Uri: remote.HTTPURI.URI}, Sha256: remote.SHA256}}
	}
	if e := c.VMConfig.EnvironmentVariables; e != nil {
		vm.EnvironmentVariables = &wasm.EnvironmentVariables{HostEnvKeys: e.HostEnvKeys, KeyValues: e.KeyValues}
	}
	w.plugin = &wasm.PluginConfig{Name: c.Name, RootId: c.RootID, Vm: &wasm.PluginConfig_VmConfig{VmConfig: vm}}
	w.plugin.FailOpen = !x.Required //lint:ignore SA1019 Consul knows no other policy
	if w.plugin.Configuration, err = stringOf(c.Configuration); err != nil {
		return w, err
	}
	if vm.Configuration, err = stringOf(c.VMConfig.Configuration); err != nil {
		return w, err
	}
	w.direction, w.protocol = strings.ToUpper(x.Arguments.ListenerType), x.Arguments.Protocol
	return w, nil
}

// stringOf is how text is handed to a filter.
func stringOf(text string) (*anypb.Any, error) {
	if text == "" {
		return nil, nil
	}
	return anypb.New(wrapperspb.String(text))
}

// isOf says whether an extension is of one of the filters.
func isOf(e map[string]any, filters []filter.Filter) bool {
	name := pluginOf(e)
	return slices.ContainsFunc(filters, func(f filter.Filter) bool { return pluginName(f.Key) == name })
}

// pluginOf is the name of an extension's plugin; empty for extensions of other kinds. Consul keeps arguments in whatever
// case they were written.
func pluginOf(e map[string]any) string {
	arguments, _ := field(e, "arguments").(map[string]any)
	config, _ := field(arguments, "pluginConfig").(map[string]any)
	name, _ := field(config, "name").(string)
	return name
}

// extensionsOf are those of an object of a plan.
func extensionsOf(content map[string]any) (all []map[string]any) {
	spec, _ := content["spec"].(map[string]any)
	list, _ := spec["envoyExtensions"].([]any)
	for _, e := range list {
		if e, ok := e.(map[string]any); ok {
			all = append(all, e)
		}
	}
	return all
}

// field is a map's, whatever the case of its name.
func field(m map[string]any, name string) any {
	for k, v := range m {
		if strings.EqualFold(k, name) {
			return v
		}
	}
	return nil
}
