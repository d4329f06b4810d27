package cli

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/meshery/meshery-filters/config"
)

// manifests are the objects that the command writes.
func manifests(t *testing.T, flags ...string) (text string, objects []*unstructured.Unstructured) {
	t.Helper()
	text = run(t, append([]string{"manifests"}, flags...)...).want(t, exitOK).out
	for d := yaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096); ; {
		o := &unstructured.Unstructured{}
		err := d.Decode(&o.Object)
		if errors.Is(err, io.EOF) {
			return text, objects
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		if o.Object != nil {
			objects = append(objects, o)
		}
	}
}

// manifestCases are the flags by the name of their golden.
var manifestCases = map[string][]string{
	"default.yaml": {"--image", "meshery-filters:v1"},
	"everything-set.yaml": {"--namespace", "y", "--image", "registry.example:5000/a/filters@sha256:" + strings.Repeat("0a", 32), "--proof", "--imagehub", "--secrets", "shop,1e3", "--upstreams", "shop",
		"--meshery-namespace", "123", "--storage", "20Gi", "--allow-unauthenticated"},
	"nothing-kept.yaml": {"--image", "meshery-filters:v1", "--storage", "none"},
	"kubeconfigs.yaml":  {"--image", "meshery-filters:v1", "--clusters", "kubeconfigs"},
}

func TestManifestsAreGolden(t *testing.T) {
	want := map[string]string{}
	for name, flags := range manifestCases {
		want[name], _ = manifests(t, flags...)
	}
	golden(t, "manifests", want)
	for _, flags := range [][]string{{"--namespace", "A"}, {"--namespace", "a b"}, {"--image", "x\ny: z"}, {"--image", "a b"}, {"--image", `a"`},
		{"--storage", "much"}, {"--clusters", "all"}, {"--clusters", "kubeconfigs", "--proof"}, {"--clusters", "kubeconfigs", "--imagehub"}, {"--clusters", "kubeconfigs", "--secrets", "shop"}, {"--clusters", "kubeconfigs", "--upstreams", "shop"}, {"--secrets", "A"}, {"--upstreams", "A"}, {"--storage", "1Gi\n"}, {"--meshery-namespace", "-"}} {
		run(t, append([]string{"manifests"}, flags...)...).want(t, exitUsage, flags[1][:1])
	}
}

func TestAnAPIServerTakesTheManifestsWhereOnlyRestrictedPodsMayBe(t *testing.T) {
	c := newCluster(t)
	for name, flags := range manifestCases {
		t.Run(name, func(t *testing.T) {
			_, objects := manifests(t, flags...)
			for _, o := range objects {
				kind, ns := o.GetKind(), o.GetNamespace()
				path := "/api/v1"
				if o.GetAPIVersion() != "v1" {
					path = "/apis/" + o.GetAPIVersion()
				}
				if ns != "" {
					path += "/namespaces/" + ns
				}
				plural := strings.ToLower(kind) + "s"
				if kind == "NetworkPolicy" {
					plural = "networkpolicies"
				}
				path += "/" + plural
				if kind == "Namespace" {
					o.SetLabels(map[string]string{"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/enforce-version": "latest"})
				}
				if kind == "RoleBinding" { // one for Secrets is in a namespace of others
					c.do(t, "POST", "/api/v1/namespaces", map[string]any{"metadata": map[string]any{"name": ns}})
				}
				// Cases share the namespace and what is outside of it.
				if code := c.do(t, "POST", path+"?fieldValidation=Strict", o.Object); code != http.StatusCreated && code != http.StatusConflict {
					t.Errorf("%s %s: %d", kind, o.GetName(), code)
				}
				if kind != "Deployment" {
					continue
				}
				template, _, _ := unstructured.NestedMap(o.Object, "spec", "template")
				pod := func(name string) *unstructured.Unstructured {
					p := &unstructured.Unstructured{Object: (&unstructured.Unstructured{Object: template}).DeepCopy().Object}
					p.SetAPIVersion("v1")
					p.SetKind("Pod")
					p.SetName(name)
					return p
				}
				pods := "/api/v1/namespaces/" + ns + "/pods?fieldValidation=Strict&dryRun=All"
				if code := c.do(t, "POST", pods, pod("adapter").Object); code != http.StatusCreated {
					t.Errorf("the Deployment's Pod: %d", code)
				}
				// That the namespace refuses what is not restricted makes the answer above worth something.
				for _, field := range []string{"allowPrivilegeEscalation", "capabilities"} {
					loose := pod("loose")
					containers, _, _ := unstructured.NestedSlice(loose.Object, "spec", "containers")
					unstructured.RemoveNestedField(containers[0].(map[string]any), "securityContext", field)
					_ = unstructured.SetNestedSlice(loose.Object, containers, "spec", "containers")
					if code := c.do(t, "POST", pods, loose.Object); code != http.StatusForbidden {
						t.Errorf("a Pod without %s: %d", field, code)
					}
				}
			}
		})
	}
}

func TestTheManifestsPartsFitTogether(t *testing.T) {
	for name, flags := range manifestCases {
		t.Run(name, func(t *testing.T) {
			_, objects := manifests(t, flags...)
			find := func(kind string) map[string]any {
				t.Helper()
				for _, o := range objects {
					if o.GetKind() == kind {
						return o.Object
					}
				}
				t.Fatalf("there is no %s", kind)
				return nil
			}
			ns := (&unstructured.Unstructured{Object: find("Namespace")}).GetName()
			for _, o := range objects {
				bound := o.GetKind() == "RoleBinding" && o.GetNamespace() == "shop" || o.GetNamespace() == "1e3"
				if n := o.GetNamespace(); n != "" && n != ns && !bound {
					t.Errorf("%s %s is in %s", o.GetKind(), o.GetName(), n)
				}
				subjects, _, _ := unstructured.NestedSlice(o.Object, "subjects")
				for _, s := range subjects {
					if s.(map[string]any)["namespace"] != ns {
						t.Errorf("%s %s is for %v", o.GetKind(), o.GetName(), s)
					}
				}
			}
			text, _, _ := unstructured.NestedString(find("ConfigMap"), "data", "adapter.yaml")
			file := filepath.Join(t.TempDir(), "adapter.yaml")
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			c, err := config.Load(file, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			// Whoever has rights of its own gets its token, and nobody else.
			auto, set, _ := unstructured.NestedBool(find("Deployment"), "spec", "template", "spec", "automountServiceAccountToken")
			roles := slices.ContainsFunc(objects, func(o *unstructured.Unstructured) bool { return strings.HasSuffix(o.GetKind(), "RoleBinding") })
			if own := c.Clusters == "own"; own != roles || own != (!set || auto) {
				t.Errorf("clusters: %s; roles: %v, a token: %v", c.Clusters, roles, !set || auto)
			}
			if want := "http://meshery-filters." + ns + ":10018"; c.ModulesURL != want {
				t.Errorf("proxies are sent to %s and not %s", c.ModulesURL, want)
			}
			pod, _, _ := unstructured.NestedMap(find("Deployment"), "spec", "template", "spec")
			container := pod["containers"].([]any)[0].(map[string]any)
			ports := map[string]string{}
			for _, p := range container["ports"].([]any) {
				p := p.(map[string]any)
				ports[p["name"].(string)] = fmt.Sprint(p["containerPort"])
			}
			for name, addr := range map[string]string{"grpc": c.GRPCAddr, "http": c.HTTPAddr, "modules": c.ModulesAddr} {
				if _, port, _ := net.SplitHostPort(addr); ports[name] != port {
					t.Errorf("the container's port %s is %s, and the adapter listens at %s", name, ports[name], addr)
				}
			}
			served, _, _ := unstructured.NestedSlice(find("Service"), "spec", "ports")
			for _, p := range served {
				p := p.(map[string]any)
				if ports[p["targetPort"].(string)] != fmt.Sprint(p["port"]) {
					t.Errorf("the Service's port %v is none of the container's %v", p, ports)
				}
			}
			mounted := false
			for _, m := range container["volumeMounts"].([]any) {
				at, _ := m.(map[string]any)["mountPath"].(string)
				mounted = mounted || strings.HasPrefix(c.StateDir, at+"/")
			}
			if !mounted {
				t.Errorf("no volume is mounted for %s", c.StateDir)
			}
		})
	}
}
