package templates

import (
	"bytes"
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
	// Kubeconfigs has the adapter change the clusters that requests bring kubeconfigs of, and no other: it gets neither
	// roles nor a token.
	Kubeconfigs bool
	// Proof adds the roles that prove that proxies run a filter. Kubeconfigs goes without them.
	Proof bool
	// ImageHub adds the role that deploys Image Hub. Kubeconfigs goes without it.
	ImageHub bool
	// Secrets are namespaces whose Secrets filters may refer to. Kubeconfigs goes without them.
	Secrets []string
	// Upstreams are namespaces whose Pods filters on Consul may give an upstream, which restarts them. Kubeconfigs goes
	// without them.
	Upstreams []string
	// AllowUnauthenticated lets callers without a certificate use the adapter's own rights.
	AllowUnauthenticated bool
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
	if a.Proof && a.Kubeconfigs {
		return "", errors.New("the roles that prove something are for the user of a kubeconfig then; templates/rbac/proof.yaml has them")
	}
	if a.ImageHub && a.Kubeconfigs {
		return "", errors.New("the role that deploys Image Hub is for the user of a kubeconfig then; templates/rbac/imagehub.yaml has it")
	}
	if len(a.Secrets) > 0 && a.Kubeconfigs {
		return "", errors.New("the role that reads Secrets is for the user of a kubeconfig then; templates/rbac/secrets.yaml has it")
	}
	if len(a.Upstreams) > 0 && a.Kubeconfigs {
		return "", errors.New("the role that gives Pods upstreams is for the user of a kubeconfig then; templates/rbac/upstreams.yaml has it")
	}
	names := []string{"rbac/base"}
	if a.Proof {
		names = append(names, "rbac/proof")
	}
	if a.ImageHub {
		names = append(names, "rbac/imagehub")
	}
	var bound []string // namespaces of the parts that are there once for each
	for _, role := range []struct {
		name       string
		namespaces []string
	}{{"secrets", a.Secrets}, {"upstreams", a.Upstreams}} {
		if len(role.namespaces) > 0 {
			names = append(names, "rbac/"+role.name)
		}
		for _, ns := range role.namespaces {
			if !namespaceForm.MatchString(ns) {
				return "", fmt.Errorf("%q is not a namespace's name", ns)
			}
			names, bound = append(names, "adapter/"+role.name), append(bound, ns)
		}
	}
	names = append(names, "adapter/configmap")
	changes := []string{
		"kind: Namespace\nmetadata:\n  name: meshery-filters\n", "kind: Namespace\nmetadata:\n  name: " + quoted(a.Namespace) + "\n",
		"namespace: meshery-filters", "namespace: " + quoted(a.Namespace),
		"//meshery-filters.meshery-filters:", "//meshery-filters." + a.Namespace + ":",
		"adapterAddr: meshery-filters.meshery-filters:", "adapterAddr: meshery-filters." + a.Namespace + ":",
		"//meshery.meshery:", "//meshery." + a.Meshery + ":",
		"kubernetes.io/metadata.name: meshery\n", "kubernetes.io/metadata.name: " + quoted(a.Meshery) + "\n",
		"image: meshery-filters\n", `image: "` + a.Image + "\"\n",
	}
	if a.Namespace != "meshery-filters" {
		// Another adapter in the cluster has roles and bindings of its own, and takes none away with it.
		for _, role := range []string{"base", "proof", "imagehub", "secrets", "upstreams"} {
			changes = append(changes, "name: meshery-filters-"+role, "name: meshery-filters-"+role+"-"+a.Namespace)
		}
	}
	if a.Storage != "" {
		names = append(names, "adapter/claim")
		changes = append(changes, "storage: 1Gi", "storage: "+a.Storage)
	} else {
		changes = append(changes, "persistentVolumeClaim: {claimName: meshery-filters}", "emptyDir: {}")
	}
	if a.Kubeconfigs {
		changes = append(changes, "clusters: own\n", "clusters: kubeconfigs\n",
			"serviceAccountName: meshery-filters\n", "serviceAccountName: meshery-filters\n      automountServiceAccountToken: false\n")
	}
	if a.AllowUnauthenticated {
		changes = append(changes, "allowUnauthenticated: false", "allowUnauthenticated: true")
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
		} else if a.Kubeconfigs {
			text = accountOnly(text)
		}
		if name == "adapter/secrets" || name == "adapter/upstreams" {
			text = bytes.Replace(text, []byte("NAMESPACE"), []byte(quoted(bound[0])), 1)
			bound = bound[1:]
		}
		out.Write(text)
	}
	return strings.NewReplacer(changes...).Replace(out.String()), nil
}

// accountOnly leaves the namespace and the ServiceAccount of rbac/base.yaml, which come first, without what is said of the
// roles.
func accountOnly(base []byte) []byte {
	documents := bytes.SplitAfterN(base, []byte("\n---\n"), 3)
	text := append(documents[0], bytes.TrimSuffix(documents[1], []byte("---\n"))...)
	return text[bytes.Index(text, []byte("apiVersion:")):]
}
