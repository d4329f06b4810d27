package filter

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

const minimal = `
apiVersion: filters.meshery.io/v1alpha1
kind: Filter
metadata: {name: hello}
spec:
  module: {builtin: headers}
`

func TestADocumentGetsItsDefaults(t *testing.T) {
	fs, err := Read([]byte(minimal), "shop")
	if err != nil {
		t.Fatal(err)
	}
	f := fs[0]
	if f.Key.String() != "shop/hello" || f.Spec.Mesh != "auto" || f.Spec.Protocol != HTTP || f.Spec.FailurePolicy != FailClosed ||
		f.Spec.Wait.For != WaitAll || time.Duration(f.Spec.Wait.Timeout) != 30*time.Second || f.Spec.VMID != "shop/hello" || f.Spec.Delivery.Mode != DeliverAuto {
		t.Errorf("defaults: %+v", f)
	}
	fs, err = Read([]byte(minimal), "")
	if err != nil || fs[0].Key.Namespace != "default" {
		t.Errorf("without a namespace in request and document: %v, %v", fs, err)
	}
	fs, err = Read([]byte(strings.Replace(minimal, "{name: hello}", "{name: hello, namespace: own}", 1)), "shop")
	if err != nil || fs[0].Key.Namespace != "own" {
		t.Errorf("the document's namespace wins: %v, %v", fs, err)
	}
}

func TestABodyIsOneDocumentSeveralOrAList(t *testing.T) {
	doc := func(name string) string { return strings.Replace(minimal, "hello", name, 1) }
	indent := func(s string) string { return "-" + strings.ReplaceAll(s, "\n", "\n  ") + "\n" }
	for name, body := range map[string]string{
		"several":                      doc("a") + "---\n" + doc("b"),
		"a list":                       indent(doc("a")) + indent(doc("b")),
		"json":                         `[{"apiVersion":"filters.meshery.io/v1alpha1","kind":"Filter","metadata":{"name":"a"},"spec":{"module":{"builtin":"headers"}}},{"apiVersion":"filters.meshery.io/v1alpha1","kind":"Filter","metadata":{"name":"b"},"spec":{"module":{"builtin":"headers"}}}]`,
		"with empty documents between": "---\n# nothing\n---\n" + doc("a") + "---\n---\n" + doc("b") + "---\n",
	} {
		fs, err := Read([]byte(body), "")
		if err != nil || len(fs) != 2 || fs[0].Key.Name != "a" || fs[1].Key.Name != "b" {
			t.Errorf("%s: %v, %v", name, fs, err)
		}
	}
}

// Each case is a file in testdata/bad: a body, and the mistakes it must report, one per line, in a comment block
// at its beginning.
func TestEveryMistakeIsNamedWithItsPath(t *testing.T) {
	files, _ := filepath.Glob("testdata/bad/*.yaml")
	if len(files) < 10 {
		t.Fatalf("only %d cases", len(files))
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			body, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			for line := range strings.Lines(string(body)) {
				if w, ok := strings.CutPrefix(line, "# "); ok {
					want = append(want, strings.TrimSpace(w))
				}
			}
			_, err = Read(body, "")
			if !errors.Is(err, problem.InvalidDocument) {
				t.Fatalf("got %v", err)
			}
			var got []string
			for _, f := range problem.Of(err).Fields {
				got = append(got, f.String())
			}
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("mistakes:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}

func TestAConfigurationIsHandedOnAsItWasWritten(t *testing.T) {
	for name, c := range map[string]struct{ yaml, want string }{
		"a string verbatim":                   {`config: "a: b\n<&>"`, "a: b\n<&>"},
		"a block of text verbatim":            {"config: |\n    {\"x\":1}\n", "{\"x\":1}\n"},
		"a map as JSON with sorted keys":      {`config: {b: 1, a: [true, null, 1.50, "<x>"]}`, `{"a":[true,null,1.50,"<x>"],"b":1}`},
		"large numbers without loss":          {`config: {n: 12345678901234567890123}`, `{"n":12345678901234567890123}`},
		"other bases as decimal":              {`config: {n: 0x10, o: 1_000}`, `{"n":16,"o":1000}`},
		"words that YAML 1.1 took for truths": {`config: {y: yes, n: off}`, `{"n":"off","y":"yes"}`},
		"dates as text":                       {`config: {d: 2026-01-02}`, `{"d":"2026-01-02"}`},
		"nothing":                             {``, ``},
		"aliases expanded":                    {`config: {a: &x {k: 1}, b: *x}`, `{"a":{"k":1},"b":{"k":1}}`},
	} {
		fs, err := Read([]byte(minimal+"  "+c.yaml), "")
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := fs[0].Spec.Config.Text(); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
		// What is stored and read again is the same filter.
		data, err := json.Marshal(fs[0])
		if err != nil {
			t.Fatal(err)
		}
		var again Filter
		if err := json.Unmarshal(data, &again); err != nil {
			t.Fatal(err)
		}
		if got := again.Spec.Config.Text(); got != c.want {
			t.Errorf("%s after storing: %q, want %q", name, got, c.want)
		}
	}
}

func TestSecretsAreReferencesUntilTheyAreResolved(t *testing.T) {
	fs, err := Read([]byte(minimal+`
  config: {auth: {key: {$secret: {name: hub, key: token}}}, list: [{$secret: {name: hub, key: token}}]}
  environment: [{name: A, value: {$secret: {name: hub, key: other}}}, {name: B, value: plain}, {name: HOME, valueFrom: host}]`), "")
	if err != nil {
		t.Fatal(err)
	}
	f := fs[0]
	if got := f.Secrets(); !slices.Equal(got, []SecretRef{{"hub", "token"}, {"hub", "other"}}) {
		t.Errorf("secrets: %v", got)
	}
	r, err := f.Resolved(func(ref SecretRef) (string, error) { return "value of " + ref.String(), nil })
	if err != nil {
		t.Fatal(err)
	}
	if got := r.Spec.Config.Text(); got != `{"auth":{"key":"value of hub/token"},"list":["value of hub/token"]}` {
		t.Errorf("resolved: %s", got)
	}
	if r.Spec.Environment[0].Value.Text() != "value of hub/other" || r.Spec.Environment[1].Value.Text() != "plain" {
		t.Errorf("resolved environment: %v", r.Spec.Environment)
	}
	data, _ := json.Marshal(f)
	if strings.Contains(string(data), "value of") || !strings.Contains(string(data), `{"$secret":{"key":"token","name":"hub"}}`) {
		t.Errorf("resolving changed the filter itself: %s", data)
	}
	_, err = f.Resolved(func(SecretRef) (string, error) { return "", problem.SecretMissing.New("hub/token") })
	if !errors.Is(err, problem.SecretMissing) {
		t.Errorf("a missing secret: %v", err)
	}
}

func TestAChainIsOrderedByPhasePriorityAndName(t *testing.T) {
	c := Chain{}
	add := func(name string, phase Phase, priority int) {
		c = c.With(Filter{Key: Key{"d", name}, Spec: Spec{Phase: phase, Priority: priority}})
	}
	add("z", "", 0)
	add("b", "", 5)
	add("a", "", 5)
	add("low", "", -1)
	add("s", Stats, 100)
	add("authz", Authz, -7)
	add("authn", Authn, 0)
	want := "d/authn d/authz d/s d/a d/b d/z d/low"
	if got := strings.Join(c.Names(), " "); got != want {
		t.Errorf("order %s, want %s", got, want)
	}
	before := strings.Join(c.Names(), " ")
	other := c.With(Filter{Key: Key{"d", "z"}, Spec: Spec{Priority: 9}})
	if got := strings.Join(other.Names(), " "); got != "d/authn d/authz d/s d/z d/a d/b d/low" {
		t.Errorf("replaced: %s", got)
	}
	if got := strings.Join(other.Without(Key{"d", "s"}).Names(), " "); got != "d/authn d/authz d/z d/a d/b d/low" {
		t.Errorf("without: %s", got)
	}
	if got := strings.Join(c.Names(), " "); got != before {
		t.Errorf("With and Without changed the chain they were called on: %s", got)
	}
}

func TestARemovalNeedsOnlyNames(t *testing.T) {
	fs, err := ReadKeys([]byte("{apiVersion: filters.meshery.io/v1alpha1, kind: Filter, metadata: {name: hello}}"), "shop")
	if err != nil || len(fs) != 1 || fs[0].Key.String() != "shop/hello" {
		t.Errorf("%v, %v", fs, err)
	}
	if _, err := ReadKeys([]byte("{apiVersion: filters.meshery.io/v1alpha1, kind: Filter, metadata: {nam: hello}}"), ""); !errors.Is(err, problem.InvalidDocument) {
		t.Errorf("a misspelled name: %v", err)
	}
}

func TestABodyThatBlowsUpIsRefused(t *testing.T) {
	bomb := "a0: &a0 [x]\n"
	for i := 1; i < 12; i++ {
		n := string(rune('a' + i))
		p := string(rune('a' + i - 1))
		ref := "*" + p + "0"
		bomb += n + "0: &" + n + "0 [" + strings.Repeat(ref+",", 9) + ref + "]\n"
	}
	body := minimal + "  config:\n    " + strings.ReplaceAll(bomb, "\n", "\n    ")
	if _, err := Read([]byte(body), ""); !errors.Is(err, problem.InvalidDocument) {
		t.Errorf("aliases of aliases: %v", err)
	}
	if _, err := Read([]byte(minimal+"  config: "+strings.Repeat("[", 500)+strings.Repeat("]", 500)), ""); !errors.Is(err, problem.InvalidDocument) {
		t.Errorf("depth: %v", err)
	}
	if _, err := Read(make([]byte, MaxBody+1), ""); !errors.Is(err, problem.InvalidDocument) {
		t.Errorf("size: %v", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(minimal))
	f.Add([]byte("- {a: *x}"))
	f.Add([]byte("&a [*a]"))
	bad, _ := filepath.Glob("testdata/bad/*.yaml")
	for _, file := range bad {
		if b, err := os.ReadFile(file); err == nil {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		checkNodes(t, body)
		filters, err := Read(body, "")
		if err != nil {
			if !errors.Is(err, problem.InvalidDocument) {
				t.Errorf("an unnamed problem: %v", err)
			}
			return
		}
		for _, fl := range filters {
			data, err := json.Marshal(fl.Document())
			if err != nil {
				t.Fatalf("a valid document cannot be written: %v", err)
			}
			again, err := Read(data, "")
			if err != nil {
				t.Fatalf("a written document cannot be read: %v\n%s", err, data)
			}
			second, _ := json.Marshal(again[0].Document())
			if string(second) != string(data) {
				t.Fatalf("reading and writing changes it:\n%s\n%s", data, second)
			}
		}
	})
}
