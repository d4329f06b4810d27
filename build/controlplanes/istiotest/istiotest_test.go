package istiotest_test

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
)

func start(t *testing.T, o istiotest.Options) *istiotest.Mesh {
	t.Helper()
	if testing.Short() {
		t.Skip("starts a Kubernetes API server, istiod and Envoys")
	}
	m, err := istiotest.Start(t.Context(), t.TempDir(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("istiod's log ends:\n%s", m.Log())
		}
		m.Stop()
	})
	return m
}

func proxy(t *testing.T, m *istiotest.Mesh, o istiotest.ProxyOptions) *istiotest.Proxy {
	t.Helper()
	p, err := m.Proxy(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestRequestsPassASidecarAndAGateway(t *testing.T) {
	m := start(t, istiotest.Options{})
	for _, p := range []*istiotest.Proxy{
		proxy(t, m, istiotest.ProxyOptions{Namespace: "shop", Pod: "api-1", Labels: map[string]string{"app": "api"}}),
		proxy(t, m, istiotest.ProxyOptions{Namespace: "edge", Pod: "web-1", Labels: map[string]string{"istio": "web"}, Gateway: true}),
	} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		r, err := p.Get(ctx, "/hello")
		if err != nil || r.Status != http.StatusOK || r.Body != "GET /hello\n" || r.Header.Get("Server") != "istio-envoy" && r.Header.Get("Server") != "envoy" {
			t.Errorf("%s: %+v %v", p.Pod, r, err)
		}
	}
}
