package filter

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	// MaxBody bounds a body in bytes: a 20 MiB module in base64, with room for a document around it.
	MaxBody = 30 << 20
	// MaxDocuments bounds the documents in one body.
	MaxDocuments = 1000

	maxNodes = 200_000 // of one body after aliases are expanded, so that nested aliases cannot blow up
	maxDepth = 100
)

// Decode reads one document, several (---) or YAML lists of them. It is strict: unknown and repeated fields and wrong
// types are mistakes, and all of them are reported at once, each with its path and line, as problem.InvalidDocument.
func Decode(body []byte) ([]Document, error) {
	docs, mistakes := decode(body)
	return docs, problem.InvalidDocument.WithFields("", mistakes)
}

// Read decodes, fills defaults in and validates, and reports all mistakes of all three steps at once. namespace is the
// default for documents that name none; empty means "default".
func Read(body []byte, namespace string) ([]Filter, error) {
	docs, mistakes := decode(body)
	decoded := len(mistakes)
	var filters []Filter
	seen := map[Key]int{}
	for i, d := range docs {
		prefix := ""
		if len(docs) > 1 {
			prefix = fmt.Sprintf("documents[%d].", i)
		}
		f := d.Filter(namespace)
		for _, m := range d.validate(f) {
			m.Path = prefix + m.Path
			// A field that could not be decoded is empty, and that emptiness is not a second mistake.
			if !slices.ContainsFunc(mistakes[:decoded], func(e problem.Field) bool { return related(e.Path, m.Path) }) {
				mistakes = append(mistakes, m)
			}
		}
		if first, twice := seen[f.Key]; twice && f.Key.Name != "" {
			mistakes = append(mistakes, problem.Field{Path: prefix + "metadata.name",
				Cause: fmt.Sprintf("%s is also the name of documents[%d]", f.Key, first), Remedy: "give each filter its own name"})
		}
		seen[f.Key] = i
		filters = append(filters, f)
	}
	if len(mistakes) > 0 {
		return nil, problem.InvalidDocument.WithFields("", mistakes)
	}
	return filters, nil
}

// ReadKeys decodes documents of which only the identity counts, as for a removal: each may be a whole Filter or stop
// after metadata.
func ReadKeys(body []byte, namespace string) ([]Filter, error) {
	docs, mistakes := decode(body)
	var filters []Filter
	for i, d := range docs {
		f := d.Filter(namespace)
		for _, m := range d.validate(f) {
			if strings.HasPrefix(m.Path, "spec") {
				continue
			}
			if len(docs) > 1 {
				m.Path = fmt.Sprintf("documents[%d].%s", i, m.Path)
			}
			mistakes = append(mistakes, m)
		}
		if !slices.ContainsFunc(filters, func(o Filter) bool { return o.Key == f.Key }) {
			filters = append(filters, f)
		}
	}
	if len(mistakes) > 0 {
		return nil, problem.InvalidDocument.WithFields("", mistakes)
	}
	return filters, nil
}

// related says whether one path is the other or lies inside it.
func related(a, b string) bool {
	if len(a) > len(b) {
		a, b = b, a
	}
	return strings.HasPrefix(b, a) && (len(a) == len(b) || b[len(a)] == '.' || b[len(a)] == '[')
}

func decode(body []byte) ([]Document, []problem.Field) {
	d := &decoder{budget: maxNodes}
	if len(body) > MaxBody {
		d.fail("", nil, fmt.Sprintf("the body has %d bytes, more than the %d allowed", len(body), MaxBody), "send fewer documents at a time")
		return nil, d.mistakes
	}
	roots := d.roots(body)
	if len(roots) == 0 && len(d.mistakes) == 0 {
		d.fail("", nil, "there is no document in the body", "send a Filter document")
	}
	docs := make([]Document, len(roots))
	for i, n := range roots {
		path := ""
		if len(roots) > 1 {
			path = fmt.Sprintf("documents[%d]", i)
		}
		d.into(n, reflect.ValueOf(&docs[i]).Elem(), path, "", 0)
	}
	return docs, d.mistakes
}

type decoder struct {
	mistakes []problem.Field
	budget   int
	spent    bool
}

func (d *decoder) fail(path string, n *yaml.Node, cause, remedy string) {
	if n != nil {
		cause += fmt.Sprintf(" (line %d)", n.Line)
	}
	if len(d.mistakes) < 100 { // a person reads ten
		d.mistakes = append(d.mistakes, problem.Field{Path: path, Cause: cause, Remedy: remedy})
	}
}

// roots finds the documents: each of a stream, or each entry of a list.
func (d *decoder) roots(body []byte) []*yaml.Node {
	var roots []*yaml.Node
	for dec := yaml.NewDecoder(bytes.NewReader(body)); ; {
		var n yaml.Node
		err := dec.Decode(&n)
		if errors.Is(err, io.EOF) {
			return roots
		}
		if err != nil {
			d.fail("", nil, "it is not YAML: "+strings.TrimPrefix(err.Error(), "yaml: "), "mind indentation and quotes")
			return nil
		}
		entries := n.Content
		if len(entries) == 1 && entries[0].Kind == yaml.SequenceNode {
			entries = entries[0].Content
		}
		for _, e := range entries {
			if e.Tag != "!!null" {
				roots = append(roots, e)
			}
		}
		if len(roots) > MaxDocuments {
			d.fail("", nil, fmt.Sprintf("there are more than %d documents", MaxDocuments), "send fewer at a time")
			return nil
		}
	}
}

// enter follows aliases and counts; it returns nil where a limit is passed.
func (d *decoder) enter(n *yaml.Node, path string, depth int) *yaml.Node {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	d.budget--
	if d.spent {
		return nil
	}
	if d.budget < 0 || depth > maxDepth {
		d.spent = true
		d.fail(path, n, "it is nested too deep or has too many values", "make the document smaller")
		return nil
	}
	return n
}

var (
	valueType = reflect.TypeFor[Value]()
	nodeKinds = map[yaml.Kind]string{yaml.MappingNode: "a map", yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}
)

// into decodes a node into a field of a document; tag is the field's schema tag.
func (d *decoder) into(n *yaml.Node, v reflect.Value, path, tag string, depth int) {
	if n = d.enter(n, path, depth); n == nil {
		return
	}
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return
	}
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	expect := func(k yaml.Kind) bool {
		if n.Kind != k {
			d.fail(path, n, fmt.Sprintf("must be %s and is %s", nodeKinds[k], nodeKinds[n.Kind]), "")
		}
		return n.Kind == k
	}
	if v.Type() == valueType {
		v.Set(reflect.ValueOf(Value{d.value(n, path, depth)}))
		return
	}
	if t, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if expect(yaml.ScalarNode) && t.UnmarshalText([]byte(n.Value)) != nil {
			d.fail(path, n, fmt.Sprintf("%q is not a duration", n.Value), "write a number with a unit, such as 30s or 2m")
		}
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		if expect(yaml.MappingNode) {
			d.object(n, v, path, depth)
		}
	case reflect.Map: // map[string]string
		if !expect(yaml.MappingNode) {
			return
		}
		v.Set(reflect.MakeMap(v.Type()))
		for key, val := range d.pairs(n, path) {
			e := reflect.New(v.Type().Elem()).Elem()
			d.into(val, e, path+"."+key, "", depth+1)
			v.SetMapIndex(reflect.ValueOf(key), e)
		}
	case reflect.Slice:
		if !expect(yaml.SequenceNode) {
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
		for i, e := range n.Content {
			d.into(e, v.Index(i), fmt.Sprintf("%s[%d]", path, i), "", depth+1)
		}
	case reflect.String:
		if !expect(yaml.ScalarNode) {
			return
		}
		if n.Tag == "!!bool" {
			d.fail(path, n, fmt.Sprintf("must be text, and %s without quotes is true or false", n.Value), "put it in quotes")
			return
		}
		if allowed := tagValue(tag, "enum"); allowed != "" && !slices.Contains(strings.Split(allowed, "|"), n.Value) {
			d.fail(path, n, fmt.Sprintf("%q is not one of %s", n.Value, strings.ReplaceAll(allowed, "|", ", ")), "")
			return
		}
		v.SetString(n.Value)
	case reflect.Int:
		var i int
		if expect(yaml.ScalarNode) {
			if n.Tag != "!!int" || n.Decode(&i) != nil {
				d.fail(path, n, fmt.Sprintf("%q is not a whole number", n.Value), "")
				return
			}
			v.SetInt(int64(i))
		}
	case reflect.Bool:
		if expect(yaml.ScalarNode) {
			if n.Tag != "!!bool" {
				d.fail(path, n, fmt.Sprintf("%q is not true or false", n.Value), "")
				return
			}
			v.SetBool(n.Value == "true" || n.Value == "True" || n.Value == "TRUE")
		}
	default:
		panic("filter: a document has a field of type " + v.Type().String())
	}
}

func (d *decoder) object(n *yaml.Node, v reflect.Value, path string, depth int) {
	fields := map[string]reflect.StructField{}
	var names []string
	for _, f := range reflect.VisibleFields(v.Type()) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		fields[name] = f
		names = append(names, name)
	}
	for key, val := range d.pairs(n, path) {
		at := key
		if path != "" {
			at = path + "." + key
		}
		f, ok := fields[key]
		if !ok {
			d.fail(at, val, "there is no such field", suggest(key, names))
			continue
		}
		d.into(val, v.FieldByIndex(f.Index), at, f.Tag.Get("schema"), depth+1)
	}
}

// pairs iterates over a map's entries and reports keys that are no text, or come twice.
func (d *decoder) pairs(n *yaml.Node, path string) func(func(string, *yaml.Node) bool) {
	return func(yield func(string, *yaml.Node) bool) {
		seen := map[string]bool{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			k := n.Content[i]
			switch {
			case k.Kind != yaml.ScalarNode || k.Tag == "!!merge":
				d.fail(path, k, "a key must be plain text", "write the fields out; merge keys are not supported")
			case seen[k.Value]:
				d.fail(strings.TrimPrefix(path+"."+k.Value, "."), k, "the field is there twice", "keep one of them")
			default:
				seen[k.Value] = true
				if !yield(k.Value, n.Content[i+1]) {
					return
				}
			}
		}
	}
}

// value decodes any YAML value into what encoding/json would give with UseNumber.
func (d *decoder) value(n *yaml.Node, path string, depth int) any {
	if n = d.enter(n, path, depth); n == nil {
		return nil
	}
	switch n.Kind {
	case yaml.MappingNode:
		m := map[string]any{}
		for key, val := range d.pairs(n, path) {
			m[key] = d.value(val, path+"."+key, depth+1)
		}
		return m
	case yaml.SequenceNode:
		l := make([]any, len(n.Content))
		for i, e := range n.Content {
			l[i] = d.value(e, fmt.Sprintf("%s[%d]", path, i), depth+1)
		}
		return l
	}
	switch n.Tag {
	case "!!null":
		return nil
	case "!!bool":
		return strings.EqualFold(n.Value, "true")
	case "!!int":
		if i, ok := new(big.Int).SetString(strings.ReplaceAll(n.Value, "_", ""), 0); ok {
			return json.Number(i.String())
		}
	case "!!float":
		if json.Valid([]byte(n.Value)) {
			return json.Number(n.Value)
		}
		var f float64
		if n.Decode(&f) == nil && f-f == 0 { // neither infinite nor not a number
			return json.Number(strconv.FormatFloat(f, 'g', -1, 64))
		}
	case "!!str", "!!timestamp":
		return n.Value
	}
	d.fail(path, n, fmt.Sprintf("%q has no equivalent in JSON", n.Value), "put it in quotes")
	return nil
}

func tagValue(tag, key string) string {
	for part := range strings.SplitSeq(tag, ",") {
		if k, v, ok := strings.Cut(part, "="); ok && k == key {
			return v
		}
	}
	return ""
}

// suggest names the field that a misspelled one is closest to, or all of them.
func suggest(key string, names []string) string {
	best, at := 3, ""
	for _, n := range names {
		if dist := distance(strings.ToLower(key), strings.ToLower(n)); dist < best {
			best, at = dist, n
		}
	}
	if at != "" {
		return "did you mean " + at + "?"
	}
	return "the fields here are " + strings.Join(names, ", ")
}

// distance is Levenshtein's, for short words: two long ones are just far apart.
func distance(a, b string) int {
	if len(a) > 40 || len(b) > 40 {
		return 99
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost++
			}
			diagonal = row[j]
			row[j] = min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}
