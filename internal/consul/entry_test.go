package consul

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/meshery/meshery-filters/internal/plan"
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
