package cli

import (
	"bytes"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/internal/filter"
)

func header(name string) string {
	return "apiVersion: filters.meshery.io/v1alpha1\nkind: Filter\nmetadata: {name: " + name + "}\n"
}

func put(t *testing.T, folder, name, text string) string {
	t.Helper()
	path := filepath.Join(folder, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestModuleFileIsReadFromTheFolderOfItsDocument(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "build/a.wasm", "\x00asm-a")
	absolute := put(t, dir, "elsewhere/b.wasm", "\x00asm-b")
	doc := put(t, dir, "docs/two.yaml", header("a")+"spec: {module: {file: ../build/a.wasm}, priority: 3, config: {n: 1.50, big: 12345678901234567890}}\n---\n"+
		header("b")+"spec: {module: {file: "+absolute+"}, config: 'as it is: [1,'}\n")
	a := &app{}
	docs, err := a.readDocuments([]string{doc}, false)
	if err != nil {
		t.Fatal(err)
	}
	body, err := bodyOf(docs)
	if err != nil {
		t.Fatal(err)
	}
	filters, err := filter.Read([]byte(body), "")
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"\x00asm-a", "\x00asm-b"} {
		got, err := filters[i].Spec.Module.Bytes()
		if err != nil || string(got) != want || filters[i].Spec.Module.File != "" {
			t.Errorf("document %d carries %q (%v), want %q", i, got, err, want)
		}
	}
	if got := filters[0].Spec.Config.Text(); got != `{"big":12345678901234567890,"n":1.50}` {
		t.Errorf("numbers of a configuration were changed on the way: %s", got)
	}
	if got := filters[1].Spec.Config.Text(); got != "as it is: [1," {
		t.Errorf("a verbatim configuration was changed on the way: %q", got)
	}
}

func TestModuleFileOfStandardInputIsReadFromTheCurrentFolder(t *testing.T) {
	t.Chdir(t.TempDir())
	put(t, ".", "a.wasm", "\x00asm-a")
	a := &app{IO: IO{In: strings.NewReader(header("a") + "spec: {module: {file: a.wasm}}\n")}}
	docs, err := a.readDocuments([]string{stdin}, false)
	if err != nil {
		t.Fatal(err)
	}
	if want := base64.StdEncoding.EncodeToString([]byte("\x00asm-a")); docs[0].Spec.Module.Inline != want {
		t.Errorf("the module is %q, want %q", docs[0].Spec.Module.Inline, want)
	}
}

func TestAnUndoIsNoFilterAndItsCommandIsTold(t *testing.T) {
	file := put(t, t.TempDir(), "undo.yaml", "apiVersion: filters.meshery.io/v1alpha1\nkind: Undo\nmetadata: {name: a, namespace: shop}\nspec: {revision: 12}\n")
	for _, args := range []string{"apply -f ", "run custom -f ", "remove -f "} {
		run(t, strings.Fields(args+file)...).want(t, exitUsage, "meshery-filters undo shop/a --to 12")
	}
}

func TestTwoFilesWithOneFilterAreToldByTheirNames(t *testing.T) {
	dir := t.TempDir()
	a := put(t, dir, "a.yaml", header("one")+"spec: {module: {builtin: headers}}\n")
	b := put(t, dir, "b.yaml", header("two")+"spec: {module: {builtin: headers}}\n---\n"+header("one")+"spec: {module: {builtin: headers}}\n")
	_, err := (&app{}).readDocuments([]string{a, b}, false)
	if err == nil || !strings.Contains(err.Error(), b+": metadata.name: default/one is also in "+a) {
		t.Errorf("got %v", err)
	}
	if docs, err := (&app{}).readDocuments([]string{a, b}, true); err != nil || len(docs) != 3 {
		t.Errorf("names may come twice: %v, %v", docs, err)
	}
}

func TestEveryMistakeOfEveryFileIsToldWithItsFile(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "empty.wasm", "")
	big, err := os.Create(filepath.Join(dir, "big.wasm"))
	if err != nil {
		t.Fatal(err)
	}
	if err := big.Truncate(filter.MaxModule + 1); err != nil {
		t.Fatal(err)
	}
	if err := big.Close(); err != nil {
		t.Fatal(err)
	}
	one := put(t, dir, "one.yaml", header("a")+"spec: {module: {file: missing.wasm}}\n---\n"+header("b")+"spec: {module: {file: big.wasm}}\n---\n"+
		header("c")+"spec: {module: {file: empty.wasm}}\n---\n"+header("d")+"spec: {module: {file: .}}\n")
	two := put(t, dir, "two.yaml", header("e")+"spec: {modul: {}}\n")
	r := run(t, "apply", "-f", one, "-f", two, "-f", "-").want(t, exitUsage,
		one+": documents[0].spec.module.file", "missing.wasm: no such file",
		one+": documents[1].spec.module.file", "more than the 20971520 bytes",
		one+": documents[2].spec.module.file", "is empty",
		one+": documents[3].spec.module.file", "is a folder",
		two+": spec.modul: there is no such field (line 4)", "did you mean module?",
		"standard input: there is no document", "meshery-filters-1001")
	if n := strings.Count(r.err, "\n  "); n < 7 {
		t.Errorf("the mistakes are not each on a line of their own:\n%s", r.err)
	}
}

func TestABodyThatIsTooLargeIsRefusedBeforeItIsSent(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "m.wasm", strings.Repeat("x", filter.MaxModule/2+filter.MaxModule/10))
	doc := put(t, dir, "d.yaml", header("a")+"spec: {module: {file: m.wasm}}\n---\n"+header("b")+"spec: {module: {file: m.wasm}}\n")
	run(t, "apply", "-f", doc).want(t, exitUsage, "one by one")
	run(t, "apply", "-f", put(t, dir, "long.yaml", "#"+strings.Repeat("x", filter.MaxBody))).want(t, exitUsage, "long.yaml has more than")
}

func TestADocumentToRemoveNeedsNoModuleFile(t *testing.T) {
	dir := t.TempDir()
	doc := put(t, dir, "d.yaml", header("a")+"spec: {module: {file: gone.wasm}}\n")
	docs, err := (&app{}).readDocuments([]string{doc}, true)
	if err != nil || len(docs) != 1 || docs[0].Metadata.Name != "a" {
		t.Errorf("%v, %v", docs, err)
	}
}

func TestTheBodyIsYAMLWhateverTheDocumentsHold(t *testing.T) {
	odd := "del \x7f nel \u0085 bom \ufeff sep \u2028 bell \a emoji \U0001F600"
	body, err := bodyOf([]filter.Document{{APIVersion: filter.APIVersion, Kind: filter.Kind, Metadata: filter.Metadata{Name: "a"},
		Spec: filter.Spec{Module: filter.Module{Builtin: "headers"}, Config: filter.Value{V: odd}}}})
	if err != nil {
		t.Fatal(err)
	}
	filters, err := filter.Read([]byte(body), "")
	if err != nil {
		t.Fatal(err)
	}
	if got := filters[0].Spec.Config.Text(); got != odd {
		t.Errorf("the configuration became %q", got)
	}
	if bytes.Contains([]byte(body), []byte{0x7f}) {
		t.Error("a control character stands in the body as it is")
	}
}
