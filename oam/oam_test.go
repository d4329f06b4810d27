package oam

import (
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/internal/filter"
)

// check validates a value against the part of JSON Schema that our schema uses. A keyword that it does not know is a
// mistake, so that it never lets something through unread.
func check(s any, v any, path string) error {
	if allowed, ok := s.(bool); ok {
		if !allowed {
			return fmt.Errorf("%s: not allowed", path)
		}
		return nil
	}
	sch := s.(map[string]any)
	m, isObject := v.(map[string]any)
	list, isList := v.([]any)
	text, isText := v.(string)
	number, isNumber := v.(float64)
	for key, want := range sch {
		var err error
		ok := true
		switch key {
		case "$schema", "$id", "title", "description", "default", "then", "else":
		case "type":
			names, several := want.([]any)
			if !several {
				names = []any{want}
			}
			ok = slices.ContainsFunc(names, func(n any) bool {
				_, isBool := v.(bool)
				return n == "object" && isObject || n == "array" && isList || n == "string" && isText ||
					n == "integer" && isNumber && number == float64(int64(number)) || n == "boolean" && isBool
			})
		case "const":
			ok = reflect.DeepEqual(v, want)
		case "enum":
			ok = slices.Contains(want.([]any), v)
		case "pattern":
			ok = !isText || regexp.MustCompile(want.(string)).MatchString(text)
		case "minLength":
			ok = !isText || utf8.RuneCountInString(text) >= int(want.(float64))
		case "maxLength":
			ok = !isText || utf8.RuneCountInString(text) <= int(want.(float64))
		case "minimum":
			ok = !isNumber || number >= want.(float64)
		case "maximum":
			ok = !isNumber || number <= want.(float64)
		case "required":
			for _, name := range want.([]any) {
				if _, has := m[name.(string)]; isObject && !has {
					ok = false
				}
			}
		case "properties":
			for name, sub := range want.(map[string]any) {
				if e, has := m[name]; has && err == nil {
					err = check(sub, e, path+"."+name)
				}
			}
		case "additionalProperties":
			known, _ := sch["properties"].(map[string]any)
			for name, e := range m {
				if _, has := known[name]; !has && err == nil {
					err = check(want, e, path+"."+name)
				}
			}
		case "items":
			for i, e := range list {
				if err == nil {
					err = check(want, e, fmt.Sprintf("%s[%d]", path, i))
				}
			}
		case "uniqueItems":
			for i, e := range list {
				ok = ok && !slices.Contains(list[:i], e)
			}
		case "dependentRequired":
			for name, needs := range want.(map[string]any) {
				if _, has := m[name]; has {
					err = check(map[string]any{"required": needs}, v, path)
				}
				if err != nil {
					break
				}
			}
		case "oneOf":
			n := 0
			for _, sub := range want.([]any) {
				if check(sub, v, path) == nil {
					n++
				}
			}
			ok = n == 1
		case "if":
			branch := "then"
			if check(want, v, path) != nil {
				branch = "else"
			}
			if sub, has := sch[branch]; has {
				err = check(sub, v, path)
			}
		default:
			return fmt.Errorf("%s: this test does not know the keyword %s", path, key)
		}
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("%s: %s is not met by %v", path, key, v)
		}
	}
	return nil
}

// conforms checks a document, in YAML or JSON, against the schema.
func conforms(t *testing.T, document string) error {
	t.Helper()
	var v, s any
	if err := yaml.Unmarshal([]byte(document), &v); err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(Schema(), &s); err != nil {
		t.Fatal(err)
	}
	return check(s, v, "document")
}

const head = "apiVersion: filters.meshery.io/v1alpha1\nkind: Filter\n"

// document puts lines below spec.
func document(spec string) string {
	return head + "metadata: {name: a, namespace: shop, labels: {team: web}}\nspec:\n  " + strings.ReplaceAll(spec, "\n", "\n  ")
}

const sha = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789ABCDEF"

func TestTheSchemaAcceptsWhatTheAdapterAccepts(t *testing.T) {
	for _, doc := range []string{
		head + "metadata: {name: a}\nspec: {module: {builtin: headers}}",
		document("module: {url: 'https://host.example/a.wasm', sha256: " + sha + "}"),
		document("module: {url: 'oci://registry.example/a:1', pullSecret: pull}"),
		document("module: {url: 'meshery://1234'}"),
		document("module: {inline: AGFzbQ==}"),
		document("module: {file: ./a.wasm}"),
		document(`mesh: istio
target: {kind: Workload, namespace: shop, labels: {app: web}, partition: p}
match: {direction: inbound, ports: [80, 443]}
protocol: tcp
module: {builtin: headers, sha256: ` + sha + `}
delivery: {mode: local, localPath: /opt/filters}
rootID: root
vmID: vm
config: {a: [1, 2.5, true, null, {$secret: {name: n, key: k}}]}
environment:
- {name: A, value: text}
- {name: B, value: {$secret: {name: n, key: k}}}
- {name: C, valueFrom: host}
phase: authn
priority: -5
failurePolicy: reload
wait: {for: some, timeout: 1m30.5s}
rollout: canary
force: true`),
		document("module: {builtin: headers}\nconfig: just text"),
		document("module: {builtin: headers}\nconfig: 5"),
		document("module: {builtin: headers}\ntarget: {kind: Mesh}\ndelivery: {mode: auto}"),
	} {
		filters, err := filter.Read([]byte(doc), "")
		if err != nil {
			t.Errorf("the adapter refuses\n%s\n%v", doc, err)
			continue
		}
		if err := conforms(t, doc); err != nil {
			t.Errorf("the schema refuses\n%s\n%v", doc, err)
		}
		shown, err := json.Marshal(filters[0].Document())
		if err != nil {
			t.Fatal(err)
		}
		if err := conforms(t, string(shown)); err != nil {
			t.Errorf("the schema refuses what lists show\n%s\n%v", shown, err)
		}
	}
}

func TestTheSchemaRefusesWhatTheAdapterRefuses(t *testing.T) {
	const module = "module: {builtin: headers}\n"
	for name, doc := range map[string]string{
		"no module":              document("mesh: auto"),
		"no source":              document("module: {sha256: " + sha + "}"),
		"empty source":           document("module: {builtin: ''}"),
		"two sources":            document("module: {builtin: headers, file: a.wasm}"),
		"https without digest":   document("module: {url: 'https://host.example/a.wasm'}"),
		"another scheme":         document("module: {url: 'http://host.example/a.wasm', sha256: " + sha + "}"),
		"credentials":            document("module: {url: 'https://a:b@host.example/a.wasm', sha256: " + sha + "}"),
		"short digest":           document("module: {builtin: headers, sha256: abc}"),
		"unknown mesh":           document(module + "mesh: linkerd"),
		"unknown field":          document(module + "failurePolicies: open"),
		"unknown policy":         document(module + "failurePolicy: ignore"),
		"unknown module field":   document("module: {builtin: headers, path: /}"),
		"port out of range":      document(module + "match: {ports: [0]}"),
		"port twice":             document(module + "match: {ports: [80, 80]}"),
		"port as text":           document(module + "match: {ports: [http]}"),
		"target without kind":    document(module + "target: {name: a}"),
		"local without path":     document(module + "delivery: {mode: local}"),
		"path without local":     document(module + "delivery: {localPath: /a}"),
		"relative path":          document(module + "delivery: {mode: local, localPath: a}"),
		"upstream of no service": document(module + "delivery: {upstreamPort: 21900}"),
		"port beyond all":        document(module + "delivery: {service: modules, upstreamPort: 65536}"),
		"bad variable":           document(module + "environment: [{name: 1A, value: a}]"),
		"variable without name":  document(module + "environment: [{value: a}]"),
		"variable without value": document(module + "environment: [{name: A}]"),
		"variable with both":     document(module + "environment: [{name: A, value: a, valueFrom: host}]"),
		"variable with a list":   document(module + "environment: [{name: A, value: [a]}]"),
		"priority too high":      document(module + "priority: 2147483648"),
		"priority with fraction": document(module + "priority: 1.5"),
		"duration without unit":  document(module + "wait: {timeout: 30}"),
		"negative duration":      document(module + "wait: {timeout: -3s}"),
		"force as text":          document(module + "force: 'yes'"),
		"spec is a list":         head + "metadata: {name: a}\nspec: []",
		"bad name":               head + "metadata: {name: A_b}\nspec: {module: {builtin: headers}}",
		"bad namespace":          head + "metadata: {name: a, namespace: a/b}\nspec: {module: {builtin: headers}}",
		"no name":                head + "metadata: {}\nspec: {module: {builtin: headers}}",
		"other version":          "apiVersion: filters.meshery.io/v1\nkind: Filter\nmetadata: {name: a}\nspec: {module: {builtin: headers}}",
		"other kind":             "apiVersion: filters.meshery.io/v1alpha1\nkind: Pod\nmetadata: {name: a}\nspec: {module: {builtin: headers}}",
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := filter.Read([]byte(doc), ""); err == nil {
				t.Errorf("the adapter accepts\n%s", doc)
			}
			if err := conforms(t, doc); err == nil {
				t.Errorf("the schema accepts\n%s", doc)
			} else if strings.Contains(err.Error(), "keyword") {
				t.Error(err)
			}
		})
	}
}

func TestExplainShowsAFieldAndWhatIsBelow(t *testing.T) {
	for path, words := range map[string][]string{
		"":                         {"KIND:     Filter", "apiVersion <text> required: yes; value: filters.meshery.io/v1alpha1\n", "spec <object>", "  spec.module.builtin <text>\n", "  spec.environment.valueFrom <text>"},
		"spec.module":              {"FIELD:    spec.module", "TYPE:     object", "REQUIRED: yes", "exactly one of", "  builtin <text>\n", "  sha256 <text>\n"},
		"spec.failurePolicy":       {"TYPE:     text", "ONE OF:   closed, open, reload", "DEFAULT:  closed", "503"},
		"spec.wait":                {"timeout <text> default: 30s\n", "for <text> one of: all, some, none; default: all\n"},
		"spec.environment":         {"list of objects", "valueFrom <text>", "value <text or object>"},
		"spec.environment.name":    {"FIELD:    spec.environment.name", "REQUIRED: yes"},
		"spec.environment[0].name": {"FIELD:    spec.environment.name"},
		"spec.match.ports":         {"list of numbers"},
		"spec.config":              {"any value", "$secret"},
		"spec.priority":            {"number", "RANGE:    -2147483648 to 2147483647"},
		"metadata.labels":          {"map of text"},
		".spec.force.":             {"FIELD:    spec.force", "true or false"},
	} {
		text, err := Explain(path)
		if err != nil {
			t.Errorf("%s: %v", path, err)
		}
		for _, w := range words {
			if !strings.Contains(text, w) {
				t.Errorf("explain %q lacks %q:\n%s", path, w, text)
			}
		}
		for line := range strings.SplitSeq(text, "\n") {
			if utf8.RuneCountInString(line) > 120 || strings.TrimRight(line, " ") != line {
				t.Errorf("explain %q has the line %q", path, line)
			}
		}
	}
	text, err := Explain("spec.module")
	if err != nil || strings.Index(text, "builtin <") > strings.Index(text, "url <") {
		t.Errorf("the fields are not in the document's order:\n%s, %v", text, err)
	}
}

func TestEveryFieldCanBeExplained(t *testing.T) {
	var s schema
	if err := json.Unmarshal(Schema(), &s); err != nil {
		t.Fatal(err)
	}
	all := s.paths("")
	if len(all) < 40 {
		t.Errorf("there are only %d fields: %v", len(all), all)
	}
	for _, path := range all {
		if text, err := Explain(path); err != nil || !strings.HasPrefix(text, "FIELD:    "+path+"\n") {
			t.Errorf("%s: %v\n%s", path, err, text)
		}
	}
}

func TestAnUnknownFieldLeadsToTheNearest(t *testing.T) {
	for path, want := range map[string]string{
		"module":            "spec.module",
		"spec.modul":        "spec.module",
		"Spec.Module":       "spec.module",
		"spec.modul.url":    "spec.module.url",
		"wait.timeout":      "spec.wait.timeout",
		"namespace":         "metadata.namespace",
		"spec.module.url.x": "spec.",
		"spec..module":      "spec.module",
	} {
		_, err := Explain(path)
		if err == nil || !strings.Contains(err.Error(), "did you mean "+want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := Explain(strings.Repeat("x.", 100000)); err == nil || len(err.Error()) > 400 {
		t.Errorf("a long path: %v", err)
	}
}
