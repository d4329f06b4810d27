// Package templates holds the files that the adapter hands out or applies: Image Hub's documents for each mesh, the roles
// that it needs in a Kubernetes cluster, and what runs it there.
package templates

import "embed"

//go:embed adapter imagehub rbac
var files embed.FS

// ImageHubLimiter is the Filter document of the operation imagehub_rate_limit on a mesh, or false where there is none.
func ImageHubLimiter(mesh string) (string, bool) {
	b, err := files.ReadFile("imagehub/" + mesh + ".yaml")
	return string(b), err == nil
}

// RBAC is one set of roles as YAML documents: "base", to apply filters, or "proof", to see that proxies run them. It is
// false for any other name.
func RBAC(name string) (string, bool) {
	b, err := files.ReadFile("rbac/" + name + ".yaml")
	return string(b), err == nil
}
