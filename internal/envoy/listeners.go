package envoy

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	wasm "github.com/envoyproxy/go-control-plane/envoy/extensions/wasm/v3"
	"google.golang.org/protobuf/encoding/protojson"
)

// Listener is the Wasm filters of one listener, as /config_dump?resource=dynamic_listeners shows it.
type Listener struct {
	Name      string
	Direction string // INBOUND or OUTBOUND; empty when it does not say
	// Protocol is what it takes its traffic for: tcp, http, or http2, as which it takes gRPC, too. Empty when it has no filters.
	Protocol string
	Active   []Plugins
	Warming  []Plugins // of an update that waits for something
	Failed   []Plugins // of the last update, when that was refused
	Error    string    // Envoy's own text of why
}

// Plugins are the Wasm filters of one filter chain in the order that traffic meets them, those of bytes before those of
// requests.
type Plugins []*wasm.PluginConfig

// ParseListeners reads an answer to /config_dump?resource=dynamic_listeners. Configurations may have secrets in clear. A
// plugin that cannot be read is one without a name.
func ParseListeners(dump []byte) ([]Listener, error) {
	type state struct {
		Listener dumpedListener `json:"listener"`
	}
	var got struct {
		Configs []struct {
			Name    string `json:"name"`
			Active  state  `json:"active_state"`
			Warming state  `json:"warming_state"`
			Error   struct {
				Failed  dumpedListener `json:"failed_configuration"`
				Details string         `json:"details"`
			} `json:"error_state"`
		} `json:"configs"`
	}
	if err := json.Unmarshal(dump, &got); err != nil {
		return nil, fmt.Errorf("read envoy's listeners: %w", err)
	}
	var all []Listener
	for _, c := range got.Configs {
		l := Listener{Name: c.Name, Active: c.Active.Listener.plugins(), Warming: c.Warming.Listener.plugins(),
			Failed: c.Error.Failed.plugins(), Error: c.Error.Details,
			Protocol: cmp.Or(c.Active.Listener.protocol(), c.Warming.Listener.protocol())}
		for _, d := range []dumpedListener{c.Active.Listener, c.Warming.Listener, c.Error.Failed} {
			if l.Direction == "" {
				l.Direction = d.Direction
			}
		}
		all = append(all, l)
	}
	return all, nil
}

type dumpedListener struct {
	Direction string        `json:"traffic_direction"`
	Chains    []dumpedChain `json:"filter_chains"`
	Default   *dumpedChain  `json:"default_filter_chain"`
}

type dumpedChain struct {
	Filters []dumpedFilter `json:"filters"`
}

// dumpedFilter is a filter of bytes or, within one, of requests.
type dumpedFilter struct {
	Typed struct {
		Type    string          `json:"@type"`
		Config  json.RawMessage `json:"config"`
		Filters []dumpedFilter  `json:"http_filters"`
		HTTP2   json.RawMessage `json:"http2_protocol_options"`
	} `json:"typed_config"`
}

func (l dumpedListener) chains() []dumpedChain {
	if l.Default != nil {
		return append(slices.Clone(l.Chains), *l.Default)
	}
	return l.Chains
}

func (l dumpedListener) protocol() (protocol string) {
	for _, c := range l.chains() {
		for _, f := range c.Filters {
			switch {
			case !strings.HasSuffix(f.Typed.Type, ".HttpConnectionManager"):
				protocol = cmp.Or(protocol, "tcp")
			case f.Typed.HTTP2 != nil:
				return "http2"
			default:
				return "http"
			}
		}
	}
	return protocol
}

func (l dumpedListener) plugins() (all []Plugins) {
	for _, c := range l.chains() {
		all = append(all, pluginsOf(c.Filters))
	}
	return all
}

func pluginsOf(filters []dumpedFilter) (p Plugins) {
	for _, f := range filters {
		if strings.HasSuffix(f.Typed.Type, ".wasm.v3.Wasm") {
			c := &wasm.PluginConfig{}
			// An Envoy may be newer than what we know.
			if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(f.Typed.Config, c); err != nil {
				c = &wasm.PluginConfig{}
			}
			p = append(p, c)
		}
		p = append(p, pluginsOf(f.Typed.Filters)...)
	}
	return p
}
