package config

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"log/slog"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/internal/problem"
)

func write(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "adapter.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

var home = []string{"HOME=/home/me"}

// mistakes loads what must be refused and returns the paths that are named.
func mistakes(t *testing.T, file string, env []string, flags map[string]string) (paths []string, text string) {
	t.Helper()
	_, err := Load(file, append(env, home...), flags)
	if !errors.Is(err, problem.InvalidConfiguration) {
		t.Fatalf("got %v", err)
	}
	for _, f := range problem.Of(err).Fields {
		paths = append(paths, f.Path)
	}
	return paths, err.Error()
}

func TestTheExampleIsTheDefaultsAndNamesEveryKey(t *testing.T) {
	fromFile, err := Load("adapter.yaml", home, nil)
	if err != nil {
		t.Fatal(err)
	}
	defaults, err := Load("", home, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(fromFile, defaults) {
		t.Errorf("adapter.yaml gives\n%s\nand the defaults are\n%s", fromFile, defaults)
	}
	var raw yaml.Node
	if err := yaml.Unmarshal(example, &raw); err != nil {
		t.Fatal(err)
	}
	docs := map[string]string{}
	comments(raw.Content[0], "", docs)
	// want collects each field's comment in the source under its path.
	set := token.NewFileSet()
	src, err := parser.ParseFile(set, "config.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	fieldDocs := map[string]string{} // Type.Field
	ast.Inspect(src, func(n ast.Node) bool {
		if spec, ok := n.(*ast.TypeSpec); ok {
			if st, ok := spec.Type.(*ast.StructType); ok {
				for _, f := range st.Fields.List {
					fieldDocs[spec.Name.Name+"."+f.Names[0].Name] = strings.Join(strings.Fields(f.Doc.Text()), " ")
				}
			}
		}
		return true
	})
	want := map[string]string{}
	var collect func(reflect.Type, string)
	collect = func(ty reflect.Type, prefix string) {
		for i := range ty.NumField() {
			f := ty.Field(i)
			path := join(prefix, f.Tag.Get("yaml"))
			want[path] = fieldDocs[ty.Name()+"."+f.Name]
			if f.Type.Kind() == reflect.Struct {
				collect(f.Type, path)
			}
		}
	}
	collect(reflect.TypeFor[Config](), "")
	for path, doc := range want {
		if doc == "" || docs[path] != doc {
			t.Errorf("adapter.yaml says of %s:\n%s\nand config.go:\n%s", path, docs[path], doc)
		}
	}
	if !slices.Equal(slices.Sorted(maps.Keys(docs)), slices.Sorted(maps.Keys(want))) {
		t.Errorf("adapter.yaml has the keys %v, want %v", slices.Sorted(maps.Keys(docs)), slices.Sorted(maps.Keys(want)))
	}
}

func TestEveryKeyHasItsOwnVariableFlagTypeAndText(t *testing.T) {
	seen := map[string]bool{}
	for _, k := range Keys() {
		if k.Doc == "" || k.Type == "" || seen[k.Env] || seen[k.Flag] {
			t.Errorf("%+v", k)
		}
		seen[k.Env], seen[k.Flag] = true, true
	}
	for path, want := range map[string][2]string{
		"grpcAddr":             {"MESHERY_FILTERS_GRPC_ADDR", "grpc-addr"},
		"grpcTLS.clientCAFile": {"MESHERY_FILTERS_GRPC_TLS_CLIENT_CA_FILE", "grpc-tls-client-ca-file"},
		"natsURL":              {"MESHERY_FILTERS_NATS_URL", "nats-url"},
		"limits.moduleBytes":   {"MESHERY_FILTERS_LIMITS_MODULE_BYTES", "limits-module-bytes"},
		"stateDir":             {"MESHERY_FILTERS_STATE_DIR", "state-dir"},
	} {
		if envName(path) != want[0] || flagName(path) != want[1] || !seen[want[0]] {
			t.Errorf("%s: %s, %s", path, envName(path), flagName(path))
		}
	}
}

func TestEachKeyIsSetByFileVariableAndFlagAndTheLaterOneWins(t *testing.T) {
	texts := map[string][3]string{"text": {"a", "b", "c"}, "number": {"2", "3", "4"}, "duration": {"1s", "2s", "3s"}, "bool": {"true", "false", "true"}}
	for _, k := range Keys() {
		v := texts[k.Type]
		// Only that the value arrives is looked at, valid or not.
		nested := ""
		for i, part := range strings.Split(k.Path, ".") {
			nested += fmt.Sprintf("\n%s%s:", strings.Repeat("  ", i), part)
		}
		file := write(t, nested+" "+v[0]+"\n")
		env := append([]string{k.Env + "=" + v[1]}, home...)
		for _, c := range []struct {
			want  string
			env   []string
			flags map[string]string
		}{{v[0], home, nil}, {v[1], env, nil}, {v[2], env, map[string]string{k.Path: v[2]}}, {v[0], append([]string{k.Env + "="}, home...), nil}} {
			got, _ := Load(file, c.env, c.flags)
			for path, s := range scalars(reflect.ValueOf(&got).Elem(), "") {
				if path == k.Path && fmt.Sprint(s.Interface()) != c.want {
					t.Errorf("%s is %v, want %s", path, s.Interface(), c.want)
				}
			}
		}
	}
}

func TestMesherysVariablesCountLessThanTheAdaptersOwn(t *testing.T) {
	c, err := Load("", []string{"HOME=/h", "MESHERY_SERVER=http://meshery:9081", "DEBUG=true"}, nil)
	if err != nil || c.MesheryServer != "http://meshery:9081" || !c.Debug {
		t.Errorf("%v\n%s", err, c)
	}
	c, err = Load("", []string{"HOME=/h", "MESHERY_SERVER=http://meshery:9081", "DEBUG=true",
		"MESHERY_FILTERS_MESHERY_SERVER=http://other:1", "MESHERY_FILTERS_DEBUG=false"}, nil)
	if err != nil || c.MesheryServer != "http://other:1" || c.Debug {
		t.Errorf("%v\n%s", err, c)
	}
	if c, err = Load("", []string{"HOME=/h", "DEBUG=express:*"}, nil); err != nil || c.Debug {
		t.Errorf("another program's DEBUG: %v, %v", c.Debug, err)
	}
}

func TestKubernetesOwnVariablesForAServiceOfThisNameAreNoMistake(t *testing.T) {
	if _, err := Load("", []string{"HOME=/h", "MESHERY_FILTERS_PORT=tcp://10.0.0.1:10014", "MESHERY_FILTERS_SERVICE_HOST=10.0.0.1"}, nil); err != nil {
		t.Error(err)
	}
}

func TestAllMistakesOfAllSourcesAreNamedAtOnce(t *testing.T) {
	file := write(t, `
grpcAdr: 127.0.0.1:1
xdsAddr: 127.0.0.1
limits:
  queue: many
  workers: [1]
  speed: 9
debug: maybe
shutdownTimeout: 30
grpcTLS: yes
natsURL: {a: b}
logFormat: xml
logFormat: json
secrets:
  one: {key: {env: A, file: /b}}
  two: {key: {}}
  three: {key: {env: A, other: x}}
`)
	got, text := mistakes(t, file, []string{"MESHERY_FILTERS_LIMITS_MODULE_BYTES=big"}, map[string]string{"limits.moduleTimeout": "soon", "nope": "1"})
	want := []string{"grpcAdr", "limits.queue", "limits.workers", "limits.speed", "debug", "shutdownTimeout", "grpcTLS", "natsURL", "logFormat",
		"secrets.three.key.other", "MESHERY_FILTERS_LIMITS_MODULE_BYTES", "--limits-module-timeout", "nope", "secrets.one.key", "secrets.two.key", "xdsAddr"}
	if !slices.Equal(got, want) {
		t.Errorf("named %v\nwant  %v\n%s", got, want, text)
	}
	for _, w := range []string{"(line 2)", "grpcAddr, grpcTLS", `"many" is not a whole number (line 5)`, "30s or 2m"} {
		if !strings.Contains(text, w) {
			t.Errorf("%q is missing in\n%s", w, text)
		}
	}
}

func TestAFileThatIsNoConfigurationIsRefused(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct{ file, word string }{
		"missing":       {filepath.Join(dir, "none.yaml"), "cannot be read"},
		"folder":        {dir, "is not a file"},
		"not YAML":      {write(t, "a: [\nsecret hunter2"), "not YAML"},
		"a list":        {write(t, "- a"), "must be a map"},
		"two documents": {write(t, "debug: true\n---\ndebug: false"), "more than one document"},
		"too large":     {write(t, "# "+strings.Repeat("x", maxFile)), "more than"},
		"merge key":     {write(t, "x: &x {queue: 1}\nlimits: {<<: *x}"), "limits.<<"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, text := mistakes(t, c.file, nil, nil); !strings.Contains(text, c.word) || strings.Contains(text, "hunter2") {
				t.Errorf("%s", text)
			}
		})
	}
	if c, err := Load(write(t, "# nothing\n"), home, nil); err != nil || c.GRPCAddr != Defaults().GRPCAddr {
		t.Errorf("an empty file: %v", err)
	}
	if _, err := Load(write(t, "limits:\nsecrets: {a: {b: &s {env: X}, c: *s}}\n"), home, nil); err != nil {
		t.Errorf("a key without value keeps its default: %v", err)
	}
}

func TestValuesOutOfRangeAreRefused(t *testing.T) {
	for path, values := range map[string][]string{
		"grpcAddr":             {"", "10014", "localhost:http", "127.0.0.1:70000", "a:b:c", "127.0.0.1:10015"},
		"xdsAddr":              {"", ":0x1"},
		"natsListen":           {"4222", "127.0.0.1:10014"},
		"natsURL":              {"host:4222", "http://host", "nats://", "nats://a:1,ftp://b:2"},
		"mesheryServer":        {"meshery:9081", "ftp://meshery"},
		"modulesAddr":          {"10018", "127.0.0.1:10014"},
		"modulesURL":           {"filters:10018", "oci://filters", "http://a@filters", "http://filters:10018"}, // the last without modulesAddr
		"stateDir":             {""},
		"limits.queue":         {"0", "-1", "1000001"},
		"limits.workers":       {"0", "1001"},
		"limits.moduleBytes":   {"0", "20971521"},
		"limits.moduleTimeout": {"0s", "-1s", "2h"},
		"limits.moduleKeep":    {"0s", "721h"},
		"shutdownTimeout":      {"0s", "61m"},
		"logFormat":            {"", "JSON"},
		"clusters":             {"", "Own"},
		"kubeconfigAllow":      {"all", "exec,file"},
		"imagehub.key.name":    {"one"},
		"imagehub.key.key":     {"one"},
		"imagehub.apiImage":    {"", "a b", "a\"b"},
		"imagehub.webImage":    {""},
		"imagehub.image":       {"-a"},
		"imagehub.host":        {"", "*", "Hub", "hub.", "hub:80", "a/b"},
		"imagehub.gateway":     {"", "consul"},
		"imagehub.mesh":        {"", "istio", "consul"},
		"imagehub.sidecarAddr": {"", "127.0.0.1:0", "0.0.0.0:10019", "localhost:10019"},
	} {
		for _, v := range values {
			if _, err := Load("", home, map[string]string{path: v}); !errors.Is(err, problem.InvalidConfiguration) {
				t.Errorf("%s %q: %v", path, v, err)
			}
		}
	}
	for given, on := range map[string]bool{"": false, "http://127.0.0.1:8500": true, "http://localhost:8500": true, "https://[::1]:8501": true, "http://10.0.0.5:8500": false} {
		for _, mesh := range []string{"auto", "envoy"} {
			c := Defaults()
			c.Consul.Addr, c.ImageHub.Mesh = given, mesh
			if got := c.OnConsul(); got != (on && mesh == "auto") {
				t.Errorf("Image Hub with consul.addr %q and mesh %s is on Consul: %t", given, mesh, got)
			}
		}
	}
	if c, err := Load("", home, map[string]string{"kubeconfigAllow": "exec, link-local"}); err != nil || !strings.Contains(strings.Join(c.Warnings(), "\n"), "exec, link-local") {
		t.Errorf("what kubeconfigs may have: %v %v", err, c.Warnings())
	}
	for path, v := range map[string]string{"natsURL": "nats://a:4222, tls://b:4222", "mesheryServer": "https://meshery.example", "grpcAddr": "localhost:0", "xdsAddr": "[::1]:0"} {
		if _, err := Load("", home, map[string]string{path: v}); err != nil {
			t.Errorf("%s %q: %v", path, v, err)
		}
	}
	for v, ok := range map[string]bool{"http://filters:10018": true, "https://filters/below": true, "http://filters/?a=b": false, "http://filters/#a": false} {
		if _, err := Load("", home, map[string]string{"modulesAddr": "127.0.0.1:0", "modulesURL": v}); (err == nil) != ok {
			t.Errorf("modulesURL %q: %v", v, err)
		}
	}
	if _, err := Load("", home, map[string]string{"grpcAddr": "127.0.0.1:0", "xdsAddr": "127.0.0.1:0", "httpAddr": "127.0.0.1:0"}); err != nil {
		t.Errorf("free ports: %v", err)
	}
}

func TestAListenerForOtherMachinesNeedsClientCertificatesOrAnExplicitYes(t *testing.T) {
	mutual := func(p string) map[string]string {
		return map[string]string{p + ".certFile": "c", p + ".keyFile": "k", p + ".clientCAFile": "a"}
	}
	for _, l := range []struct{ addr, tls string }{{"grpcAddr", "grpcTLS"}, {"xdsAddr", "xdsTLS"}, {"httpAddr", "httpTLS"}, {"modulesAddr", "modulesTLS"}, {"natsListen", "natsTLS"}, {"imagehub.addr", "imagehub"}} {
		for _, open := range []string{":4000", "0.0.0.0:4000", "[::]:4000", "10.1.2.3:4000", "some-host:4000"} {
			load := func(flags map[string]string) (Config, error) {
				all := map[string]string{l.addr: open}
				maps.Copy(all, flags)
				return Load("", home, all)
			}
			if _, err := load(nil); err == nil || !strings.Contains(err.Error(), l.addr+": "+open) || !strings.Contains(err.Error(), l.tls+".insecure") {
				t.Errorf("%s %s: %v", l.addr, open, err)
			}
			c, err := load(map[string]string{l.tls + ".insecure": "true"})
			if w := c.Warnings(); err != nil || len(w) != 1 || !strings.Contains(w[0], open) || !strings.Contains(w[0], l.tls+".insecure") {
				t.Errorf("%s %s insecure: %v, %v", l.addr, open, err, w)
			}
			if l.tls == "imagehub" {
				continue
			}
			c, err = load(map[string]string{l.tls + ".certFile": "c", l.tls + ".keyFile": "k"})
			if alone := l.addr == "modulesAddr"; (err == nil) != alone || alone && len(c.Warnings()) > 0 { // those who fetch have no certificate
				t.Errorf("%s %s with TLS and without client certificates: %v, %v", l.addr, open, err, c.Warnings())
			}
			if c, err := load(mutual(l.tls)); err != nil || len(c.Warnings()) > 0 {
				t.Errorf("%s %s with client certificates: %v, %v", l.addr, open, err, c.Warnings())
			}
		}
		if l.tls != "imagehub" {
			for _, half := range []string{".certFile", ".keyFile", ".clientCAFile"} {
				if _, err := Load("", home, map[string]string{l.addr: "127.0.0.1:4000", l.tls + half: "x"}); err == nil {
					t.Errorf("%s%s alone is allowed", l.tls, half)
				}
			}
		}
		if c, err := Load("", home, map[string]string{l.addr: "127.0.0.1:4000", l.tls + ".insecure": "true"}); err != nil || len(c.Warnings()) > 0 {
			t.Errorf("loopback warns: %v, %v", err, c.Warnings())
		}
	}
	hub := "secrets: {imagehub: {token-key: {env: X}, other: {env: Y}}}\n"
	if c, err := Load(write(t, hub+"imagehub: {key: {name: imagehub, key: other}}\n"), home, nil); err != nil || len(c.Warnings()) != 1 ||
		!strings.Contains(c.Warnings()[0], "imagehub/token-key") {
		t.Errorf("a key of Image Hub that another stands before: %v, %v", err, c.Warnings())
	}
	for _, rest := range []string{"", "imagehub: {key: {name: imagehub, key: token-key}}\n"} {
		if c, err := Load(write(t, hub+rest), home, nil); err != nil || len(c.Warnings()) != 0 {
			t.Errorf("a key of Image Hub that is used warns: %v, %v", err, c.Warnings())
		}
	}
	for server, warnings := range map[string]int{"http://meshery.meshery:9081": 1, "http://192.0.2.1:9081": 1, "https://meshery.example": 0, "http://localhost:9081": 0, "http://[::1]:9081": 0} {
		if c, err := Load("", home, map[string]string{"mesheryServer": server, "meshery.tokenFile": "/auth.json"}); err != nil || len(c.Warnings()) != warnings {
			t.Errorf("a token for %s: %v, %v", server, err, c.Warnings())
		}
		if c, err := Load("", home, map[string]string{"mesheryServer": server}); err != nil || len(c.Warnings()) != 0 {
			t.Errorf("%s without a token: %v, %v", server, err, c.Warnings())
		}
	}
	if c, err := Load("", home, map[string]string{"allowLoopbackModules": "true"}); err != nil || len(c.Warnings()) != 1 {
		t.Errorf("allowLoopbackModules: %v, %v", err, c.Warnings())
	}
}

func TestPathsStartAtHomeAndOperationsLieBesideTheFile(t *testing.T) {
	file := write(t, "grpcTLS: {certFile: ~/c.pem, keyFile: k.pem}\nsecrets: {a: {b: {file: ~/s}}}\n")
	c, err := Load(file, home, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.StateDir != "/home/me/.meshery/filters" || c.GRPCTLS.CertFile != "/home/me/c.pem" || c.GRPCTLS.KeyFile != "k.pem" ||
		c.Secrets["a"]["b"].File != "/home/me/s" || c.OperationsDir != "" {
		t.Errorf("%s", c)
	}
	dir := filepath.Join(filepath.Dir(file), "operations.d")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if c, err = Load(file, home, nil); err != nil || c.OperationsDir != dir {
		t.Errorf("operationsDir is %q, %v", c.OperationsDir, err)
	}
	if c, err = Load(file, home, map[string]string{"operationsDir": "/other"}); err != nil || c.OperationsDir != "/other" {
		t.Errorf("operationsDir is %q, %v", c.OperationsDir, err)
	}
	if _, err := Load("", nil, nil); err == nil || !strings.Contains(err.Error(), "stateDir") {
		t.Errorf("without HOME: %v", err)
	}
	if c, err := Load("", nil, map[string]string{"stateDir": "/var/lib/filters"}); err != nil || c.StateDir != "/var/lib/filters" {
		t.Errorf("without HOME and with a folder: %v", err)
	}
}

func TestSetChangesOneKey(t *testing.T) {
	c := Defaults()
	if err := c.Set("limits.moduleTimeout", "5s"); err != nil || c.Limits.ModuleTimeout != 5*time.Second {
		t.Errorf("%v, %v", c.Limits.ModuleTimeout, err)
	}
	for path, v := range map[string]string{"limits.moduleTimeout": "5", "nope": "1", "limits": "1", "secrets": "1"} {
		if err := c.Set(path, v); !errors.Is(err, problem.InvalidConfiguration) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestASecretIsReadWhenItIsNeededAndNeverNamedByItsValue(t *testing.T) {
	file := write(t, "from-file\n")
	t.Setenv("FILTERS_TEST_SECRET", "from-env")
	c := Defaults()
	c.Secrets = map[string]map[string]Source{"hub": {"env": {Env: "FILTERS_TEST_SECRET"}, "file": {File: file},
		"unset": {Env: "FILTERS_TEST_UNSET"}, "gone": {File: file + ".gone"}, "folder": {File: filepath.Dir(file)}, "empty": {File: write(t, "\n")}}}
	for key, want := range map[string]string{"env": "from-env", "file": "from-file"} {
		if v, err := c.Secret("hub", key); v != want || err != nil {
			t.Errorf("%s: %q, %v", key, v, err)
		}
	}
	for _, key := range []string{"unset", "gone", "folder", "empty", "unknown"} {
		_, err := c.Secret("hub", key)
		if !errors.Is(err, problem.SecretMissing) || !strings.Contains(err.Error(), "hub/"+key) {
			t.Errorf("%s: %v", key, err)
		} else if strings.Contains(err.Error(), file) || strings.Contains(err.Error(), "FILTERS_TEST") {
			t.Errorf("%v says where it looked", err)
		}
	}
	if err := os.WriteFile(file, []byte("rotated"), 0o600); err != nil {
		t.Fatal(err)
	}
	if v, err := c.Secret("hub", "file"); v != "rotated" || err != nil {
		t.Errorf("after rotation: %q, %v", v, err)
	}
}

func TestNothingThatIsPrintedShowsASecret(t *testing.T) {
	t.Setenv("FILTERS_TEST_SECRET", "hunter2")
	file := write(t, `
natsURL: nats://user:hunter2@host:4222,nats://u:hunter2,x@host
mesheryServer: http://u:hunter2@%zz
secrets:
  a: {b: hunter2, c: {value: hunter2}, d: {env: "hunter2 is here"}, e: {env: FILTERS_TEST_SECRET}}
`)
	c, err := Load(file, home, nil)
	if err == nil {
		t.Fatal("it is accepted")
	}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("starting", "config", c)
	for _, text := range []string{err.Error(), c.String(), fmt.Sprintf("%v %+v %s", c, c, &c), fmt.Sprintf("%#v", c), log.String()} {
		if strings.Contains(text, "hunter2") {
			t.Errorf("it shows:\n%s", text)
		}
	}
	paths := problem.Of(err).Fields
	for _, want := range []string{"natsURL", "mesheryServer", "secrets.a.b", "secrets.a.c.value", "secrets.a.d.env"} {
		if !slices.ContainsFunc(paths, func(f problem.Field) bool { return f.Path == want }) {
			t.Errorf("%s is not refused: %v", want, err)
		}
	}
	if !strings.Contains(log.String(), "grpcAddr: 127.0.0.1:10014") {
		t.Errorf("the log lacks the settings: %s", log.String())
	}
}

func TestWhatStringShowsLoadsAgain(t *testing.T) {
	c, err := Load(write(t, "limits: {moduleTimeout: 90s}\nsecrets: {a: {b: {env: X}}}\nimagehub: {key: {name: a, key: b}}\n"), home, nil)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Load(write(t, c.String()), home, nil)
	if err != nil || !reflect.DeepEqual(c, again) {
		t.Errorf("%v\n%s\n%s", err, c, again)
	}
}

func TestAListenersTLSAsksForClientCertificates(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile := filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem")
	for name, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: cert}, keyFile: {Type: "PRIVATE KEY", Bytes: der}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if conf, err := (TLS{}).Server(slog.Default()); conf != nil || err != nil {
		t.Errorf("without TLS: %v, %v", conf, err)
	}
	conf, err := TLS{CertFile: certFile, KeyFile: keyFile}.Server(slog.Default())
	if err != nil || conf.ClientAuth != tls.NoClientCert || len(conf.Certificates) != 1 {
		t.Errorf("TLS: %+v, %v", conf, err)
	}
	conf, err = TLS{CertFile: certFile, KeyFile: keyFile, ClientCAFile: certFile}.Server(slog.Default())
	if err != nil || conf.ClientAuth != tls.RequireAndVerifyClientCert || conf.ClientCAs == nil {
		t.Errorf("mutual TLS: %+v, %v", conf, err)
	}
	for _, bad := range []TLS{{CertFile: certFile, KeyFile: certFile}, {CertFile: certFile, KeyFile: keyFile, ClientCAFile: keyFile}, {CertFile: certFile, KeyFile: keyFile, ClientCAFile: dir}} {
		if _, err := bad.Server(slog.Default()); !errors.Is(err, problem.InvalidConfiguration) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

type listening string

func (listening) Network() string  { return "tcp" }
func (l listening) String() string { return string(l) }

func TestMesheryIsToldWhereItReachesTheAdapter(t *testing.T) {
	for _, c := range []struct{ grpc, adapter, listens, want string }{
		{"127.0.0.1:10014", "", "127.0.0.1:10014", "127.0.0.1:10014"},
		{"127.0.0.1:0", "", "127.0.0.1:4711", "127.0.0.1:4711"},
		{"0.0.0.0:10014", "", "[::]:10014", "machine:10014"},
		{":10014", "", "[::]:10014", "machine:10014"},
		{"127.0.0.1:10014", "meshery-filters", "127.0.0.1:10014", "meshery-filters:10014"},
		{"127.0.0.1:0", "meshery-filters", "127.0.0.1:4711", "meshery-filters:4711"},
		{"127.0.0.1:10014", "host.docker.internal:20014", "127.0.0.1:10014", "host.docker.internal:20014"},
		{"127.0.0.1:10014", "[fd00::7]", "127.0.0.1:10014", "[fd00::7]:10014"},
	} {
		conf := Defaults()
		conf.GRPCAddr, conf.Meshery.AdapterAddr = c.grpc, c.adapter
		if got, err := conf.Callback(listening(c.listens), "machine"); err != nil || got != c.want {
			t.Errorf("%+v: %s, %v", c, got, err)
		}
	}
}

func TestWhatMesheryNeedsIsChecked(t *testing.T) {
	paths, text := mistakes(t, write(t, `
mesheryServer: http://me:secret@host:9081
meshery:
  adapterAddr: http://host:10014
  provider: "a;b"
`), nil, nil)
	if fmt.Sprint(paths) != "[meshery.adapterAddr meshery.provider mesheryServer]" || strings.Contains(text, "secret") {
		t.Errorf("wrong are %v: %s", paths, text)
	}
	if paths, _ := mistakes(t, write(t, "meshery: {events: true}\n"), nil, nil); fmt.Sprint(paths) != "[meshery.events]" {
		t.Errorf("wrong are %v", paths)
	}
	c, err := Load("", append([]string{"MESHERY_SERVER=http://meshery:9081", "SERVICE_ADDR=filters"}, home...), nil)
	if err != nil || c.MesheryServer != "http://meshery:9081" || c.Meshery.AdapterAddr != "filters" {
		t.Errorf("Meshery's variables give %+v, %v", c.Meshery, err)
	}
}
