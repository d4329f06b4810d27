package templates

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// Adapter says what of the manifests that run the adapter in a cluster is not as the files in adapter and rbac have it.
type Adapter struct {
	Namespace string // of the adapter. Default: meshery-filters
	Meshery   string // namespace of Meshery, whose Pods reach gRPC. Default: meshery
	Image     string
	// Storage is the size of the volume, such as 1Gi. Empty: there is none, and what the adapter keeps goes with its Pod.
	Storage string
	// Proof adds the roles that prove that proxies run a filter.
	Proof bool
}

var (
	namespaceForm = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	imageForm     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/:@-]{0,500}$`)
	storageForm   = regexp.MustCompile(`^[1-9][0-9]{0,5}(Mi|Gi|Ti)$`)
)

// Manifests writes everything that kubectl needs to run the adapter, in the order in which it has to be made.
func (a Adapter) Manifests() (string, error) {
	if a.Namespace == "" {
		a.Namespace = "meshery-filters"
	}
	if a.Meshery == "" {
		a.Meshery = "meshery"
	}
	for _, c := range []struct {
		form        *regexp.Regexp
		what, value string
	}{{namespaceForm, "a namespace's name", a.Namespace}, {namespaceForm, "a namespace's name", a.Meshery}, {imageForm, "an image's name", a.Image}} {
		if !c.form.MatchString(c.value) {
			return "", fmt.Errorf("%q is not %s", c.value, c.what)
		}
	}
	if a.Storage != "" && !storageForm.MatchString(a.Storage) {
		return "", fmt.Errorf("%q is not the size of a volume, such as 1Gi", a.Storage)
	}
	quoted := func(name string) string { // YAML takes some names for numbers, and others for true
		if name == "meshery-filters" || name == "meshery" {
			return name
		}
		return `"` + name + `"`
	}
	names := []string{"rbac/base"}
	if a.Proof {
		names = append(names, "rbac/proof")
	}
	names = append(names, "adapter/configmap")
	changes := []string{
		"kind: Namespace\nmetadata:\n  name: meshery-filters\n", "kind: Namespace\nmetadata:\n  name: " + quoted(a.Namespace) + "\n",
		"namespace: meshery-filters", "namespace: " + quoted(a.Namespace),
		"//meshery-filters.meshery-filters:", "//meshery-filters." + a.Namespace + ":",
		"kubernetes.io/metadata.name: meshery\n", "kubernetes.io/metadata.name: " + quoted(a.Meshery) + "\n",
		"image: meshery-filters\n", `image: "` + a.Image + "\"\n",
	}
	if a.Storage != "" {
		names = append(names, "adapter/claim")
		changes = append(changes, "storage: 1Gi", "storage: "+a.Storage)
	} else {
		changes = append(changes, "persistentVolumeClaim: {claimName: meshery-filters}", "emptyDir: {}")
	}
	names = append(names, "adapter/service", "adapter/networkpolicy", "adapter/deployment")
	var out strings.Builder
	for i, name := range names {
		text, err := files.ReadFile(name + ".yaml")
		if err != nil {
			return "", errors.Join(errors.New("the program lacks a part of itself"), err)
		}
		if i > 0 {
			out.WriteString("---\n")
		}
		out.Write(text)
	}
	return strings.NewReplacer(changes...).Replace(out.String()), nil
}
