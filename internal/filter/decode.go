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
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	// MaxBody bounds a body in bytes: a 20 MiB module in base64, with room for a document around it.
	MaxBody = 30 << 20
	// MaxDocuments bounds the documents in one body.
	MaxDocuments = 1000

	maxNodes    = 200_000 // of one body after aliases are expanded, so that nested aliases cannot blow up
	maxDepth    = 100
	maxKey      = 1 << 10 // bytes
	maxNumber   = 400     // characters; the largest float64 has 309 digits
	maxText     = 2 << 20 // bytes of a body that are neither base64 nor white space
	maxMistakes = 100     // a person reads ten
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
		if len(mistakes) >= maxMistakes {
			break
		}
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

// ReadKeys decodes documents of which only the identity and the wait count, as for a removal: each may be a whole
// Filter or stop after metadata.
func ReadKeys(body []byte, namespace string) ([]Filter, error) {
	docs, mistakes := decode(body)
	decoded := len(mistakes)
	var filters []Filter
	for i, d := range docs {
		if len(mistakes) >= maxMistakes {
			break
		}
		f := d.Filter(namespace)
		for _, m := range d.validateKey(f) {
			if len(docs) > 1 {
				m.Path = fmt.Sprintf("documents[%d].%s", i, m.Path)
			}
			if !slices.ContainsFunc(mistakes[:decoded], func(e problem.Field) bool { return related(e.Path, m.Path) }) {
				mistakes = append(mistakes, m)
			}
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

// related says whether one path is the other or lies inside it. The empty path is the one document.
func related(a, b string) bool {
	if len(a) > len(b) {
		a, b = b, a
	}
	return strings.HasPrefix(b, a) && (a == "" || len(a) == len(b) || b[len(a)] == '.' || b[len(a)] == '[')
}

func decode(body []byte) ([]Document, []problem.Field) {
	d := newDecoder()
	roots := d.roots(body)
	if len(roots) == 0 && len(d.mistakes) == 0 {
		d.fail(nil, nil, "there is no document in the body", "send a Filter document")
	}
	docs := make([]Document, len(roots))
	list := (*place)(nil).field("documents")
	for i, n := range roots {
		var at *place
		if len(roots) > 1 {
			e := list.entry(i)
			at = &e
		}
		d.into(n, reflect.ValueOf(&docs[i]).Elem(), at, "", 0)
	}
	return docs, d.mistakes
}

const (
	longRun = 40 // base64 characters in a row that are taken for a piece of a module

	// Each node of a YAML tree is there because of one of these characters, and none brings more than three: a colon
	// in a list makes a map, its key and its value; a ? or { does the same; a comma or a dash an entry, and a dash its
	// list; --- and ... a document and its root. The rest decorates nodes, and is counted as it takes room, too.
	// Letters, quotes, white space and all of base64 only lengthen the scalar that one of these began.
	marks = "-?:,[{" + "." + "]}&*!#"
)

// The classes of a byte in refusal.
const (
	other byte = iota
	mark
	white
	digit  // base64 that numbers are written in, too
	letter // all other base64
)

// refusal looks at a body before the YAML parser builds its tree, which takes some 300 bytes for a mark of one byte.
// It says what is wrong with a body that would take too much, or nothing.
func refusal(body []byte) (cause, remedy string) {
	if len(body) > MaxBody {
		return fmt.Sprintf("the body has %d bytes, more than the %d allowed", len(body), MaxBody), "send fewer documents at a time"
	}
	if !utf8.Valid(body) {
		return "it is not UTF-8", "save it as UTF-8"
	}
	classes := [256]byte{' ': white, '\t': white, '\r': white, '\n': white}
	for c := range byte(128) {
		switch {
		case strings.IndexByte(marks, c) >= 0:
			classes[c] = mark
		case '0' <= c && c <= '9', c == 'e', c == 'E', c == '+':
			classes[c] = digit
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', c == '/', c == '=':
			classes[c] = letter
		}
	}
	nodes, text := 0, 0
	run, word := 0, false // of base64; digits alone are a number, whose type YAML takes long to find
	for i, c := range body {
		class := classes[c]
		if class >= digit {
			run++
			word = word || class == letter && run <= longRun
			continue
		}
		if run < longRun || !word {
			text += run
		}
		run, word = 0, false
		switch class {
		case mark:
			nodes++
			text++
		case other:
			text++
			if c == '%' && startsLine(body[:i]) { // %TAG has one line lengthen every tag
				return "a line starts with %, and YAML's directives are not supported", "leave it out"
			}
		}
	}
	if run < longRun || !word {
		text += run
	}
	if nodes > maxNodes || text > maxText {
		return "it has too many values or too much text beside its modules", "make the documents smaller, or send fewer at a time"
	}
	return "", ""
}

// startsLine says whether what follows before stands at the beginning of a line, as YAML counts lines.
func startsLine(before []byte) bool {
	r, size := utf8.DecodeLastRune(before)
	return size == 0 || strings.ContainsRune("\n\r\u0085\u2028\u2029\ufeff", r)
}

// place is where a value stands in the body. A mistake makes a text of it; without one, no path is ever written.
type place struct {
	up    *place
	key   string
	index int // of a list's entry; -1 under a key
}

func (p *place) field(key string) place { return place{p, key, -1} }

func (p *place) entry(i int) place { return place{p, "", i} }

func (p *place) String() string {
	switch {
	case p == nil:
		return ""
	case p.index >= 0:
		return fmt.Sprintf("%s[%d]", p.up, p.index)
	case p.up == nil:
		return clip(p.key)
	default:
		return p.up.String() + "." + clip(p.key)
	}
}

type decoder struct {
	mistakes []problem.Field
	nodes    int  // that may still come
	text     int  // bytes of scalars that may still come: an alias writes its anchor's again
	spent    bool // nothing more is looked at
}

func newDecoder() *decoder { return &decoder{nodes: maxNodes, text: MaxBody} }

func (d *decoder) fail(at *place, n *yaml.Node, cause, remedy string) {
	if len(d.mistakes) == maxMistakes {
		d.spent = true
		return
	}
	if n != nil {
		cause += fmt.Sprintf(" (line %d)", n.Line)
	}
	d.mistakes = append(d.mistakes, problem.Field{Path: at.String(), Cause: cause, Remedy: remedy})
}

// roots finds the documents: each of a stream, or each entry of a list.
func (d *decoder) roots(body []byte) []*yaml.Node {
	if cause, remedy := refusal(body); cause != "" {
		d.fail(nil, nil, cause, remedy)
		return nil
	}
	var roots []*yaml.Node
	for dec := yaml.NewDecoder(bytes.NewReader(body)); ; {
		var n yaml.Node
		err := dec.Decode(&n)
		if errors.Is(err, io.EOF) {
			return roots
		}
		if err != nil {
			d.fail(nil, nil, "it is not YAML: "+strings.TrimPrefix(err.Error(), "yaml: "), "mind indentation and quotes")
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
			d.fail(nil, nil, fmt.Sprintf("there are more than %d documents", MaxDocuments), "send fewer at a time")
			return nil
		}
	}
}

// enter follows aliases and counts; it returns nil where a limit is passed. A node pays for its children at once, as
// room is made for all of them before the first is entered.
func (d *decoder) enter(n *yaml.Node, at *place, depth int) *yaml.Node {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if d.spent {
		return nil
	}
	d.nodes -= len(n.Content)
	d.text -= len(n.Value)
	if d.nodes < 0 || d.text < 0 || depth > maxDepth {
		d.fail(at, n, "it is nested too deep, has too many values or, with its aliases written out, too much text", "make the document smaller")
		d.spent = true
		return nil
	}
	return n
}

var (
	valueType = reflect.TypeFor[Value]()
	nodeKinds = map[yaml.Kind]string{yaml.MappingNode: "a map", yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}
)

// into decodes a node into a field of a document; tag is the field's schema tag.
func (d *decoder) into(n *yaml.Node, v reflect.Value, at *place, tag string, depth int) {
	if n = d.enter(n, at, depth); n == nil {
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
			d.fail(at, n, fmt.Sprintf("must be %s and is %s", nodeKinds[k], nodeKinds[n.Kind]), "")
		}
		return n.Kind == k
	}
	if v.Type() == valueType {
		v.Set(reflect.ValueOf(Value{d.entered(n, at, depth)}))
		return
	}
	if t, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if expect(yaml.ScalarNode) && t.UnmarshalText([]byte(n.Value)) != nil {
			d.fail(at, n, fmt.Sprintf("%q is not a duration", clip(n.Value)), "write a number with a unit, such as 30s or 2m")
		}
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		if expect(yaml.MappingNode) {
			d.object(n, v, at, depth)
		}
	case reflect.Map: // map[string]string
		if !expect(yaml.MappingNode) {
			return
		}
		v.Set(reflect.MakeMap(v.Type()))
		for key, val := range d.pairs(n, at) {
			e := reflect.New(v.Type().Elem()).Elem()
			inner := at.field(key)
			d.into(val, e, &inner, "", depth+1)
			v.SetMapIndex(reflect.ValueOf(key), e)
		}
	case reflect.Slice:
		if !expect(yaml.SequenceNode) {
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
		for i, e := range n.Content {
			inner := at.entry(i)
			d.into(e, v.Index(i), &inner, "", depth+1)
		}
	case reflect.String:
		if !expect(yaml.ScalarNode) {
			return
		}
		if n.Tag == "!!bool" {
			d.fail(at, n, fmt.Sprintf("must be text, and %s without quotes is true or false", clip(n.Value)), "put it in quotes")
			return
		}
		if allowed := tagValue(tag, "enum"); allowed != "" && !slices.Contains(strings.Split(allowed, "|"), n.Value) {
			d.fail(at, n, fmt.Sprintf("%q is not one of %s", clip(n.Value), strings.ReplaceAll(allowed, "|", ", ")), "")
			return
		}
		v.SetString(n.Value)
	case reflect.Int:
		var i int
		if expect(yaml.ScalarNode) {
			if n.Tag != "!!int" || len(n.Value) > maxNumber || n.Decode(&i) != nil {
				d.fail(at, n, fmt.Sprintf("%q is not a whole number", clip(n.Value)), "")
				return
			}
			v.SetInt(int64(i))
		}
	case reflect.Bool:
		if expect(yaml.ScalarNode) {
			if n.Tag != "!!bool" {
				d.fail(at, n, fmt.Sprintf("%q is not true or false", clip(n.Value)), "")
				return
			}
			v.SetBool(n.Value == "true" || n.Value == "True" || n.Value == "TRUE")
		}
	default:
		panic("filter: a document has a field of type " + v.Type().String())
	}
}

func (d *decoder) object(n *yaml.Node, v reflect.Value, at *place, depth int) {
	fields := map[string]reflect.StructField{}
	var names []string
	for _, f := range reflect.VisibleFields(v.Type()) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		fields[name] = f
		names = append(names, name)
	}
	for key, val := range d.pairs(n, at) {
		inner := at.field(key)
		f, ok := fields[key]
		if !ok {
			d.fail(&inner, val, "there is no such field", suggest(key, names))
			continue
		}
		d.into(val, v.FieldByIndex(f.Index), &inner, f.Tag.Get("schema"), depth+1)
	}
}

// pairs iterates over a map's entries and reports keys that are no text, too long, or come twice.
func (d *decoder) pairs(n *yaml.Node, at *place) func(func(string, *yaml.Node) bool) {
	return func(yield func(string, *yaml.Node) bool) {
		seen := map[string]bool{}
		for i := 0; i+1 < len(n.Content) && !d.spent; i += 2 {
			k := n.Content[i]
			switch inner := at.field(k.Value); {
			case k.Kind != yaml.ScalarNode || k.Tag == "!!merge":
				d.fail(at, k, "a key must be plain text", "write the fields out; merge keys are not supported")
			case len(k.Value) > maxKey:
				d.fail(&inner, k, fmt.Sprintf("a key has more than %d bytes", maxKey), "use a shorter one")
			case seen[k.Value]:
				d.fail(&inner, k, "the field is there twice", "keep one of them")
			default:
				d.text -= len(k.Value)
				seen[k.Value] = true
				if !yield(k.Value, n.Content[i+1]) {
					return
				}
			}
		}
	}
}

// value decodes any YAML value into what encoding/json would give with UseNumber.
func (d *decoder) value(n *yaml.Node, at *place, depth int) any {
	if n = d.enter(n, at, depth); n == nil {
		return nil
	}
	return d.entered(n, at, depth)
}

// entered is value for a node that is counted already.
func (d *decoder) entered(n *yaml.Node, at *place, depth int) any {
	switch n.Kind {
	case yaml.MappingNode:
		m := map[string]any{}
		for key, val := range d.pairs(n, at) {
			inner := at.field(key)
			m[key] = d.value(val, &inner, depth+1)
		}
		return m
	case yaml.SequenceNode:
		l := make([]any, len(n.Content))
		for i, e := range n.Content {
			inner := at.entry(i)
			l[i] = d.value(e, &inner, depth+1)
		}
		return l
	}
	if (n.Tag == "!!int" || n.Tag == "!!float") && len(n.Value) > maxNumber {
		d.fail(at, n, fmt.Sprintf("a number has more than %d characters", maxNumber), "put it in quotes")
		return nil
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
	d.fail(at, n, fmt.Sprintf("%q has no equivalent in JSON", clip(n.Value)), "put it in quotes")
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
