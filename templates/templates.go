// Package templates holds the files that the adapter hands out or applies: Image Hub's documents for each mesh.
package templates

import "embed"

//go:embed imagehub
var files embed.FS

// ImageHubLimiter is the Filter document of the operation imagehub_rate_limit on a mesh, or false where there is none.
func ImageHubLimiter(mesh string) (string, bool) {
	b, err := files.ReadFile("imagehub/" + mesh + ".yaml")
	return string(b), err == nil
}
