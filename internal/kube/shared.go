package kube

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	utiljson "k8s.io/apimachinery/pkg/util/json"
)

// edit is one thing that was added to an object of the user's, in a form that can be taken back and is kept in the
// inventory: what we wrote is there as its digest, since it may hold secrets, and what was there before as it was.
type edit struct {
	Path []string `json:"path"`
	// Made says that the map or the list at Path is ours; it goes when nothing is left in it.
	Made bool `json:"made,omitempty"`
	// Entry is the digest of an entry that we added to the list at Path.
	Entry string `json:"entry,omitempty"`
	// After is the digest of the value that we set at Path, and Before is the value that was there, if any.
	After  string          `json:"after,omitempty"`
	Before json.RawMessage `json:"before,omitempty"`

	value any // that is set, made or added
	at    int // place of the entry in the list
}

// servers are the fields of an object that the server alone writes.
var servers = [][]string{
	{"status"}, {"metadata", "resourceVersion"}, {"metadata", "managedFields"}, {"metadata", "generation"},
	{"metadata", "uid"}, {"metadata", "creationTimestamp"}, {"metadata", "selfLink"},
}

// difference lists what desired has and base has not. Something that base has and desired has not, or has otherwise within
// a list, is an error: it is the user's.
func difference(base, desired map[string]any) ([]edit, error) {
	return mapDifference(base, desired, nil)
}

func mapDifference(base, desired map[string]any, path []string) ([]edit, error) {
	var edits []edit
	for _, key := range slices.Sorted(maps.Keys(base)) {
		at := append(slices.Clone(path), key)
		if _, ok := desired[key]; !ok && !isServers(at) {
			return nil, fmt.Errorf("%s is the user's and may not be left out", strings.Join(at, "."))
		}
	}
	for _, key := range slices.Sorted(maps.Keys(desired)) {
		at := append(slices.Clone(path), key)
		if isServers(at) {
			continue
		}
		before, ok := base[key]
		after := desired[key]
		var more []edit
		var err error
		switch after := after.(type) {
		case map[string]any:
			was, isMap := before.(map[string]any)
			switch {
			case !ok:
				edits = append(edits, edit{Path: at, Made: true, value: map[string]any{}})
			case !isMap:
				return nil, fmt.Errorf("%s is the user's and of another type", strings.Join(at, "."))
			}
			more, err = mapDifference(was, after, at)
		case []any:
			was, isList := before.([]any)
			switch {
			case !ok:
				edits = append(edits, edit{Path: at, Made: true, value: []any{}})
			case !isList:
				return nil, fmt.Errorf("%s is the user's and of another type", strings.Join(at, "."))
			}
			more, err = listDifference(was, after, at)
		case string:
			was, isText := before.(string)
			if ok && !isText || !isListInText(at) {
				more, err = valueDifference(before, after, ok, at)
				break
			}
			if !ok {
				edits = append(edits, edit{Path: at, Made: true, value: ""})
			}
			more, err = listDifference(entriesOf(was), entriesOf(after), at)
		default:
			more, err = valueDifference(before, after, ok, at)
		}
		if err != nil {
			return nil, err
		}
		edits = append(edits, more...)
	}
	return edits, nil
}

func valueDifference(before, after any, ok bool, path []string) ([]edit, error) {
	if ok && reflect.DeepEqual(before, after) {
		return nil, nil
	}
	e := edit{Path: path, After: digest(after), value: after}
	if ok {
		var err error
		if e.Before, err = json.Marshal(before); err != nil {
			return nil, err
		}
	}
	return []edit{e}, nil
}

// listsInText are annotations that are lists, with commas between entries. Others may add entries to them, too.
var listsInText = []string{"consul.hashicorp.com/connect-service-upstreams"}

func isListInText(path []string) bool { return slices.Contains(listsInText, path[len(path)-1]) }

func entriesOf(text string) (entries []any) {
	if text == "" {
		return nil
	}
	for _, s := range strings.Split(text, ",") {
		entries = append(entries, s)
	}
	return entries
}

func textOf(entries []any) string {
	var parts []string
	for _, e := range entries {
		parts = append(parts, fmt.Sprint(e))
	}
	return strings.Join(parts, ",")
}

func listDifference(base, desired []any, path []string) ([]edit, error) {
	var edits []edit
	for i, entry := range desired {
		if len(base) > 0 && reflect.DeepEqual(base[0], entry) {
			base = base[1:]
			continue
		}
		edits = append(edits, edit{Path: path, Entry: digest(entry), value: entry, at: i})
	}
	if len(base) > 0 {
		return nil, fmt.Errorf("an entry of %s is the user's and may not be changed, moved or left out", strings.Join(path, "."))
	}
	return edits, nil
}

func isServers(path []string) bool {
	return slices.ContainsFunc(servers, func(s []string) bool { return slices.Equal(s, path) })
}

// added returns base with the edits.
func added(base map[string]any, edits []edit) map[string]any {
	o := clone(base)
	for _, e := range edits {
		parent := descend(o, e.Path[:len(e.Path)-1])
		if parent == nil {
			continue // the user has made something else of it meanwhile
		}
		key := e.Path[len(e.Path)-1]
		switch {
		case e.Made:
			if _, ok := parent[key]; !ok {
				parent[key] = e.value
				if m, ok := e.value.(map[string]any); ok {
					parent[key] = clone(m)
				}
			}
		case e.Entry != "":
			switch list := parent[key].(type) {
			case []any:
				parent[key] = slices.Insert(slices.Clone(list), min(e.at, len(list)), e.value)
			case string:
				entries := entriesOf(list)
				parent[key] = textOf(slices.Insert(entries, min(e.at, len(entries)), e.value))
			}
		default:
			parent[key] = e.value
		}
	}
	return o
}

// without returns the object as it is without the edits: what the user has changed since stays changed.
func without(object map[string]any, edits []edit) map[string]any {
	o := clone(object)
	for _, e := range slices.Backward(edits) {
		parent := descend(o, e.Path[:len(e.Path)-1])
		key := e.Path[len(e.Path)-1]
		value, ok := parent[key]
		if !ok {
			continue
		}
		switch {
		case e.Made:
			if isEmpty(value) {
				delete(parent, key)
			}
		case e.Entry != "":
			switch list := value.(type) {
			case []any:
				if i := slices.IndexFunc(list, func(v any) bool { return digest(v) == e.Entry }); i >= 0 {
					parent[key] = slices.Delete(slices.Clone(list), i, i+1)
				}
			case string:
				entries := entriesOf(list)
				parent[key] = textOf(slices.DeleteFunc(entries, func(v any) bool { return digest(strings.TrimSpace(v.(string))) == e.Entry }))
			}
		case digest(value) == e.After:
			delete(parent, key)
			var before any
			if len(e.Before) > 0 && utiljson.Unmarshal(e.Before, &before) == nil {
				parent[key] = before
			}
		}
	}
	return o
}

// union has every edit of a and of b, and those that both have once: after a run that was cut off, nobody knows which of
// the two the object has.
func union(a, b []edit) []edit {
	left := map[string]int{}
	for _, e := range a {
		left[e.id()]++
	}
	all := slices.Clone(a)
	for _, e := range b {
		if left[e.id()] > 0 {
			left[e.id()]--
			continue
		}
		all = append(all, e)
	}
	// What is made comes before what is in it, so that it goes after it.
	slices.SortStableFunc(all, func(a, b edit) int {
		return cmp.Or(cmp.Compare(len(a.Path), len(b.Path)), -cmp.Compare(boolInt(a.Made), boolInt(b.Made)))
	})
	return all
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (e edit) id() string {
	return strings.Join([]string{strings.Join(e.Path, "\x00"), fmt.Sprint(e.Made), e.Entry, e.After, string(e.Before)}, "\x01")
}

// descend follows a path of maps; nil where it does not lead to one.
func descend(o map[string]any, path []string) map[string]any {
	for _, key := range path {
		o, _ = o[key].(map[string]any)
	}
	return o
}

func isEmpty(v any) bool {
	switch v := v.(type) {
	case map[string]any:
		return len(v) == 0
	case []any:
		return len(v) == 0
	case string:
		return v == ""
	}
	return false
}

// digest names a JSON value.
func digest(v any) string {
	data, err := json.Marshal(v) // maps are written in the order of their keys
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// normal is a JSON object with every number as int64 or float64, as the answers of a server are read.
func normal(object any) (map[string]any, error) {
	data, err := json.Marshal(object)
	if err != nil {
		return nil, err
	}
	return decode(data)
}

func decode(data []byte) (map[string]any, error) {
	var o map[string]any
	if err := utiljson.Unmarshal(bytes.TrimSpace(data), &o); err != nil {
		return nil, err
	}
	if o == nil {
		return nil, fmt.Errorf("it is no object")
	}
	return o, nil
}

// clone copies a JSON object's maps; lists and values are never changed in place.
func clone(o map[string]any) map[string]any {
	c := make(map[string]any, len(o))
	for key, value := range o {
		if m, ok := value.(map[string]any); ok {
			value = clone(m)
		}
		c[key] = value
	}
	return c
}
