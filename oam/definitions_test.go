package oam_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/oam"
)

var updateDefinitions = flag.Bool("update-definitions", false, "write the golden definitions anew")

func TestTheDefinitionsAreTheGoldenOnes(t *testing.T) {
	all, err := oam.Definitions([]string{"1.40.0", "1.39.3"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range all {
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
		path := filepath.Join("testdata", "definitions", name+".json")
		if *updateDefinitions {
			if err := os.WriteFile(path, got.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%s is not as in %s (%v); if that is meant: go test ./oam -run Definitions -update-definitions", name, path, err)
		}
	}
	if got := strings.Join(names, " "); got != "WASMFilter-1.40.0 ImageHub-1.40.0 WASMFilter-1.39.3 ImageHub-1.39.3" {
		t.Errorf("the definitions are %s", got)
	}
}

// Meshery UI reads the versions of the model that is called like the adapter.
func TestTheModelIsWhereMesheryUILooksForVersions(t *testing.T) {
	all, err := oam.Definitions([]string{"1.40.0"})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range all {
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
	all, err := oam.Definitions([]string{"1.40.0"})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range all {
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
