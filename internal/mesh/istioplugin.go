package mesh

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"unicode/utf8"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

// The limits of vmConfig.env.
const (
	maxEnv      = 256
	maxEnvValue = 2048 // characters
)

// within is where a kind keeps what is the module's own: spec.wasm of a TrafficExtension, spec of a WasmPlugin.
func within(k plan.Kind) string {
	if k.GroupKind() == trafficExtension {
		return "spec.wasm"
	}
	return "spec"
}

// misfits says what of a filter a TrafficExtension or WasmPlugin cannot hold, so that it has to be an EnvoyFilter.
func misfits(k plan.Kind, f filter.Filter, at site) (why []string) {
	s := f.Spec
	add := func(set bool, reason string) {
		if set {
			why = append(why, reason)
		}
	}
	no := at.reachable(k)
	add(no != "", no)
	add(!k.Has("spec.match"), "it has no match, so the filter would run twice, for requests that come in and that go out")
	add(s.Before != "", "it has phases and no exact position (spec.before)")
	if s.Config.V != nil {
		_, ok := pluginConfig(s.Config)
		add(!ok, "its configuration is an object with numbers that a double holds, and not empty (spec.config)")
	}
	add(s.Protocol == filter.TCP && !k.Takes(within(k)+".type", "NETWORK"), "it is for http only")
	add(len(s.Environment) > 0 && !k.Has(within(k)+".vmConfig.env"), "it has no environment (spec.environment)")
	add(len(s.Environment) > maxEnv, fmt.Sprintf("it has at most %d variables (spec.environment)", maxEnv))
	for i, e := range s.Environment {
		add(e.Value != nil && utf8.RuneCountInString(e.Value.Text()) > maxEnvValue,
			fmt.Sprintf("a variable has at most %d characters (spec.environment[%d])", maxEnvValue, i))
	}
	return why
}

// pluginSpec is the spec of a TrafficExtension or WasmPlugin.
func pluginSpec(k plan.Kind, f filter.Filter, at site, c code, priority int64) (map[string]any, []plan.Loss) {
	s := f.Spec
	var losses []plan.Loss
	lose := func(field, reason string) {
		losses = append(losses, plan.Loss{Filter: f.Key, Field: field, Reason: reason})
	}
	kind := k.GroupVersionKind.Kind
	module := map[string]any{}
	switch {
	case c.path != "":
		module["url"] = "file://" + c.path // without sha256, which Istio does not look at for a file
	default:
		module["url"] = c.url
		if !c.pinned {
			module["sha256"] = s.Module.SHA256
		}
		if k.Takes(within(k)+".imagePullPolicy", "IfNotPresent") {
			module["imagePullPolicy"] = "IfNotPresent" // what a digest names does not change
		}
		if s.Module.PullSecret != "" && strings.HasPrefix(c.url, "oci://") {
			module["imagePullSecret"] = s.Module.PullSecret
		}
	}
	if s.RootID != "" {
		module["pluginName"] = s.RootID
	}
	if config, ok := pluginConfig(s.Config); ok {
		module["pluginConfig"] = config
	}
	if s.Protocol == filter.TCP {
		module["type"] = "NETWORK"
	}
	if len(s.Environment) > 0 {
		env := make([]any, len(s.Environment))
		for i, e := range s.Environment {
			if e.Value == nil {
				env[i] = map[string]any{"name": e.Name, "valueFrom": "HOST"}
			} else {
				env[i] = map[string]any{"name": e.Name, "valueFrom": "INLINE", "value": e.Value.Text()}
			}
		}
		module["vmConfig"] = map[string]any{"env": env}
	}
	strategy := map[filter.FailurePolicy]string{filter.FailClosed: "FAIL_CLOSE", filter.FailOpen: "FAIL_OPEN", filter.FailReload: "FAIL_RELOAD"}[s.FailurePolicy]
	switch at := within(k) + ".failStrategy"; {
	case k.Takes(at, strategy):
		module["failStrategy"] = strategy
	case s.FailurePolicy != filter.FailClosed:
		lose("spec.failurePolicy", fmt.Sprintf("this Istio's %s has no %s; it fails closed", kind, strategy))
	}
	if s.VMID != f.Key.String() {
		lose("spec.vmID", fmt.Sprintf("a %s does not name its sandbox", kind))
	}

	spec := at.selection(k)
	spec["priority"] = priority
	if s.Phase != "" {
		spec["phase"] = strings.ToUpper(string(s.Phase))
	}
	// Without a mode the filter would meet a request twice: where it leaves one sidecar and where it enters the other.
	match := map[string]any{"mode": "SERVER"}
	if at.gateway || s.Match.Direction == filter.Outbound && !at.waypoint {
		match["mode"] = "CLIENT" // which is what Istio calls a gateway's listeners
	}
	if len(s.Match.Ports) > 0 {
		ports := make([]any, len(s.Match.Ports))
		for i, p := range s.Match.Ports {
			ports[i] = map[string]any{"number": int64(p)}
		}
		match["ports"] = ports
	}
	spec["match"] = []any{match}
	if k.GroupKind() == trafficExtension {
		spec["wasm"] = module
	} else {
		maps.Copy(spec, module)
	}
	return spec, losses
}

// pluginConfig is a configuration as Istio hands it on unchanged: an object that is not empty, whose numbers are doubles.
func pluginConfig(v filter.Value) (map[string]any, bool) {
	m, ok := v.V.(map[string]any)
	if !ok || len(m) == 0 {
		return nil, false
	}
	plain, ok := plainJSON(m)
	if !ok {
		return nil, false
	}
	return plain.(map[string]any), true
}

// plainJSON copies a value with its numbers as the int64 and float64 that Kubernetes' objects have, or says that one is
// not exactly a double.
func plainJSON(v any) (any, bool) {
	switch t := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(t))
		for k, e := range t {
			p, ok := plainJSON(e)
			if !ok {
				return nil, false
			}
			out[k] = p
		}
		return out, true
	case []any:
		out := make([]any, len(t))
		for i, e := range t {
			p, ok := plainJSON(e)
			if !ok {
				return nil, false
			}
			out[i] = p
		}
		return out, true
	case json.Number:
		if i, err := t.Int64(); err == nil {
			return i, int64(float64(i)) == i && i != 1<<63-1
		}
		f, err := t.Float64()
		if err != nil || strings.Trim(t.String(), "-0123456789") == "" { // too large for an int64
			return nil, false
		}
		return f, true
	}
	return v, true
}
