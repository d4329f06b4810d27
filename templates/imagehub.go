package templates

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/template"

	"go.yaml.in/yaml/v3"
)

// ImageHub says what of Image Hub in a cluster with Istio is not as imagehub/istio.yaml has it. Nothing has a default.
type ImageHub struct {
	// APIImage and WebImage are the public images. Their tokens are not signed.
	APIImage, WebImage string
	// Image is this project's, which takes the place of both. Its tokens are signed.
	Image string
	// Host that the gateway answers for.
	Host string
	// LabelNamespace makes the namespace where it is missing, and has Istio put sidecars into all of its Pods.
	LabelNamespace bool
}

// GatewayAPI is the group of the Gateway API's kinds.
const GatewayAPI = "gateway.networking.k8s.io"

// words of imagehub/istio.yaml.
type words struct {
	ImageHub
	Namespace  string
	Serves     string // apiVersion of the Gateway and its routes
	GatewayAPI bool
	Key        string // in base64
}

// Objects are what an API has to keep so that Image Hub runs in a namespace, as JSON. gateway is the apiVersion of the
// Gateway to stand behind, Istio's or the Gateway API's, and key is what tokens are signed with, without effect where they
// are not.
func (h ImageHub) Objects(namespace, gateway, key string) ([]map[string]any, error) {
	text, err := h.execute("istio", words{h, namespace, gateway, strings.HasPrefix(gateway, GatewayAPI+"/"), base64.StdEncoding.EncodeToString([]byte(key))})
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
			meta["namespace"] = namespace
			meta["labels"] = map[string]any{"app.kubernetes.io/managed-by": "meshery-filters", "app.kubernetes.io/part-of": "imagehub"}
		}
		all = append(all, o)
	}
}

// Limiter is the Filter document of the operation imagehub_rate_limit on it.
func (h ImageHub) Limiter() (string, error) {
	text, err := h.execute("limiter-istio", words{ImageHub: h})
	return string(text), err
}

func (h ImageHub) execute(name string, w words) ([]byte, error) {
	t, err := template.New(name+".yaml").Funcs(template.FuncMap{"q": func(s string) string { return fmt.Sprintf("%q", s) }}).
		ParseFS(files, "imagehub/"+name+".yaml")
	if err != nil {
		return nil, fmt.Errorf("the program lacks a part of itself: %w", err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, w); err != nil {
		return nil, fmt.Errorf("write imagehub/%s.yaml: %w", name, err)
	}
	return out.Bytes(), nil
}
