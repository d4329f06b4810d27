package consul

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// What is ours says so: an entry in its Meta, and a plan's object by this label.
const (
	managedBy      = "managed-by"
	managedByLabel = "app.kubernetes.io/managed-by"
	manager        = "meshery-filters"
	pushed         = "meshery-filters-pushed"   // in an entry's Meta: when it was written once more
	spoken         = "meshery-filters-protocol" // in the Meta of an entry that we made: the protocol that we had it say
)

const group = "consul.hashicorp.com"

// kinds are Consul's names of the kinds that carry extensions, by Kubernetes'.
var kinds = map[string]string{"ServiceDefaults": "service-defaults", "ProxyDefaults": "proxy-defaults"}

// bookkeeping are the fields of an entry that are none of its settings.
var bookkeeping = []string{"Kind", "Name", "Meta", "CreateIndex", "ModifyIndex", "Hash", "Namespace", "Partition"}

// entry is a configuration entry as Consul has it.
type entry struct {
	kind, name string
	raw        map[string]any // nil: there is none
	index      uint64
}

func (e entry) String() string { return e.kind + "/" + e.name }

func (c *Client) entry(ctx context.Context, kind, name string) (e entry, err error) {
	e = entry{kind: kind, name: name}
	found, err := c.get(ctx, call{path: "/v1/config/" + kind + "/" + url.PathEscape(name), global: kind == "proxy-defaults"}, &e.raw)
	if err != nil || !found {
		return e, err
	}
	index, _ := e.raw["ModifyIndex"].(json.Number)
	if e.index, err = strconv.ParseUint(index.String(), 10, 64); err != nil {
		return e, problem.ConsulRefused.New("%s: %s has no index", c, e)
	}
	if e.meta()["external-source"] == "kubernetes" {
		return e, problem.ConsulKubernetes.New("%s: %s", c, e)
	}
	return e, nil
}

func (e entry) meta() map[string]any { m, _ := e.raw["Meta"].(map[string]any); return m }

// speaksForUs says whether the protocol that the entry says is the one that we had it say.
func (e entry) speaksForUs() bool {
	return e.raw["Protocol"] != nil && e.raw["Protocol"] == e.meta()[spoken]
}

// object is the entry as Kubernetes would show it, without what is ours.
func (e entry) object(kind, namespace string) plan.Object {
	spec := map[string]any{}
	for k, v := range e.raw {
		if !slices.Contains(bookkeeping, k) {
			spec[camel(k)] = v
		}
	}
	var theirs []any
	for _, x := range e.extensions() {
		if !strings.HasPrefix(pluginOf(x), plugins) {
			theirs = append(theirs, plain(x))
		}
	}
	if e.speaksForUs() {
		delete(spec, "protocol")
	}
	delete(spec, "envoyExtensions")
	if theirs != nil {
		spec["envoyExtensions"] = theirs
	}
	metadata := map[string]any{"name": e.name}
	if namespace != "" {
		metadata["namespace"] = namespace
	}
	if e.meta()[managedBy] == manager {
		metadata["labels"] = map[string]any{managedByLabel: manager}
	}
	return plan.Object{Content: map[string]any{"apiVersion": group + "/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}}
}

// camel is a field's name as Kubernetes has it.
func camel(s string) string { return strings.ToLower(s[:1]) + s[1:] }

func (e entry) extensions() (all []map[string]any) {
	list, _ := e.raw["EnvoyExtensions"].([]any)
	for _, v := range list {
		x, _ := v.(map[string]any)
		all = append(all, x)
	}
	return all
}

// plain is an extension with the fields that matter to us, under the names that Kubernetes has for them.
func plain(x map[string]any) map[string]any {
	return map[string]any{"name": field(x, "name"), "required": field(x, "required") == true, "arguments": field(x, "arguments")}
}

// with is the entry's content with these extensions in the place of those whose plugins have the names; nil: nothing is
// left of it that is not ours. Where none of them is there yet, they come after as many of the user's as at says.
func (e entry) with(ours []map[string]any, names []string, at int) map[string]any {
	all := e.extensions()
	mine := func(x map[string]any) bool { return slices.Contains(names, pluginOf(x)) }
	if i := slices.IndexFunc(all, mine); i >= 0 {
		at = i
	}
	list := slices.DeleteFunc(all, mine)
	list = slices.Insert(list, min(at, len(list)), ours...)
	raw := maps.Clone(e.raw)
	if raw == nil {
		raw = map[string]any{"Meta": map[string]any{managedBy: manager}}
		arguments, _ := field(ours[0], "arguments").(map[string]any)
		if protocol, _ := field(arguments, "protocol").(string); e.kind == "service-defaults" {
			// The service has it from elsewhere. An entry that does not say it makes Consul give the callers another cluster.
			raw["Protocol"], raw["Meta"] = protocol, map[string]any{managedBy: manager, spoken: protocol}
		}
	}
	raw["Kind"], raw["Name"] = e.kind, e.name
	for _, k := range []string{"CreateIndex", "ModifyIndex", "Hash", "EnvoyExtensions"} {
		delete(raw, k)
	}
	if len(list) > 0 {
		all := make([]any, len(list))
		for i, x := range list {
			all[i] = x
		}
		raw["EnvoyExtensions"] = all
	}
	if slices.ContainsFunc(list, func(x map[string]any) bool { return strings.HasPrefix(pluginOf(x), plugins) }) {
		return raw
	}
	// With the last of ours goes what says so.
	meta, _ := raw["Meta"].(map[string]any)
	meta = maps.Clone(meta)
	made := meta[managedBy] == manager
	if e.speaksForUs() {
		delete(raw, "Protocol")
	}
	delete(meta, spoken)
	delete(meta, managedBy)
	delete(meta, pushed)
	delete(raw, "Meta")
	if len(meta) > 0 {
		raw["Meta"] = meta
	}
	if made && len(meta) == 0 && isBare(raw) {
		return nil
	}
	return raw
}

// isBare says whether an entry sets nothing.
func isBare(raw map[string]any) bool {
	return !slices.ContainsFunc(slices.Collect(maps.Keys(raw)), func(k string) bool {
		return !slices.Contains(bookkeeping, k) && !isZero(raw[k])
	})
}

// isZero says whether a field is as Consul shows one that was not set.
func isZero(v any) bool {
	switch v := v.(type) {
	case map[string]any:
		return len(v) == 0
	case []any:
		return len(v) == 0
	case json.Number:
		return v == "0"
	}
	return v == nil || v == "" || v == false
}

// same says whether writing raw would change nothing.
func (e entry) same(raw map[string]any) bool {
	if e.raw == nil || raw == nil {
		return e.raw == nil && raw == nil
	}
	next := entry{raw: raw}
	a, b := e.extensions(), next.extensions()
	return reflect.DeepEqual(e.meta(), next.meta()) && slices.EqualFunc(a, b, func(x, y map[string]any) bool {
		return canonical(plain(x)) == canonical(plain(y))
	})
}

func canonical(v any) string {
	data, err := json.Marshal(v) // with the keys of maps in order
	if err != nil {
		return fmt.Sprint(v)
	}
	return string(data)
}

// put writes the content that the entry gets, or deletes it, unless somebody else has changed it since it was read.
func (c *Client) put(ctx context.Context, e entry, raw map[string]any) (done bool, err error) {
	global := e.kind == "proxy-defaults"
	if raw == nil {
		return c.swap(ctx, call{method: http.MethodDelete, path: "/v1/config/" + e.kind + "/" + url.PathEscape(e.name), global: global}, e.index)
	}
	return c.swap(ctx, call{method: http.MethodPut, path: "/v1/config", body: raw, global: global}, e.index)
}

// entryOf reads the entry that an object of a plan stands for.
func (c *Client) entryOf(ctx context.Context, o plan.Object) (entry, error) {
	u := &unstructured.Unstructured{Object: o.Content}
	kind, ok := kinds[u.GetKind()]
	if !ok || u.GroupVersionKind().Group != group {
		return entry{}, problem.Internal.New("%s is nothing that Consul keeps", o)
	}
	return c.entry(ctx, kind, u.GetName())
}
