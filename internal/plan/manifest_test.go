package plan

import (
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/yaml"
)

func manifestOf(t *testing.T, spec map[string]any) string {
	t.Helper()
	o := Object{Content: map[string]any{"apiVersion": "v1", "kind": "Thing",
		"metadata": map[string]any{"name": "thing"}, "spec": spec}}
	text, err := Manifest([]Object{o, o})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// kubectlReads decodes as kubectl does, which takes YAML of the older kind.
func kubectlReads(t *testing.T, text string) (objects []map[string]any) {
	t.Helper()
	for _, doc := range strings.Split(text, "---\n")[1:] {
		var o map[string]any
		if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		objects = append(objects, o)
	}
	return objects
}

func TestKubectlReadsTextAsTheTextThatWasMeant(t *testing.T) {
	tricky := []string{"y", "Y", "n", "no", "yes", "on", "off", "true", "null", "~", "", " ", "1", "0x1F", "010", "1_000", "1:30", "1e3", ".5",
		"-", "- a", "a: b", "#c", "a #c", "{", "[", "*a", "&a", "!a", "%a", "@a", "`a", "2026-01-02", "2001-12-14t21:59:43.10-05:00",
		"first\nsecond\n", "\n", "  leading\nless", "tab\there", "\u0085", "é ", "'", "\"", "\\", "a\r\nb", "=", "<<",
		strings.Repeat("1", 64), strings.Repeat("1", 31) + "e" + strings.Repeat("2", 32), strings.Repeat("ab ", 100)}
	spec := map[string]any{}
	var list []any
	for _, s := range tricky {
		spec["k"+s] = s
		list = append(list, s)
	}
	spec["list"] = list
	text := manifestOf(t, spec)
	for _, o := range kubectlReads(t, text) {
		if got := o["spec"]; !reflect.DeepEqual(got, any(spec)) {
			t.Errorf("read back as %v\nfrom\n%s", got, text)
		}
	}
	if !strings.Contains(text, `"`+strings.Repeat("1", 64)+`"`) {
		t.Error("a digest has no quotes")
	}
}

func TestTextOfAnyCharactersComesBack(t *testing.T) {
	const characters = "aZ09 \n\t\r:#-{}[],&*!|>'\"%@`\\~é\u0085\u2028🦀yNe.+_=/"
	runes := []rune(characters)
	for range 2000 {
		var b strings.Builder
		for range rand.IntN(12) {
			b.WriteRune(runes[rand.IntN(len(runes))])
		}
		spec := map[string]any{"text": b.String(), "key" + b.String(): "x"}
		if got := kubectlReads(t, manifestOf(t, spec))[0]["spec"]; !reflect.DeepEqual(got, any(spec)) {
			t.Fatalf("%q was read back as %v", b.String(), got)
		}
	}
}

func TestAManifestIsTheSameEachTime(t *testing.T) {
	spec := map[string]any{"b": int64(1), "a": []any{true, nil, 1.5}, "c": map[string]any{"z": "1", "y": "2"}}
	text := manifestOf(t, spec)
	for range 50 {
		if manifestOf(t, spec) != text {
			t.Fatal("it differs")
		}
	}
}
