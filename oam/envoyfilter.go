package oam

import (
	"fmt"
	"path"
	"strings"
)

// Meshery relates a WASMFilter to an Istio EnvoyFilter by writing the WASMFilter's config over the value of each of the
// EnvoyFilter's patches (the relationship "hierarchical, parent, wallet" of its model istio-base). So a patch's value is
// either the filter as Envoy has it, whose Wasm plugin names its module, or the config of a WASMFilter that is in the same
// request, which names the module. The EnvoyFilter says where the filter goes.

// patches are those of an EnvoyFilter, which a design has with or without the spec around them.
func (c component) patches() []any {
	spec := c.settings
	if inner, ok := spec["spec"].(map[string]any); ok {
		spec = inner
	}
	list, _ := spec["configPatches"].([]any)
	return list
}

func (c component) selector() any {
	if inner, ok := c.settings["spec"].(map[string]any); ok {
		return inner["workloadSelector"]
	}
	return c.settings["workloadSelector"]
}

// relate finds what WASMFilters and EnvoyFilters of the design have in common. false when there are too many patches.
func (w *writer) relate() bool {
	patches := 0
	for _, e := range w.all {
		if e.kind != KindEnvoyFilter && e.kind != kindEnvoyFilterIstio {
			continue
		}
		list := e.patches()
		if patches += len(list); patches > maxComponents {
			w.fail(e, "settings.configPatches", fmt.Sprintf("deploy at most %d at a time", maxComponents), "with these there are %d patches", patches)
			return false
		}
		for _, p := range list {
			w.values[canonical(w.parsed(at(p, "patch", "value")))] = true
		}
	}
	if patches == 0 {
		return true
	}
	for _, c := range w.all {
		if c.kind != KindWASMFilter {
			continue
		}
		if spec, ok := c.settings["spec"].(map[string]any); ok {
			c.settings = spec
		}
		config := w.parsed(c.settings["config"])
		if prune(config) == nil {
			continue
		}
		if key := canonical(config); w.configs[key].settings == nil {
			w.configs[key] = c
		}
	}
	return true
}

// patched says whether an EnvoyFilter of the design has the WASMFilter's config.
func (w *writer) patched(c component) bool {
	if len(w.values) == 0 {
		return false
	}
	config := w.parsed(c.settings["config"])
	return prune(config) != nil && w.values[canonical(config)]
}

// related is the WASMFilter whose config a patch's value is.
func (w *writer) related(value any) (component, bool) {
	c, ok := w.configs[canonical(w.parsed(value))]
	return c, ok
}

// envoyFilter applies a filter for each patch of an EnvoyFilter.
func (w *writer) envoyFilter(c component) {
	patches := c.patches()
	if len(patches) == 0 {
		w.fail(c, "settings.configPatches", "", "there is no patch, so there is no filter to apply")
		return
	}
	for i, p := range patches {
		name := c.name
		if len(patches) > 1 {
			name = fmt.Sprintf("%s-%d", label(c.name), i)
		}
		s := settings{writer: w, component: c, spec: map[string]any{}}
		if !w.remove {
			s.patch(i, p)
		}
		s.spec["mesh"] = "istio"
		w.add(c, name, s.spec)
	}
}

// patch writes the spec of the filter that one patch is.
func (s *settings) patch(i int, p any) {
	value := at(p, "patch", "value")
	where := fmt.Sprintf("configPatches[%d].patch.value", i)
	if wasm, ok := s.related(value); ok {
		inner := settings{writer: s.writer, component: wasm, spec: s.spec}
		inner.wasmFilter()
	} else if plugin, protocol := s.wasmPlugin(value); plugin != nil {
		s.plugin(where, plugin, protocol)
	} else {
		s.fail(s.component, "settings."+where, "relate the EnvoyFilter to a WASMFilter, or deploy it with Istio's own model",
			"it is neither a Wasm filter of Envoy's nor the config of a WASMFilter in this request")
	}
	pos := position{operation: text(at(p, "patch", "operation")), applyTo: text(field(p, "applyTo")), selector: s.component.selector(), selected: "workloadSelector", whole: true}
	pos.match(field(p, "match"))
	s.place(pos)
}

// wasmPlugin finds the plugin in what Envoy's list of filters holds, and the protocol of its traffic; nil when that is no
// Wasm filter. A text is read as YAML.
func (w *writer) wasmPlugin(value any) (plugin map[string]any, protocol string) {
	if t, ok := value.(string); ok && !strings.Contains(t, "typed") {
		return nil, ""
	}
	typed, _ := field(w.parsed(value), "typed_config").(map[string]any)
	kind := text(typed["@type"])
	if strings.HasSuffix(kind, ".TypedStruct") {
		kind = text(field(typed, "type_url"))
		typed, _ = typed["value"].(map[string]any)
	}
	switch path.Base(kind) {
	case "envoy.extensions.filters.http.wasm.v3.Wasm":
		protocol = "http"
	case "envoy.extensions.filters.network.wasm.v3.Wasm":
		protocol = "tcp"
	default:
		return nil, ""
	}
	plugin, _ = typed["config"].(map[string]any)
	return plugin, protocol
}

// plugin writes what an Envoy's PluginConfig says.
func (s *settings) plugin(where string, p map[string]any, protocol string) {
	refuse := func(path, remedy, cause string, args ...any) {
		s.fail(s.component, "settings."+where+".typed_config.config."+path, remedy, cause, args...)
	}
	s.set("protocol", protocol)
	s.set("rootID", prune(field(p, "root_id")))
	vm := field(p, "vm_config")
	s.set("vmID", prune(field(vm, "vm_id")))
	switch c, _ := p["configuration"].(map[string]any); path.Base(text(c["@type"])) {
	case ".":
		if p["configuration"] != nil {
			refuse("configuration", "", "it has no @type")
		}
	case "google.protobuf.StringValue", "google.protobuf.Struct":
		s.set("config", c["value"])
	default:
		refuse("configuration", "use google.protobuf.StringValue or google.protobuf.Struct", "the type %q cannot be handed to a filter", clip(text(c["@type"])))
	}
	if runtime := text(field(vm, "runtime")); runtime != "" && runtime != "envoy.wasm.runtime.v8" {
		refuse("vm_config.runtime", "use envoy.wasm.runtime.v8", "%q is no runtime that the adapter loads filters into", clip(runtime))
	}
	switch policy := text(field(p, "failure_policy")); policy {
	case "", "UNSPECIFIED":
		if field(p, "fail_open") == true {
			s.set("failurePolicy", "open")
		}
	case "FAIL_OPEN", "FAIL_CLOSED", "FAIL_RELOAD":
		s.set("failurePolicy", strings.ToLower(strings.TrimPrefix(policy, "FAIL_")))
	default:
		refuse("failure_policy", "", "%q is none of Envoy's policies", clip(policy))
	}
	s.environment(refuse, field(vm, "environment_variables"))
	remote, local := at(vm, "code", "remote"), at(vm, "code", "local")
	switch {
	case text(at(remote, "http_uri", "uri")) != "":
		module := map[string]any{"url": at(remote, "http_uri", "uri")}
		if sum := text(field(remote, "sha256")); sum != "" {
			module["sha256"] = sum
		}
		s.merge("module", module)
	case text(field(local, "inline_bytes")) != "":
		s.merge("module", map[string]any{"inline": field(local, "inline_bytes")})
	case s.spec["module"] == nil:
		refuse("vm_config.code", "give the module's address in a WASMFilter's module or wasmFilter, or in code.remote",
			"it does not say where the module is to be had from; a file of the proxy's machine is not read")
	}
}

func (s *settings) environment(refuse func(path, remedy, cause string, args ...any), variables any) {
	var list []any
	keys, _ := field(variables, "host_env_keys").([]any)
	for _, k := range keys {
		list = append(list, map[string]any{"name": k, "valueFrom": "host"})
	}
	values, _ := field(variables, "key_values").(map[string]any)
	for k, v := range values {
		list = append(list, map[string]any{"name": k, "value": v})
	}
	if len(keys)+len(values) > 100 {
		refuse("vm_config.environment_variables", "", "there are more than 100")
		return
	}
	if len(list) > 0 {
		sortByName(list)
		s.set("environment", list)
	}
}

// position is where a filter goes, as an EnvoyFilter says it.
type position struct {
	operation, applyTo, context string
	listener                    any
	port                        any
	beside                      string // what of EnvoyFilter's match has no equivalent
	selector                    any
	selected                    string // the selector's field
	whole                       bool   // without a context or a selector everything is meant
}

// match takes a match that has EnvoyFilter's form: an object, or its context alone.
func (p *position) match(v any) bool {
	m, isMap := v.(map[string]any)
	switch {
	case text(v) != "":
		p.context = text(v)
	case isMap && (m["context"] != nil || m["listener"] != nil || m["proxy"] != nil || m["routeConfiguration"] != nil || m["cluster"] != nil):
		p.context, p.listener = text(m["context"]), m["listener"]
		p.port = field(p.listener, "portNumber")
		for _, other := range []string{"proxy", "routeConfiguration", "cluster"} {
			if m[other] != nil {
				p.beside = other
			}
		}
	default:
		return false
	}
	return true
}

// place writes the target, the match and the place in the chain.
func (s *settings) place(p position) {
	refuse := func(path, remedy, cause string, args ...any) {
		s.fail(s.component, "settings."+path, remedy, cause, args...)
	}
	target := map[string]any{}
	switch p.context {
	case "SIDECAR_INBOUND":
		s.merge("match", map[string]any{"direction": "inbound"})
	case "SIDECAR_OUTBOUND":
		s.merge("match", map[string]any{"direction": "outbound"})
	case "GATEWAY":
		target["kind"] = "Gateway"
	case "":
		if p.whole {
			refuse("match.context", "write SIDECAR_INBOUND, SIDECAR_OUTBOUND or GATEWAY", "without it the filter would be for every direction, and one filter is for one")
		}
	default:
		refuse("match.context", "write SIDECAR_INBOUND, SIDECAR_OUTBOUND or GATEWAY, and one component for each", "a filter is for one direction, and not for %q", clip(p.context))
	}
	if p.beside != "" {
		refuse("match."+p.beside, "take it out", "filters are not placed by it")
	}
	if p.port != nil {
		port, ok := number(p.port)
		if !ok {
			refuse("match.listener.portNumber", "", "it is not a port")
		}
		s.merge("match", map[string]any{"ports": []any{port}})
	}
	if labels, ok := field(p.selector, "labels").(map[string]any); ok && len(labels) > 0 {
		if target["kind"] == nil {
			target["kind"] = "Workload"
		}
		target["labels"] = labels
	} else if prune(p.selector) != nil {
		refuse(p.selected, "write labels: {KEY: VALUE}", "it has no labels to select proxies by")
	} else if p.whole && target["kind"] == nil {
		target["kind"] = "Namespace"
	}
	if len(target) > 0 {
		s.merge("target", target)
	}
	switch p.applyTo {
	case "", "HTTP_FILTER":
		if p.applyTo != "" {
			s.set("protocol", "http")
		}
	case "NETWORK_FILTER":
		s.set("protocol", "tcp")
	default:
		refuse("applyTo", "use HTTP_FILTER or NETWORK_FILTER", "a Wasm filter is no %q", clip(p.applyTo))
	}
	s.order(p, refuse)
}

// order writes the place in the chain.
func (s *settings) order(p position, refuse func(path, remedy, cause string, args ...any)) {
	beside := text(at(p.listener, "filterChain", "filter", "subFilter", "name"))
	if p.applyTo == "NETWORK_FILTER" {
		beside = ""
	}
	switch p.operation {
	case "":
	case "INSERT_FIRST":
		s.set("phase", "authn")
	case "INSERT_BEFORE":
		if beside != "" && beside != "envoy.filters.http.router" && beside != "envoy.router" {
			s.set("before", beside)
		}
	default:
		refuse("patch.operation", "use INSERT_BEFORE or INSERT_FIRST", "filters are put into chains, and %q is something else", clip(p.operation))
	}
}
