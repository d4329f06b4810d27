package consultest_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/consultest"
)

func TestRequestsPassTwoSidecars(t *testing.T) {
	if testing.Short() {
		t.Skip("starts Consul and Envoys")
	}
	ctx := t.Context()
	c, err := consultest.Start(ctx, t.TempDir(), consultest.Options{ACL: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("Consul's log ends:\n%s", c.Log())
		}
		c.Stop()
	})
	for _, entry := range []map[string]any{
		{"Kind": "service-defaults", "Name": "api", "Protocol": "http"},
		{"Kind": "service-intentions", "Name": "api", "Sources": []any{map[string]any{"Name": "web", "Action": "allow"}}},
	} {
		if err := c.Write(ctx, entry); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Service(ctx, consultest.ServiceOptions{Name: "api"}); err != nil {
		t.Fatal(err)
	}
	web, err := c.Service(ctx, consultest.ServiceOptions{Name: "web", Upstreams: []string{"api"}})
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; {
		r, err := web.Get(ctx, "api", "/hello")
		if err == nil && r.Status == http.StatusOK && r.Body == "GET /hello\n" && r.Header.Get("Server") == "envoy" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v %v", r, err)
		}
	}
}
