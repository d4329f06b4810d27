package oam

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/meshery/meshery-filters/internal/meshery"
	"github.com/meshery/meshery-filters/internal/problem"
)

// traits are what a design for servers of OAM can attach to components of this adapter. Each stands for settings of the
// component's.
var traits = []struct {
	name, kind, title string
	settings          []string       // that are properties of the trait
	implied           map[string]any // settings that the trait itself says
}{
	{"WASMFilterPlacement", KindWASMFilter, "Where a WASM filter runs", []string{"mesh", "target", "match", "phase", "priority", "before"}, nil},
	{"ImageHubRateLimit", KindImageHub, "The rate limit filter in front of Image Hub", nil, map[string]any{"rateLimit": true}},
}

// attached is a trait of a design.
type attached struct {
	Name       string
	Properties object
}

// traitDefinitions are the traits for registries of OAM, with the part of the components' forms that they stand for.
func traitDefinitions(forms map[string]string) (all []meshery.Definition, err error) {
	for _, t := range traits {
		var form struct{ Properties map[string]json.RawMessage }
		if err := json.Unmarshal([]byte(forms[t.kind]), &form); err != nil {
			return nil, fmt.Errorf("read the form of %s: %w", t.kind, err)
		}
		maps.DeleteFunc(form.Properties, func(name string, _ json.RawMessage) bool { return !slices.Contains(t.settings, name) })
		schema, err := json.Marshal(map[string]any{"$schema": "http://json-schema.org/draft-07/schema#", "title": t.title, "type": "object",
			"properties": form.Properties, "additionalProperties": false})
		if err != nil {
			return nil, fmt.Errorf("write the form of %s: %w", t.name, err)
		}
		trait, err := definition("TraitDefinition", t.name, map[string]any{"appliesToWorkloads": []string{t.kind}}, nil)
		if err != nil {
			return nil, fmt.Errorf("write the definition of %s: %w", t.name, err)
		}
		all = append(all, meshery.Definition{Kind: t.name, Trait: trait, Schema: string(schema)})
	}
	return all, nil
}

// attach has components get the settings that traits of this adapter attach to them. Others' traits are others' to see to:
// the server sends the configuration, with the traits of all of a design's components, to the adapter of each of them, and
// where MeshMap has drawn a component is a trait, too.
func attach(configuration string, all []component, remove bool) (mistakes []problem.Field) {
	if strings.TrimSpace(configuration) == "" {
		return nil
	}
	var c struct {
		Spec struct {
			Components []struct {
				ComponentName string
				Traits        []attached
			}
		}
	}
	if err := read(configuration, &c); err != nil {
		return []problem.Field{{Path: "oam_config", Cause: "it is not JSON that the adapter can read: " + err.Error()}}
	}
	by, ours := map[string][]attached{}, false
	for _, part := range c.Spec.Components {
		by[part.ComponentName] = append(by[part.ComponentName], part.Traits...)
		ours = ours || slices.ContainsFunc(part.Traits, func(t attached) bool { return traitOf(t.Name) >= 0 })
	}
	for i := range all {
		key, found := keyOf(all[i].name, by)
		switch {
		case found:
		case len(all) > 1 || !ours: // without traits
			continue
		case len(by) == 1: // the server sends them for components that have some
			for key = range by {
			}
		default:
			mistakes = append(mistakes, problem.Field{Path: "oam_config", Cause: fmt.Sprintf("which traits are those of %q cannot be told: the design has it by another name", clip(all[i].name)),
				Remedy: "give it the name that it has as a service of the design"})
			continue
		}
		for _, t := range by[key] {
			mistakes = append(mistakes, all[i].attach(t)...)
		}
	}
	if remove { // which a design that cannot be deployed any longer must not keep from happening
		return nil
	}
	return mistakes
}

// keyOf is what the configuration calls a component: its key in the design, which is its name, or that and the begin of its
// JSON in base64 where MeshMap has drawn it.
func keyOf(name string, by map[string][]attached) (key string, found bool) {
	if _, found := by[name]; found {
		return name, true
	}
	for key := range by {
		if strings.HasPrefix(key, name+"eyJ") && len(key) == len(name)+5 {
			return key, true
		}
	}
	return "", false
}

func traitOf(name string) int {
	for i, t := range traits {
		if t.name == name {
			return i
		}
	}
	return -1
}

// attach adds the settings that a trait stands for.
func (c *component) attach(a attached) (mistakes []problem.Field) {
	i := traitOf(a.Name)
	if i < 0 {
		return nil
	}
	t := traits[i]
	fail := func(remedy, cause string, args ...any) {
		mistakes = append(mistakes, problem.Field{Path: fmt.Sprintf("%s (%s).traits.%s", c.at, clip(c.String()), t.name), Cause: fmt.Sprintf(cause, args...), Remedy: remedy})
	}
	if c.kind != t.kind {
		fail("take it out of the design", "it is a trait of %ss", t.kind)
		return mistakes
	}
	settings := maps.Clone(t.implied)
	if settings == nil {
		settings = map[string]any{}
	}
	for _, name := range slices.Sorted(maps.Keys(a.Properties)) {
		v := prune(a.Properties[name])
		switch {
		case v == nil:
		case !slices.Contains(t.settings, name):
			fail("take it out", "it has no property %q", clip(name))
		default:
			settings[name] = v
		}
	}
	if c.settings == nil {
		c.settings = map[string]any{}
	}
	into := c.settings
	if spec, ok := into["spec"].(map[string]any); ok && c.kind == KindWASMFilter { // where they are, then
		into = spec
	}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		if v := prune(into[name]); v != nil && v != false { // which forms send
			fail("say it in one of them", "%s is among the component's settings, too", name)
			continue
		}
		into[name] = settings[name]
	}
	return mistakes
}
