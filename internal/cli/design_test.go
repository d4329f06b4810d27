package cli

import (
	"context"
	"fmt"
	"net/http"
	"slices"
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
	send      func(ctx context.Context, conn *grpc.ClientConn, remove bool, kubeconfigs, components []string) (string, error)
}

var designers = map[string]designer{
	"ProcessOAM": {
		func(kind, name, settings string) string {
			return fmt.Sprintf(`{"kind":"Component","apiVersion":"core.oam.dev/v1alpha2","metadata":{"name":%q,"namespace":"shop","creationTimestamp":null},"spec":{"type":%q,"settings":%s,"parameters":null}}`, name, kind, settings)
		},
		func(ctx context.Context, conn *grpc.ClientConn, remove bool, kubeconfigs, components []string) (string, error) {
			resp, err := meshes.NewMeshServiceClient(conn).ProcessOAM(ctx, &meshes.ProcessOAMRequest{Username: "meshery", DeleteOp: remove, OamComps: components,
				OamConfig: `{"metadata":{"creationTimestamp":null},"spec":{"Components":null}}`, KubeConfigs: kubeconfigs})
			return resp.GetMessage(), err
		},
	},
	"Provision": {
		func(kind, name, settings string) string {
			return fmt.Sprintf(`{"displayName":%q,"component":{"kind":%q,"version":"filters.meshery.io/v1alpha1"},"metadata":{"isAnnotation":false},"configuration":{"metadata":{"namespace":"shop"},%s}`, name, kind, strings.TrimPrefix(settings, "{"))
		},
		func(ctx context.Context, conn *grpc.ClientConn, remove bool, kubeconfigs, components []string) (string, error) {
			resp := &filterspb.ProvisionResponse{}
			err := conn.Invoke(ctx, "/meshes.MeshService/Provision", &filterspb.ProvisionRequest{Username: "meshery", DeleteOp: remove, Declarations: components, KubeConfigs: kubeconfigs}, resp)
			return resp.GetMessage(), err
		},
	},
}

// deploy has a design deployed or removed, and returns what the server would show of each component.
func (d designer) deploy(t *testing.T, conn *grpc.ClientConn, remove bool, kubeconfigs []string, design ...string) (lines []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	message, err := d.send(ctx, conn, remove, kubeconfigs, design)
	if err != nil {
		t.Fatalf("removal %v: %v", remove, err)
	}
	return strings.Split(message, "\n")
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
	kubeconfigs := []string{string(m.Kubeconfig(m.Token(wholeUser)))}
	hub := hubClient{t, sidecar.URL[strings.LastIndex(sidecar.URL, ":")+1:]}
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
	before := m.objects(t, "shop")
	for method, d := range designers {
		send := func(remove bool, components ...string) []string {
			t.Helper()
			return d.deploy(t, conn, remove, kubeconfigs, components...)
		}
		design := []string{
			d.component("WASMFilter", "hello", `{"mesh":"istio",`+onAPI+`,"module":{"builtin":"headers"},"config":"{\"response\":{\"x-hello\":\"design\"}}"}`),
			d.component("ImageHub", "hub", `{"rateLimit":true}`),
		}
		ran := make(chan error, 1)
		go func() { ran <- node.run(t.Context(), m.Mesh) }()
		lines := send(false, design...)
		if err := <-ran; err != nil {
			t.Fatal(err)
		}
		if len(lines) != 3 || !strings.HasPrefix(lines[0], "ImageHub hub: Image Hub runs at ") || !strings.Contains(lines[1], "shop/imagehub-rate-limit") ||
			!strings.HasPrefix(lines[2], "WASMFilter hello: shop/hello (sha256 ") || !strings.Contains(lines[2], "1 of 1 proxy") {
			t.Errorf("%s says\n%s", method, strings.Join(lines, "\n"))
		}
		ask("/", http.StatusOK, "design")
		ask("/pull", http.StatusUnauthorized, "design")
		hub.limited(hub.login("ada of "+method), "design")
		lines = send(true, design...)
		if len(lines) != 3 || !strings.HasPrefix(lines[0], "WASMFilter hello: shop/hello removed from ") || !strings.HasPrefix(lines[1], "ImageHub hub: shop/imagehub-rate-limit removed from ") ||
			!strings.HasPrefix(lines[2], "ImageHub hub: Image Hub removed from the namespace shop") {
			t.Errorf("%s says of the removal\n%s", method, strings.Join(lines, "\n"))
		}
		ask("/pull", http.StatusOK, "")
		if left := m.objects(t, "shop"); !slices.Equal(left, before) {
			t.Errorf("%s: there were %v, and are %v", method, before, left)
		}

		const config = `response:\n  x-hello: related\n`
		related := []string{
			d.component("WASMFilter", "headers", `{"module":{"builtin":"headers"},"config":"{\"response\": {\"x-hello\": \"related\"}}"}`),
			d.component("EnvoyFilter", "on-the-api", `{"workloadSelector":{"labels":{"app":"imagehub-api"}},"configPatches":[{"applyTo":"HTTP_FILTER","match":{"context":"SIDECAR_INBOUND"},`+
				`"patch":{"operation":"INSERT_BEFORE","value":"`+config+`"}}]}`),
		}
		if lines = send(false, related...); !strings.HasPrefix(lines[0], "EnvoyFilter on-the-api: shop/on-the-api (sha256 ") || len(lines) != 1 {
			t.Errorf("%s says of the relationship\n%s", method, strings.Join(lines, "\n"))
		}
		ask("/", http.StatusOK, "related")
		send(true, related...)
		ask("/", http.StatusOK, "")
	}
}

// objects are what a namespace has of all that the adapter may make.
func (m *istioMesh) objects(t *testing.T, namespace string) (all []string) {
	t.Helper()
	for _, path := range []string{"/api/v1/%s/secrets", "/api/v1/%s/configmaps", "/api/v1/%s/services", "/api/v1/%s/serviceaccounts", "/apis/apps/v1/%s/deployments",
		"/apis/networking.istio.io/v1/%s/gateways", "/apis/networking.istio.io/v1/%s/virtualservices", "/apis/networking.istio.io/v1alpha3/%s/envoyfilters",
		"/apis/extensions.istio.io/v1alpha1/%s/wasmplugins", "/apis/extensions.istio.io/v1alpha1/%s/trafficextensions"} {
		path = fmt.Sprintf(path, "namespaces/"+namespace)
		var list struct {
			Items []struct{ Metadata struct{ Name string } }
		}
		if err := m.Get(t.Context(), path, &list); err != nil {
			t.Fatal(err)
		}
		for _, o := range list.Items {
			all = append(all, path+"/"+o.Metadata.Name)
		}
	}
	return all
}
