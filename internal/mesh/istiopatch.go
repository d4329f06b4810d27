package mesh

import (
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

// protocolWords are what an EnvoyFilter calls the same things for HTTP and for TCP.
type protocolWords struct{ applyTo, wasm, rbac, last string }

var protocols = map[filter.Protocol]protocolWords{
	filter.HTTP: {"HTTP_FILTER", typeURL + "envoy.extensions.filters.http.wasm.v3.Wasm", typeURL + "envoy.extensions.filters.http.rbac.v3.RBAC", "envoy.filters.http.router"},
	filter.TCP:  {"NETWORK_FILTER", typeURL + "envoy.extensions.filters.network.wasm.v3.Wasm", typeURL + "envoy.extensions.filters.network.rbac.v3.RBAC", "envoy.filters.network.tcp_proxy"},
}

const (
	typeURL           = "type.googleapis.com/"
	connectionManager = "envoy.filters.network.http_connection_manager"
)

// envoyPatchSpec is the spec of an EnvoyFilter; name is what the proxy calls the filter.
//
// Bytes and files stand in the listener itself, so that a proxy that cannot load them refuses the listener and serves on
// with what it had. An address goes by extension configuration discovery: that is the only place where Istio's agent
// fetches modules, and Envoy's own fetching acknowledges before it has them.
func envoyPatchSpec(k plan.Kind, f filter.Filter, name string, at site, c code, priority int64) (map[string]any, []plan.Loss) {
	s := f.Spec
	words := protocols[s.Protocol]
	var losses []plan.Loss
	lose := func(set bool, field, reason string) {
		if set {
			losses = append(losses, plan.Loss{Filter: f.Key, Field: field, Reason: reason})
		}
	}
	filterValue := map[string]any{"name": name}
	typed := map[string]any{"@type": words.wasm, "config": patchConfig(name+placed(s), f, c)}
	remote := c.url != ""
	if remote {
		filterValue["config_discovery"] = map[string]any{
			"config_source": map[string]any{"ads": map[string]any{}, "initial_fetch_timeout": "0s", "resource_api_version": "V3"},
			// Istio's agent puts the second in the place of a module that it cannot fetch.
			"type_urls": []any{words.wasm, words.rbac},
		}
	} else {
		filterValue["typed_config"] = typed
	}

	context := "SIDECAR_INBOUND"
	switch {
	case at.gateway:
		context = "GATEWAY"
	case s.Match.Direction == filter.Outbound:
		context = "SIDECAR_OUTBOUND"
	}
	operation, before := "INSERT_BEFORE", words.last
	switch {
	case s.Before != "":
		before = s.Before
		lose(s.Phase != "", "spec.phase", "spec.before gives its place")
	case s.Phase == filter.Authn:
		operation, before = "INSERT_FIRST", ""
	default:
		lose(s.Phase != "", "spec.phase", "an EnvoyFilter places a filter first of all or right before a filter that is always there: this one stands before the router")
	}
	ports := s.Match.Ports
	if len(ports) == 0 {
		ports = []int{0}
	}
	var patches []any
	for _, port := range ports {
		inner := map[string]any{"name": before}
		if s.Protocol == filter.HTTP {
			inner = map[string]any{"name": connectionManager}
			if before != "" {
				inner["subFilter"] = map[string]any{"name": before}
			}
		}
		listener := map[string]any{}
		if inner["name"] != "" {
			listener["filterChain"] = map[string]any{"filter": inner}
		}
		if port != 0 {
			listener["portNumber"] = int64(port)
		}
		match := map[string]any{"context": context}
		if len(listener) > 0 {
			match["listener"] = listener
		}
		patches = append(patches, map[string]any{"applyTo": words.applyTo, "match": match,
			"patch": map[string]any{"operation": operation, "value": filterValue}})
	}
	if remote {
		patches = append(patches, map[string]any{"applyTo": "EXTENSION_CONFIG", "match": map[string]any{"context": context},
			"patch": map[string]any{"operation": "ADD", "value": map[string]any{"name": name, "typed_config": typed}}})
	}
	spec := at.selection(k)
	spec["configPatches"] = patches
	// Istio works through EnvoyFilters from the lowest number up: what is put before the router first stands before what
	// follows, and what is put first of all last stands foremost.
	if spec["priority"] = -priority; operation == "INSERT_FIRST" {
		spec["priority"] = priority
	}
	return spec, losses
}

// placed is what a plugin's name ends with when its filter is not in the usual place: @outbound:8080,9090. istiod gives an
// EnvoyFilter's version away to nobody, so only by that a proxy that has the filter where it was before shows it.
func placed(s filter.Spec) string {
	var at []string
	if s.Match.Direction == filter.Outbound {
		at = append(at, "outbound")
	}
	if len(s.Match.Ports) > 0 {
		var ports []string
		for _, p := range s.Match.Ports {
			ports = append(ports, strconv.Itoa(p))
		}
		at = append(at, strings.Join(ports, ","))
	}
	switch {
	case s.Before != "":
		at = append(at, "before "+s.Before)
	case s.Phase == filter.Authn:
		at = append(at, "first")
	}
	if len(at) == 0 {
		return ""
	}
	return "@" + strings.Join(at, ":")
}

// patchConfig is Envoy's own PluginConfig.
func patchConfig(name string, f filter.Filter, c code) map[string]any {
	s := f.Spec
	source := map[string]any{}
	switch {
	case c.inline != nil:
		source["local"] = map[string]any{"inline_bytes": base64.StdEncoding.EncodeToString(c.inline)}
	case c.path != "":
		source["local"] = map[string]any{"filename": c.path}
	default:
		remote := map[string]any{"http_uri": map[string]any{"uri": c.url, "timeout": "30s", "cluster": "_"}} // the agent fetches, without a cluster
		// Envoy wants a digest of any text, and Istio's agent reads this one as none: the address names it.
		if remote["sha256"] = s.Module.SHA256; c.pinned {
			remote["sha256"] = "nil"
		}
		source["remote"] = remote
	}
	vm := map[string]any{"vm_id": s.VMID, "runtime": "envoy.wasm.runtime.v8", "code": source}
	if environment := environmentOf(f, "key_values", "host_env_keys"); len(environment) > 0 {
		vm["environment_variables"] = environment
	}
	config := map[string]any{"name": name, "vm_config": vm}
	if s.RootID != "" {
		config["root_id"] = s.RootID
	}
	if s.FailurePolicy != filter.FailClosed { // which is Envoy's own default
		config["failure_policy"] = fmt.Sprint(failurePolicies[s.FailurePolicy])
	}
	if !s.Config.IsZero() {
		config["configuration"] = map[string]any{"@type": typeURL + "google.protobuf.StringValue", "value": s.Config.Text()}
	}
	return config
}

// environmentOf is a sandbox's environment: what the document sets below one name, and what is the host's below the other.
func environmentOf(f filter.Filter, values, hosts string) map[string]any {
	set, host := map[string]any{}, []any{}
	for _, e := range f.Spec.Environment {
		if e.Value == nil {
			host = append(host, e.Name)
		} else {
			set[e.Name] = e.Value.Text()
		}
	}
	environment := map[string]any{}
	if len(set) > 0 {
		environment[values] = set
	}
	if len(host) > 0 {
		environment[hosts] = host
	}
	return environment
}
