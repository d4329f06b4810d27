package k8stest_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
)

func TestTheServerIsOfThePinnedVersionKnowsItsUsersAndFinishesWhatIsDeleted(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a Kubernetes API server")
	}
	s, err := k8stest.Start(t.Context(), t.TempDir(), k8stest.Options{Users: []string{"nobody-yet"}, ControllerManager: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(s.CA) {
		t.Fatal("the authority is no certificate")
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	defer client.CloseIdleConnections()
	call := func(method, path, user, body string) (int, map[string]any) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, method, s.URL+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+s.Token(user))
		req.Header.Set("Content-Type", "application/json")
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		var answer map[string]any
		if err := json.Unmarshal(data, &answer); err != nil {
			t.Fatalf("%s %s: %v: %s", method, path, err, data)
		}
		return resp.StatusCode, answer
	}

	if code, v := call("GET", "/version", k8stest.Admin, ""); code != 200 || v["gitVersion"] != "v1.37.2" || v["minor"] != "37" {
		t.Errorf("version: %d %v", code, v)
	}
	if code, v := call("GET", "/api/v1/namespaces", "nobody-yet", ""); code != 403 {
		t.Errorf("a user without a role lists namespaces: %d %v", code, v)
	}
	if code, v := call("GET", "/api/v1/namespaces", "a stranger", ""); code != 403 {
		t.Errorf("without a token: %d %v", code, v)
	}
	if code, v := call("POST", "/api/v1/namespaces", k8stest.Admin, `{"metadata":{"name":"passing"}}`); code != 201 {
		t.Fatalf("create a namespace: %d %v", code, v)
	}
	if code, v := call("DELETE", "/api/v1/namespaces/passing", k8stest.Admin, ""); code != 200 {
		t.Fatalf("delete the namespace: %d %v", code, v)
	}
	deadline := time.Now().Add(2 * time.Minute)
	for {
		code, v := call("GET", "/api/v1/namespaces/passing", k8stest.Admin, "")
		if code == 404 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the namespace is still there: %d %v", code, v)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
