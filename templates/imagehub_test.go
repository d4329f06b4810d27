package templates

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"go.yaml.in/yaml/v3"
)

var update = flag.Bool("update", false, "write the golden files anew")

const hubKey = "a key of forty characters, as they come."

// hubs are Image Hub as a configuration can have it.
var hubs = map[string]struct {
	hub           ImageHub
	mesh, gateway string
}{
	"istio":           {ImageHub{APIImage: "layer5/image-hub-api:latest", WebImage: "layer5/image-hub-web:latest", Host: "imagehub.localhost"}, "istio", "networking.istio.io/v1"},
	"gateway-api":     {ImageHub{APIImage: "layer5/image-hub-api:latest", WebImage: "layer5/image-hub-web:latest", Host: "imagehub.localhost"}, "istio", "gateway.networking.k8s.io/v1"},
	"own-image":       {ImageHub{Image: "registry.example/meshery-filters:v1", Host: "hub.example.com", LabelNamespace: true}, "istio", "networking.istio.io/v1"},
	"consul":          {ImageHub{APIImage: "layer5/image-hub-api:latest", WebImage: "layer5/image-hub-web:latest", Host: "imagehub.localhost"}, "consul", "gateway.networking.k8s.io/v1beta1"},
	"consul-own":      {ImageHub{Image: "registry.example/meshery-filters:v1", Host: "hub.example.com", LabelNamespace: true}, "consul", "gateway.networking.k8s.io/v1"},
	"own-gateway-api": {ImageHub{Image: "registry.example/meshery-filters:v1", Host: "hub.example.com"}, "istio", "gateway.networking.k8s.io/v1"},
}

func TestImageHubsObjectsAreTheGoldenOnes(t *testing.T) {
	for name, h := range hubs {
		objects, err := h.hub.Objects(Place{Mesh: h.mesh, Namespace: "shop", Gateway: h.gateway, Key: hubKey, Module: []byte("\x00asm")})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var out bytes.Buffer
		e := yaml.NewEncoder(&out)
		e.SetIndent(2)
		for _, o := range objects {
			if err := e.Encode(o); err != nil {
				t.Fatal(err)
			}
		}
		limiter, err := h.hub.Limiter(h.mesh)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name+".yaml", out.Bytes())
		golden(t, name+"-limiter.yaml", []byte(limiter))
	}
	files, err := filepath.Glob("testdata/imagehub/*")
	if err != nil || len(files) != 2*len(hubs) {
		t.Errorf("%d golden files, for %d cases: %v", len(files), len(hubs), err)
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", "imagehub", name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; if that is meant: go test ./templates -update\n%s", path, got)
	}
}

func TestANameThatYAMLTakesForANumberStaysAName(t *testing.T) {
	objects, err := ImageHub{APIImage: "a", WebImage: "b", Host: "1.2", LabelNamespace: true}.Objects(Place{Mesh: "istio", Namespace: "123", Gateway: "networking.istio.io/v1"})
	if err != nil {
		t.Fatal(err)
	}
	if name := objects[0]["metadata"].(map[string]any)["name"]; name != "123" {
		t.Errorf("the namespace is %#v", name)
	}
}
