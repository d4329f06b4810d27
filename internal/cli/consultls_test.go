package cli

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/build/controlplanes/consultest"
	"github.com/meshery/meshery-filters/config"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
)

// documentedRights are those that docs/consul.md gives the adapter's token.
func documentedRights(t *testing.T) string {
	t.Helper()
	docs, err := os.ReadFile("../../docs/consul.md")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile("(?s)The token needs this policy.*?```hcl\n(.*?)```").FindSubmatch(docs)
	if found == nil {
		t.Fatal("docs/consul.md has no policy")
	}
	return string(found[1])
}

func TestConsulByTLSWithTheRightsThatTheDocsName(t *testing.T) {
	if testing.Short() {
		t.Skip("starts Consul and an Envoy")
	}
	dir, ctx := t.TempDir(), t.Context()
	_, _, ca := issue(t, dir, "ca", nil)
	cert, key, _ := issue(t, dir, "agent", ca)
	client, clientKey, _ := issue(t, dir, "client", ca)
	stranger, strangerKey, other := issue(t, filepath.Join(dir, "other"), "other", nil)
	c, err := consultest.Start(ctx, filepath.Join(dir, "consul"), consultest.Options{ACL: true, TLS: &consultest.TLS{CA: ca.file, Cert: cert, Key: key}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Stop)
	if err := c.Write(ctx, map[string]any{"Kind": "proxy-defaults", "Name": "global", "Config": map[string]any{"protocol": "http"}}); err != nil {
		t.Fatal(err)
	}
	api, err := c.Service(ctx, consultest.ServiceOptions{Name: "api"})
	if err != nil {
		t.Fatal(err)
	}
	token := filepath.Join(dir, "token")
	use := func(name, rights string) {
		t.Helper()
		made, err := c.Token(ctx, name, rights)
		if err := errors.Join(err, os.WriteFile(token, []byte(made), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	rights := documentedRights(t)
	use("whole", rights)

	settings := func(addr, ca, cert, key string) config.Config {
		s := config.Defaults()
		s.Consul.Addr, s.Consul.CAFile, s.Consul.CertFile, s.Consul.KeyFile = addr, ca, cert, key
		return s
	}
	for name, try := range map[string]struct {
		config.Config
		is   *problem.Kind
		says string
	}{
		"as it should be":              {settings(c.Secure, ca.file, client, clientKey), nil, ""},
		"another authority":            {settings(c.Secure, other.file, client, clientKey), problem.ConsulTLS, "consul.caFile does not have the authority"},
		"no authority":                 {settings(c.Secure, "", client, clientKey), problem.ConsulTLS, "consul.caFile does not have the authority"},
		"another name":                 {settings(strings.Replace(c.Secure, "127.0.0.1", "localhost", 1), ca.file, client, clientKey), problem.ConsulTLS, "another name than consul.addr"},
		"no client certificate":        {settings(c.Secure, ca.file, "", ""), problem.ConsulTLS, "consul.certFile and consul.keyFile are not set"},
		"a strange client certificate": {settings(c.Secure, ca.file, stranger, strangerKey), problem.ConsulTLS, "does not take the certificate of consul.certFile"},
		"http to https":                {settings("http"+strings.TrimPrefix(c.Secure, "https"), ca.file, client, clientKey), problem.ConsulTLS, "consul.addr begins with http://"},
		"https to http":                {settings("https"+strings.TrimPrefix(c.Addr, "http"), ca.file, client, clientKey), problem.ConsulTLS, "consul.addr begins with https://"},
	} {
		try.Config.Consul.Token = config.ConsulToken{Name: "consul", Key: "token"}
		try.Config.Secrets = map[string]map[string]config.Source{"consul": {"token": {File: token}}}
		opened, err := openConsul(&operation.Options{Log: slog.New(slog.DiscardHandler)}, try.Config)
		if err != nil {
			t.Fatal(name, err)
		}
		_, err = opened.Targets(ctx)
		opened.Close()
		if try.is == nil && err != nil || try.is != nil && (!errors.Is(err, try.is) || !strings.Contains(err.Error(), try.says)) {
			t.Errorf("%s: %v", name, err)
		}
	}

	folder, file := t.TempDir(), filepath.Join(dir, "adapter.yaml")
	if err := errors.Join(os.Chmod(folder, 0o755), os.WriteFile(file, fmt.Appendf(nil, `allowWideTargets: true
consul: {addr: %q, caFile: %q, certFile: %q, keyFile: %q, token: {name: consul, key: token}, admin: %q, localPath: %q}
secrets: {consul: {token: {file: %q}}}
`, c.Secure, ca.file, client, clientKey, api.Envoy.AdminAddr(), folder, token), 0o600)); err != nil {
		t.Fatal(err)
	}
	a := newAdapter(t, "--config", file)
	on := func(name, target string) string {
		return put(t, dir, name+".yaml", "apiVersion: filters.meshery.io/v1alpha1\nkind: Filter\nmetadata: {name: "+name+"}\nspec:\n  mesh: consul\n  target: "+target+
			"\n  module: {builtin: headers}\n  config: {response: {x-"+name+": there}}\n")
	}
	hello, wide := on("hello", "{kind: Service, name: api}"), on("wide", "{kind: Mesh}")
	const denied = "meshery-filters-1101"
	use("no-keys", strings.Replace(rights, `key_prefix "meshery-filters/" { policy = "write" }`, "", 1))
	a.cli("apply", "-f", hello).want(t, exitFailed, denied, "lacks permission 'key:", "consul.token", "docs/consul.md")
	use("no-nodes", strings.Replace(rights, `node_prefix "" { policy = "read" }`, "", 1))
	a.cli("apply", "-f", hello).want(t, exitFailed, denied, "/v1/catalog/connect/api", "may not see all of the answer")
	use("others", strings.Replace(rights, `service_prefix ""`, `service_prefix "web"`, 1))
	a.cli("apply", "-f", hello).want(t, exitFailed, denied, "lacks permission 'service:")
	use("no-mesh", strings.Replace(rights, `mesh = "write"`, "", 1))
	a.cli("apply", "-f", wide).want(t, exitFailed, denied, "lacks permission 'mesh:write'")
	use("one-service", strings.Replace(rights, `service_prefix ""`, `service_prefix "api"`, 1))
	a.cli("apply", "-f", hello).want(t, exitOK, "runs on Service default/api (1 of 1 proxy)")

	use("again", rights)
	a.cli("diff", "-f", hello, "--consul").want(t, exitOK, "service-defaults/api unchanged")
	a.cli("diff", "-f", wide, "--consul").want(t, exitOK, "proxy-defaults/global would be updated", "filter default/wide would be created")
	a.cli("apply", "-f", wide).want(t, exitOK, "is applied to Mesh consul (1 of 1 proxy)")
	a.cli("list", "--proxies").want(t, exitOK, "default/hello", "default/wide", "1 of 1 proxy", "Looked at 1 of 1 proxies")
	a.cli("status", "--proxies").want(t, exitOK, "as applied", "Looked at 1 of 1 proxies")
	a.cli("history", "hello").want(t, exitOK, "applied")
	// What cannot be told fails a command that tells all the rest.
	if err := c.Send(ctx, http.MethodPut, "/v1/kv/meshery-filters/damaged", "nonsense", nil); err != nil {
		t.Fatal(err)
	}
	alone := func(args ...string) result { return run(t, append(args, "--consul", "--config", file)...) }
	for _, command := range [][]string{{"list"}, {"status"}, {"history", "hello"}} {
		for _, do := range []func(...string) result{a.cli, alone} {
			do(command...).want(t, exitFailed, "Service default/api", "meshery-filters-1163", "the key meshery-filters/damaged", "consul kv delete")
		}
	}
	if err := c.Send(ctx, http.MethodDelete, "/v1/kv/meshery-filters/damaged", nil, nil); err != nil {
		t.Fatal(err)
	}
	rendered := a.cli("render", "-f", hello, "--consul").want(t, exitOK, `"Kind": "service-defaults"`).out
	write := c.Command(ctx, "config", "write", "-")
	write.Stdin = strings.NewReader(rendered)
	if out, err := write.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	a.cli("render", "-f", hello, "--consul", "--delete").want(t, exitOK, "Nothing would be left of service-defaults/api.")
	a.cli("remove", "wide", "hello").want(t, exitOK)
	a.cli("render", "-f", hello, "--consul", "--mesh", "istio").want(t, exitUsage, "--mesh is istio")
	a.cli("diff", "-f", hello, "--consul", "--kubeconfig", file).want(t, exitUsage, "--consul")
	a.cli("diff", "-f", hello).want(t, exitUsage, "--consul")

	// Without the adapter the same goes from here.
	a.cli("apply", "-f", hello).want(t, exitOK)
	a.interrupt()
	a.wait(t, patience)
	alone("list", "--proxies").want(t, exitOK, "default/hello", "1 of 1 proxy", "Looked at 1 of 1 proxies")
	alone("status", "--proxies").want(t, exitOK, "as applied", "Looked at 1 of 1 proxies")
	alone("history", "hello").want(t, exitOK, "applied", "removed")
	alone("remove", "hello", "--no-adapter").want(t, exitOK, "default/hello removed from Service default/api (1 of 1 proxy)")
	alone("remove", "hello", "--no-adapter").want(t, exitFailed, "meshery-filters-1010")
	alone("undo", "hello", "--no-adapter").want(t, exitOK, "runs on Service default/api (1 of 1 proxy)")
	alone("apply", "-f", wide, "--no-adapter").want(t, exitOK, "is applied to Mesh consul (1 of 1 proxy)")
	alone("remove", "wide", "hello", "--no-adapter").want(t, exitOK)
	alone("list").want(t, exitOK, "No filter is applied.")
	if e, err := c.Entry(ctx, "service-defaults", "api"); e != nil || err != nil {
		t.Errorf("%v %v", e, err)
	}
	runWith(t, "", []string{"MESHERY_FILTERS_CONSUL_ADDR=http://127.0.0.1:1"}, "list", "--consul").want(t, exitFailed, "meshery-filters-1100", "127.0.0.1:1")
}
