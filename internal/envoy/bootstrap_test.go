package envoy

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/internal/problem"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// good is a bootstrap without mistakes.
func good() Bootstrap {
	return Bootstrap{Group: "edge", NodeID: "edge-1", XDSAddr: DefaultXDSAddr, Listen: "0.0.0.0:8080",
		Upstream: "127.0.0.1:9000", Admin: "127.0.0.1:9901"}
}

// cases are the bootstraps that have goldens.
func cases() map[string]Bootstrap {
	names := good()
	names.XDSAddr, names.Upstream, names.Concurrency, names.StatPrefix = "adapter.example:10015", "shop.example:80", 4, "shop"
	secure := good()
	secure.XDSAddr = "adapter.example:10015"
	secure.XDSTLS = &TLS{CA: "/etc/envoy/ca.pem", Cert: "/etc/envoy/edge-1.pem", Key: "/etc/envoy/edge-1.key"}
	v6 := good()
	v6.Listen, v6.Upstream, v6.NodeID = "[::1]:8080", "[::1]:9000", `one "quoted": {node} #1`
	return map[string]Bootstrap{"loopback": good(), "host-names": names, "tls": secure, "ipv6-and-an-odd-id": v6}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s differs (%v); if that is meant, run: go test ./internal/envoy -update\ngot:\n%s", path, err, got)
	}
}

func TestBootstrapsAreWhatTheirGoldensSay(t *testing.T) {
	for name, b := range cases() {
		t.Run(name, func(t *testing.T) {
			text, err := b.YAML()
			if err != nil {
				t.Fatal(err)
			}
			golden(t, "bootstrap-"+name+".yaml", text)
			var parsed struct {
				Node struct{ ID, Cluster string }
			}
			if err := yaml.Unmarshal(text, &parsed); err != nil {
				t.Fatal(err)
			}
			if parsed.Node.ID != b.NodeID || parsed.Node.Cluster != b.Group {
				t.Errorf("the node is %+v", parsed.Node)
			}
		})
	}
}

func TestEveryGoldenHasItsCase(t *testing.T) {
	files, err := os.ReadDir("testdata")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		name := strings.TrimSuffix(strings.TrimPrefix(f.Name(), "bootstrap-"), ".yaml")
		if _, ok := cases()[name]; !ok && f.Name() != "slot.yaml" {
			t.Errorf("testdata/%s belongs to no test; delete it", f.Name())
		}
	}
}

func TestABootstrapNamesAllItsMistakesAtOnce(t *testing.T) {
	_, err := Bootstrap{Group: "edge\nadmin: {}", Listen: "localhost:8080", Upstream: "shop:0", Admin: ":9901",
		StatPrefix: "a b", Concurrency: -1, XDSTLS: &TLS{CA: "ca.pem"}, XDSAddr: "host name:1"}.YAML()
	if !errors.Is(err, problem.InvalidRequest) {
		t.Fatalf("got %v", err)
	}
	var got []string
	for _, f := range problem.Of(err).Fields {
		got = append(got, f.Path)
	}
	want := "group nodeID xdsAddr listen upstream admin statPrefix concurrency xdsTLS.cert xdsTLS.key"
	if strings.Join(got, " ") != want {
		t.Errorf("the fields are %s, and not %s", got, want)
	}
	if _, err := good().YAML(); err != nil {
		t.Errorf("a good one: %v", err)
	}
}

func TestEnvoyAcceptsEveryBootstrap(t *testing.T) {
	b := realEnvoy(t)
	for name, bootstrap := range cases() {
		t.Run(name, func(t *testing.T) {
			if bootstrap.XDSTLS != nil {
				bootstrap.XDSTLS = writeCertificate(t)
			}
			text, err := bootstrap.YAML()
			if err != nil {
				t.Fatal(err)
			}
			validate(t, b, text)
		})
	}
}

// validate has Envoy check a configuration. Warnings fail too: they say what is deprecated.
func validate(t *testing.T, b Binary, config []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "envoy.yaml")
	if err := os.WriteFile(path, config, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(within(t, 30*time.Second), b.Path, "--mode", "validate", "--config-path", path,
		"--log-level", "warning", "--disable-hot-restart").CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("[warning]")) {
		t.Errorf("%v: %s\n%s", err, out, config)
	}
}

func TestTheSlotIsWhatItsGoldenSays(t *testing.T) {
	golden(t, "slot.yaml", []byte(Slot("edge")))
	if s := Slot("x\nadmin: {}"); !strings.Contains(s, `cluster: "GROUP"`) || strings.Contains(s, "admin: {}") {
		t.Errorf("a group that is none gives:\n%s", s)
	}
}

func TestTheSlotFitsIntoAnEnvoyOfOnesOwn(t *testing.T) {
	b := realEnvoy(t)
	validate(t, b, ownEnvoyWithSlot(t))
}

// ownEnvoyWithSlot does with the snippet what it tells an operator to do.
func ownEnvoyWithSlot(t *testing.T) []byte {
	t.Helper()
	var slot, own map[string]any
	if err := yaml.Unmarshal([]byte(Slot("edge")), &slot); err != nil {
		t.Fatal(err)
	}
	const text = `
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
node: {id: mine}
static_resources:
  clusters: []
  listeners:
  - address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: own
          route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, direct_response: {status: 204}}]}]}
          http_filters:
          - {name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
`
	if err := yaml.Unmarshal([]byte(text), &own); err != nil {
		t.Fatal(err)
	}
	own["node"].(map[string]any)["cluster"] = slot["node"].(map[string]any)["cluster"]
	own["dynamic_resources"] = slot["dynamic_resources"]
	static := own["static_resources"].(map[string]any)
	static["clusters"] = slot["static_resources"].(map[string]any)["clusters"]
	chain := static["listeners"].([]any)[0].(map[string]any)["filter_chains"].([]any)[0].(map[string]any)
	hcm := chain["filters"].([]any)[0].(map[string]any)["typed_config"].(map[string]any)
	hcm["http_filters"] = append(slot["http_filters"].([]any), hcm["http_filters"].([]any)...)
	out, err := yaml.Marshal(own)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
