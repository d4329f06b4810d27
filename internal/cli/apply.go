package cli

import (
	"github.com/layer5io/meshery-adapter-library/meshes"
	"github.com/spf13/cobra"
)

// newApply makes `apply`.
func newApply(a *app) *cobra.Command {
	var files []string
	var w waiting
	cmd := &cobra.Command{
		Use:   "apply -f FILE",
		Short: "Load the filters of a document into the proxies of their targets",
		Long: `Load the filters of a document into the proxies of their targets, and wait until the proxies run them.

The adapter runs each module with its configuration in a sandbox first; a filter that refuses its configuration reaches
no proxy. When a proxy rejects the new chain, the one before is put back. Applying a filter again changes it in place.

Filters of a mesh in Kubernetes, such as Istio, go to the cluster that --kubeconfig names; an adapter that is configured
with "clusters: own" needs none.

A document with module.file names a file beside the document; its bytes are sent along. Progress goes to standard error
and the result to standard output; with -o json or yaml every event is one line or document there.`,
		Example: `  meshery-filters apply -f filter.yaml
  meshery-filters apply -f headers.yaml -f limits.yaml --timeout 1m
  meshery-filters apply -f istio.yaml --kubeconfig ~/.kube/config --context staging
  meshery-filters apply -f istio.yaml --kubeconfig ~/.kube/config --no-adapter
  meshery-filters apply -f consul.yaml --consul --config adapter.yaml --no-adapter
  sed s/edge/canary/ filter.yaml | meshery-filters apply -f -`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(files) == 0 {
				return usage("say what to apply with -f FILE")
			}
			docs, err := a.readDocuments(files, false)
			if err != nil {
				return err
			}
			body, err := bodyOf(docs)
			if err != nil {
				return err
			}
			return a.start(cmd.Context(), w, &meshes.ApplyRuleRequest{OpName: "apply_filter", Namespace: a.namespace, CustomBody: body})
		},
	}
	filesFlag(cmd, &files)
	a.namespaceFlag(cmd, "namespace of documents that name none (default: \"default\")")
	w.flags(cmd)
	w.cluster.flags(cmd, "whose mesh the filters are for; the adapter gets that one context of it")
	w.aloneFlag(cmd)
	a.servedFlag(cmd)
	a.outputFlag(cmd)
	a.adapterFlags(cmd)
	return cmd
}
