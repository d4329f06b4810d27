package oam_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/internal/meshery"
	"github.com/meshery/meshery-filters/oam"
)

var updateDefinitions = flag.Bool("update-definitions", false, "write the golden definitions anew")

func TestTheDefinitionsAreTheGoldenOnes(t *testing.T) {
	all, err := oam.Definitions([]string{"1.40.0", "1.39.3"}, "adapter.example:10014")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range all {
		if d.Trait != nil {
			names = append(names, d.Kind)
			var got bytes.Buffer
			if err := json.Indent(&got, d.Trait, "", "  "); err != nil || !json.Valid([]byte(d.Schema)) || d.Entity != nil || d.Workload != nil {
				t.Fatalf("%s: %v", d.Kind, err)
			}
			golden(t, d.Kind, got.Bytes())
			continue
		}
		name := d.Kind + "-" + d.Version
		names = append(names, name)
		if (d.Workload == nil) != (d.Version == "1.39.3") {
			t.Errorf("%s: OAM has one definition of each kind, and this is %s", name, d.Workload)
		}
		// The forms have a test of their own, and change with every word that is said of a setting.
		var form struct{ Schema json.RawMessage }
		if err := json.Unmarshal(d.Entity, &form); err != nil {
			t.Fatal(err)
		}
		entity := bytes.ReplaceAll(d.Entity, form.Schema, []byte(`"(the form)"`))
		var got bytes.Buffer
		for _, text := range []json.RawMessage{entity, d.Workload} {
			if err := json.Indent(&got, text, "", "  "); len(text) > 0 && err != nil {
				t.Fatal(err)
			}
			got.WriteByte('\n')
		}
		golden(t, name, got.Bytes())
	}
	if got := strings.Join(names, " "); got != "WASMFilter-1.40.0 ImageHub-1.40.0 WASMFilter-1.39.3 ImageHub-1.39.3 WASMFilterPlacement ImageHubRateLimit" {
		t.Errorf("the definitions are %s", got)
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", "definitions", name+".json")
	if *updateDefinitions {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s is not as in %s (%v); if that is meant: go test ./oam -run Definitions -update-definitions", name, path, err)
	}
}

// Meshery UI reads the versions of the model that is called like the adapter.
func TestTheModelIsWhereMesheryUILooksForVersions(t *testing.T) {
	all, err := oam.Definitions([]string{"1.40.0"}, "adapter.example:10014")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range components(all) {
		var e struct {
			Schema    string
			Component struct{ Kind, Version, Schema string }
			Model     struct {
				Name, Version string
				Model         struct{ Version string }
			}
			Metadata map[string]any
		}
		if err := json.Unmarshal(d.Entity, &e); err != nil {
			t.Fatal(err)
		}
		if e.Model.Name != "meshery-filters" || e.Model.Version != "1.40.0" || e.Model.Model.Version != "1.40.0" {
			t.Errorf("the model of %s is %+v", d.Kind, e.Model)
		}
		if e.Metadata["isAnnotation"] != false || e.Component.Kind != d.Kind || e.Schema != e.Component.Schema || !json.Valid([]byte(e.Schema)) {
			t.Errorf("%s is %+v", d.Kind, e)
		}
	}
}

// What a form offers, the reader of designs takes.
func TestEverySettingOfTheFormsIsTakenInADesign(t *testing.T) {
	all, err := oam.Definitions([]string{"1.40.0"}, "adapter.example:10014")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range components(all) {
		var form struct{ Properties map[string]json.RawMessage }
		if err := json.Unmarshal([]byte(d.Schema), &form); err != nil || len(form.Properties) == 0 {
			t.Fatalf("%s has a form of %d settings: %v", d.Kind, len(form.Properties), err)
		}
		form.Properties["invented"] = nil // so that it is seen to be refused
		for name := range form.Properties {
			settings := map[string]any{name: "x"} // of whatever type: what matters is the name
			if d.Kind == oam.KindWASMFilter && name != "module" {
				settings["module"] = map[string]any{"builtin": "headers"}
			} else if name == "module" {
				settings[name] = map[string]any{"builtin": "headers"}
			}
			component, err := json.Marshal(map[string]any{"metadata": map[string]any{"name": "x"}, "spec": map[string]any{"type": d.Kind, "settings": settings}})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := oam.OAM([]string{string(component)}, "", false); (err != nil && strings.Contains(err.Error(), "there is no such")) != (name == "invented") {
				t.Errorf("%s.%s: %v", d.Kind, name, err)
			}
		}
	}
}

// components leaves out traits.
func components(all []meshery.Definition) []meshery.Definition {
	return slices.DeleteFunc(all, func(d meshery.Definition) bool { return d.Trait != nil })
}

// What the form of a trait offers, the reader of designs takes as the settings that they are.
func TestEveryPropertyOfTheTraitsIsTheSettingOfThatName(t *testing.T) {
	all, err := oam.Definitions([]string{"1.40.0"}, "adapter.example:10014")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, d := range all {
		if d.Trait == nil || d.Kind != "WASMFilterPlacement" {
			continue
		}
		var form struct{ Properties map[string]json.RawMessage }
		if err := json.Unmarshal([]byte(d.Schema), &form); err != nil {
			t.Fatal(err)
		}
		for name := range form.Properties {
			seen++
			bodies := map[bool]string{}
			value := map[string]string{"mesh": `"istio"`, "target": `{"kind":"Workload","labels":{"app":"x"}}`, "match": `{"ports":[80]}`, "phase": `"authn"`, "priority": "7", "before": `"envoy.filters.http.router"`}[name]
			for _, by := range []bool{false, true} {
				setting, config := `,"`+name+`":`+value, ""
				if by {
					setting, config = "", `{"spec":{"Components":[{"ComponentName":"x","Traits":[{"Name":"WASMFilterPlacement","Properties":{"`+name+`":`+value+`}}]}]}}`
				}
				steps, err := oam.OAM([]string{`{"metadata":{"name":"x"},"spec":{"type":"WASMFilter","settings":{"module":{"builtin":"headers"}` + setting + `}}}`}, config, false)
				if err != nil || len(steps) != 1 {
					t.Fatalf("%s: %v", name, err)
				}
				bodies[by] = steps[0].Request.Body
			}
			if bodies[true] != bodies[false] || !strings.Contains(bodies[true], `"`+name+`":`) {
				t.Errorf("the trait says %s and the setting %s", bodies[true], bodies[false])
			}
		}
	}
	if seen != 6 {
		t.Errorf("there are %d properties", seen)
	}
}

func TestTraitsAreForTheComponentsThatTheyAreAttachedTo(t *testing.T) {
	part := func(name, trait, properties string) string {
		return `{"ComponentName":"` + name + `","Traits":[{"Name":"meshmap","Properties":{"position":{"posX":1,"posY":2}}},{"Name":"` + trait + `","Properties":` + properties + `}]}`
	}
	const place = "WASMFilterPlacement"
	hub, filter := `{"metadata":{"name":"hub"},"spec":{"type":"ImageHub","settings":{"rateLimit":false}}}`,
		`{"metadata":{"name":"limit"},"spec":{"type":"WASMFilter","settings":{"module":{"builtin":"headers"},"priority":3}}}`
	for reason, c := range map[string]struct {
		components []string
		parts      []string
		operations string
		says       string // the last document, or the error
	}{
		"the rate limit":                         {[]string{hub}, []string{part("hub", "ImageHubRateLimit", "null")}, "imagehub imagehub_rate_limit", ``},
		"others' traits":                         {[]string{hub}, []string{part("hub", "mTLS", `{"policy":"strict"}`)}, "imagehub", ``},
		"another component's trait":              {[]string{hub}, []string{part("hub", "mTLS", "{}"), part("limit", place, `{"phase":"authn"}`)}, "imagehub", ``},
		"several components":                     {[]string{hub, filter}, []string{part("limit", place, `{"phase":"authn"}`)}, "imagehub apply_filter", `"phase":"authn"`},
		"a component that MeshMap has drawn":     {[]string{filter}, []string{part("limiteyJ0e", place, `{"phase":"authn"}`), part("hubeyJ0e", "ImageHubRateLimit", "{}")}, "apply_filter", `"phase":"authn"`},
		"the only one, by the key of its design": {[]string{filter}, []string{part("my-filter", place, `{"phase":"authn"}`)}, "apply_filter", `"phase":"authn"`},
		"one of several, by such a key":          {[]string{filter}, []string{part("my-filter", place, `{"phase":"authn"}`), part("hub", "mTLS", "{}")}, "", `which traits are those of "limit" cannot be told`},
		"a trait of the other kind":              {[]string{hub}, []string{part("hub", place, "{}")}, "", `it is a trait of WASMFilters`},
		"a property that it does not have":       {[]string{filter}, []string{part("limit", place, `{"module":{"builtin":"ratelimit"}}`)}, "", `it has no property "module"`},
		"what the settings say, too":             {[]string{filter}, []string{part("limit", place, `{"priority":4}`)}, "", `priority is among the component's settings, too`},
		"settings in the form of an object":      {[]string{`{"metadata":{"name":"limit"},"spec":{"type":"WASMFilter","settings":{"spec":{"module":{"builtin":"headers"}}}}}`}, []string{part("limit", place, `{"phase":"authn"}`)}, "apply_filter", `"phase":"authn"`},
		"what a form leaves empty":               {[]string{filter}, []string{part("limit", place, `{"priority":null,"mesh":"","target":{"kind":""}}`)}, "apply_filter", ``},
	} {
		steps, err := oam.OAM(c.components, `{"spec":{"Components":[`+strings.Join(c.parts, ",")+`]}}`, false)
		var operations []string
		text := fmt.Sprint(err)
		for _, s := range steps {
			operations, text = append(operations, s.Request.Operation), s.Request.Body
		}
		if got := strings.Join(operations, " "); got != c.operations || !strings.Contains(text, c.says) {
			t.Errorf("%s: %q, %s; want %q, %s", reason, got, text, c.operations, c.says)
		}
	}
	// What a trait says counts for a removal, too, and what is wrong with it does not.
	steps, err := oam.OAM([]string{hub}, `{"spec":{"Components":[`+part("hub", "ImageHubRateLimit", `{"a":1}`)+`]}}`, true)
	if err != nil || len(steps) != 2 || steps[0].Request.Operation != "imagehub_rate_limit" {
		t.Errorf("%+v %v", steps, err)
	}
}
