// Package templates holds the files that the adapter hands out or applies: Image Hub's documents for each mesh, the roles
// that it needs in a Kubernetes cluster, and what runs it there.
package templates

import "embed"

//go:embed adapter imagehub rbac
var files embed.FS

// ImageHubLimiter is the Filter document of the operation imagehub_rate_limit on a mesh, or false where there is none. In a
// cluster it is the one for the public images.
func ImageHubLimiter(mesh string) (string, bool) {
	if mesh == "istio" {
		text, err := ImageHub{}.Limiter()
		return text, err == nil
	}
	b, err := files.ReadFile("imagehub/limiter-" + mesh + ".yaml")
	return string(b), err == nil
}

// RBAC is one set of roles as YAML documents: "base", to apply filters, "proof", to see that proxies run them, "secrets", to
// read the Secrets that filters refer to, which is bound to nobody, or "imagehub", to deploy Image Hub. It is false for any
// other name.
func RBAC(name string) (string, bool) {
	b, err := files.ReadFile("rbac/" + name + ".yaml")
	return string(b), err == nil
}
