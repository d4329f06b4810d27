package filter

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// Value is any YAML or JSON value: nil, bool, string, json.Number, []any or map[string]any. A map whose only key is
// $secret stands for a value that is resolved when a filter is applied.
type Value struct{ V any }

// SecretRef names a value that the adapter resolves.
type SecretRef struct {
	Name string `json:"name"`
	Key  string `json:"key"`
}

func (r SecretRef) String() string { return r.Name + "/" + r.Key }

const secretKey = "$secret"

// IsZero lets encoding/json's omitzero and this package see whether a value was given.
func (v Value) IsZero() bool { return v.V == nil }

// MarshalJSON writes the value; references stay references.
func (v Value) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v.V)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// UnmarshalJSON keeps numbers as they were written.
func (v *Value) UnmarshalJSON(data []byte) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	return dec.Decode(&v.V)
}

// Text is what the filter gets: a string verbatim, nothing for no value, JSON with sorted keys for all else.
func (v Value) Text() string {
	switch t := v.V.(type) {
	case nil:
		return ""
	case string:
		return t
	}
	data, err := v.MarshalJSON()
	if err != nil { // only decoded YAML and JSON gets in here
		panic(fmt.Sprintf("filter: value of type %T: %v", v.V, err))
	}
	return string(data)
}

// JSON is a string as it stands between the quotes of a JSON document.
func (v Value) JSON() string {
	data, err := v.MarshalJSON()
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(strings.TrimPrefix(string(data), `"`), `"`)
}

// Secrets lists the references in the value, each once.
func (v Value) Secrets() []SecretRef {
	var refs []SecretRef
	walk(v.V, func(ref SecretRef) (any, error) {
		if !slices.Contains(refs, ref) {
			refs = append(refs, ref)
		}
		return nil, nil
	})
	return refs
}

// Resolve returns the value with each reference replaced by what lookup gives.
func (v Value) Resolve(lookup func(SecretRef) (string, error)) (Value, error) {
	r, err := walk(v.V, func(ref SecretRef) (any, error) { return lookup(ref) })
	return Value{r}, err
}

// walk copies v with references replaced.
func walk(v any, replace func(SecretRef) (any, error)) (any, error) {
	switch t := v.(type) {
	case []any:
		out := make([]any, len(t))
		for i, e := range t {
			r, err := walk(e, replace)
			if err != nil {
				return nil, err
			}
			out[i] = r
		}
		return out, nil
	case map[string]any:
		if ref, ok, _ := asSecret(t); ok {
			return replace(ref)
		}
		out := make(map[string]any, len(t))
		for k, e := range t {
			r, err := walk(e, replace)
			if err != nil {
				return nil, err
			}
			out[k] = r
		}
		return out, nil
	}
	return v, nil
}

// asSecret reads {$secret: {name, key}}. The third result says what is wrong with a map that has $secret but is none.
func asSecret(m map[string]any) (ref SecretRef, ok bool, mistake string) {
	body, has := m[secretKey]
	if !has {
		return SecretRef{}, false, ""
	}
	const form = "write {$secret: {name: NAME, key: KEY}} and nothing beside it"
	if len(m) != 1 {
		return SecretRef{}, false, form
	}
	b, isMap := body.(map[string]any)
	if !isMap || len(b) != 2 {
		return SecretRef{}, false, form
	}
	name, ok1 := b["name"].(string)
	key, ok2 := b["key"].(string)
	if !ok1 || !ok2 || strings.TrimSpace(name) == "" || strings.TrimSpace(key) == "" {
		return SecretRef{}, false, form
	}
	return SecretRef{name, key}, true, ""
}

// badSecrets calls report for each map in v that has $secret and is no reference.
func badSecrets(at *place, v any, report func(path, cause string)) {
	switch t := v.(type) {
	case []any:
		for i, e := range t {
			inner := at.entry(i)
			badSecrets(&inner, e, report)
		}
	case map[string]any:
		if _, _, mistake := asSecret(t); mistake != "" {
			report(at.String(), mistake)
			return
		}
		for k, e := range t {
			inner := at.field(k)
			badSecrets(&inner, e, report)
		}
	}
}
