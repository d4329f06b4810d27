package istiod

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"reflect"
	"slices"
	"strings"

	wasm "github.com/envoyproxy/go-control-plane/envoy/extensions/wasm/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// What the mesh writes into objects.
const (
	digestAnnotation = "filters.meshery.io/sha256"
	// versionVariable is how istiod has a plugin's environment say which resourceVersion it is made of.
	versionVariable = "ISTIO_META_WASM_PLUGIN_RESOURCE_VERSION"
	translated      = "~istio-translated-wasmplugin" // ends the name of what istiod makes of a WasmPlugin
	plugins         = "extensions.istio.io/"
	patches         = "meshery.filters/"
)

// want is one filter that a proxy has to have, as the plan's object says.
type want struct {
	subject string // TrafficExtension/shop/rate-limit-api-0123456789; with one of several of an object .000, .001 … behind it
	object  string // the object's, without that
	ref     plan.Ref
	version string // the object's resourceVersion
	digest  string // of the module
	file    string // where the module lies on the proxies' machines; empty when it comes otherwise
	image   string // the digest of the image that the module comes in, as its address has it; empty when it comes otherwise
	// configuration is a plugin's, and what else it says is its root, environment and strategy; exact is all that an
	// EnvoyFilter says.
	configuration any
	root          string
	environment   environment
	strategy      string
	exact         *wasm.PluginConfig
}

// environment is a sandbox's: what is set, and what is the host's.
type environment struct {
	values map[string]string
	host   []string
}

// wantsOf reads what objects ask of a proxy.
func wantsOf(objects []plan.Object) ([]want, error) {
	var wants []want
	for _, o := range objects {
		u := &unstructured.Unstructured{Object: o.Content}
		x := want{subject: o.String(), object: o.String(), digest: u.GetAnnotations()[digestAnnotation],
			ref: plan.Ref{GroupKind: u.GroupVersionKind().GroupKind(), Namespace: u.GetNamespace(), Name: u.GetName()}}
		spec, _, _ := unstructured.NestedMap(o.Content, "spec")
		switch x.ref.GroupKind {
		case schema.GroupKind{Group: "extensions.istio.io", Kind: "TrafficExtension"}:
			spec, _, _ = unstructured.NestedMap(spec, "wasm")
			fallthrough
		case schema.GroupKind{Group: "extensions.istio.io", Kind: "WasmPlugin"}:
			url, _ := spec["url"].(string)
			x.configuration = spec["pluginConfig"]
			x.file, _ = strings.CutPrefix(url, "file://")
			if x.file == url {
				x.file, x.image = "", imageOf(url)
			}
			x.root, _ = spec["pluginName"].(string)
			x.strategy, _ = spec["failStrategy"].(string)
			x.environment = environmentOf(spec)
		case schema.GroupKind{Group: "networking.istio.io", Kind: "EnvoyFilter"}:
			several, err := patched(spec)
			if err != nil {
				return nil, problem.Internal.New("%s: %w", o, err)
			}
			for _, c := range several {
				x := x
				if subject, ok := subjectOf(c.GetName()); ok && objectOf(subject) == x.object {
					x.subject = subject
				}
				x.exact = c
				code := c.GetVmConfig().GetCode()
				x.file = code.GetLocal().GetFilename()
				if inline := code.GetLocal().GetInlineBytes(); inline != nil {
					sum := sha256.Sum256(inline)
					x.digest = hex.EncodeToString(sum[:])
				} else if remote := code.GetRemote(); remote != nil {
					x.digest, x.image = remote.GetSha256(), imageOf(remote.GetHttpUri().GetUri())
				}
				wants = append(wants, x)
			}
			continue
		default:
			return nil, problem.Internal.New("%s is nothing that a proxy could have", o)
		}
		wants = append(wants, x)
	}
	return wants, nil
}

// imageOf is the digest in the address of an image, which Istio's agent calls the module's file by.
func imageOf(url string) string {
	_, digest, _ := strings.Cut(url, "@sha256:")
	if !strings.HasPrefix(url, "oci://") {
		return ""
	}
	return digest
}

// environmentOf is what a plugin's object says of its sandbox's environment.
func environmentOf(spec map[string]any) environment {
	e := environment{values: map[string]string{}}
	list, _, _ := unstructured.NestedSlice(spec, "vmConfig", "env")
	for _, v := range list {
		v, _ := v.(map[string]any)
		name, _ := v["name"].(string)
		if v["valueFrom"] == "HOST" {
			e.host = append(e.host, name)
		} else {
			e.values[name], _ = v["value"].(string)
		}
	}
	return e
}

// patched are the plugins that an EnvoyFilter puts into proxies, by their names, which is the order that requests meet them.
func patched(spec map[string]any) (plugins []*wasm.PluginConfig, err error) {
	list, _ := spec["configPatches"].([]any)
	for _, p := range list {
		p, _ := p.(map[string]any)
		config, found, _ := unstructured.NestedMap(p, "patch", "value", "typed_config", "config")
		if !found {
			continue
		}
		c, err := pluginOf(config)
		if err != nil {
			return nil, err
		}
		plugins = append(plugins, c)
	}
	if plugins == nil {
		return nil, fmt.Errorf("it patches no plugin in")
	}
	named := func(a, b *wasm.PluginConfig) int { return strings.Compare(a.GetName(), b.GetName()) }
	slices.SortStableFunc(plugins, named)
	// One for each port.
	return slices.CompactFunc(plugins, func(a, b *wasm.PluginConfig) bool { return named(a, b) == 0 }), nil
}

// pluginOf reads a plugin in either of JSON's two forms of protobuf's names.
func pluginOf(config map[string]any) (*wasm.PluginConfig, error) {
	data, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	c := &wasm.PluginConfig{}
	// A proxy or istiod may be newer than what we know.
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, c); err != nil {
		return nil, fmt.Errorf("read a plugin's configuration: %w", err)
	}
	return c, nil
}

func versionOf(o plan.Object) string {
	return (&unstructured.Unstructured{Object: o.Content}).GetResourceVersion()
}

// subjectOf is the want's subject that a filter's name in a proxy stands for, or a plugin's, which may end with its place.
func subjectOf(name string) (subject string, ok bool) {
	kind := "EnvoyFilter"
	name, _, _ = strings.Cut(name, "@")
	rest, ok := strings.CutPrefix(name, patches)
	if !ok {
		if name, ok = strings.CutPrefix(name, plugins); !ok {
			return "", false
		}
		switch kind, rest, _ = strings.Cut(name, "/"); kind {
		case "trafficextension":
			kind = "TrafficExtension"
			if made, ok := strings.CutSuffix(rest, translated); ok {
				kind, rest = "WasmPlugin", made
			}
		case "wasmplugin": // as Istio before 1.30 calls it
			kind = "WasmPlugin"
		default:
			return "", false
		}
	}
	namespace, name, ok := strings.Cut(rest, ".")
	return kind + "/" + namespace + "/" + name, ok
}

// objectOf is the object of a filter's subject. Names of the objects that we make have no dots.
func objectOf(subject string) string {
	object, _, _ := strings.Cut(subject, ".")
	return object
}

// differs says how a plugin that a proxy has is not the one that is wanted; empty means that it is.
func (x want) differs(c *wasm.PluginConfig) string {
	if x.exact != nil {
		have, exact := proto.Clone(c).(*wasm.PluginConfig), proto.Clone(x.exact).(*wasm.PluginConfig)
		if why := x.differsInCode(have); why != "" {
			return why
		}
		if vm := have.GetVmConfig(); vm != nil {
			vm.Code = nil
			exact.GetVmConfig().Code = nil
		}
		if !proto.Equal(have, exact) {
			return "its configuration is another"
		}
		return ""
	}
	if v := c.GetVmConfig().GetEnvironmentVariables().GetKeyValues()[versionVariable]; v != "" && older(v, x.version) {
		return "it is an older one"
	}
	if why := x.differsInCode(c); why != "" {
		return why
	}
	if !x.configured(c) || c.GetRootId() != x.root {
		return "its configuration is another"
	}
	// Istio's agent takes the version away from what it fetches, so that a change of nothing but these shows in them alone.
	//lint:ignore SA1019 an older istiod says it so
	open := c.GetFailOpen() || c.GetFailurePolicy() == wasm.FailurePolicy_FAIL_OPEN
	reload := c.GetFailurePolicy() == wasm.FailurePolicy_FAIL_RELOAD
	if open != (x.strategy == "FAIL_OPEN") || reload != (x.strategy == "FAIL_RELOAD") {
		return "its failure policy is another"
	}
	v := c.GetVmConfig().GetEnvironmentVariables()
	set := maps.Clone(v.GetKeyValues())
	maps.DeleteFunc(set, func(name, _ string) bool { return strings.HasPrefix(name, "ISTIO_META_") })
	if !maps.Equal(set, x.environment.values) || !slices.Equal(v.GetHostEnvKeys(), x.environment.host) {
		return "its environment is another"
	}
	return ""
}

// differsInCode compares where the module comes from, and its digest where that is told.
func (x want) differsInCode(c *wasm.PluginConfig) string {
	const other = "its module is another"
	code := c.GetVmConfig().GetCode()
	local, remote := code.GetLocal(), code.GetRemote()
	switch {
	case local.GetFilename() != "" && x.file != "":
		if local.GetFilename() != x.file {
			return other
		}
	case local.GetFilename() != "": // Istio's agent has fetched it, and names the file by its digest
		if !strings.HasPrefix(path.Base(local.GetFilename()), cmp.Or(x.image, x.digest)) {
			return other
		}
	case local != nil:
		if sum := sha256.Sum256(local.GetInlineBytes()); hex.EncodeToString(sum[:]) != x.digest {
			return other
		}
	case remote != nil:
		if x.image == "" && remote.GetSha256() != x.digest || x.image != imageOf(remote.GetHttpUri().GetUri()) {
			return other
		}
	default:
		return "it has no module"
	}
	return ""
}

// configured compares a plugin's configuration with the object that istiod hands on as text.
func (x want) configured(c *wasm.PluginConfig) bool {
	text := &wrapperspb.StringValue{}
	if c.GetConfiguration().GetTypeUrl() != "" && c.GetConfiguration().UnmarshalTo(text) != nil {
		return false
	}
	if x.configuration == nil || text.Value == "" {
		return x.configuration == nil && text.Value == ""
	}
	planned, err := json.Marshal(x.configuration)
	return err == nil && reflect.DeepEqual(decoded(planned), decoded([]byte(text.Value)))
}

// decoded is JSON with numbers as the doubles that protobuf's Struct makes of them.
func decoded(data []byte) (v any) {
	if json.NewDecoder(bytes.NewReader(data)).Decode(&v) != nil {
		return nil
	}
	return v
}

// older says whether a resourceVersion comes before another; they are decimal numbers.
func older(a, b string) bool {
	return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b)) < 0
}
