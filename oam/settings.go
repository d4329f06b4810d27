package oam

import (
	"encoding/json"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/internal/filter"
)

// settings become the spec of a Filter document. They are its fields, or what designs that were made for Meshery's own
// WASMFilter call them.
type settings struct {
	*writer
	component
	spec map[string]any
}

var (
	specFields = func() []string {
		var names []string
		for _, f := range reflect.VisibleFields(reflect.TypeFor[filter.Spec]()) {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			names = append(names, name)
		}
		return names
	}()
	storedID = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
)

// wasmFilter writes the spec of a WASMFilter. Of one that is to be removed only what a removal reads is looked at, so that
// a design which cannot be deployed any longer can still be undeployed.
func (s *settings) wasmFilter() {
	if s.writer.remove {
		for _, key := range []string{"mesh", "wait", "rollout"} {
			s.set(key, prune(s.settings[key]))
		}
		return
	}
	p := position{}
	later := map[string]any{}
	for _, key := range slices.Sorted(maps.Keys(s.settings)) {
		v := s.settings[key]
		switch {
		case key == "config" || key == "environment":
			if prune(v) != nil {
				s.spec[key] = v
			}
		case key == "match" && p.match(v):
		case slices.Contains(specFields, key):
			s.set(key, prune(v))
		default:
			if v = prune(v); v != nil {
				later[key] = v
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(later)) {
		v := later[key]
		switch key {
		case "wasmFilter", "wasm-filter", "wasm_filter":
			s.module(key, v)
		case "sha256":
			s.merge("module", map[string]any{"sha256": v})
		case "configuration":
			s.set("config", v)
		case "workload_selector", "workloadSelector":
			p.selector, p.selected = v, key
		case "operation":
			p.operation = text(v)
		case "apply_to", "applyTo":
			p.applyTo = text(v)
		case "context":
			p.context = text(v)
		default:
			s.set(key, v) // which the document's reader refuses by its name
		}
	}
	if plugin, protocol := s.wasmPlugin(s.spec["config"]); plugin != nil {
		delete(s.spec, "config")
		s.plugin("config", plugin, protocol)
	}
	s.place(p)
}

// set puts a field into the spec, unless it has another value already.
func (s *settings) set(field string, v any) {
	if v == nil {
		return
	}
	if had, ok := s.spec[field]; ok && !equal(had, v) {
		s.fail(s.component, "settings."+clip(field), "keep one of them", "another setting of the design says something else")
		return
	}
	s.spec[field] = v
}

// merge adds to an object of the spec.
func (s *settings) merge(field string, more map[string]any) {
	into, ok := s.spec[field].(map[string]any)
	if !ok && s.spec[field] != nil {
		return // the document's reader says that it is no object
	}
	into = maps.Clone(into)
	if into == nil {
		into = map[string]any{}
	}
	for k, v := range more {
		if had, ok := into[k]; ok && !equal(had, v) {
			s.fail(s.component, "settings."+field+"."+k, "keep one of them", "another setting of the design says something else")
			return
		}
		into[k] = v
	}
	s.spec[field] = into
}

// module is Meshery's setting wasmFilter: the address of the module, or the id of one that is stored in Meshery.
func (s *settings) module(key string, v any) {
	address := strings.TrimSpace(text(v))
	switch {
	case storedID.MatchString(address):
		address = "meshery://" + strings.ToLower(address)
	case !strings.Contains(address, "://"):
		s.fail(s.component, "settings."+key, "write https://…, oci://… or meshery://ID", "%q is not the address of a module", clip(address))
		return
	}
	s.merge("module", map[string]any{"url": address})
}

// prune takes out what a form sends for fields that nobody has filled in. Nil is left where there is nothing else.
func prune(v any) any {
	switch v := v.(type) {
	case string:
		if v == "" {
			return nil
		}
	case []any:
		if len(v) == 0 {
			return nil
		}
	case map[string]any:
		out := map[string]any{}
		for k, e := range v {
			if e = prune(e); e != nil {
				out[k] = e
			}
		}
		if len(out) == 0 {
			return nil
		}
		return out
	}
	return v
}

func text(v any) string {
	s, _ := v.(string)
	return s
}

// field reads a field by its name in a proto file, or as JSON spells that.
func field(v any, name string) any {
	m, _ := v.(map[string]any)
	if e, ok := m[name]; ok {
		return e
	}
	parts := strings.Split(name, "_")
	for i, p := range parts[1:] {
		parts[i+1] = strings.ToUpper(p[:1]) + p[1:]
	}
	return m[strings.Join(parts, "")]
}

// at follows fields inwards.
func at(v any, names ...string) any {
	for _, n := range names {
		v = field(v, n)
	}
	return v
}

func equal(a, b any) bool {
	return canonical(a) == canonical(b)
}

// canonical is the same for values that are equal.
func canonical(v any) string { return string(marshal(v)) }

// maxText bounds a text that is tried as YAML, and maxTexts all of a design, in bytes: reading one takes far more room than
// the text, and time that grows with the square of its keys.
const maxText, maxTexts = 64 << 10, 1 << 20

// parsed is the object that a text in JSON or YAML says, or the value itself.
func (w *writer) parsed(v any) any {
	s, ok := v.(string)
	if !ok || len(s) > maxText {
		return v
	}
	if o, known := w.texts[s]; known {
		return o
	}
	if w.read += len(s); w.read > maxTexts {
		return v
	}
	w.texts[s] = parse(s)
	return w.texts[s]
}

func parse(s string) any {
	var m map[string]any
	if yaml.Unmarshal([]byte(s), &m) != nil || m == nil {
		return s
	}
	data, err := json.Marshal(m)
	if err != nil { // a key that is no text, or a number that JSON lacks
		return s
	}
	var o object
	if json.Unmarshal(data, &o) != nil {
		return s
	}
	return map[string]any(o)
}

// number is a whole number as JSON or a form has it.
func number(v any) (int, bool) {
	switch v := v.(type) {
	case json.Number:
		n, err := strconv.Atoi(v.String())
		return n, err == nil
	case string:
		n, err := strconv.Atoi(v)
		return n, err == nil
	}
	return 0, false
}

// sortByName orders variables, which come from a map.
func sortByName(list []any) {
	slices.SortFunc(list, func(a, b any) int { return strings.Compare(text(field(a, "name")), text(field(b, "name"))) })
}
