package proof

import (
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

var update = flag.Bool("update", false, "rewrite what the adapter answers in testdata/generations")

func TestMessagesInTextAreTheBytesOfTheWire(t *testing.T) {
	for text, want := range map[string]string{
		``:                                 "",
		`1: "apply_filter"`:                "0a0c6170706c795f66696c746572",
		"2: `a\"b`, 5: 1, 7: \"x, 1: {\"":  "1203612262" + "2801" + "3a07782c20313a207b",
		`1: {1: "a}", 2: {3: 300}}, 2: ""`: "0a09" + "0a02617d" + "1203" + "18ac02" + "1200",
		`15: fixed32 1, 16: fixed64 2`:     "7d01000000" + "8101" + "0200000000000000",
		`1:18446744073709551615,2:0`:       "08ffffffffffffffffff01" + "1000",
	} {
		got, err := parseMessage(text)
		if err != nil || hex.EncodeToString(got) != want {
			t.Errorf("%s is %x, %v, want %s", text, []byte(got), err, want)
		}
	}
	for _, text := range []string{"1", "x: 1", "1: x", `1: "a`, "1: {2: 3", "1: 2 3: 4", `1: "a" 2: 3`, "1: fixed16 2"} {
		if got, err := parseMessage(text); err == nil {
			t.Errorf("%s is taken for %x", text, []byte(got))
		}
	}
}

// Each file of testdata/generations is what one generation of Meshery's servers says to an adapter, and what the
// adapter answers, by field numbers.
func TestEveryGenerationOfMesherysServersIsServed(t *testing.T) {
	onRealParts(t)
	files, err := filepath.Glob("testdata/generations/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	backend := upstream(t)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			t.Parallel()
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			server := newGenerationREST(t, strings.TrimSuffix(filepath.Base(file), ".txt"))
			a := newAdapter(t, "--meshery-server", server.url)
			x := &transcript{t: t, a: a, server: server, proxy: startProxy(t, proxyOptions{id: "edge-1", group: "default", upstream: backend, xds: a.addresses.XDS})}
			for line := range strings.Lines(string(want)) {
				x.line(strings.TrimSuffix(line, "\n"))
			}
			x.flush()
			if *update {
				if err := os.WriteFile(file, x.out.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if x.instance == nil {
				return
			}
			if config := x.instance.get(t, 1); config == "" || strings.Contains(a.log.String(), config) {
				t.Error("the log has the kubeconfig")
			}
		})
	}
}

// transcript replays a file. A line is one of
//
//	registered               waits for that over REST, and shows it: < each request, and the body of each that was taken
//	dial                     the calls that follow come over a new connection to where that says, and the old one stays open
//	Method                   a call; StreamEvents is opened and kept
//	> 1: "…"                 a field of the request
//	again                    in place of the fields: the request of the last call of that method
//	< 1: "…"                 a field of the response
//	! Code: text             or the failure
//	events                   what the stream says of the last operation, event by event, all fields
//	ended                    waits for the end of the last operation
//	wait 2s                  long enough for the next call to show that its client has received everything before
//	leave                    closes the connection with its stream
//	GET /path                through the proxy; < what it answers, with the headers x-…
//
// What differs from run to run is replaced by a word in capitals.
type transcript struct {
	t        *testing.T
	a        *adapter
	server   *generationREST
	proxy    *proxy
	conn     *grpc.ClientConn
	events   grpc.ClientStream
	last     message            // request of the last operation
	before   map[string]message // requests by method
	instance message            // the request of CreateMeshInstance

	head    string
	request []string
	want    []string
	out     bytes.Buffer
}

func (x *transcript) line(line string) {
	switch {
	case strings.HasPrefix(line, "<"), strings.HasPrefix(line, "!"):
		x.want = append(x.want, line)
		return
	case strings.HasPrefix(line, "> "), line == "again":
		x.request = append(x.request, strings.TrimPrefix(line, "> "))
	default:
		x.flush()
		x.head = line
	}
	x.out.WriteString(line + "\n")
}

// flush does what the lines before say, and compares.
func (x *transcript) flush() {
	x.t.Helper()
	var got []string
	method, argument, _ := strings.Cut(x.head, " ")
	switch {
	case x.head == "", strings.HasPrefix(x.head, "#"):
	case x.head == "registered":
		for _, line := range x.server.registered() {
			got = append(got, "< "+line)
		}
	case x.head == "dial":
		x.conn = dialAs(x.t, x.server.addr)
	case x.head == "ended":
		if _, err := x.a.story(x.last.get(x.t, 6)); err != nil {
			x.t.Fatal(err)
		}
	case method == "wait":
		d, err := time.ParseDuration(argument)
		if err != nil {
			x.t.Fatal(err)
		}
		time.Sleep(d)
	case x.head == "leave":
		x.conn.Close()
	case x.head == "events":
		got = x.told()
	case method == "GET":
		code, header := x.proxy.answer(argument, nil)
		got = append(got, fmt.Sprintf("< %d", code))
		for name, values := range header {
			if strings.HasPrefix(name, "X-") && !strings.HasPrefix(name, "X-Envoy") {
				got = append(got, fmt.Sprintf("< %s: %s", strings.ToLower(name), values[0]))
			}
		}
		slices.Sort(got[1:])
	case method == "StreamEvents":
		var err error
		if x.events, err = streamAs(x.t.Context(), x.conn); err != nil {
			x.t.Fatal(err)
		}
	default:
		got = x.call(method)
	}
	for i, line := range got {
		got[i] = x.normal(line)
		x.out.WriteString(got[i] + "\n")
	}
	if !*update && !slices.Equal(got, x.want) {
		x.t.Fatalf("%s %s\nis answered with\n%s\nwhere the transcript has\n%s\nIf that is right, run: go test ./build/proof -run Generation -update",
			x.head, strings.Join(x.request, ", "), strings.Join(got, "\n"), strings.Join(x.want, "\n"))
	}
	x.head, x.request, x.want = "", nil, nil
}

// nestedFields are the fields of each method's response that are messages.
var nestedFields = map[string][]protowire.Number{"SupportedOperations": {1}, "ComponentInfo": {5}}

func (x *transcript) call(method string) []string {
	x.t.Helper()
	if x.before == nil {
		x.before = map[string]message{}
	}
	request := x.before[method]
	if !slices.Equal(x.request, []string{"again"}) {
		var err error
		if request, err = parseMessage(strings.Join(x.request, ", ")); err != nil {
			x.t.Fatalf("%s: %v", method, err)
		}
	}
	x.before[method] = request
	x.server.sends(x.t, method)
	switch method {
	case "ApplyOperation":
		x.last = request
	case "CreateMeshInstance":
		x.instance = request
	}
	response, err := callAs(x.t.Context(), x.conn, method, request)
	if err != nil {
		s := status.Convert(err)
		return strings.Split(fmt.Sprintf("! %s: %s", s.Code(), strings.ReplaceAll(s.Message(), "\n", "\n! ")), "\n")
	}
	lines, err := response.text(nestedFields[method]...)
	if err != nil {
		x.t.Fatalf("%s answered %x: %v", method, []byte(response), err)
	}
	for i := range lines {
		lines[i] = "< " + lines[i]
	}
	return append(lines, "<")
}

// told reads as many events of the stream as the last operation has.
func (x *transcript) told() (lines []string) {
	x.t.Helper()
	id := x.last.get(x.t, 6)
	story, err := x.a.story(id)
	if err != nil {
		x.t.Fatal(err)
	}
	fields, err := x.last.fields()
	if err != nil {
		x.t.Fatal(err)
	}
	removal := x.last.get(x.t, 1) == "remove_filter" || slices.ContainsFunc(fields, func(f field) bool { return f.number == 5 && f.varint == 1 })
	for range story {
		var e message
		if err := x.events.RecvMsg(&e); err != nil {
			x.t.Fatal(err)
		}
		fields, err := e.text()
		if err != nil {
			x.t.Fatalf("event %x: %v", []byte(e), err)
		}
		checkEvent(x.t, e, id, removal)
		if strings.HasPrefix(e.get(x.t, 2), waits) {
			continue // the one before has told its end, and may not have made room yet
		}
		for _, f := range fields {
			lines = append(lines, "< "+f)
		}
		lines = append(lines, "<")
	}
	return lines
}

// waits begins the event of an operation that has to wait for another.
const waits = "Waits for operation "

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

// checkEvent holds an event to what Meshery's programs make of it, whatever the transcript says.
func checkEvent(t *testing.T, e message, id string, removed bool) {
	t.Helper()
	fields, err := e.fields()
	if err != nil {
		t.Fatal(err)
	}
	kind := uint64(0)
	for _, f := range fields {
		if f.number == 1 {
			kind = f.varint
		}
		if f.number > 9 {
			t.Errorf("an event has the field %d", f.number)
		}
	}
	text := e.get(t, 2) + "\n" + e.get(t, 3)
	switch {
	case e.get(t, 4) != id:
		t.Errorf("an event of %s comes where %s should tell", e.get(t, 4), id)
	case e.get(t, 2) == "" || !uuidForm.MatchString(e.get(t, 8)) || e.get(t, 9) != "meshery-filters":
		t.Errorf("Meshery cannot file the event %q of %q, %q", e.get(t, 2), e.get(t, 8), e.get(t, 9))
	case kind != 2 && strings.Contains(strings.ToLower(text), "error"):
		t.Errorf("mesheryctl takes this for a failure: %s", text)
	case kind == 2 && (e.get(t, 5) == "" || e.get(t, 6) == "" || e.get(t, 7) == ""):
		t.Errorf("a failure without cause, remedy or code: %s", text)
	case removed && kind == 0 && !strings.Contains(e.get(t, 2), "removed") && !strings.HasPrefix(e.get(t, 2), waits):
		t.Errorf("Meshery takes this for a deployment: %s", e.get(t, 2))
	}
}

var varying = []struct {
	form *regexp.Regexp
	word string
}{
	{regexp.MustCompile(`\d+ bytes, sha256 [0-9a-f]{64}`), "SIZE bytes, sha256 DIGEST"},
	{regexp.MustCompile(`sha256 [0-9a-f]{12}…`), "sha256 DIGEST…"},
	{regexp.MustCompile(`run version [0-9a-f]{16}`), "run version VERSION"},
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "127.0.0.1:PORT"},
	{regexp.MustCompile(`8: "[0-9a-f-]{36}"`), `8: "COMPONENT"`},
}

func (x *transcript) normal(line string) string {
	for _, v := range varying {
		line = v.form.ReplaceAllString(line, v.word)
	}
	return line
}
