package templates

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/template"

	"go.yaml.in/yaml/v3"
)

// ImageHub says what of Image Hub in a cluster is not as the files in imagehub have it. Nothing has a default.
type ImageHub struct {
	// APIImage and WebImage are the public images. Their tokens are not signed.
	APIImage, WebImage string
	// Image is this project's, which takes the place of both. Its tokens are signed.
	Image string
	// Host that the gateway answers for.
	Host string
	// LabelNamespace makes the namespace where it is missing, and has Istio put sidecars into all of its Pods. Consul is not
	// asked for those by a namespace.
	LabelNamespace bool
}

// GatewayAPI is the group of the Gateway API's kinds.
const GatewayAPI = "gateway.networking.k8s.io"

// Place is where Image Hub runs. All but Module must be set.
type Place struct {
	// Mesh that its sidecars are of: istio or consul.
	Mesh      string
	Namespace string
	// Gateway is the apiVersion of the Gateway to stand behind: Istio's, or the Gateway API's.
	Gateway string
	// Key is what tokens are signed with, without effect where they are not.
	Key string
	// Module of the limiter, which the Pods have on Consul.
	Module []byte
}

// words of the files.
type words struct {
	ImageHub
	Mesh       string
	Namespace  string
	Serves     string // apiVersion of the Gateway and its routes
	GatewayAPI bool
	Key        string // in base64
	Module     string // in base64
	ModuleName string // by its digest
}

// Objects are what an API has to keep so that Image Hub runs in a place, as JSON.
func (h ImageHub) Objects(at Place) ([]map[string]any, error) {
	sum := sha256.Sum256(at.Module)
	text, err := h.execute(at.Mesh, words{h, at.Mesh, at.Namespace, at.Gateway, strings.HasPrefix(at.Gateway, GatewayAPI+"/"),
		base64.StdEncoding.EncodeToString([]byte(at.Key)), base64.StdEncoding.EncodeToString(at.Module), hex.EncodeToString(sum[:]) + ".wasm"})
	if err != nil {
		return nil, err
	}
	var all []map[string]any
	for d := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var o map[string]any
		if err := d.Decode(&o); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, fmt.Errorf("read Image Hub's objects: %w", err)
		}
		meta := o["metadata"].(map[string]any)
		if o["kind"] != "Namespace" {
			meta["namespace"] = at.Namespace
			meta["labels"] = map[string]any{"app.kubernetes.io/managed-by": "meshery-filters", "app.kubernetes.io/part-of": "imagehub"}
		}
		all = append(all, o)
	}
}

// Limiter is the Filter document of the operation imagehub_rate_limit on it, in clusters with a mesh.
func (h ImageHub) Limiter(mesh string) (string, error) {
	text, err := h.execute("limiter-"+mesh, words{ImageHub: h})
	return string(text), err
}

func (h ImageHub) execute(name string, w words) ([]byte, error) {
	t, err := template.New(name+".yaml").Funcs(template.FuncMap{"q": func(s string) string { return fmt.Sprintf("%q", s) }}).
		ParseFS(files, "imagehub/parts.yaml", "imagehub/"+name+".yaml")
	if err != nil {
		return nil, fmt.Errorf("the program lacks a part of itself: %w", err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, w); err != nil {
		return nil, fmt.Errorf("write imagehub/%s.yaml: %w", name, err)
	}
	return out.Bytes(), nil
}
