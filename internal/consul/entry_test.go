package consul

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// read is an entry as Consul shows it.
func read(t *testing.T, text string) entry {
	t.Helper()
	e := entry{kind: "service-defaults", name: "api"}
	if text == "" {
		return e
	}
	d := json.NewDecoder(bytes.NewReader([]byte(text)))
	d.UseNumber()
	if err := d.Decode(&e.raw); err != nil {
		t.Fatal(err)
	}
	return e
}

func ours(name string) map[string]any {
	return map[string]any{"name": "builtin/wasm", "required": true, "arguments": map[string]any{"pluginConfig": map[string]any{"name": plugins + name}}}
}

const (
	usual    = `"Kind": "service-defaults", "Name": "api", "Expose": {}, "MeshGateway": {}, "TransparentProxy": {}, "CreateIndex": 7, "ModifyIndex": 9, "Hash": 18446744073709551615`
	made     = `"Meta": {"managed-by": "meshery-filters", "meshery-filters-pushed": "20260101T000000Z"}`
	wasmOne  = `{"Name": "builtin/wasm", "Required": true, "ConsulVersion": "", "EnvoyVersion": "", "Arguments": {"PluginConfig": {"Name": "meshery.filters/a.one"}}}`
	wasmTwo  = `{"Name": "builtin/wasm", "Required": true, "Arguments": {"pluginConfig": {"name": "meshery.filters/b.two"}}}`
	wasmUser = `{"Name": "builtin/wasm", "Required": false, "Arguments": {"PluginConfig": {"Name": "theirs", "Big": 12345678901234567890}}}`
)

func TestWhatIsLeftOfAnEntryWithoutOurs(t *testing.T) {
	one := []string{plugins + "a.one"}
	for story, c := range map[string]struct{ entry, want string }{
		"one that was made goes": {`{` + usual + `, ` + made + `, "EnvoyExtensions": [` + wasmOne + `]}`, `null`},
		"the protocol that it was made with is no setting of theirs": {
			`{` + usual + `, "Meta": {"managed-by": "meshery-filters", "meshery-filters-protocol": "http"}, "Protocol": "http", "EnvoyExtensions": [` + wasmOne + `]}`, `null`},
		"another is": {
			`{` + usual + `, "Meta": {"managed-by": "meshery-filters", "meshery-filters-protocol": "http"}, "Protocol": "grpc", "EnvoyExtensions": [` + wasmOne + `]}`,
			`{"Expose":{},"Kind":"service-defaults","MeshGateway":{},"Name":"api","Protocol":"grpc","TransparentProxy":{}}`},
		"one that was made and that they have set something in stays, and is theirs": {
			`{` + usual + `, ` + made + `, "Protocol": "http", "EnvoyExtensions": [` + wasmOne + `]}`,
			`{"Expose":{},"Kind":"service-defaults","MeshGateway":{},"Name":"api","Protocol":"http","TransparentProxy":{}}`},
		"one that was made stays with another target's": {`{` + usual + `, ` + made + `, "EnvoyExtensions": [` + wasmOne + `, ` + wasmTwo + `]}`,
			`{"EnvoyExtensions":[{"Arguments":{"pluginConfig":{"name":"meshery.filters/b.two"}},"Name":"builtin/wasm","Required":true}],"Expose":{},"Kind":"service-defaults",` +
				`"MeshGateway":{},"Meta":{"managed-by":"meshery-filters","meshery-filters-pushed":"20260101T000000Z"},"Name":"api","TransparentProxy":{}}`},
		"theirs stays to the digit": {`{` + usual + `, "Meta": {"owner": "them"}, "EnvoyExtensions": [` + wasmOne + `, ` + wasmUser + `]}`,
			`{"EnvoyExtensions":[{"Arguments":{"PluginConfig":{"Big":12345678901234567890,"Name":"theirs"}},"Name":"builtin/wasm","Required":false}],` +
				`"Expose":{},"Kind":"service-defaults","MeshGateway":{},"Meta":{"owner":"them"},"Name":"api","TransparentProxy":{}}`},
	} {
		if got := canonical(read(t, c.entry).with(nil, one, 0)); got != c.want {
			t.Errorf("%s: got\n%s\nwant\n%s", story, got, c.want)
		}
	}
}

func TestOursTakeTheirPlaceAmongTheUsers(t *testing.T) {
	names := []string{plugins + "a.one", plugins + "a.three"}
	order := func(e entry, at int) (all string) {
		next := entry{raw: e.with([]map[string]any{ours("a.three"), ours("a.one")}, names, at)}
		for _, x := range next.extensions() {
			all += pluginOf(x) + " "
		}
		return all
	}
	const new = plugins + "a.three " + plugins + "a.one "
	for story, c := range map[string]struct {
		entry string
		at    int
		want  string
	}{
		"an entry that is not there":       {"", 0, new},
		"where the plan has them":          {`{"EnvoyExtensions": [` + wasmUser + `]}`, 1, "theirs " + new},
		"where they stood":                 {`{"EnvoyExtensions": [` + wasmOne + `, ` + wasmUser + `]}`, 1, new + "theirs "},
		"behind fewer than the plan knows": {`{"EnvoyExtensions": []}`, 3, new},
	} {
		if got := order(read(t, c.entry), c.at); got != c.want {
			t.Errorf("%s: %s", story, got)
		}
	}
}

func TestAnEntryThatHoldsWhatItShouldIsNotWritten(t *testing.T) {
	e := read(t, `{`+usual+`, `+made+`, "EnvoyExtensions": [`+wasmTwo+`]}`)
	if !e.same(e.with([]map[string]any{ours("b.two")}, []string{plugins + "b.two"}, 0)) {
		t.Error("it would be written")
	}
	changed := ours("b.two")
	changed["required"] = false
	if e.same(e.with([]map[string]any{changed}, []string{plugins + "b.two"}, 0)) {
		t.Error("a change would not be written")
	}
}

func TestWhatAControllerSaysIsOneBoundedLine(t *testing.T) {
	long := "no\nentry: " + strings.Repeat("é", maxText)
	o := plan.Object{Content: map[string]any{"status": map[string]any{"conditions": []any{map[string]any{"type": "Synced", "message": long}}}}}
	if _, _, text, _ := condition(o); !utf8.ValidString(text) || len(text) > maxText+2 || strings.Contains(text, "\n") {
		t.Errorf("%q", text)
	}
}

// TestAnEntryThatOthersWriteAllTheTimeIsWrittenOverThemOrLeft has somebody write the entry right after each of our reads.
func TestAnEntryThatOthersWriteAllTheTimeIsWrittenOverThemOrLeft(t *testing.T) {
	if testing.Short() {
		t.Skip("starts Consul")
	}
	s, err := startConsul()
	if err != nil {
		t.Fatal(err)
	}
	for _, times := range []int{rewrites - 1, rewrites} {
		at, err := url.Parse(s.Addr)
		if err != nil {
			t.Fatal(err)
		}
		theirs := 0
		write := func(n int) {
			if err := s.Write(t.Context(), map[string]any{"Kind": "service-defaults", "Name": "busy", "Protocol": "http", "MaxInboundConnections": n}); err != nil {
				t.Error(err)
			}
		}
		write(1000)
		before := httptest.NewServer(&httputil.ReverseProxy{
			Rewrite: func(q *httputil.ProxyRequest) { q.SetURL(at) },
			ModifyResponse: func(r *http.Response) error {
				if r.Request.Method == http.MethodGet && strings.HasSuffix(r.Request.URL.Path, "/service-defaults/busy") && theirs < times {
					theirs++
					write(theirs)
				}
				return nil
			}})
		t.Cleanup(before.Close)
		c := newClient(t, func(o *Options) { o.Addr = before.URL })
		e, err := c.entry(t.Context(), "service-defaults", "busy")
		if err != nil {
			t.Fatal(err)
		}
		err = (&step{entry: e, ours: []map[string]any{wasmFor("a.one")}}).write(t.Context(), c, []string{plugins + "a.one"})
		now, rerr := c.entry(t.Context(), "service-defaults", "busy")
		if rerr != nil {
			t.Fatal(rerr)
		}
		switch {
		case times < rewrites && (err != nil || len(now.extensions()) != 1 || now.raw["MaxInboundConnections"] != json.Number(strconv.Itoa(times))):
			t.Errorf("over %d others: %v %v", times, err, now.raw)
		case times == rewrites && (!errors.Is(err, problem.ChainChanged) || len(now.extensions()) != 0 || theirs != rewrites):
			t.Errorf("over %d others: %v %v", times, err, now.raw)
		}
		if err := s.Delete(t.Context(), "service-defaults", "busy"); err != nil {
			t.Error(err)
		}
	}
}

// wasmFor is an extension that Consul takes.
func wasmFor(name string) map[string]any {
	return map[string]any{"Name": "builtin/wasm", "Required": true, "Arguments": map[string]any{"Protocol": "http", "ListenerType": "inbound", "ProxyType": "connect-proxy",
		"PluginConfig": map[string]any{"Name": plugins + name, "VmConfig": map[string]any{"Runtime": "v8",
			"Code": map[string]any{"Local": map[string]any{"Filename": "/opt/filters/none.wasm"}}}}}}
}
