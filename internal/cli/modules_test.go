package cli

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// answerOf asks an address and returns the status and the body.
func answerOf(t *testing.T, client *http.Client, url string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestTheModulesOfChainsAreServedOnAListenerOfTheirOwn(t *testing.T) {
	dir := t.TempDir()
	_, _, ca := issue(t, dir, "ca", nil)
	cert, key, _ := issue(t, dir, "adapter", ca)
	trusting := &tls.Config{RootCAs: x509.NewCertPool()}
	trusting.RootCAs.AddCert(ca.cert)
	for name, c := range map[string]struct {
		scheme string
		client *http.Client
		flags  []string
	}{
		"in clear": {"http://", &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, nil},
		"with TLS": {"https://", &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: trusting}},
			[]string{"--modules-tls-cert-file", cert, "--modules-tls-key-file", key}},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAdapter(t, append([]string{"--modules-addr", "127.0.0.1:0"}, c.flags...)...)
			bytes, err := os.ReadFile(probe)
			if err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(bytes)
			url := c.scheme + a.at.Modules + "/modules/" + hex.EncodeToString(sum[:]) + ".wasm"
			if status, _ := answerOf(t, c.client, url); status != http.StatusNotFound {
				t.Fatalf("status %d before a chain uses it", status)
			}
			doc := stamping(t, t.TempDir(), "stamp", "")
			a.cli("apply", "-f", doc).want(t, exitOK)
			if status, body := answerOf(t, c.client, url); status != http.StatusOK || body != string(bytes) {
				t.Errorf("status %d and %d bytes", status, len(body))
			}
			a.cli("remove", "-f", doc).want(t, exitOK)
			for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
				if status, _ := answerOf(t, c.client, url); status == http.StatusNotFound {
					break
				}
				if time.Now().After(deadline) {
					t.Fatal("it is served still")
				}
			}
			if status, _ := answerOf(t, c.client, c.scheme+a.at.Modules+"/metrics"); status != http.StatusNotFound {
				t.Errorf("the page is on the listener for modules: status %d", status)
			}
			_, metrics := answerOf(t, http.DefaultClient, "http://"+a.at.HTTP+"/metrics")
			http.DefaultClient.CloseIdleConnections()
			for _, line := range []string{`meshery_filters_module_requests_total{code="200"} `, `meshery_filters_module_requests_total{code="404"} `,
				`meshery_filters_connections_refused_total{listener="modulesAddr"} 0`, "meshery_filters_module_served_bytes_total "} {
				if !strings.Contains(metrics, line) {
					t.Errorf("no %q in:\n%s", line, metrics)
				}
			}
		})
	}
}
