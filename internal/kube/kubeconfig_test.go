package kube

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

// kubeconfig writes one with these lines in its cluster and its user.
func kubeconfig(cluster, user string) []byte {
	return fmt.Appendf(nil, `{apiVersion: v1, kind: Config, current-context: test,
contexts: [{name: test, context: {cluster: test, user: test}}, {name: nowhere, context: {cluster: elsewhere, user: test}}],
clusters: [{name: test, cluster: {%s}}], users: [{name: test, user: {%s}}]}`, cluster, user)
}

const (
	goodServer = `server: "https://api.example:6443"`
	secretText = "not-to-be-shown-9d41c7"
)

func TestAKubeconfigThatWouldUseWhatIsTheAdaptersIsRefusedUnlessAllowed(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "token")
	if err := os.WriteFile(file, []byte("t"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, cluster, user string
		allow               Allow
		says                string // what the refusal says; empty when it is taken
	}{
		{"a token", goodServer, "token: " + secretText, Allow{}, ""},
		{"a password", goodServer, "username: bob, password: " + secretText, Allow{}, ""},
		{"nobody", goodServer, "", Allow{}, ""},
		{"a program", goodServer, "exec: {apiVersion: client.authentication.k8s.io/v1, command: /bin/false, interactiveMode: Never}", Allow{}, "user.exec"},
		{"a program that is allowed", goodServer, "exec: {apiVersion: client.authentication.k8s.io/v1, command: /bin/false, interactiveMode: Never}", Allow{Exec: true}, ""},
		{"a plugin", goodServer, "auth-provider: {name: gcp}", Allow{true, true, true, true, true}, "user.auth-provider"},
		{"a token file", goodServer, "tokenFile: " + file, Allow{}, "user.tokenFile"},
		{"a token file that is allowed", goodServer, "tokenFile: " + file, Allow{Files: true}, ""},
		{"a relative token file", goodServer, "tokenFile: token", Allow{Files: true}, "user.tokenFile: a relative path"},
		{"a client key file", goodServer, "client-certificate: /etc/hostname, client-key: /etc/hostname", Allow{}, "user.client-key"},
		{"an authority's file", goodServer + ", certificate-authority: /etc/hostname", "", Allow{}, "cluster.certificate-authority"},
		{"a proxy", goodServer + `, proxy-url: "http://10.0.0.1:3128"`, "", Allow{}, "cluster.proxy-url"},
		{"a proxy that is allowed", goodServer + `, proxy-url: "http://10.0.0.1:3128"`, "", Allow{Proxy: true}, ""},
		{"no verification", goodServer + ", insecure-skip-tls-verify: true", "", Allow{}, "cluster.insecure-skip-tls-verify"},
		{"no verification, allowed", goodServer + ", insecure-skip-tls-verify: true", "", Allow{Insecure: true}, ""},
		{"in clear", `server: "http://api.example"`, "", Allow{}, "cluster.server: credentials may not be sent in clear"},
		{"in clear, allowed", `server: "http://api.example"`, "", Allow{Insecure: true}, ""},
		{"another scheme", `server: "file:///etc/passwd"`, "", Allow{Insecure: true}, "cluster.server"},
		{"no server", "tls-server-name: x", "", Allow{}, "cluster.server"},
		{"a user in the address", `server: "https://a:` + secretText + `@api.example"`, "", Allow{}, "cluster.server"},
		{"a query", `server: "https://api.example/?a=b"`, "", Allow{}, "cluster.server"},
		{"a metadata service", `server: "https://169.254.169.254"`, "", Allow{}, "cluster.server: it is a link-local address"},
		{"a metadata service, allowed", `server: "https://169.254.169.254"`, "", Allow{LinkLocal: true}, ""},
		{"one in IPv6", `server: "https://[fd00:ec2::254]/"`, "", Allow{}, "metadata"},
		{"one in disguise", `server: "https://[::ffff:169.254.169.254]/"`, "", Allow{}, "link-local"},
		{"one in another disguise", `server: "https://[64:ff9b::a9fe:a9fe]/"`, "", Allow{}, "link-local"},
		{"a line break in the token", goodServer, `token: "a\nX-Remote-User: admin"`, Allow{}, "user.token"},
		{"no certificate", goodServer + ", certificate-authority-data: " + base64.StdEncoding.EncodeToString([]byte(secretText)), "", Allow{}, "certificates"},
		{"both kinds of credentials", goodServer, "token: a, username: b, password: " + secretText, Allow{}, "credentials"},
	} {
		cl, err := Open(kubeconfig(c.cluster, c.user), Options{Allow: c.allow})
		if err == nil {
			cl.Close()
		}
		switch {
		case c.says == "" && err != nil:
			t.Errorf("%s: refused: %v", c.name, err)
		case c.says != "" && (!errors.Is(err, problem.KubeconfigRefused) || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%s: got %v, want %q", c.name, err, c.says)
		case err != nil && strings.Contains(err.Error(), secretText):
			t.Errorf("%s: it shows a secret: %v", c.name, err)
		}
	}
	// All mistakes are told at once.
	_, err := Open(kubeconfig(`server: "http://169.254.1.1", proxy-url: "http://x", insecure-skip-tls-verify: true`,
		"tokenFile: /a, exec: {apiVersion: client.authentication.k8s.io/v1, command: x, interactiveMode: Never}"), Options{})
	if p := problem.Of(err); len(p.Fields) != 5 {
		t.Errorf("%d mistakes are told: %v", len(p.Fields), err)
	}
}

func TestAKubeconfigThatCannotBeReadIsRefusedWithoutQuotingIt(t *testing.T) {
	for name, text := range map[string]string{
		"no YAML":            secretText + ": [",
		"another type":       "users: " + secretText,
		"another kind":       "apiVersion: v1\nkind: Secret\ndata: {a: " + secretText + "}",
		"nothing":            "",
		"no current context": strings.Replace(string(kubeconfig(goodServer, "token: "+secretText)), "current-context: test", "current-context: ''", 1),
		"too large":          strings.Repeat("#"+secretText+"\n", maxKubeconfig/20),
	} {
		_, err := Open([]byte(text), Options{})
		if !errors.Is(err, problem.KubeconfigRefused) || strings.Contains(err.Error(), secretText) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for context, ok := range map[string]bool{"test": true, "nowhere": false, "absent": false} {
		c, err := Open(kubeconfig(goodServer, ""), Options{Context: context})
		if (err == nil) != ok {
			t.Errorf("context %s: %v", context, err)
		}
		if context == "absent" && !strings.Contains(err.Error(), "there are nowhere, test") {
			t.Errorf("the contexts that are there are not told: %v", err)
		}
		if err == nil {
			c.Close()
		}
	}
}

// ping is the least that a cluster is asked.
func ping(ctx context.Context, c *Cluster) error {
	_, err := c.Target(ctx, "istio", target("anywhere"))
	return err
}

func TestANameIsLookedAtWhenItIsDialled(t *testing.T) {
	// The resolver of this machine knows no name that stands for a link-local address, so the dialler is asked itself.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := dialer(Allow{})(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	for _, address := range []string{"169.254.169.254:443", "[fe80::1]:443", "0.0.0.0:443"} {
		conn, err := dialer(Allow{})(t.Context(), "tcp", address)
		var why errAddress
		if !errors.As(err, &why) {
			t.Errorf("%s: %v", address, err)
		}
		if conn != nil {
			conn.Close()
		}
	}
}

// other is a server that is no API server, which a kubeconfig that came from outside may name.
func other(t *testing.T, handle http.HandlerFunc) *Cluster {
	t.Helper()
	s := httptest.NewTLSServer(handle)
	t.Cleanup(s.Close)
	return cluster(t, kubeconfig(fmt.Sprintf("server: %q, certificate-authority-data: %q", s.URL,
		base64.StdEncoding.EncodeToString(pemOf(s.Certificate().Raw))), "token: "+secretText), Options{Timeout: 20 * time.Second})
}

func TestTheAnswersOfWhatIsNoAPIServerAreNotShown(t *testing.T) {
	const inside = "what only the inside may know"
	for name, c := range map[string]struct {
		handle http.HandlerFunc
		kind   *problem.Kind
	}{
		"a page":              {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, inside) }, problem.ClusterAnswer},
		"a page that is JSON": {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, `{"secret": %q}`, inside) }, problem.InventoryDamaged},
		"an error page":       {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, inside, http.StatusInternalServerError) }, problem.ClusterAnswer},
		"another's error": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprintf(w, `{"message": %q}`, inside)
		}, problem.ClusterAnswer},
		"a refusal": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, inside, http.StatusForbidden) }, problem.RightMissing},
		"an address to go to": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://169.254.169.254/"+strings.ReplaceAll(inside, " ", "-"), http.StatusFound)
		}, problem.ClusterAnswer},
		"no end": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 1<<20)); err != nil {
					return
				}
			}
		}, problem.ClusterAnswer},
		"a header without end": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Large", strings.Repeat("x", 1<<20))
		}, problem.ClusterUnreachable},
	} {
		err := ping(t.Context(), other(t, c.handle))
		if !errors.Is(err, c.kind) || strings.Contains(strings.ReplaceAll(err.Error(), "-", " "), inside) || strings.Contains(err.Error(), secretText) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAServersMessageIsMadeHarmless(t *testing.T) {
	c := other(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusUnprocessableEntity)
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid",
			"message": "bad\r\n\x1b[31mline" + strings.Repeat("x", 9000)})
	})
	err := ping(t.Context(), c)
	fails(t, err, problem.ObjectRefused, "bad")
	if d := problem.Of(err).Details; strings.ContainsAny(d, "\r\n\x1b") || len(d) > 2*maxText {
		t.Errorf("%q", d)
	}
}

func TestAServerThatCannotBeReachedIsTold(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	silent := l.Addr().String()
	defer l.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	stranger := httptest.NewUnstartedServer(http.NotFoundHandler())
	stranger.Config.ErrorLog = log.New(io.Discard, "", 0)
	stranger.StartTLS()
	defer stranger.Close()
	for _, c := range []struct{ name, server, says string }{
		{"nobody listens", "https://" + closed.Addr().String(), "refused"},
		{"nobody answers", "https://" + silent, "did not answer"},
		{"no such name", "https://no-such-host.invalid", "no-such-host.invalid"},
		{"another's certificate", stranger.URL, "certificate"},
	} {
		cl := cluster(t, kubeconfig(fmt.Sprintf("server: %q", c.server), "token: "+secretText), Options{Timeout: 2 * time.Second})
		err := ping(t.Context(), cl)
		if !errors.Is(err, problem.ClusterUnreachable) || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), secretText) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	// Who gives up is not told that the cluster is at fault.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := ping(ctx, cluster(t, kubeconfig(fmt.Sprintf("server: %q", "https://"+silent), ""), Options{})); !errors.Is(err, context.Canceled) || errors.Is(err, problem.ClusterUnreachable) {
		t.Errorf("given up: %v", err)
	}
}

func TestAPortableKubeconfigHasOneContextAndTheContentsOfItsFiles(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"ca.crt": "the authority", "token": secretText + "\n", "config": `{apiVersion: v1, kind: Config, current-context: one,
contexts: [{name: one, context: {cluster: one, user: one}}, {name: two, context: {cluster: two, user: two}}],
clusters: [{name: one, cluster: {server: "https://one.example"}}, {name: two, cluster: {server: "https://two.example", certificate-authority: ca.crt}}],
users: [{name: one, user: {token: of-one}}, {name: two, user: {tokenFile: token}}]}`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	text, err := Portable(filepath.Join(dir, "config"), "two")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{secretText, "https://two.example", base64.StdEncoding.EncodeToString([]byte("the authority"))} {
		if !strings.Contains(string(text), want) {
			t.Errorf("%q is not in it", want)
		}
	}
	if strings.Contains(string(text), "one") || strings.Contains(string(text), dir) {
		t.Errorf("it has more than it should:\n%s", text)
	}
	if text, err = Portable(filepath.Join(dir, "config"), ""); err != nil || !strings.Contains(string(text), "of-one") {
		t.Errorf("the current context: %v", err)
	}
	_, err = Portable(filepath.Join(dir, "config"), "three")
	fails(t, err, problem.KubeconfigRefused, `no context "three"`)
	_, err = Portable(filepath.Join(dir, "absent"), "")
	fails(t, err, problem.KubeconfigRefused, "absent")
}
