package cli

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/templates"
)

// newManifests makes `manifests`.
func newManifests(a *app) *cobra.Command {
	m := templates.Adapter{}
	clusters := ""
	cmd := &cobra.Command{
		Use:   "manifests",
		Short: "Write what runs the adapter in a Kubernetes cluster",
		Long: `Write what runs the adapter in a Kubernetes cluster, for kubectl: a namespace with the adapter's ServiceAccount and
roles, its configuration, a volume for what it keeps, a Service, a NetworkPolicy and a Deployment.

The Pod meets the restricted Pod Security Standard. Only Pods of Meshery's namespace reach its gRPC, where the cluster's
network enforces policies, and every Pod may fetch modules that chains use. It applies filters to the cluster that it
runs in, for callers with a client certificate or through kubectl port-forward; see docs/kubernetes.md for Meshery.`,
		Example: `  meshery-filters manifests --image registry.example/meshery-filters:v1 | kubectl apply -f -
  meshery-filters manifests --namespace filters --proof > adapter.yaml
  meshery-filters manifests --clusters kubeconfigs > adapter.yaml`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			if m.Storage == "none" {
				m.Storage = ""
			}
			switch clusters {
			case "own":
			case "kubeconfigs":
				m.Kubeconfigs = true
			default:
				return usage("--clusters is own or kubeconfigs, and not %q", clusters)
			}
			text, err := m.Manifests()
			if err != nil {
				return usage("%s", err)
			}
			return write(a.Out, []byte(text), "")
		},
	}
	f := cmd.Flags()
	f.StringVarP(&m.Namespace, "namespace", "n", "meshery-filters", "`namespace` that the adapter runs in, and keeps its inventories in")
	f.StringVar(&m.Image, "image", "meshery-filters:"+strings.ReplaceAll(a.build.Version, "+", "-"), "`image` to run, as `make image` writes it")
	f.StringVar(&m.Meshery, "meshery-namespace", "meshery", "`namespace` of Meshery")
	f.StringVar(&m.Storage, "storage", "1Gi", "`size` of the volume; none keeps nothing when the Pod is made anew")
	f.StringVar(&clusters, "clusters", "own", "`which` clusters are changed: own, by the Pod's ServiceAccount, or kubeconfigs, those that requests bring one of")
	f.BoolVar(&m.AllowUnauthenticated, "allow-unauthenticated", false, "let every Pod that reaches gRPC use the adapter's own rights, as Meshery needs with --clusters own")
	f.BoolVar(&m.Proof, "proof", false, "add the roles that prove that proxies run a filter: to find pods and reach their ports")
	f.StringSliceVar(&m.Secrets, "secrets", nil, "`namespaces` whose Secrets the adapter may read, for filters that refer to them")
	f.StringSliceVar(&m.Upstreams, "upstreams", nil, "`namespaces` whose Pods filters on Consul may give an upstream, which restarts them; the adapter may then change every Deployment there")
	f.BoolVar(&m.ImageHub, "imagehub", false, "add the role that deploys Image Hub, and so may run any image under its names")
	return cmd
}
