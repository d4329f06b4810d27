package consultest

import (
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
)

func TestASidecarReachesAServiceOutsideByTLSOfTheGateway(t *testing.T) {
	ctx := t.Context()
	c, err := Start(ctx, filepath.Join(t.TempDir(), "consul"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Stop()
	outside := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "by TLS: ", r.TLS != nil) }))
	defer outside.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: outside.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Outside(ctx, "author", outside.Listener.Addr().String(), ca, "example.com"); err != nil {
		t.Fatal(err)
	}
	web, err := c.Service(ctx, ServiceOptions{Name: "web", Upstreams: []string{"author"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := web.Reaches(ctx, "author", "/"); err != nil {
		t.Fatal(err)
	}
	if r, err := web.Get(ctx, "author", "/"); err != nil || r.Body != "by TLS: true" {
		t.Errorf("%q %v", r.Body, err)
	}
}
