package config

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/internal/problem"
)

// maxFile bounds the configuration file and a secret's file, in bytes.
const maxFile = 1 << 20

// Load reads the configuration: Defaults, file (empty: none), environ (as os.Environ gives it) and flags (key path to
// text, only those that were given), later ones winning. It expands ~ in paths, and validates. Every mistake of every
// source is in the one problem.InvalidConfiguration.
func Load(file string, environ []string, flags map[string]string) (Config, error) {
	c := Defaults()
	l := &loader{wrong: map[string]bool{}}
	if file != "" {
		l.file(file, &c)
	}
	env := map[string]string{}
	for _, e := range environ {
		if name, value, ok := strings.Cut(e, "="); ok && value != "" {
			env[name] = value
		}
	}
	if v, ok := env["MESHERY_SERVER"]; ok {
		c.MesheryServer = v
	}
	if v, ok := env["SERVICE_ADDR"]; ok {
		c.Meshery.AdapterAddr = v
	}
	// Other programs give DEBUG other meanings; what is no answer to yes or no is theirs.
	if v, err := strconv.ParseBool(env["DEBUG"]); err == nil {
		c.Debug = v
	}
	known := map[string]bool{}
	for path, v := range scalars(reflect.ValueOf(&c).Elem(), "") {
		known[path] = true
		if text, ok := env[envName(path)]; ok {
			l.set(v, text, path, envName(path), "")
		}
		if text, ok := flags[path]; ok {
			l.set(v, text, path, "--"+flagName(path), "")
		}
	}
	for path := range flags {
		if !known[path] {
			l.fail(path, path, "there is no such key", "")
		}
	}
	for path, v := range scalars(reflect.ValueOf(&c).Elem(), "") {
		if strings.HasSuffix(path, "File") || strings.HasSuffix(path, "Dir") {
			v.SetString(l.expand(v.String(), path, env["HOME"]))
		}
	}
	for name, keys := range c.Secrets {
		for key, s := range keys {
			keys[key] = Source{Env: s.Env, File: l.expand(s.File, "secrets."+name+"."+key+".file", env["HOME"])}
		}
	}
	if c.OperationsDir == "" && file != "" {
		dir := filepath.Join(filepath.Dir(file), "operations.d")
		if info, err := os.Stat(dir); err == nil && info.IsDir() {
			c.OperationsDir = dir
		}
	}
	for _, m := range c.mistakes() {
		if !l.wrong[m.Path] { // a value that could not be read is not wrong a second time
			l.mistakes = append(l.mistakes, m)
		}
	}
	return c, problem.InvalidConfiguration.WithFields("", l.mistakes)
}

// Set changes one scalar key by its path, such as limits.queue. It does not validate the whole.
func (c *Config) Set(path, value string) error {
	for p, v := range scalars(reflect.ValueOf(c).Elem(), "") {
		if p == path {
			l := &loader{wrong: map[string]bool{}}
			l.set(v, value, path, path, "")
			return problem.InvalidConfiguration.WithFields("", l.mistakes)
		}
	}
	return problem.InvalidConfiguration.WithFields("", []problem.Field{{Path: path, Cause: "there is no such key"}})
}

// Key is one scalar setting.
type Key struct {
	Path    string // limits.queue
	Env     string // MESHERY_FILTERS_LIMITS_QUEUE
	Flag    string // limits-queue
	Type    string // text, number, duration or bool
	Default string
	Doc     string // one or more sentences
}

// Keys lists every scalar setting in the order of adapter.yaml.
func Keys() []Key {
	var n yaml.Node
	if err := yaml.Unmarshal(example, &n); err != nil {
		panic(fmt.Sprintf("config: adapter.yaml, which is part of the program: %v", err))
	}
	docs := map[string]string{}
	comments(n.Content[0], "", docs)
	var keys []Key
	c := Defaults()
	for path, v := range scalars(reflect.ValueOf(&c).Elem(), "") {
		keys = append(keys, Key{Path: path, Env: envName(path), Flag: flagName(path), Type: typeName(v),
			Default: fmt.Sprint(v.Interface()), Doc: docs[path]})
	}
	return keys
}

//go:embed adapter.yaml
var example []byte

// Example is adapter.yaml: every key with its default and what it means.
func Example() []byte { return bytes.Clone(example) }

// comments collects the comment above each key, as one line.
func comments(n *yaml.Node, prefix string, into map[string]string) {
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], n.Content[i+1]
		path := join(prefix, key.Value)
		paragraphs := strings.Split(key.HeadComment, "\n\n")
		last := strings.Split(paragraphs[len(paragraphs)-1], "\n")
		for i, line := range last {
			last[i] = strings.TrimSpace(strings.TrimPrefix(line, "#"))
		}
		into[path] = strings.Join(last, " ")
		if val.Kind == yaml.MappingNode {
			comments(val, path, into)
		}
	}
}

type loader struct {
	mistakes []problem.Field
	wrong    map[string]bool // key paths
}

func (l *loader) fail(path, shown, cause, remedy string) {
	l.wrong[path] = true
	l.mistakes = append(l.mistakes, problem.Field{Path: shown, Cause: cause, Remedy: remedy})
}

func (l *loader) file(name string, c *Config) {
	data, err := readFile(name)
	if err != nil {
		l.fail("", name, "it cannot be read: "+err.Error(), "")
		return
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var n, more yaml.Node
	if err := dec.Decode(&n); errors.Is(err, io.EOF) {
		return
	} else if err != nil {
		l.fail("", name, "it is not YAML", "mind indentation and quotes"+strings.TrimPrefix(lineOf(err), " "))
		return
	}
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		l.fail("", name, "it has more than one document", "keep one")
	}
	l.into(n.Content[0], reflect.ValueOf(c).Elem(), "")
}

// lineOf keeps the place of a YAML error and leaves out its text, which may quote the file.
func lineOf(err error) string {
	_, rest, ok := strings.Cut(err.Error(), "line ")
	digits := strings.IndexFunc(rest, func(r rune) bool { return !unicode.IsDigit(r) })
	if !ok || digits < 1 {
		return ""
	}
	return " near line " + rest[:digits]
}

// into reads a node of the file into a part of the configuration.
func (l *loader) into(n *yaml.Node, v reflect.Value, path string) {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n.Tag == "!!null" {
		return
	}
	line := fmt.Sprintf(" (line %d)", n.Line)
	isMap := v.Kind() == reflect.Struct || v.Kind() == reflect.Map
	switch {
	case isMap && n.Kind != yaml.MappingNode:
		l.fail(path, path, "it must be a map"+line, "write its keys below it, indented")
		return
	case !isMap && n.Kind != yaml.ScalarNode:
		l.fail(path, path, "it must be a single value"+line, "")
		return
	case !isMap:
		l.set(v, n.Value, path, path, line)
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], n.Content[i+1]
		at := join(path, key.Value)
		line := fmt.Sprintf(" (line %d)", key.Line)
		if seen[key.Value] {
			l.fail(at, at, "the key is there twice"+line, "keep one of them")
			continue
		}
		seen[key.Value] = true
		if v.Kind() == reflect.Map {
			if v.IsNil() {
				v.Set(reflect.MakeMap(v.Type()))
			}
			e := reflect.New(v.Type().Elem()).Elem()
			l.into(val, e, at)
			v.SetMapIndex(reflect.ValueOf(key.Value), e)
			continue
		}
		var names []string
		var field reflect.Value
		for name, f := range fields(v) {
			names = append(names, name)
			if name == key.Value {
				field = f
			}
		}
		if !field.IsValid() {
			l.fail(at, at, "there is no such key"+line, "the keys here are "+strings.Join(names, ", "))
			continue
		}
		l.into(val, field, at)
	}
}

// set reads text into a scalar; shown is how a message names where the text came from.
func (l *loader) set(v reflect.Value, text, path, shown, line string) {
	delete(l.wrong, path) // what an earlier source had wrong stays reported, and this one speaks for itself
	if _, ok := v.Interface().(time.Duration); ok {
		d, err := time.ParseDuration(text)
		if err != nil {
			l.fail(path, shown, fmt.Sprintf("%q is not a duration%s", text, line), "write a number with a unit, such as 30s or 2m")
		}
		v.SetInt(int64(d))
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
	case reflect.Int:
		i, err := strconv.Atoi(text)
		if err != nil {
			l.fail(path, shown, fmt.Sprintf("%q is not a whole number%s", text, line), "")
		}
		v.SetInt(int64(i))
	case reflect.Bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			l.fail(path, shown, fmt.Sprintf("%q is not true or false%s", text, line), "")
		}
		v.SetBool(b)
	default:
		panic("config: a key of type " + v.Type().String())
	}
}

// fields yields a struct's keys and values.
func fields(v reflect.Value) iter.Seq2[string, reflect.Value] {
	return func(yield func(string, reflect.Value) bool) {
		for i := range v.NumField() {
			name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("yaml"), ",")
			if !yield(name, v.Field(i)) {
				return
			}
		}
	}
}

// scalars yields the path and value of every scalar in a struct; maps have none.
func scalars(v reflect.Value, prefix string) iter.Seq2[string, reflect.Value] {
	return func(yield func(string, reflect.Value) bool) {
		for name, f := range fields(v) {
			path := join(prefix, name)
			switch f.Kind() {
			case reflect.Map:
			case reflect.Struct:
				for p, s := range scalars(f, path) {
					if !yield(p, s) {
						return
					}
				}
			default:
				if !yield(path, f) {
					return
				}
			}
		}
	}
}

func typeName(v reflect.Value) string {
	if _, ok := v.Interface().(time.Duration); ok {
		return "duration"
	}
	return map[reflect.Kind]string{reflect.String: "text", reflect.Int: "number", reflect.Bool: "bool"}[v.Kind()]
}

func join(prefix, name string) string { return strings.TrimPrefix(prefix+"."+name, ".") }

// words divides limits.moduleBytes into limits, module, Bytes, and clientCAFile into client, CA, File.
func words(path string) []string {
	var out []string
	for part := range strings.SplitSeq(path, ".") {
		r := []rune(part)
		start := 0
		for i := 1; i < len(r); i++ {
			afterLower := unicode.IsUpper(r[i]) && !unicode.IsUpper(r[i-1])
			beforeLower := unicode.IsUpper(r[i]) && i+1 < len(r) && unicode.IsLower(r[i+1])
			if afterLower || beforeLower {
				out = append(out, string(r[start:i]))
				start = i
			}
		}
		out = append(out, string(r[start:]))
	}
	return out
}

func envName(path string) string {
	return "MESHERY_FILTERS_" + strings.ToUpper(strings.Join(words(path), "_"))
}

func flagName(path string) string { return strings.ToLower(strings.Join(words(path), "-")) }

// expand replaces a leading ~ by the home folder.
func (l *loader) expand(file, path, home string) string {
	rest, ok := strings.CutPrefix(file, "~")
	if !ok || rest != "" && rest[0] != '/' {
		return file
	}
	if home == "" {
		l.fail(path, path, file+" cannot be told, because the variable HOME is not set", "write the whole path")
		return file
	}
	return filepath.Join(home, rest)
}

// readFile reads a regular file of at most maxFile bytes. Anything else could keep the reader waiting.
func readFile(name string) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("%s has more than %d bytes", name, maxFile)
	}
	return data, err
}
