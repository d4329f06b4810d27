package filter

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/internal/problem"
)

// readAllocating reads and says how many bytes were allocated meanwhile, garbage included.
func readAllocating(body string) (filters []Filter, allocated uint64, err error) {
	var before, after runtime.MemStats
	text := []byte(body)
	runtime.ReadMemStats(&before)
	filters, err = Read(text, "")
	runtime.ReadMemStats(&after)
	return filters, after.TotalAlloc - before.TotalAlloc, err
}

// numbered repeats a format with 0 to n-1.
func numbered(format string, n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}

const config = minimal + "  config: "

func TestABodyOfTooManyValuesIsRefusedBeforeItsTreeIsBuilt(t *testing.T) {
	for name, body := range map[string]string{
		"a list in brackets":         config + "[" + strings.Repeat("a,", 14<<20) + "a]",
		"spread out":                 config + "[" + strings.Repeat("a ,\n   ", 1<<20) + "a]",
		"a list of dashes":           config + strings.Repeat("\n    -", 1<<20),
		"dashes on a line":           config + "\n    " + strings.Repeat("- ", 1<<20),
		"keys with question marks":   config + strings.Repeat("\n    ? ", 1<<20),
		"keys without values":        config + "{" + numbered("k%d,", 400_000) + "}",
		"keys with values":           config + "{" + numbered("k%d: ,", 400_000) + "}",
		"maps of one pair in a list": config + "[" + strings.Repeat("a: b,", 400_000) + "]",
		"empty lists":                config + "[" + strings.Repeat("[],", 400_000) + "]",
		"JSON":                       config + "[" + strings.Repeat(`"",`, 400_000) + `""]`,
		"deep":                       config + strings.Repeat("[", 1<<20),
		"anchors and aliases":        config + "[&a x," + strings.Repeat("*a,", 400_000) + "]",
		"tags":                       config + "[" + strings.Repeat("!!str a,", 400_000) + "]",
		"comments":                   config + "x" + strings.Repeat("\n#", 400_000),
		"empty documents":            minimal + strings.Repeat("---\n", 400_000),
		"ends of documents":          minimal + strings.Repeat("...\n", 400_000),
		"between base64":             config + "[" + strings.Repeat(strings.Repeat("A", longRun)+",", 400_000) + "]",
		"much text":                  config + strings.Repeat("some words ", 1<<20),
		"digits for a module":        config + strings.Repeat("9", MaxBody-1000),
	} {
		_, allocated, err := readAllocating(body)
		if !errors.Is(err, problem.InvalidDocument) || allocated > 1<<20 {
			t.Errorf("%s: %d bytes allocated, %.300v", name, allocated, err)
		}
	}
}

func TestTheWorstBodiesThatAreReadTakeLittleMemory(t *testing.T) {
	key := strings.Repeat("k", maxKey)
	for name, c := range map[string]struct {
		body string
		ok   bool
	}{
		"a long list":                 {config + "[" + strings.Repeat("a,", maxNodes-1000) + "]", true},
		"dashes":                      {config + strings.Repeat("\n    -", maxNodes-1000), true},
		"keys with question marks":    {config + strings.Repeat("\n    - ?", maxNodes/3-1000), true},
		"keys without values":         {config + "{" + numbered("k%d,", maxNodes/2-1000) + "}", true},
		"many maps":                   {config + "[" + strings.Repeat("a: b,", maxNodes/2-1000) + "]", false},
		"a long list under a key":     {config + "{? " + key + " : [" + strings.Repeat("0,", maxNodes-1000) + "]}", true},
		"the same under too long one": {config + "{? " + key + key + " : [" + strings.Repeat("0,", maxNodes-1000) + "]}", false},
		"a list that holds itself":    {config + "&a [*a," + strings.Repeat("0,", maxNodes-1000) + "]", false},
		"an alias of a long text":     {config + "[&a " + strings.Repeat("x", 1<<20) + strings.Repeat(",*a", maxNodes/3) + "]", false},
		"an alias of a map":           {config + "[&a {" + strings.Repeat("x", 900) + ": 1}" + strings.Repeat(",*a", maxNodes/3) + "]", false},
		"only mistakes": {strings.Replace(minimal, "spec:", "spec:\n  match: {ports: ["+strings.Repeat("0,", maxNodes-1000)+"]}", 1),
			false},
		"only unknown fields": {"{" + numbered("targe%x: 1,", 60_000) + "}", false},
	} {
		_, allocated, err := readAllocating(c.body)
		if allocated > 128<<20 || (err == nil) != c.ok {
			t.Errorf("%s: %d MiB allocated, %.300v", name, allocated>>20, err)
		}
		if err != nil && (!errors.Is(err, problem.InvalidDocument) || len(problem.Of(err).Fields) > maxMistakes || len(err.Error()) > 40<<10) {
			t.Errorf("%s: %d mistakes in %d bytes: %.300v", name, len(problem.Of(err).Fields), len(err.Error()), err)
		}
	}
}

func TestAModuleOfFullSizeIsReadInEveryLayout(t *testing.T) {
	size := MaxModule
	if underRace { // which takes minutes over the full size, and sees the same code
		size /= 10
	}
	module := make([]byte, size)
	rand.NewChaCha8([32]byte{}).Read(module)
	copy(module, "\x00asm")
	clear(module[1<<20 : 2<<20])
	digest := sha256.Sum256(module)
	text := base64.StdEncoding.EncodeToString(module)
	var lines strings.Builder
	for rest := text; rest != ""; {
		n := min(76, len(rest))
		lines.WriteString("\n" + rest[:n])
		rest = rest[n:]
	}
	indented := strings.ReplaceAll(lines.String(), "\n", "\n      ")
	document := func(inline string) string { return strings.Replace(minimal, "{builtin: headers}", inline, 1) }
	json := func(inline string) string {
		return `{"apiVersion":"filters.meshery.io/v1alpha1","kind":"Filter","metadata":{"name":"x"},"spec":{"module":{"inline":"` + inline + `"}}}`
	}
	for name, body := range map[string]string{
		"a block of lines":                document("\n    inline: |" + indented),
		"a folded block":                  document("\n    inline: >-" + indented),
		"a block with Windows' line ends": document("\n    inline: |" + strings.ReplaceAll(indented, "\n", "\r\n")),
		"plain text over lines":           document("\n    inline:" + indented),
		"one line":                        document("\n    inline: " + text),
		"one line in braces and quotes":   document("{inline: '" + text + "'}"),
		"JSON":                            json(text),
		"JSON with escaped line ends":     json(strings.ReplaceAll(lines.String(), "\n", `\n`)),
		"JSON with Windows' line ends":    json(strings.ReplaceAll(lines.String(), "\n", `\r\n`)),
		"a block beside a large configuration": document("\n    inline: |"+indented) +
			"\n  config: [" + strings.Repeat("1,", maxNodes/2) + "]",
	} {
		filters, allocated, err := readAllocating(body)
		if err != nil {
			t.Errorf("%s: %.300v", name, err)
			continue
		}
		got, err := filters[0].Spec.Module.Bytes()
		if err != nil || sha256.Sum256(got) != digest {
			t.Errorf("%s: other bytes, %v", name, err)
		}
		if allocated > 400<<20 {
			t.Errorf("%s: %d MiB allocated", name, allocated>>20)
		}
	}
}

func TestEveryNodeOfATreeIsPaidForByAMark(t *testing.T) {
	for _, body := range []string{"", "a", "---", "--- a\n---\n", "[a: b, c: d]", "[:,:]", "[? , ? ]", "{a, b, ?, : }", "- - ? - : -\n", "? \n? \n",
		"- ?\n- ?\n", "a:\n- b\n- c:\n  - d\n", "!!map {? [a] : &x {b}, *x : *x}", "a: !t\nb: &c\n", "\"a\": 'b'\n", "a: |\n  b\n  c\n? |\n  d\n"} {
		checkNodes(t, []byte(body))
	}
}

// checkNodes holds yaml's tree of a body against what refusal counts on.
func checkNodes(t *testing.T, body []byte) {
	t.Helper()
	var count func(n *yaml.Node) int
	count = func(n *yaml.Node) int {
		sum := 1
		for _, c := range n.Content {
			sum += count(c)
		}
		return sum
	}
	nodes, most := 0, 2 // the first document and its root need no mark
	for _, c := range body {
		if strings.IndexByte(marks, c) >= 0 {
			most += 3
		}
	}
	for dec := yaml.NewDecoder(bytes.NewReader(body)); ; {
		var n yaml.Node
		if dec.Decode(&n) != nil {
			break
		}
		nodes += count(&n)
	}
	if nodes > most {
		t.Errorf("%q has %d nodes, more than %d", body, nodes, most)
	}
}

func TestDirectivesAndOtherEncodingsAreRefused(t *testing.T) {
	tag := "%TAG !e! " + strings.Repeat("A", 1<<20) + "\n---\n[" + strings.Repeat("!e!a x,", 60_000) + "]"
	utf16 := []byte{0xff, 0xfe}
	for _, c := range tag[:100] {
		utf16 = append(utf16, byte(c), 0)
	}
	for name, body := range map[string]string{
		"at the start":            tag,
		"after a byte order mark": "\ufeff" + tag,
		"after a line":            "# c\n" + tag,
		"after Windows' line":     "# c\r" + tag,
		"after a rare line end":   "# c\u0085" + tag,
		"after another":           "# c\u2028" + tag,
		"in UTF-16":               string(utf16),
	} {
		if _, allocated, err := readAllocating(body); !errors.Is(err, problem.InvalidDocument) || allocated > 1<<20 {
			t.Errorf("%s: %d bytes allocated, %.300v", name, allocated, err)
		}
	}
	if fs, err := Read([]byte(config+"|\n    100%\n    %TAG\n    é%"), ""); err != nil || fs[0].Spec.Config.Text() != "100%\n%TAG\né%" {
		t.Errorf("a percent sign in a text: %v, %v", fs, err)
	}
}

func TestNumbersHaveABoundedLength(t *testing.T) {
	nines := strings.Repeat("9", maxNumber)
	fs, err := Read([]byte(config+"["+nines[:300]+", -1."+nines[3:]+", !!int "+nines+"]"), "")
	if err != nil || fs[0].Spec.Config.Text() != "["+nines[:300]+",-1."+nines[3:]+","+nines+"]" {
		t.Errorf("%d digits: %v", maxNumber, err)
	}
	// Plain digits beyond the largest float64 are no number to YAML.
	for _, text := range []string{"'9" + nines + "'", "9" + nines} {
		if fs, err := Read([]byte(config+text), ""); err != nil || fs[0].Spec.Config.Text() != "9"+nines {
			t.Errorf("%.5s…: %v", text, err)
		}
	}
	for name, number := range map[string]string{
		"one digit more":           "!!int 9" + nines,
		"hexadecimal":              "!!int 0x" + strings.Repeat("f", maxNumber),
		"a fraction":               "1." + nines,
		"a small exponent":         "1e-" + strings.Repeat("0", maxNumber) + "1",
		"what is said to be one":   "!!int " + strings.Repeat("9", 1<<20),
		"text said to be one":      "!!int Q" + strings.Repeat("9", 4<<20),
		"what is said to be float": "!!float '" + strings.Repeat("9", 1<<20) + "'",
	} {
		for field, body := range map[string]string{"spec.config": config + number, "spec.config.n": config + "{n: " + number + "}",
			"spec.priority": minimal + "  priority: " + number} {
			_, allocated, err := readAllocating(body)
			if !errors.Is(err, problem.InvalidDocument) || len(err.Error()) > 1000 || len(problem.Of(err).Fields) != 1 || problem.Of(err).Fields[0].Path != field {
				t.Errorf("%s in %s: %.300v", name, field, err)
			}
			if allocated > 64<<20 {
				t.Errorf("%s in %s: %d MiB allocated", name, field, allocated>>20)
			}
		}
	}
}

func TestTextsOfMistakesStayShort(t *testing.T) {
	long := strings.Repeat("é", 100_000)
	for name, body := range map[string]string{
		"a duration":     minimal + "  wait: {timeout: " + long + "}",
		"an enumeration": minimal + "  mesh: " + long,
		"a truth":        minimal + "  force: " + long,
		"a version":      strings.Replace(minimal, "filters.meshery.io/v1alpha1", long, 1),
		"a kind":         strings.Replace(minimal, "kind: Filter", "kind: "+long, 1),
		"a name":         strings.Replace(minimal, "hello", long, 1),
		"a tag":          config + "!t " + long,
		"a key":          minimal + "  ? a" + long[:1000] + " : 1",
		"too long a key": minimal + "  ? a" + long + " : 1",
	} {
		_, err := Read([]byte(body), "")
		if !errors.Is(err, problem.InvalidDocument) || len(err.Error()) > 1000 || !utf8.ValidString(err.Error()) {
			t.Errorf("%s: %.300v", name, err)
		}
	}
}

func TestARemovalsWaitIsValidated(t *testing.T) {
	removal := func(spec string) []byte {
		return []byte("{apiVersion: filters.meshery.io/v1alpha1, kind: Filter, metadata: {name: hello}, spec: " + spec + "}")
	}
	for _, timeout := range []string{"-5s", "90000h", "61m", "soon"} {
		_, err := ReadKeys(removal("{wait: {timeout: "+timeout+"}}"), "")
		if !errors.Is(err, problem.InvalidDocument) || len(problem.Of(err).Fields) != 1 || problem.Of(err).Fields[0].Path != "spec.wait.timeout" {
			t.Errorf("%s: %v", timeout, err)
		}
	}
	// What else stands in the spec does not keep a filter from being removed.
	fs, err := ReadKeys(removal("{wait: {timeout: 1h}, module: {url: 'ftp://x'}, match: {ports: ["+strings.Repeat("0,", 200)+"]}}"), "")
	if err != nil || time.Duration(fs[0].Spec.Wait.Timeout) != time.Hour {
		t.Errorf("%v, %v", fs, err)
	}
}

func TestASourceHoldsNoSecret(t *testing.T) {
	for url, want := range map[string]string{
		"https://host/a%2Fb.wasm?X-Amz-Signature=secret#secret": "https://host/a%2Fb.wasm",
		"https://user:secret@host:1/a.wasm":                     "https://host:1/a.wasm",
		"https://secret@host?":                                  "https://host",
		"oci://host/repository:tag@sha256:12":                   "oci://host/repository:tag@sha256:12",
		"meshery://id":                                          "meshery://id",
		"https:secret":                                          "an address that cannot be read",
		"https://host/%zz?secret":                               "an address that cannot be read",
	} {
		if got := (Module{URL: url}).Source(); got != want {
			t.Errorf("%s: %s, want %s", url, got, want)
		}
	}
}
