package oam

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/templates"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// split tells the two forms of a component apart: a definition says what it is below component.
func split(components []string) (oam, declarations []string) {
	for _, c := range components {
		if strings.Contains(c, `"component":`) {
			declarations = append(declarations, c)
		} else {
			oam = append(oam, c)
		}
	}
	return oam, declarations
}

// Each file is a design's components, and its golden file what is done with them, as a person would read it.
func TestDesignsBecomeOperations(t *testing.T) {
	files, err := filepath.Glob("testdata/designs/*.in.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no designs: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".in.json"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var raw []json.RawMessage
			if err := json.Unmarshal(text, &raw); err != nil {
				t.Fatal(err)
			}
			var components []string
			for _, r := range raw {
				var b bytes.Buffer
				if err := json.Compact(&b, r); err != nil {
					t.Fatal(err)
				}
				components = append(components, b.String())
			}
			var out strings.Builder
			show := func(what string, steps []Step, err error) {
				fmt.Fprintf(&out, "# %s\n", what)
				if err != nil {
					p := problem.Of(err)
					fmt.Fprintf(&out, "%s: %s\n", p.Kind.Code, p.Error())
				}
				for _, s := range steps {
					fmt.Fprintf(&out, "%s: %s", s.Component, s.Request.Operation)
					if s.Request.Delete {
						fmt.Fprint(&out, ", delete")
					}
					fmt.Fprintf(&out, " in %q\n", s.Request.Namespace)
					if s.Request.Body == "" {
						continue
					}
					var b bytes.Buffer
					if err := json.Indent(&b, []byte(s.Request.Body), "  ", "  "); err != nil {
						t.Fatal(err)
					}
					fmt.Fprintf(&out, "  %s\n", b.String())
				}
			}
			oam, declarations := split(components)
			for _, remove := range []bool{false, true} {
				done := map[bool]string{false: "deployed", true: "removed"}[remove]
				if len(oam) > 0 {
					steps, err := OAM(oam, `{"metadata":{"creationTimestamp":null},"spec":{"Components":null}}`, remove)
					show(done+" by ProcessOAM", steps, err)
				}
				if len(declarations) > 0 {
					steps, err := Declarations(declarations, remove)
					show(done+" by Provision", steps, err)
				}
			}
			golden := strings.Replace(file, ".in.json", ".txt", 1)
			if *update {
				if err := os.WriteFile(golden, []byte(out.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil || out.String() != string(want) {
				t.Errorf("%s differs; if it should, run: go test ./oam -update\n%s", golden, out.String())
			}
		})
	}
}

func TestADesignIsBounded(t *testing.T) {
	one := `{"metadata":{"name":"a"},"spec":{"type":"WASMFilter","settings":{"module":{"builtin":"headers"}}}}`
	setting := func(s string) string {
		return strings.Replace(one, `{"builtin":"headers"}`, `{"builtin":"headers"},"config":`+s, 1)
	}
	for reason, c := range map[string]struct {
		components []string
		config     string
		says       string
	}{
		"no component":            {nil, "", "there is no component"},
		"too many components":     {make([]string, 101), "", "at most 100"},
		"no JSON":                 {[]string{`{"metadata"`}, "", "oam_comps[0]"},
		"two values":              {[]string{one + one}, "", "something follows it"},
		"a list":                  {[]string{`[]`}, "", "oam_comps[0]"},
		"settings that are text":  {[]string{`{"spec":{"settings":"secret-word"}}`}, "", "oam_comps[0]"},
		"a deep value":            {[]string{setting(strings.Repeat("[", 200) + strings.Repeat("]", 200))}, "", "too deep"},
		"a million empty objects": {[]string{setting("[" + strings.Repeat("{},", 1_000_000) + "{}]")}, "", "too many values"},
		"a component of 31 MiB":   {[]string{setting(`"` + strings.Repeat("a", 31<<20) + `"`)}, "", "too large"},
		"a foreign property":      {[]string{one}, `{"spec":{"Components":[{"ComponentName":"a","Traits":[{"Name":"WASMFilterPlacement","Properties":{"secret-key":"secret-word"}}]}]}}`, "secret-key"},
		"too many patches":        {[]string{`{"metadata":{"name":"e"},"spec":{"type":"EnvoyFilter","settings":{"configPatches":[` + strings.Repeat(`{},`, 100) + `{}]}}}`}, "", "there are 101 patches"},
		"no configuration":        {[]string{one}, `{`, "oam_config"},
	} {
		steps, err := OAM(c.components, c.config, false)
		if !errors.Is(err, problem.InvalidDesign) || len(steps) != 0 || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %.300v, want one that says %q", reason, err, c.says)
		}
		if err != nil && (len(err.Error()) > 2000 || strings.Contains(err.Error(), "secret-word")) {
			t.Errorf("%s: the text has %d bytes: %.300s", reason, len(err.Error()), err)
		}
	}
	hundred := make([]string, 100)
	for i := range hundred {
		hundred[i] = strings.Replace(one, `"a"`, fmt.Sprintf(`"a%d"`, i), 1)
	}
	if steps, err := OAM(hundred, `{"spec":{"Components":null}}`, false); err != nil || len(steps) != 100 {
		t.Errorf("100 components: %.300v", err)
	}
	large := setting(`"` + strings.Repeat("YWFh", 5<<20) + `"`)
	if steps, err := OAM([]string{large}, "", false); err != nil || len(steps) != 1 {
		t.Errorf("20 MiB of base64: %.300v", err)
	}
	// A removal needs no more than to know which filter is meant.
	if steps, err := OAM([]string{`{"metadata":{"name":"a"},"spec":{"type":"WASMFilter","settings":{"nonsense":1,"context":"ANY"}}}`}, "", true); err != nil || len(steps) != 1 {
		t.Errorf("the removal of what could not be deployed: %v", err)
	}
}

// Whatever a design relates is read once: with each config read for each patch this would take minutes.
func TestADesignWithLongConfigsAndManyPatchesIsReadSoon(t *testing.T) {
	var config strings.Builder
	for i := 0; config.Len() < 15_000; i++ {
		fmt.Fprintf(&config, "key-%d: value\n", i)
	}
	var all []string
	for i := range 98 {
		all = append(all, fmt.Sprintf(`{"metadata":{"name":"a%d"},"spec":{"type":"WASMFilter","settings":{"module":{"builtin":"headers"},"config":%q}}}`, i, fmt.Sprint("n: ", i, "\n", config.String())))
	}
	all = append(all, fmt.Sprintf(`{"metadata":{"name":"e"},"spec":{"type":"EnvoyFilter","settings":{"configPatches":[%s{}]}}}`,
		strings.Repeat(fmt.Sprintf(`{"patch":{"value":%q}},`, config.String()), 99)))
	begun := time.Now()
	if _, err := OAM(all, "", false); !errors.Is(err, problem.InvalidDesign) || !strings.Contains(err.Error(), "texts that may be YAML") {
		t.Errorf("it is read: %.300v", err)
	}
	if took := time.Since(begun); took > 40*time.Second {
		t.Errorf("it took %v", took)
	}
	// Without an EnvoyFilter none of them is tried.
	if steps, err := OAM(all[:98], "", false); err != nil || len(steps) != 98 {
		t.Errorf("the WASMFilters alone: %.300v", err)
	}
}

// What the forms of Meshery's page have is what designs are read for.
func TestEverySettingOfTheFormsIsRead(t *testing.T) {
	for kind, known := range map[string]func(string) bool{
		KindWASMFilter: func(name string) bool { return slices.Contains(specFields, name) },
		KindImageHub:   func(name string) bool { return name == "rateLimit" },
	} {
		parts, err := templates.MeshmodelComponent(kind)
		if err != nil {
			t.Fatal(err)
		}
		var form struct{ Properties map[string]json.RawMessage }
		if err := json.Unmarshal([]byte(parts.Schema), &form); err != nil || len(form.Properties) == 0 {
			t.Fatalf("%s: %d settings, %v", kind, len(form.Properties), err)
		}
		for name := range form.Properties {
			if !known(name) {
				t.Errorf("%s: the form's setting %s is not read", kind, name)
			}
		}
	}
}

// FuzzDesign reads any text as a component of either generation. Whatever it makes of it is a document that the adapter
// reads, and what it refuses it refuses in words.
func FuzzDesign(f *testing.F) {
	files, err := filepath.Glob("testdata/designs/*.in.json")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		var raw []json.RawMessage
		if err := json.Unmarshal(text, &raw); err != nil {
			f.Fatal(err)
		}
		for i, r := range raw {
			f.Add(string(r), string(raw[len(raw)-1-i]), i%2 == 0)
		}
	}
	f.Fuzz(func(t *testing.T, one, other string, remove bool) {
		for _, read := range []func() ([]Step, error){
			func() ([]Step, error) { return OAM([]string{one, other}, "", remove) },
			func() ([]Step, error) { return OAM([]string{one}, other, remove) },
			func() ([]Step, error) { return Declarations([]string{one, other}, remove) },
		} {
			steps, err := read()
			if err != nil {
				if p := problem.Of(err); p.Kind != problem.InvalidDesign && p.Kind != problem.ForeignComponent || len(steps) != 0 || p.Details == "" {
					t.Fatalf("%v with %d operations", err, len(steps))
				}
				continue
			}
			for _, s := range steps {
				if s.Request.Delete != remove || !utf8.ValidString(s.Request.Body) {
					t.Fatalf("%+v", s)
				}
				if s.Request.Body == "" {
					continue
				}
				readAgain := filter.Read
				if remove {
					readAgain = filter.ReadKeys
				}
				filters, err := readAgain([]byte(s.Request.Body), "")
				if err != nil || len(filters) != 1 || filters[0].Key.Namespace != s.Request.Namespace {
					t.Fatalf("%s\n%v", s.Request.Body, err)
				}
			}
		}
	})
}

func TestComponentsWhoseNamesComeToTheSameAreToldApart(t *testing.T) {
	seen := map[string]string{}
	for _, kind := range []string{KindWASMFilter, KindEnvoyFilter} {
		for _, name := range []string{"my-filter", "My-Filter", "My Filter", "my filter", "my_filter", "mÿ-filter", strings.Repeat("x", 70), strings.Repeat("x", 71), ""} {
			got := origin(component{kind: kind, name: name})
			if !labelValue.MatchString(got) || seen[got] != "" {
				t.Errorf("%s %q and %s are both %q", kind, name, seen[got], got)
			}
			seen[got] = kind + " " + name
		}
	}
	if one, other := origin(component{kind: kindEnvoyFilterIstio, name: "a"}), origin(component{kind: KindEnvoyFilter, name: "a"}); one != other {
		t.Errorf("%q and %q, which are one to servers of two generations", one, other)
	}
}
