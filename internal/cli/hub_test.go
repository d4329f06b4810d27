package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
	"github.com/meshery/meshery-filters/build/controlplanes/stack"
	"github.com/meshery/meshery-filters/internal/imagehub"
)

// hubNode does what a node would, in a cluster that has none: it runs the API of the Deployment, with the key from the
// Secret, as what the sidecar passes requests on to, and says that the Deployment's Pods run.
type hubNode struct {
	upstream *httptest.Server
	app      atomic.Pointer[imagehub.App]
}

func newHubNode(t *testing.T) *hubNode {
	n := &hubNode{}
	n.upstream = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if app := n.app.Load(); app != nil {
			app.ServeHTTP(w, r)
		} // before there is a program the sidecar waits for any answer
	}))
	t.Cleanup(n.upstream.Close)
	return n
}

// run waits for the Deployment, and runs it.
func (n *hubNode) run(ctx context.Context, m *istiotest.Mesh) error {
	const deployment = "/apis/apps/v1/namespaces/shop/deployments/imagehub-api"
	var o struct{ Metadata struct{ Generation int } }
	for m.Get(ctx, deployment, &o) != nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	var secret struct{ Data map[string][]byte }
	if err := m.Get(ctx, "/api/v1/namespaces/shop/secrets/imagehub", &secret); err != nil {
		return err
	}
	app, err := imagehub.New(imagehub.Options{Key: secret.Data["token-key"], Cost: 4})
	if err != nil {
		return err
	}
	n.app.Store(app)
	return m.Send(ctx, http.MethodPatch, deployment+"/status", map[string]any{"status": map[string]any{
		"observedGeneration": o.Metadata.Generation, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1, "availableReplicas": 1}})
}

// hubClient asks Image Hub by an ingress gateway's port, with a connection of its own each time.
type hubClient struct {
	t    *testing.T
	port string
}

func (c hubClient) ask(method, path, token, body string) (status int, text string, err error) {
	c.t.Helper()
	status, _, text, err = c.send(method, path, token, body)
	return status, text, err
}

func (c hubClient) send(method, path, token, body string) (status int, header http.Header, text string, err error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://127.0.0.1:"+c.port+path, strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	req.Host, req.Close = "imagehub.localhost", true
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return 0, nil, "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return resp.StatusCode, resp.Header, string(data), err
}

// pull is one with a token.
func (c hubClient) pull(token string) int {
	c.t.Helper()
	status, _, err := c.ask(http.MethodGet, "/pull", token, "")
	if err != nil {
		c.t.Fatal(err)
	}
	return status
}

// limited uses up the pulls of a Personal user; whatever is answered has the header x-hello.
func (c hubClient) limited(token, hello string) {
	c.t.Helper()
	for n := range 12 {
		want := http.StatusOK
		if n >= 10 {
			want = http.StatusTooManyRequests
		}
		status, header, _, err := c.send(http.MethodGet, "/pull", token, "")
		if err != nil || status != want || header.Get("X-Hello") != hello {
			c.t.Errorf("pull %d of a Personal user is answered with %d and x-hello %q, %v, and should be with %d and %q", n+1, status, header.Get("X-Hello"), err, want, hello)
		}
	}
}

// until asks for a pull without a token until the answer is as wanted: a gateway keeps connections to sidecars for a while,
// and these stay on the filters that they began with.
func (c hubClient) until(what string, wanted func(status int, err error) bool) {
	c.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		status, text, err := c.ask(http.MethodGet, "/pull", "", "")
		if wanted(status, err) {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("%s: the last answer is %d %s %v", what, status, text, err)
		}
	}
}

func answered(want int) func(int, error) bool {
	return func(status int, err error) bool { return err == nil && status == want }
}

func (c hubClient) login(user string) (token string) {
	c.t.Helper()
	body := fmt.Sprintf(`{"username": %q, "password": "a password", "plan": "Personal"}`, user)
	for _, path := range []string{"/signup", "/auth"} {
		status, text, err := c.ask(http.MethodPost, path, "", body)
		if err != nil || status != http.StatusOK {
			c.t.Fatalf("%s: %d %s %v", path, status, text, err)
		}
		var answer struct{ Token string }
		if err := json.Unmarshal([]byte(text), &answer); err != nil {
			c.t.Fatal(err)
		}
		token = answer.Token
	}
	return token
}

// TestImageHubAnswersThroughAnIngressGateway has what the adapter deploys looked at from where users are: in front of a real
// ingress gateway, behind which is the API with its sidecar.
func TestImageHubAnswersThroughAnIngressGateway(t *testing.T) {
	t.Run("of Istio", func(t *testing.T) {
		imageHubAnswers(t, startIstio(t), "istio", istiotest.Namespace, "istio-ingressgateway", "istio", "ingressgateway")
	})
	t.Run("of the Gateway API", func(t *testing.T) {
		imageHubAnswers(t, startIstio(t), "gateway-api", "shop", "imagehub-istio", "gateway.networking.k8s.io/gateway-name", "imagehub")
	})
}

// imageHubAnswers has an ingress gateway of that family, with a label, and a Service with its ports.
func imageHubAnswers(t *testing.T, m *istioMesh, family, namespace, service, label, value string) {
	node := newHubNode(t)
	sidecar := m.add(t, istiotest.ProxyOptions{Namespace: "shop", Pod: "imagehub-api-1", Labels: map[string]string{"app": "imagehub-api"},
		Upstream: node.upstream.Listener.Addr().String()})
	m.add(t, istiotest.ProxyOptions{Namespace: namespace, Pod: "ingress-1", Labels: map[string]string{label: value}, Gateway: true})
	ports, err := stack.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		// The gateway's port 80, which Image Hub's Gateway is for, is a free one of this machine.
		fmt.Sprintf(`{"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": %q, "name": %q},
			"spec": {"selector": {%q: %q}, "ports": [{"name": "http", "port": 80, "targetPort": %s}]}}`, namespace, service, label, value, ports[0]),
		// No node routes to Pods: the Service finds the sidecar by this.
		`{"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry", "metadata": {"namespace": "shop", "name": "imagehub-api-1"},
			"spec": {"address": "127.0.0.1", "labels": {"app": "imagehub-api"}, "ports": {"http": ` + sidecar.URL[strings.LastIndex(sidecar.URL, ":")+1:] + `}}}`,
	} {
		var o map[string]any
		if err := json.Unmarshal([]byte(text), &o); err != nil {
			t.Fatal(err)
		}
		if err := m.Apply(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	a := newAdapter(t, "--imagehub-image", "registry.example/meshery-filters:v1", "--imagehub-gateway", family)
	hub := func(operation string, more ...string) result {
		t.Helper()
		return a.cli(append([]string{"run", operation, "-n", "shop", "--kubeconfig", m.as(t, wholeUser)}, more...)...)
	}
	ran := make(chan error, 1)
	go func() { ran <- node.run(t.Context(), m.Mesh) }()
	deployed := hub("imagehub")
	if err := <-ran; err != nil {
		t.Fatal(err)
	}
	deployed.want(t, exitOK, "Deployment/shop/imagehub-api created", "Image Hub runs at http://imagehub.localhost/ from the namespace shop", "through Gateway shop/imagehub")
	c := hubClient{t, ports[0]}
	c.until("Image Hub answers, and nothing limits it", answered(http.StatusOK))
	if status, text, err := c.ask(http.MethodGet, "/", "", ""); err != nil || status != http.StatusOK || !strings.Contains(text, "<html") {
		t.Errorf("the page: %d %s %v", status, text, err)
	}
	token := c.login("ada")

	hub("imagehub_rate_limit").want(t, exitOK, "EnvoyFilter/shop/imagehub-rate-limit-imagehub-api-", "1 of 1 proxy")
	c.until("the limiter wants a token", answered(http.StatusUnauthorized))
	c.limited(token, "")
	forger, err := imagehub.New(imagehub.Options{Key: []byte("a key that somebody else has made up"), Cost: 4})
	if err != nil {
		t.Fatal(err)
	}
	if got := c.pull(forged(t, forger, "eve")); got != http.StatusUnauthorized {
		t.Errorf("a forged token is answered with %d", got)
	}

	hub("imagehub_rate_limit", "--delete").want(t, exitOK, "removed from")
	c.until("nothing limits it any more", answered(http.StatusOK))
	if got := c.pull(token); got != http.StatusOK {
		t.Errorf("without the limiter a pull is answered with %d", got)
	}
	hub("imagehub", "--delete").want(t, exitOK, "Image Hub removed from the namespace shop")
	c.until("the gateway does not listen for it any more", func(status int, err error) bool {
		return errors.Is(err, syscall.ECONNREFUSED)
	})
}

// forged is a token of a Personal user, signed by another Image Hub.
func forged(t *testing.T, app http.Handler, user string) string {
	t.Helper()
	body := fmt.Sprintf(`{"username": %q, "password": "a password", "plan": "Personal"}`, user)
	var answer struct{ Token string }
	for _, path := range []string{"/signup", "/auth"} {
		r := httptest.NewRequest(http.MethodPost, path, strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		app.ServeHTTP(w, r)
		if w.Code != http.StatusOK {
			t.Fatalf("%s: %d %s", path, w.Code, w.Body)
		}
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
			t.Fatal(err)
		}
	}
	return answer.Token
}
