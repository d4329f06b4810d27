package browser

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/build/controlplanes/consultest"
	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/imagehub"
	"github.com/meshery/meshery-filters/templates"
)

// hubOnConsul is a cluster with Consul where the sidecars of imagehub-api and of a gateway run.
type hubOnConsul struct {
	*consultest.Cluster
	gateway *consultest.Service
	app     atomic.Pointer[imagehub.App]
}

func newHubOnConsul(t *testing.T) *hubOnConsul {
	t.Helper()
	ctx := t.Context()
	c, err := consultest.StartCluster(ctx, t.TempDir(), k8stest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	h := &hubOnConsul{Cluster: c}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("Consul's log ends:\n%s", c.Consul.Log())
		}
		c.Stop()
	})
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", "sigs.k8s.io/gateway-api")
	cmd.Dir = "../controlplanes/istio"
	out, err := cmd.Output()
	var module struct{ Dir string }
	if err == nil {
		err = json.Unmarshal(out, &module)
	}
	if err != nil {
		t.Fatalf("find the Gateway API's kinds: %v: %s", err, out)
	}
	for _, kind := range []string{"gateways", "httproutes"} {
		text, err := os.ReadFile(filepath.Join(module.Dir, "config", "crd", "standard", "gateway.networking.k8s.io_"+kind+".yaml"))
		var crd map[string]any
		if err == nil {
			err = yaml.Unmarshal(text, &crd)
		}
		if err == nil {
			err = c.Send(ctx, http.MethodPost, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd)
		}
		for deadline := time.Now().Add(patience); err == nil && c.Send(ctx, http.MethodGet, "/apis/gateway.networking.k8s.io/v1/"+kind, nil) != nil; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s are not served", kind)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	api, err := c.Consul.Service(ctx, consultest.ServiceOptions{Name: "imagehub-api", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if app := h.app.Load(); app != nil {
			app.ServeHTTP(w, r)
		}
	})})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Pod(ctx, "shop", "imagehub-api-1", map[string]string{"app": "imagehub-api"}, api); err != nil {
		t.Fatal(err)
	}
	// It has the gateway's name, which intentions let in.
	if h.gateway, err = c.Consul.Service(ctx, consultest.ServiceOptions{Name: "imagehub", Upstreams: []string{"imagehub-api"}}); err != nil {
		t.Fatal(err)
	}
	return h
}

// node does what one would with the Deployment: it runs the API with the key from the Secret, and says so.
func (h *hubOnConsul) node(ctx context.Context) error {
	const deployment = "/apis/apps/v1/namespaces/shop/deployments/imagehub-api"
	var o struct{ Metadata struct{ Generation int } }
	for h.Get(ctx, deployment, &o) != nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	var secret struct{ Data map[string][]byte }
	if err := h.Get(ctx, "/api/v1/namespaces/shop/secrets/imagehub", &secret); err != nil {
		return err
	}
	app, err := imagehub.New(imagehub.Options{Key: secret.Data["token-key"], Cost: 4})
	if err != nil {
		return err
	}
	h.app.Store(app)
	return h.Send(ctx, http.MethodPatch, deployment+"/status", map[string]any{"status": map[string]any{
		"observedGeneration": o.Metadata.Generation, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1, "availableReplicas": 1}})
}

// settled asks until all answers are as wanted: connections between sidecars that were open before a change are closed with
// one more request, which meets the filters that the connection began with.
func (h *hubOnConsul) settled(t *testing.T, path string, want int) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		var others atomic.Int32
		var g sync.WaitGroup
		for range 10 {
			g.Go(func() {
				if r, err := h.gateway.Get(t.Context(), "imagehub-api", path); err != nil || r.Status != want {
					others.Add(1)
				}
			})
		}
		if g.Wait(); others.Load() == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is not answered with %d", path, want)
		}
	}
}

func TestAnImageHubUserMeetsTheLimitThroughSidecarsOfConsul(t *testing.T) {
	t.Parallel()
	h := newHubOnConsul(t)
	module, _ := filters.Builtin("ratelimit")
	sum := sha256.Sum256(module)
	dir := t.TempDir()
	config := filepath.Join(dir, "config")
	for file, data := range map[string][]byte{config: h.Kubeconfig(h.Token(k8stest.Admin)), filepath.Join(dir, hex.EncodeToString(sum[:])+".wasm"): module} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a := newAdapter(t, "--imagehub-image", "registry.example/meshery-filters:v1")
	shop := []string{"--namespace", "shop", "--kubeconfig", config}
	ran := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	go func() { ran <- h.node(ctx) }()
	out := a.command("", append([]string{"run", "imagehub"}, shop...)...)
	if err := <-ran; err != nil || !strings.Contains(out, "Image Hub runs at http://imagehub.localhost:8080/") {
		t.Fatalf("%v\n%s", err, out)
	}
	h.settled(t, "/healthz", http.StatusOK)

	// What Pods have as a volume at /meshery-filters is in a folder of this machine.
	limiter, err := templates.ImageHub{Image: "set"}.Limiter("consul")
	if err != nil {
		t.Fatal(err)
	}
	limiter = strings.Replace(limiter, "/meshery-filters}", dir+"}", 1)
	b := newTab(t)
	b.pullAndUpgrade(strings.TrimPrefix(h.gateway.Upstreams["imagehub-api"], "http://"), func() {
		if out := a.command(limiter, append([]string{"apply", "-f", "-"}, shop...)...); !strings.Contains(out, "runs on Service shop/imagehub-api (1 of 1 proxy)") {
			t.Errorf("it says\n%s", out)
		}
		h.settled(t, "/pull", http.StatusUnauthorized)
	}, func() {
		a.command("", append([]string{"run", "imagehub_rate_limit", "--delete"}, shop...)...)
		h.settled(t, "/pull", http.StatusOK)
	})
	b.clean("401", "429")
}
