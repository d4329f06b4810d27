// Package templates holds the files that the adapter hands out or applies: Image Hub's documents for each mesh, the forms and
// icons of its components in Meshery, the roles that it needs in a Kubernetes cluster, and what runs it there.
package templates

import (
	"embed"
	"fmt"
	"strings"
)

//go:embed adapter imagehub meshmodel rbac
var files embed.FS

// ImageHubLimiter is the Filter document of the operation imagehub_rate_limit on a mesh, or false where there is none. In a
// cluster it is the one for the public images; agent is Consul off Kubernetes.
func ImageHubLimiter(mesh string) (string, bool) {
	if mesh == "istio" || mesh == "consul" {
		text, err := ImageHub{}.Limiter(mesh)
		return text, err == nil
	}
	b, err := files.ReadFile("imagehub/limiter-" + mesh + ".yaml")
	return string(b), err == nil
}

// RBAC is one set of roles as YAML documents: "base", to apply filters, "proof", to see that proxies run them, "secrets", to
// read the Secrets that filters refer to, "upstreams", to give Pods an upstream of Consul's, which are bound to nobody, or
// "imagehub", to deploy Image Hub. It is false for any other name.
func RBAC(name string) (string, bool) {
	b, err := files.ReadFile("rbac/" + name + ".yaml")
	return string(b), err == nil
}

// Component is what Meshery shows of a component.
type Component struct {
	Schema          string // of its form, as JSON
	Icon, WhiteIcon string // SVG
}

// MeshmodelComponent is the component of a kind, such as WASMFilter.
func MeshmodelComponent(kind string) (c Component, err error) {
	base := "meshmodel/" + strings.ToLower(kind)
	for name, text := range map[string]*string{base + ".schema.json": &c.Schema, base + ".svg": &c.Icon, base + "-white.svg": &c.WhiteIcon} {
		b, err := files.ReadFile(name)
		if err != nil {
			return c, fmt.Errorf("the program lacks a part of itself: %w", err)
		}
		*text = strings.TrimSpace(string(b))
	}
	return c, nil
}
