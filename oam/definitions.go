package oam

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/meshery"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/templates"
)

// ImageHubSettings are what the form of an ImageHub component has.
type ImageHubSettings struct {
	// RateLimit puts the rate limit filter in front of Image Hub as well.
	RateLimit bool `json:"rateLimit,omitempty"`
}

// How Meshery shows the components. The colours are those of the icons.
const (
	primaryColor   = "#0b6e63"
	secondaryColor = "#5fb3a8"
	// definitionVersion is of the definitions themselves. It grows with them.
	definitionVersion = "v1.0.0"
)

// components are what a design can hold of this adapter, as Meshery lists them.
var components = []struct{ kind, title, description string }{
	{KindWASMFilter, "WASM Filter", "A WebAssembly filter in running Envoy proxies."},
	{KindImageHub, "Image Hub", "The sample application whose pulls a rate limit filter counts."},
}

// Definitions are the adapter's components for Meshery's registries, for each version of Envoy that it lists, newest first.
// The model has the adapter's name, which is where Meshery UI looks for the versions that it lets users choose. addr is where
// servers reach the adapter: the newest take a model for the one that they have, with the address that it had, unless the
// registrant in it is another.
//
// The traits come last, for servers that know of OAM only.
func Definitions(versions []string, addr string) ([]meshery.Definition, error) {
	var all []meshery.Definition
	forms := map[string]string{}
	for i, version := range versions {
		for _, c := range components {
			parts, err := templates.MeshmodelComponent(c.kind)
			if err != nil {
				return nil, err
			}
			forms[c.kind] = parts.Schema
			look := map[string]any{"primaryColor": primaryColor, "secondaryColor": secondaryColor, "shape": "round-rectangle",
				"svgColor": parts.Icon, "svgWhite": parts.WhiteIcon, "svgComplete": ""}
			model, err := templates.MeshmodelComponent(KindWASMFilter)
			if err != nil {
				return nil, err
			}
			entity, err := json.Marshal(map[string]any{
				// Of v1alpha1.
				"kind": c.kind, "apiVersion": filter.APIVersion, "schema": parts.Schema,
				// Of v1beta1 and later.
				"schemaVersion": "components.meshery.io/v1beta1", "version": definitionVersion, "description": c.description, "status": "enabled",
				"styles": look, "configuration": map[string]any{},
				"component": map[string]any{"kind": c.kind, "version": filter.APIVersion, "schema": parts.Schema},
				// Of both.
				"displayName": c.title, "format": "JSON",
				"metadata": merged(look, map[string]any{"genealogy": "", "isAnnotation": false, "isNamespaced": true, "published": true,
					"configurationUISchema": uiSchema(c.kind)}),
				"model": map[string]any{"schemaVersion": "models.meshery.io/v1beta1", "name": operation.ComponentName, "displayName": "Envoy Filters",
					"description": "WebAssembly filters in running Envoy proxies.", "version": version, "status": "enabled",
					"category": map[string]any{"name": "Cloud Native Network", "metadata": nil}, "registrant": map[string]any{"kind": operation.ComponentName, "name": addr},
					"metadata": map[string]any{"primaryColor": primaryColor, "secondaryColor": secondaryColor, "svgColor": model.Icon, "svgWhite": model.WhiteIcon, "isAnnotation": false},
					"model":    map[string]any{"version": version}},
			})
			if err != nil {
				return nil, fmt.Errorf("write the definition of %s: %w", c.kind, err)
			}
			d := meshery.Definition{Kind: c.kind, Version: version, Entity: entity}
			if i == 0 {
				d.Schema = parts.Schema
				if d.Workload, err = definition("WorkloadDefinition", c.kind, map[string]any{}, map[string]any{"version": version}); err != nil {
					return nil, fmt.Errorf("write the workload definition of %s: %w", c.kind, err)
				}
			}
			all = append(all, d)
		}
	}
	traits, err := traitDefinitions(forms)
	return append(all, traits...), err
}

// definition is one that servers take which know of OAM only.
func definition(kind, name string, spec, metadata map[string]any) ([]byte, error) {
	spec["definitionRef"] = map[string]any{"name": strings.ToLower(name) + ".filters.meshery.io"}
	spec["metadata"] = merged(map[string]any{"adapter.meshery.io/name": operation.ComponentName}, metadata)
	return json.Marshal(map[string]any{"apiVersion": "core.oam.dev/v1alpha1", "kind": kind, "metadata": map[string]any{"name": name}, "spec": spec})
}

// uiSchema has forms give a configuration more than one line.
func uiSchema(kind string) string {
	if kind == KindWASMFilter {
		return `{"config":{"ui:widget":"textarea"}}`
	}
	return "{}"
}

// merged is a with what b adds.
func merged(a, b map[string]any) map[string]any {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return all
}
