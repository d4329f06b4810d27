// Package oam holds the Filter document's JSON Schema, which build/schema makes from the Go types, and explains it.
package oam

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

//go:embed filter.schema.json
var filterSchema []byte

// Schema returns the JSON Schema (draft 2020-12) of a Filter document. The bytes are the caller's to keep.
func Schema() []byte { return bytes.Clone(filterSchema) }

// schema is what Explain reads of a JSON Schema.
type schema struct {
	Title       string     `json:"title"`
	Description string     `json:"description"`
	Type        types      `json:"type"`
	Const       string     `json:"const"`
	Enum        []string   `json:"enum"`
	Default     any        `json:"default"`
	Required    []string   `json:"required"`
	Properties  properties `json:"properties"`
	Items       *schema    `json:"items"`
	Minimum     *int64     `json:"minimum"`
	Maximum     *int64     `json:"maximum"`
}

// types is one type or several.
type types []string

func (t *types) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*t = types{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(t))
}

// properties keeps the order of the file, which is the order of the document.
type properties []property

type property struct {
	name string
	schema
}

func (p *properties) UnmarshalJSON(data []byte) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	if _, err := dec.Token(); err != nil {
		return err
	}
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return err
		}
		var s schema
		if err := dec.Decode(&s); err != nil {
			return err
		}
		*p = append(*p, property{fmt.Sprint(name), s})
	}
	return nil
}

// object is the schema whose properties are below s: its own, or those of a list's entries.
func (s schema) object() schema {
	if s.Items != nil {
		return *s.Items
	}
	return s
}

var index = regexp.MustCompile(`\[[0-9]*\]`)

// Explain describes the field at a path such as spec.module, and lists the fields below it. The empty path is the
// document, of which every field is listed. The error for a path that does not exist names the nearest one.
func Explain(path string) (string, error) {
	var at property
	if err := json.Unmarshal(filterSchema, &at.schema); err != nil {
		return "", fmt.Errorf("read the schema: %w", err)
	}
	root := at.schema
	required := false
	path = strings.Trim(index.ReplaceAllString(path, ""), ".")
	for name := range strings.SplitSeq(path, ".") {
		if path == "" {
			break
		}
		in := at.object()
		i := slices.IndexFunc(in.Properties, func(p property) bool { return p.name == name })
		if i < 0 {
			return "", fmt.Errorf("there is no field %.200q; did you mean %s?", path, nearest(path, root.paths("")))
		}
		at, required = in.Properties[i], slices.Contains(in.Required, name)
	}
	var b strings.Builder
	if path == "" {
		fmt.Fprintf(&b, "KIND:     %s\n", at.Title)
	} else {
		fmt.Fprintf(&b, "FIELD:    %s\n", path)
	}
	fmt.Fprintf(&b, "TYPE:     %s\n", at.typeName())
	if path != "" {
		for _, f := range at.facts(required) {
			fmt.Fprintf(&b, "%-9s %s\n", strings.ToUpper(f.name)+":", f.value)
		}
	}
	fmt.Fprintf(&b, "\n%s", wrap(at.Description, "  "))
	if fields := at.fields("", path == ""); len(fields) > 0 {
		b.WriteString("\nFIELDS:\n" + strings.Join(fields, "\n"))
	}
	return b.String(), nil
}

// fields describes each field of s, or with all also what is below them.
func (s schema) fields(prefix string, all bool) (out []string) {
	in := s.object()
	for _, p := range in.Properties {
		facts := ""
		for _, f := range p.facts(slices.Contains(in.Required, p.name)) {
			facts += fmt.Sprintf(" %s: %s;", f.name, f.value)
		}
		out = append(out, fmt.Sprintf("  %s <%s>%s\n%s", prefix+p.name, p.typeName(), strings.TrimSuffix(facts, ";"), wrap(p.Description, "      ")))
		if all {
			out = append(out, p.fields(prefix+p.name+".", all)...)
		}
	}
	return out
}

type fact struct{ name, value string }

// facts are what can be said about a field's value in a word or two.
func (s schema) facts(required bool) []fact {
	var f []fact
	if required {
		f = append(f, fact{"required", "yes"})
	}
	if s.Const != "" {
		f = append(f, fact{"value", s.Const})
	}
	if len(s.Enum) > 0 {
		f = append(f, fact{"one of", strings.Join(s.Enum, ", ")})
	}
	if s.Default != nil {
		f = append(f, fact{"default", fmt.Sprint(s.Default)})
	}
	if s.Minimum != nil && s.Maximum != nil {
		f = append(f, fact{"range", fmt.Sprintf("%d to %d", *s.Minimum, *s.Maximum)})
	}
	return f
}

var typeNames = map[string]string{"string": "text", "integer": "number", "boolean": "true or false"}

func (s schema) typeName() string {
	switch {
	case len(s.Type) == 0:
		return "any value"
	case s.Items != nil && s.Items.Properties != nil:
		return "list of objects"
	case s.Items != nil:
		return "list of " + s.Items.typeName() + "s"
	case s.Type[0] == "object" && s.Properties == nil:
		return "map of text"
	}
	names := make([]string, len(s.Type))
	for i, t := range s.Type {
		names[i] = t
		if n, ok := typeNames[t]; ok {
			names[i] = n
		}
	}
	return strings.Join(names, " or ")
}

// Fields lists the paths of all fields, in the document's order.
func Fields() []string {
	var root schema
	if json.Unmarshal(filterSchema, &root) != nil { // Explain says so
		return nil
	}
	return root.paths("")
}

// paths lists every field below s.
func (s schema) paths(prefix string) []string {
	var all []string
	for _, p := range s.object().Properties {
		at := strings.TrimPrefix(prefix+"."+p.name, ".")
		all = append(append(all, at), p.paths(at)...)
	}
	return all
}

// nearest picks the path whose last word is most like that of path, and of those the one most like it in whole.
func nearest(path string, all []string) string {
	path = strings.ToLower(path[:min(len(path), 200)])
	last := func(p string) string { return p[strings.LastIndexByte(p, '.')+1:] }
	score := func(p string) int {
		p = strings.ToLower(p)
		return distance(last(path), last(p))*1000 + distance(path, p)
	}
	return slices.MinFunc(all, func(a, b string) int { return score(a) - score(b) })
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// wrap breaks text into lines of about 100 characters.
func wrap(text, indent string) string {
	var b strings.Builder
	line := indent
	for _, w := range strings.Fields(text) {
		if len(line) > len(indent) && len(line)+1+len(w) > 100 {
			b.WriteString(line + "\n")
			line = indent
		}
		if len(line) > len(indent) {
			line += " "
		}
		line += w
	}
	b.WriteString(line + "\n")
	return b.String()
}
