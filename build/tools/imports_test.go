// Package tools pins the programs that check and generate this project's code, and holds the tests of their settings.
package tools

import (
	"fmt"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	depguard "github.com/OpenPeeDeeP/depguard/v2"
	"go.yaml.in/yaml/v3"
	"golang.org/x/tools/go/analysis"
)

const (
	module   = "github.com/meshery/meshery-filters"
	settings = "../../.depguard.yaml"
)

// imports is the table of the packages: what each may have of the project. cli may have everything but build.
var imports = map[string]string{
	"internal/problem":   "",
	"internal/filter":    "problem",
	"internal/plan":      "filter",
	"internal/mesh":      "filter plan problem",
	"internal/wasm":      "filter problem",
	"internal/address":   "",
	"internal/module":    "address filters filter store problem",
	"internal/event":     "store problem",
	"internal/meshery":   "address event store problem",
	"internal/store":     "problem",
	"internal/kube":      "address filter plan problem",
	"internal/survey":    "plan problem",
	"internal/istiod":    "filter plan survey problem",
	"internal/consul":    "address envoy filter plan survey problem",
	"internal/xds":       "filter plan store limit problem",
	"internal/audit":     "problem",
	"internal/limit":     "",
	"internal/envoy":     "problem",
	"internal/demo":      "filters envoy event filter server/filterspb templates",
	"filters":            "",
	"templates":          "",
	"oam":                "filter meshery operation problem templates",
	"internal/imagehub":  "",
	"internal/operation": "filters filter plan mesh wasm module event store audit problem templates",
	"internal/page":      "event operation plan filter problem",
	"internal/server":    "operation oam event limit audit problem server/filterspb",
	"internal/telemetry": "meshery operation module event xds problem",
	"config":             "problem",
	"internal/cli":       "problem meshery filter plan mesh wasm module event store kube survey istiod consul xds limit audit envoy demo filters templates oam imagehub operation page server server/filterspb telemetry address config",
}

// others are imported, or not, but have no row of their own.
var others = []string{"internal/server/filterspb", "build/controlplanes"}

func readSettings(t *testing.T) *analysis.Analyzer {
	t.Helper()
	data, err := os.ReadFile(settings)
	if err != nil {
		t.Fatal(err)
	}
	s := depguard.LinterSettings{}
	if err := yaml.Unmarshal(data, &s); err != nil {
		t.Fatal(err)
	}
	a, err := depguard.NewAnalyzer(&s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// refused asks the linter about a file of that name that imports one package.
func refused(t *testing.T, a *analysis.Analyzer, file, imported string) bool {
	t.Helper()
	files := token.NewFileSet()
	parsed, err := parser.ParseFile(files, file, fmt.Sprintf("package p\n\nimport _ %q\n", imported), parser.ImportsOnly)
	if err != nil {
		t.Fatal(err)
	}
	var n int
	pass := &analysis.Pass{Analyzer: a, Fset: files, Report: func(analysis.Diagnostic) { n++ }}
	pass.Files = append(pass.Files, parsed)
	if _, err := a.Run(pass); err != nil {
		t.Fatal(err)
	}
	return n > 0
}

func TestTheLinterHoldsTheTableOfThePackagesPairByPair(t *testing.T) {
	a := readSettings(t)
	targets := append([]string{}, others...)
	for p := range imports {
		targets = append(targets, p)
	}
	for importer, row := range imports {
		allowed := map[string]bool{}
		for _, name := range strings.Fields(row) {
			allowed[name] = true
		}
		for _, target := range targets {
			if target == importer {
				continue
			}
			want := !allowed[strings.TrimPrefix(target, "internal/")]
			if got := refused(t, a, "/somewhere/"+importer+"/a.go", module+"/"+target); got != want {
				t.Errorf("%s importing %s: refused %v", importer, target, got)
			}
		}
	}
}

func TestTheLinterHoldsWhatTheTableCannotSay(t *testing.T) {
	a := readSettings(t)
	for _, c := range []struct {
		file, imported string
		refused        bool
	}{
		{"main.go", module + "/internal/cli", false},
		{"main.go", module + "/config", true},
		{"main.go", module + "/internal/xds", true},
		// Pure packages have no I/O; wasm reads no files.
		{"internal/mesh/a.go", "os", true},
		{"internal/mesh/a.go", "net/http", true},
		{"internal/filter/a.go", "math/rand/v2", true},
		{"internal/mesh/a.go", "net/netip", false},
		{"internal/wasm/a.go", "os", true},
		{"internal/xds/a.go", "net", false},
		// Tests run real parts.
		{"internal/mesh/a_test.go", "os", false},
		{"internal/xds/a_test.go", module + "/internal/envoy", false},
		{"internal/xds/a_test.go", module + "/internal/cli", true},
		{"internal/operation/a_test.go", module + "/config", true},
		{"internal/cli/a_test.go", module + "/config", false},
		// Packages of others are not this table's business.
		{"internal/mesh/a.go", "google.golang.org/protobuf/proto", false},
		// What measures is in one place.
		{"internal/xds/a.go", "github.com/prometheus/client_golang/prometheus", true},
		{"internal/operation/a.go", "go.opentelemetry.io/otel/sdk/trace", true},
		{"internal/operation/a.go", "go.opentelemetry.io/otel/trace", false},
		{"internal/telemetry/a.go", "github.com/prometheus/client_golang/prometheus", false},
		// A name that begins like another is another.
		{"internal/mesh/a.go", module + "/internal/filters", true},
	} {
		if got := refused(t, a, "/somewhere/"+c.file, c.imported); got != c.refused {
			t.Errorf("%s importing %s: refused %v", c.file, c.imported, got)
		}
	}
}

func TestEveryPackageThatIsThereHasARow(t *testing.T) {
	dirs, err := filepath.Glob("../../internal/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range append(dirs, "../../config", "../../oam", "../../filters", "../../templates") {
		sources, err := filepath.Glob(d + "/*.go")
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(filepath.ToSlash(d), "../../")
		if _, ok := imports[name]; !ok && len(sources) > 0 {
			t.Errorf("%s is not in the table; give it a row here and a list in .depguard.yaml", name)
		}
	}
}

func TestTheLinterThatMakeRunsRefusesAForbiddenImport(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	rules, err := os.ReadFile(settings)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(".depguard.yaml", string(rules))
	write("go.mod", "module "+module+"\n\ngo 1.26\n")
	write("internal/store/store.go", "package store\n")
	write("internal/mesh/mesh.go", "package mesh\n\nimport _ \""+module+"/internal/store\"\n")
	tools, err := filepath.Abs("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	lint := exec.Command("go", "tool", "-modfile="+tools, "depguard", "./...")
	lint.Dir = dir
	out, err := lint.CombinedOutput()
	const want = "mesh.go:3:8: import '" + module + "/internal/store' is not allowed from list 'mesh': internal/mesh may import filter, plan, problem"
	if err == nil || !strings.Contains(string(out), want) {
		t.Errorf("%v: %s", err, out)
	}
	write("internal/mesh/mesh.go", "package mesh\n")
	lint = exec.Command("go", "tool", "-modfile="+tools, "depguard", "./...")
	lint.Dir = dir
	if out, err := lint.CombinedOutput(); err != nil {
		t.Errorf("without it: %v: %s", err, out)
	}
}
