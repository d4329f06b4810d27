package oam

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
)

// The components that a design can hold of this adapter.
const (
	KindWASMFilter = "WASMFilter"
	KindImageHub   = "ImageHub"
	// KindEnvoyFilter is Istio's, which Meshery's relationship patches with a WASMFilter's config.
	KindEnvoyFilter = "EnvoyFilter"
	// kindEnvoyFilterIstio is what Meshery's servers of 2021 call that.
	kindEnvoyFilterIstio = "EnvoyFilterIstio"
)

// Bounds of a design.
const (
	maxComponents = 100
	maxComponent  = filter.MaxBody // bytes
	maxMarks      = 200_000        // of JSON's structure, in all components
	maxNesting    = 100
	maxMistakes   = 100
)

// Step is one operation of a design.
type Step struct {
	Component string            // "WASMFilter limit", as the design has it
	Request   operation.Request // Operation, Namespace, Body and Delete
}

// component is what a design says of one of its parts, in any generation's form.
type component struct {
	at              string // where it stands: components[0]
	kind            string
	name, namespace string
	labels          map[string]string
	settings        map[string]any
}

func (c component) String() string { return strings.TrimSpace(c.kind + " " + c.name) }

// OAM reads the components that ProcessOAM brings, and its configuration. The operations come in the order in which they
// are to be done: Image Hub first, what stands in front of it after it, and the other way round where they are removed.
//
// Errors are problem.ForeignComponent for what is not this adapter's, and problem.InvalidDesign with all mistakes. Then
// nothing of the design is to be done.
func OAM(components []string, configuration string, remove bool) ([]Step, error) {
	if err := few("oam_comps", components); err != nil {
		return nil, err
	}
	var mistakes []problem.Field
	all := make([]component, 0, len(components))
	err := each("oam_comps", append(slices.Clone(components), configuration), func(at string, i int, text string) error {
		if i == len(components) {
			mistakes = attach(text, all, remove)
			return nil
		}
		var c struct {
			Metadata struct {
				Name, Namespace string
				Labels          map[string]string
			}
			Spec struct {
				Type     string
				Settings object
			}
		}
		if err := read(text, &c); err != nil {
			return err
		}
		all = append(all, component{at, c.Spec.Type, c.Metadata.Name, c.Metadata.Namespace, c.Metadata.Labels, c.Spec.Settings})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return steps(all, remove, mistakes)
}

// Declarations is OAM for the component definitions that Provision brings.
func Declarations(declarations []string, remove bool) ([]Step, error) {
	if err := few("declarations", declarations); err != nil {
		return nil, err
	}
	all := make([]component, 0, len(declarations))
	err := each("declarations", declarations, func(at string, _ int, text string) error {
		var d struct {
			DisplayName   string
			Component     struct{ Kind string }
			Configuration object
		}
		if err := read(text, &d); err != nil {
			return err
		}
		c := component{at: at, kind: d.Component.Kind, name: d.DisplayName, settings: d.Configuration}
		c.identify()
		all = append(all, c)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return steps(all, remove, nil)
}

// identify takes from a configuration what is no setting: it may have the form of a Kubernetes object, whose metadata the
// server writes labels into.
func (c *component) identify() {
	text := func(m map[string]any, key string) string { s, _ := m[key].(string); return s }
	meta, _ := c.settings["metadata"].(map[string]any)
	if name := text(meta, "name"); name != "" {
		c.name = name
	}
	c.namespace = text(meta, "namespace")
	if c.namespace == "" {
		c.namespace = text(c.settings, "namespace")
	}
	labels, _ := meta["labels"].(map[string]any)
	for k, v := range labels {
		if s, ok := v.(string); ok {
			if c.labels == nil {
				c.labels = map[string]string{}
			}
			c.labels[k] = s
		}
	}
	for _, key := range []string{"metadata", "namespace", "apiVersion", "kind"} {
		delete(c.settings, key)
	}
}

// few bounds the components of a design.
func few(field string, components []string) error {
	if len(components) <= maxComponents {
		return nil
	}
	return problem.InvalidDesign.WithFields("", []problem.Field{{Path: field, Cause: fmt.Sprintf("there are %d components", len(components)),
		Remedy: fmt.Sprintf("deploy at most %d at a time", maxComponents)}})
}

// each bounds the texts of a design and has them read.
func each(field string, texts []string, do func(at string, i int, text string) error) error {
	var mistakes []problem.Field
	marks := 0
	for i, text := range texts {
		at := fmt.Sprintf("%s[%d]", field, i)
		n, depth := shape(text)
		if marks += n; marks > maxMarks || depth > maxNesting || len(text) > maxComponent {
			mistakes = append(mistakes, problem.Field{Path: at, Cause: "it is too large, nested too deep or has too many values", Remedy: "deploy fewer components at a time"})
			break
		}
		if err := do(at, i, text); err != nil {
			mistakes = append(mistakes, problem.Field{Path: at, Cause: "it is not a component in JSON: " + err.Error()})
		}
	}
	return problem.InvalidDesign.WithFields("", mistakes)
}

// shape counts what makes JSON's tree, each of which takes room once it is read, and its depth.
func shape(text string) (marks, depth int) {
	quoted, at := false, 0
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			marks++
			at++
			depth = max(depth, at)
		case c == '}' || c == ']':
			at--
		case c == ',' || c == ':':
			marks++
		}
	}
	return marks, depth
}

// object is a JSON object whose numbers stay as they are written.
type object map[string]any

// UnmarshalJSON reads an object, or null.
func (o *object) UnmarshalJSON(text []byte) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	return d.Decode((*map[string]any)(o))
}

// read decodes one JSON value that is the whole text. What it says of a mistake quotes no value.
func read(text string, into any) error {
	d := json.NewDecoder(strings.NewReader(text))
	err := d.Decode(into)
	if err == nil {
		if _, more := d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("something follows it")
		}
	}
	var wrong *json.UnmarshalTypeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &wrong):
		return fmt.Errorf("%s must not be a JSON %s", wrong.Field, strings.SplitN(wrong.Value, " ", 2)[0])
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("it ends early")
	}
	return err
}

// steps orders the components and makes operations of them.
func steps(all []component, remove bool, mistakes []problem.Field) ([]Step, error) {
	if len(all) == 0 {
		return nil, problem.InvalidDesign.New("there is no component in the request")
	}
	var foreign []problem.Field
	for _, c := range all {
		if !slices.Contains([]string{KindWASMFilter, KindImageHub, KindEnvoyFilter, kindEnvoyFilterIstio}, c.kind) {
			foreign = append(foreign, problem.Field{Path: c.at, Cause: fmt.Sprintf("%q is of the type %q", clip(c.name), clip(c.kind))})
		}
	}
	if err := problem.ForeignComponent.WithFields("", foreign); err != nil {
		return nil, err
	}
	w := writer{all: all, remove: remove, mistakes: mistakes, names: map[filter.Key]string{},
		values: map[string]bool{}, configs: map[string]component{}, texts: map[string]any{}}
	if !w.relate() {
		return nil, problem.InvalidDesign.WithFields("", w.mistakes[:min(len(w.mistakes), maxMistakes)])
	}
	for _, c := range all {
		if c.kind == KindImageHub {
			w.imageHub(c)
		}
	}
	for _, c := range all {
		switch c.kind {
		case KindWASMFilter:
			w.wasmFilter(c)
		case KindEnvoyFilter, kindEnvoyFilterIstio:
			w.envoyFilter(c)
		}
	}
	if w.read > maxTexts {
		w.mistakes = slices.Insert(w.mistakes, 0, problem.Field{Path: "settings", Cause: fmt.Sprintf("texts that may be YAML have more than %d bytes", maxTexts),
			Remedy: "deploy fewer components at a time"})
	}
	if err := problem.InvalidDesign.WithFields("", w.mistakes[:min(len(w.mistakes), maxMistakes)]); err != nil {
		return nil, err
	}
	if remove {
		slices.Reverse(w.steps)
	}
	return w.steps, nil
}

// writer collects the operations of a design, and what is wrong with it.
type writer struct {
	all      []component
	remove   bool
	steps    []Step
	mistakes []problem.Field
	names    map[filter.Key]string // who has a filter's name
	values   map[string]bool       // of EnvoyFilters' patches, as canonical has them
	configs  map[string]component  // WASMFilters by their config, where there are EnvoyFilters
	texts    map[string]any        // what those say that were read
	read     int                   // bytes of them
}

func (w *writer) fail(c component, path, remedy, cause string, args ...any) {
	w.mistakes = append(w.mistakes, problem.Field{Path: strings.TrimSuffix(fmt.Sprintf("%s (%s).%s", c.at, clip(c.String()), path), "."),
		Cause: fmt.Sprintf(cause, args...), Remedy: remedy})
}

// imageHub runs the application, and puts its limiter in front of it where rateLimit says so.
func (w *writer) imageHub(c component) {
	limit := false
	for _, key := range slices.Sorted(maps.Keys(c.settings)) {
		v := c.settings[key]
		b, ok := v.(bool)
		switch {
		case w.remove && (key != "rateLimit" || !ok):
		case key != "rateLimit":
			w.fail(c, "settings."+clip(key), "the setting here is rateLimit", "there is no such setting")
		case !ok && v != nil:
			w.fail(c, "settings.rateLimit", "", "it is not true or false")
		default:
			limit = b
		}
	}
	if c.namespace != "" && !filter.IsDNSLabel(c.namespace) {
		w.fail(c, "namespace", "use at most 63 lower-case letters, digits and dashes", "%q is not a namespace's name", clip(c.namespace))
	}
	operations := []string{"imagehub"}
	if limit {
		operations = append(operations, "imagehub_rate_limit")
	}
	for _, o := range operations {
		w.steps = append(w.steps, Step{c.String(), operation.Request{Operation: o, Namespace: c.namespace, Delete: w.remove}})
	}
}

// wasmFilter applies one filter, unless an EnvoyFilter of the same design does it.
func (w *writer) wasmFilter(c component) {
	if spec, ok := c.settings["spec"].(map[string]any); ok {
		c.settings = spec
	}
	if w.patched(c) {
		return
	}
	s := settings{writer: w, component: c, spec: map[string]any{}}
	s.wasmFilter()
	w.add(c, c.name, s.spec)
}

// add makes an operation of a document. A removal needs of it only which filter is meant, and how.
func (w *writer) add(c component, name string, spec map[string]any) {
	key := filter.Key{Namespace: c.namespace, Name: label(name)}
	if key.Namespace == "" {
		key.Namespace = "default"
	}
	if other, taken := w.names[key]; taken {
		w.fail(c, "name", "give each component a name of its own", "%s is also the filter of %s", key, clip(other))
		return
	}
	w.names[key] = c.String()
	labels := map[string]string{filter.ComponentLabel: origin(c)}
	for k, v := range c.labels {
		if k != filter.ComponentLabel {
			labels[k] = v
		}
	}
	metadata := map[string]any{"name": key.Name, "namespace": key.Namespace, "labels": labels}
	check := func(body []byte) error { _, err := filter.Read(body, ""); return err }
	if w.remove {
		spec = only(spec, "mesh", "wait", "rollout")
		check = func(body []byte) error { _, err := filter.ReadKeys(body, ""); return err }
	}
	body := marshal(map[string]any{"apiVersion": filter.APIVersion, "kind": filter.Kind, "metadata": metadata, "spec": spec})
	if err := check(body); err != nil {
		var p *problem.Problem
		if !errors.As(err, &p) || len(p.Fields) == 0 {
			w.fail(c, "", "", "%s", err)
			return
		}
		for _, f := range p.Fields {
			path := f.Path
			if rest, ok := strings.CutPrefix(path, "spec"); ok {
				path = "settings" + rest
			}
			// Everything is in the first line.
			w.fail(c, path, f.Remedy, "%s", strings.TrimSuffix(f.Cause, " (line 1)"))
		}
		return
	}
	w.steps = append(w.steps, Step{c.String(), operation.Request{Operation: "apply_filter", Namespace: key.Namespace, Body: string(body), Delete: w.remove}})
}

// label makes a name of a filter of a component's name, which may have blanks and capitals.
func label(name string) string {
	name = strings.Map(func(r rune) rune {
		switch {
		case 'A' <= r && r <= 'Z':
			return r + 'a' - 'A'
		case 'a' <= r && r <= 'z', '0' <= r && r <= '9':
			return r
		}
		return '-'
	}, name)
	return strings.Trim(name[:min(len(name), 63)], "-")
}

// origin tells components apart whose names come to the same label: "WASMFilter.hello", and with a digest of what a label
// cannot hold "WASMFilter.My-Filter-2c26b46b68ff".
func origin(c component) string {
	kind := c.kind
	if kind == kindEnvoyFilterIstio {
		kind = KindEnvoyFilter
	}
	text := kind + "." + c.name
	if labelValue.MatchString(text) {
		return text
	}
	sum := sha256.Sum256([]byte(text))
	return fmt.Sprintf("%s-%x", strings.Map(func(r rune) rune {
		if r == '.' || labelValue.MatchString(string(r)) {
			return r
		}
		return '-'
	}, text[:min(len(text), 50)]), sum[:6])
}

// labelValue is what Kubernetes takes for the value of a label.
var labelValue = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)

// only is the part of m that has one of the keys.
func only(m map[string]any, keys ...string) map[string]any {
	out := map[string]any{}
	for _, k := range keys {
		if v, ok := m[k]; ok {
			out[k] = v
		}
	}
	return out
}

// marshal writes a document. What it is made of was JSON before.
func marshal(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic("oam: " + err.Error())
	}
	return bytes.TrimSpace(b.Bytes())
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
