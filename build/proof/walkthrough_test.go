package proof

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// registry plays the part of Meshery Server that the page asks which versions there are: those of the model that the
// adapter has registered.
type registry struct {
	mu       sync.Mutex
	versions []string
}

func (r *registry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	body, _ := io.ReadAll(q.Body)
	var sent struct{ Entity string }
	if q.Method != http.MethodPost || json.Unmarshal(body, &sent) != nil || sent.Entity == "" {
		_, _ = io.WriteString(w, "{}")
		return
	}
	text := []byte(sent.Entity)
	if decoded, err := base64.StdEncoding.DecodeString(sent.Entity); err == nil {
		text = decoded
	}
	var d struct {
		Model struct {
			Name  string
			Model struct{ Version string }
		}
	}
	_ = json.Unmarshal(text, &d)
	r.mu.Lock()
	defer r.mu.Unlock()
	if v := d.Model.Model.Version; d.Model.Name == "meshery-filters" && !slices.Contains(r.versions, v) {
		r.versions = append(r.versions, v)
	}
}

func (r *registry) list() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.versions)
}

// user is somebody at Meshery's page or mesheryctl. What is shown to that person is written down.
type user struct {
	t      *testing.T
	a      *adapter
	conn   *grpc.ClientConn
	events grpc.ClientStream
	n      int
	out    bytes.Buffer
}

func (u *user) sees(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	for _, v := range varying {
		line = v.form.ReplaceAllString(line, v.word)
	}
	u.out.WriteString(line + "\n")
}

// notice is what the server makes of an event.
type notice struct {
	failure          bool
	summary, details string
}

// operate presses a button: the page sends whatever text is in its editor.
func (u *user) operate(key, editor string, remove bool) (notices []notice) {
	u.t.Helper()
	u.n++
	id := fmt.Sprintf("0c3b7c52-7f10-4f5a-9a53-%012d", u.n)
	request := fmt.Sprintf("1: %q, 2: \"default\", 3: \"meshery\", 4: %q, 6: %q", key, editor, id)
	if remove {
		request += ", 5: 1"
	}
	m, err := parseMessage(request)
	if err != nil {
		u.t.Fatal(err)
	}
	if _, err := callAs(u.t.Context(), u.conn, "ApplyOperation", m); err != nil {
		u.sees("    ! %s", strings.ReplaceAll(status.Convert(err).Message(), "\n", "\n      "))
		return nil
	}
	story, err := u.a.story(id)
	if err != nil {
		u.t.Fatal(err)
	}
	for range story {
		var e message
		if err := u.events.RecvMsg(&e); err != nil {
			u.t.Fatal(err)
		}
		checkEvent(u.t, e, id, false)
		if strings.HasPrefix(e.get(u.t, 2), waits) {
			continue // the one before has told its end, and may not have made room yet
		}
		n := notice{summary: e.get(u.t, 2), details: e.get(u.t, 3)}
		fields, err := e.fields()
		if err != nil {
			u.t.Fatal(err)
		}
		n.failure = slices.ContainsFunc(fields, func(f field) bool { return f.number == 1 && f.varint == 2 })
		notices = append(notices, n)
		// So the server files an event: by a word of its summary.
		action := "deploy"
		if strings.Contains(n.summary, "removed") {
			action = "undeploy"
		}
		u.sees("    %s: %s", action, n.summary)
		if n.details != "" {
			u.sees("      %s", strings.ReplaceAll(n.details, "\n", "\n      "))
		}
		if n.failure {
			u.sees("      Probable cause: %s", e.get(u.t, 5))
			u.sees("      Suggested remediation: %s", e.get(u.t, 6))
			u.sees("      Error code: %s", e.get(u.t, 7))
		}
	}
	return notices
}

// watch is what mesheryctl makes of the events with --watch.
func watch(notices []notice) string {
	for _, n := range notices {
		if strings.Contains(n.summary, "error") || strings.Contains(n.details, "error") || n.failure {
			return "failed: " + n.summary
		}
		if strings.Contains(n.details, "mesh is now installed") {
			return "verified: the mesh is now installed"
		}
	}
	return "waits for ever"
}

// types shows a text in the editor.
func (u *user) types(text string) {
	for line := range strings.Lines(text) {
		u.sees("    | %s", strings.TrimSuffix(line, "\n"))
	}
}

const (
	editorOne = `apiVersion: filters.meshery.io/v1alpha1
kind: Filter
metadata: {name: hello}
spec:
  module: {builtin: headers}
  config: {response: {x-hello: world}}
`
	// The editor takes one YAML document: several filters are a list.
	editorList = `- apiVersion: filters.meshery.io/v1alpha1
  kind: Filter
  metadata: {name: hello}
  spec: {module: {builtin: headers}, config: {response: {x-hello: list}}}
- apiVersion: filters.meshery.io/v1alpha1
  kind: Filter
  metadata: {name: bye}
  spec: {module: {builtin: headers}, config: {response: {x-bye: list}}}
`
	editorWrong = `apiVersion: filters.meshery.io/v1alpha1
kind: Filter
metadata: {name: Hello}
spec: {module: {builtin: header}, phase: first}
`
)

// Titles of the page's cards, in its order, by the category's number.
var cards = []struct{ number, title string }{
	{"0", "Manage Service Mesh Lifecycle"}, {"1", "Manage Sample Application Lifecycle"}, {"2", "Apply Service Mesh Configuration"},
	{"3", "Validate Service Mesh Configuration"}, {"4", "Apply Custom Configuration"},
}

// TestAWalkThroughMeshery does what people do at Meshery's page and with mesheryctl. What they get to see is in the golden
// file, to be read on its own.
func TestAWalkThroughMeshery(t *testing.T) {
	onRealParts(t)
	server := &registry{}
	s := httptest.NewServer(server)
	t.Cleanup(s.Close)
	a := newAdapter(t, "--meshery-server", s.URL)
	u := &user{t: t, a: a, conn: dialAs(t, a.addresses.GRPC)}
	p := startProxy(t, proxyOptions{id: "edge-1", group: "default", upstream: upstream(t), xds: a.addresses.XDS})
	var err error
	if u.events, err = streamAs(t.Context(), u.conn); err != nil {
		t.Fatal(err)
	}
	get := func() {
		t.Helper()
		code, header := p.answer("/", nil)
		u.sees("    (a request is answered %d, x-hello %q, x-bye %q)", code, header.Get("X-Hello"), header.Get("X-Bye"))
	}

	u.sees("What somebody sees at Meshery's page of the adapter, and of mesheryctl. Lines with | are typed into the editor, deploy: and")
	u.sees("undeploy: are events with the action that the server files them under, and ! is the answer to what is refused at once.\n")
	u.sees("# The page of the adapter\n")
	for deadline := time.Now().Add(patience); len(server.list()) < 3; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the model has the versions %q", server.list())
		}
	}
	u.sees("Version: %s", strings.Join(server.list(), " | "))
	operations, err := callAs(t.Context(), u.conn, "SupportedOperations", nil)
	if err != nil {
		t.Fatal(err)
	}
	rows, err := operations.fields()
	if err != nil {
		t.Fatal(err)
	}
	for _, card := range cards {
		u.sees("%s", card.title)
		var lines []string
		for _, r := range rows {
			row := message(r.bytes)
			fields, err := row.fields()
			if err != nil {
				t.Fatal(err)
			}
			category := "0"
			for _, f := range fields {
				if f.number == 3 {
					category = fmt.Sprint(f.varint)
				}
			}
			// The page shows of the custom operations only the one that has its editor.
			if key := row.get(t, 1); category == card.number && (category != "4" || key == "custom") {
				lines = append(lines, fmt.Sprintf("  + %s (%s)", row.get(t, 2), key))
			}
		}
		slices.Sort(lines)
		for _, l := range lines {
			u.sees("%s", l)
		}
	}

	u.sees("\n# Apply Custom Configuration, +, with a document in the editor\n")
	u.types(editorOne)
	u.operate("custom", editorOne, false)
	get()
	u.sees("\n# The same with a list of two documents\n")
	u.types(editorList)
	u.operate("custom", editorList, false)
	get()
	u.sees("\n# Apply Custom Configuration, the bin, with the same text\n")
	u.operate("custom", editorList, true)
	get()
	u.sees("\n# The bin once more, with the first document, which is gone\n")
	u.operate("custom", editorOne, true)
	u.sees("\n# + with mistakes in the editor\n")
	u.types(editorWrong)
	u.operate("custom", editorWrong, false)
	u.sees("\n# + with nothing in the editor\n")
	u.operate("custom", "", false)
	u.sees("\n# Manage Sample Application Lifecycle, + Image Hub, and Apply Service Mesh Configuration, + Image Hub rate limit filter,")
	u.sees("# while the editor still has the text with mistakes, which is sent along and is nothing to them\n")
	u.operate("imagehub", editorWrong, false)
	u.operate("imagehub_rate_limit", editorWrong, false)
	u.sees("\n# Validate Service Mesh Configuration, + Status of filters, with that text still\n")
	u.operate("filters_status", editorWrong, false)
	u.sees("\n# The bins of the limiter and of Image Hub\n")
	u.operate("imagehub_rate_limit", editorWrong, true)
	u.operate("imagehub", editorWrong, true)

	u.sees("\n# mesheryctl mesh deploy meshery-filters --watch\n")
	u.sees("mesheryctl: %s", watch(u.operate("meshery-filters", "null", false)))
	u.sees("\n# Again\n")
	u.sees("mesheryctl: %s", watch(u.operate("meshery-filters", "null", false)))
	u.sees("\n# mesheryctl mesh remove meshery-filters\n")
	u.operate("meshery-filters", "null", true)
	u.sees("\n# mesheryctl mesh validate meshery-filters\n")
	u.operate("smiConformanceTest", "null", false)

	const golden = "testdata/walkthrough.txt"
	if *update {
		if err := os.WriteFile(golden, u.out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil || u.out.String() != string(want) {
		t.Errorf("%s differs; if it should, run: go test ./build/proof -run WalkThrough -update\n%s", golden, u.out.String())
	}
}
