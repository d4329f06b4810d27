// Command schema writes the Filter document's JSON Schema to oam/filter.schema.json, and the schemas of the forms that
// Meshery draws of the adapter's components to templates/meshmodel, from the Go types of internal/filter and oam, their
// comments and their schema tags. Run it from the repository's root: go run ./build/schema
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/oam"
)

// outputs are what is written where, from the repository's root.
var outputs = map[string]func(root string) ([]byte, error){
	"oam/filter.schema.json": generate,
	"templates/meshmodel/wasmfilter.schema.json": func(root string) ([]byte, error) {
		return form(root, "internal/filter/filter.go", "WASM Filter", reflect.TypeFor[filter.Spec](), "spec")
	},
	"templates/meshmodel/imagehub.schema.json": func(root string) ([]byte, error) {
		return form(root, "oam/definitions.go", "Image Hub", reflect.TypeFor[oam.ImageHubSettings](), "")
	},
}

func main() {
	for output, make := range outputs {
		data, err := make(".")
		if err == nil {
			err = os.WriteFile(output, data, 0o644)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "schema:", err)
			os.Exit(1)
		}
	}
}

// object is a JSON object that keeps its order: fields are read in the order of the document.
type object []member

type member struct {
	key   string
	value any
}

func (o object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "%q:", m.key)
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		if err := enc.Encode(m.value); err != nil {
			return nil, err
		}
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

const (
	dnsLabel = `^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`
	duration = `^([0-9]+(\.[0-9]*)?(ns|us|µs|ms|s|m|h))+$`
)

// more adds what types and tags do not say, by path, where a schema can say it simply. filter.Read has the last word.
var more = map[string]object{
	"apiVersion":         {{"const", filter.APIVersion}},
	"kind":               {{"const", filter.Kind}},
	"metadata.name":      {{"pattern", dnsLabel}},
	"metadata.namespace": {{"pattern", dnsLabel}},
	"spec.target": {{"dependentRequired", object{
		{"namespace", []string{"kind"}}, {"name", []string{"kind"}}, {"labels", []string{"kind"}}, {"partition", []string{"kind"}}}}},
	"spec.target.namespace": {{"pattern", dnsLabel}},
	"spec.target.partition": {{"pattern", dnsLabel}},
	"spec.match.ports":      {{"uniqueItems", true}},
	"spec.match.ports[]":    {{"minimum", 1}, {"maximum", 65535}},
	"spec.module": {
		{"oneOf", []object{required("builtin"), required("url"), required("inline"), required("file")}},
		{"if", object{{"properties", object{{"url", object{{"pattern", "^https://"}}}}}, {"required", []string{"url"}}}},
		{"then", required("sha256")},
	},
	"spec.module.builtin":        {{"minLength", 1}},
	"spec.module.url":            {{"pattern", `^(https|oci|meshery)://[^/?#@]+([/?#]|$)`}},
	"spec.module.inline":         {{"minLength", 1}},
	"spec.module.file":           {{"minLength", 1}},
	"spec.module.sha256":         {{"pattern", `^[0-9A-Fa-f]{64}$`}},
	"spec.delivery":              {{"dependentRequired", object{{"upstreamPort", []string{"service"}}}}, {"if", object{{"properties", object{{"mode", object{{"const", "local"}}}}}, {"required", []string{"mode"}}}}, {"then", required("localPath")}, {"else", object{{"properties", object{{"localPath", false}}}}}},
	"spec.delivery.localPath":    {{"pattern", "^/"}},
	"spec.delivery.upstreamPort": {{"minimum", 1}, {"maximum", 65535}},
	"spec.rootID":                {{"maxLength", 253}},
	"spec.vmID":                  {{"maxLength", 253}},
	"spec.before":                {{"maxLength", 253}},
	"spec.environment[]":         {{"oneOf", []object{required("value"), required("valueFrom")}}},
	"spec.environment[].name":    {{"pattern", `^[A-Za-z_][A-Za-z0-9_]{0,127}$`}},
	"spec.priority":              {{"minimum", -1 << 31}, {"maximum", 1<<31 - 1}},
	"spec.environment[].value":   {{"type", []string{"string", "object"}}},
}

func required(field string) object { return object{{"required", []string{field}}} }

// generate makes the schema of the repository at root.
func generate(root string) ([]byte, error) {
	docs, err := comments(filepath.Join(root, "internal", "filter", "filter.go"))
	if err != nil {
		return nil, err
	}
	g := generator{docs: docs, unused: map[string]bool{}}
	for path := range more {
		g.unused[path] = true
	}
	o := object{
		{"$schema", "https://json-schema.org/draft/2020-12/schema"},
		{"$id", "urn:filters.meshery.io:v1alpha1:Filter"},
		{"title", filter.Kind},
		{"description", "A Filter is a WebAssembly module with its configuration, for one set of proxies."},
	}
	body, err := g.schema(reflect.TypeFor[filter.Document](), "", "")
	if err != nil {
		return nil, err
	}
	for path := range g.unused {
		return nil, fmt.Errorf("there is no field %s any more: correct the table in build/schema", path)
	}
	return indented(append(o, body...))
}

// indented is an object as it is committed.
func indented(o object) ([]byte, error) {
	compact, err := o.MarshalJSON()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, compact, "", "  "); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

// form makes the schema of a component's form, of the settings in a type that is in a file and stands at a path of the
// Filter document. A form has no words for what depends on something else, so the document's schema says more.
func form(root, file, title string, settings reflect.Type, path string) ([]byte, error) {
	docs, err := comments(filepath.Join(root, filepath.FromSlash(file)))
	if err != nil {
		return nil, err
	}
	body, err := generator{docs: docs, form: true}.schema(settings, path, "")
	if err != nil {
		return nil, err
	}
	return indented(append(object{{"$schema", "http://json-schema.org/draft-07/schema#"}, {"title", title}}, body...))
}

// unformed are the words of schemas that forms do not have: they would draw choices that are none.
var unformed = []string{"oneOf", "if", "then", "else", "dependentRequired"}

type generator struct {
	docs   map[string]string // Type.Field
	form   bool              // it is for a form
	unused map[string]bool   // paths of more
}

// schema describes a type at a path; tag is the field's schema tag.
func (g generator) schema(t reflect.Type, path, tag string) (object, error) {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	words := map[string]string{}
	for w := range strings.SplitSeq(tag, ",") {
		k, v, _ := strings.Cut(w, "=")
		words[k] = v
	}
	var o object
	_, isAny := words["any"]
	_, isDuration := words["duration"]
	switch {
	case isAny && g.form:
		o = object{{"type", "string"}} // it is handed on verbatim, so that JSON can be written into it
	case isAny:
	case isDuration:
		o = object{{"type", "string"}, {"pattern", duration}}
	case t.Kind() == reflect.String:
		o = object{{"type", "string"}}
	case t.Kind() == reflect.Int:
		o = object{{"type", "integer"}}
	case t.Kind() == reflect.Bool:
		o = object{{"type", "boolean"}}
	case t.Kind() == reflect.Map:
		values, err := g.schema(t.Elem(), path+".*", "")
		if err != nil {
			return nil, err
		}
		o = object{{"type", "object"}, {"additionalProperties", values}}
	case t.Kind() == reflect.Slice:
		items, err := g.schema(t.Elem(), path+"[]", "")
		if err != nil {
			return nil, err
		}
		o = object{{"type", "array"}, {"items", items}}
	case t.Kind() == reflect.Struct:
		properties, names, err := g.fields(t, path)
		if err != nil {
			return nil, err
		}
		o = object{{"type", "object"}, {"additionalProperties", false}}
		if len(names) > 0 {
			o = append(o, member{"required", names})
		}
		o = append(o, member{"properties", properties})
	default:
		return nil, fmt.Errorf("%s: the schema has no words for a %s", path, t)
	}
	if enum := words["enum"]; enum != "" {
		o = append(o, member{"enum", strings.Split(enum, "|")})
	}
	if value := words["default"]; value != "" {
		o = append(o, member{"default", value})
	}
	delete(g.unused, path)
	o = append(o, more[path]...)
	if !g.form {
		return o, nil
	}
	return slices.DeleteFunc(o, func(m member) bool {
		switch m.key {
		case "additionalProperties":
			return t.Kind() != reflect.Map
		case "required":
			return path == "spec" // the module can have other names in a design
		case "type":
			return isAny && m.value != "string"
		}
		return slices.Contains(unformed, m.key)
	}), nil
}

func (g generator) fields(t reflect.Type, path string) (properties object, required []string, err error) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		at := strings.TrimPrefix(path+"."+name, ".")
		if g.form && at == "spec.module.file" { // it is of the command line's machine
			continue
		}
		doc := g.docs[t.Name()+"."+f.Name]
		if doc == "" {
			return nil, nil, fmt.Errorf("%s.%s has no comment, which would be its description", t, f.Name)
		}
		tag := f.Tag.Get("schema")
		if tag == "required" || strings.HasPrefix(tag, "required,") || strings.HasSuffix(tag, ",required") {
			required = append(required, name)
		}
		s, err := g.schema(f.Type, at, tag)
		if err != nil {
			return nil, nil, err
		}
		properties = append(properties, member{name, append(object{{"description", doc}}, s...)})
	}
	return properties, required, nil
}

// comments reads the comment of every field of every struct in a file, as one line each.
func comments(file string) (map[string]string, error) {
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	docs := map[string]string{}
	ast.Inspect(parsed, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok {
			return true
		}
		if s, ok := spec.Type.(*ast.StructType); ok {
			for _, f := range s.Fields.List {
				for _, name := range f.Names {
					docs[spec.Name.Name+"."+name.Name] = strings.Join(strings.Fields(f.Doc.Text()), " ")
				}
			}
		}
		return true
	})
	return docs, nil
}
