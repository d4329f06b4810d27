package cli

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// designer deploys designs as one generation of Meshery's servers does.
type designer struct {
	component func(kind, name, settings string) string
	send      func(ctx context.Context, conn *grpc.ClientConn, remove bool, kubeconfig string, components []string) (string, error)
}

var designers = map[string]designer{
	"ProcessOAM": {
		func(kind, name, settings string) string {
			return fmt.Sprintf(`{"kind":"Component","apiVersion":"core.oam.dev/v1alpha2","metadata":{"name":%q,"namespace":"shop","creationTimestamp":null},"spec":{"type":%q,"settings":%s,"parameters":null}}`, name, kind, settings)
		},
		func(ctx context.Context, conn *grpc.ClientConn, remove bool, kubeconfig string, components []string) (string, error) {
			resp, err := meshes.NewMeshServiceClient(conn).ProcessOAM(ctx, &meshes.ProcessOAMRequest{Username: "meshery", DeleteOp: remove, OamComps: components,
				OamConfig: `{"metadata":{"creationTimestamp":null},"spec":{"Components":null}}`, KubeConfigs: []string{kubeconfig}})
			return resp.GetMessage(), err
		},
	},
	"Provision": {
		func(kind, name, settings string) string {
			return fmt.Sprintf(`{"displayName":%q,"component":{"kind":%q,"version":"filters.meshery.io/v1alpha1"},"metadata":{"isAnnotation":false},"configuration":{"metadata":{"namespace":"shop"},%s}`, name, kind, strings.TrimPrefix(settings, "{"))
		},
		func(ctx context.Context, conn *grpc.ClientConn, remove bool, kubeconfig string, components []string) (string, error) {
			resp := &filterspb.ProvisionResponse{}
			err := conn.Invoke(ctx, "/meshes.MeshService/Provision", &filterspb.ProvisionRequest{Username: "meshery", DeleteOp: remove, Declarations: components, KubeConfigs: []string{kubeconfig}}, resp)
			return resp.GetMessage(), err
		},
	},
}

// dialDesigner connects to an adapter as a server does.
func dialDesigner(t *testing.T, a *adapter) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+a.at.GRPC, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// TestADesignIsDeployedToIstioAndUndeployed has Image Hub, its rate limit and a second filter come and go, with what
// istiod and the API's sidecar make of them; then a filter that an EnvoyFilter has from a WASMFilter, as Meshery's
// relationship writes it.
func TestADesignIsDeployedToIstioAndUndeployed(t *testing.T) {
	m, node := startIstio(t), newHubNode(t)
	sidecar := m.add(t, istiotest.ProxyOptions{Namespace: "shop", Pod: "imagehub-api-1", Labels: map[string]string{"app": "imagehub-api"},
		Upstream: node.upstream.Listener.Addr().String()})
	a := newAdapter(t, "--imagehub-image", "registry.example/meshery-filters:v1")
	conn := dialDesigner(t, a)
	kubeconfig := string(m.Kubeconfig(m.Token(wholeUser)))
	ask := func(path string, status int, hello string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		r, err := sidecar.Get(ctx, path)
		if err != nil || r.Status != status || r.Header.Get("X-Hello") != hello {
			t.Errorf("%s is answered %d with x-hello %q, %v; want %d with %q", path, r.Status, r.Header.Get("X-Hello"), err, status, hello)
		}
	}
	const onAPI = `"target":{"kind":"Workload","labels":{"app":"imagehub-api"}}`
	for method, d := range designers {
		send := func(remove bool, components ...string) string {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			message, err := d.send(ctx, conn, remove, kubeconfig, components)
			if err != nil {
				t.Fatalf("%s, removal %v: %v", method, remove, err)
			}
			return message
		}
		design := []string{
			d.component("WASMFilter", "hello", `{"mesh":"istio",`+onAPI+`,"module":{"builtin":"headers"},"config":"{\"response\":{\"x-hello\":\"design\"}}"}`),
			d.component("ImageHub", "hub", `{"rateLimit":true}`),
		}
		ran := make(chan error, 1)
		go func() { ran <- node.run(t.Context(), m.Mesh) }()
		message := send(false, design...)
		if err := <-ran; err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(message, "\n")
		if len(lines) != 3 || !strings.HasPrefix(lines[0], "ImageHub hub: Image Hub runs at ") || !strings.Contains(lines[1], "shop/imagehub-rate-limit") ||
			!strings.HasPrefix(lines[2], "WASMFilter hello: shop/hello (sha256 ") || !strings.Contains(lines[2], "1 of 1 proxy") {
			t.Errorf("%s says\n%s", method, message)
		}
		ask("/", http.StatusOK, "design")
		ask("/pull", http.StatusUnauthorized, "design")
		message = send(true, design...)
		if lines := strings.Split(message, "\n"); len(lines) != 3 || !strings.Contains(lines[0], "shop/hello removed") || !strings.Contains(lines[2], "removed") {
			t.Errorf("%s says of the removal\n%s", method, message)
		}
		ask("/pull", http.StatusOK, "")

		const config = `response:\n  x-hello: related\n`
		related := []string{
			d.component("WASMFilter", "headers", `{"module":{"builtin":"headers"},"config":"{\"response\": {\"x-hello\": \"related\"}}"}`),
			d.component("EnvoyFilter", "on-the-api", `{"workloadSelector":{"labels":{"app":"imagehub-api"}},"configPatches":[{"applyTo":"HTTP_FILTER","match":{"context":"SIDECAR_INBOUND"},`+
				`"patch":{"operation":"INSERT_BEFORE","value":"`+config+`"}}]}`),
		}
		if message = send(false, related...); !strings.HasPrefix(message, "EnvoyFilter on-the-api: shop/on-the-api (sha256 ") || strings.Contains(message, "\n") {
			t.Errorf("%s says of the relationship\n%s", method, message)
		}
		ask("/", http.StatusOK, "related")
		send(true, related...)
		ask("/", http.StatusOK, "")
	}
}
