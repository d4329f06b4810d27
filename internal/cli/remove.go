package cli

import (
	"cmp"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/filter"
)

// newRemove makes `remove`.
func newRemove(a *app) *cobra.Command {
	var files []string
	var w waiting
	cmd := &cobra.Command{
		Use:   "remove NAME|NAMESPACE/NAME...",
		Short: "Take filters out of the proxies that run them",
		Long: `Take filters out of the proxies that run them, and wait until the proxies have done so.

Filters are named, or read from documents of which only the names and the mesh count. The other filters of a chain stay
as they are. With --kubeconfig they are taken out of that cluster, and of plain Envoys unless documents name the mesh.`,
		Example: `  meshery-filters remove shop/rate-limit
  meshery-filters remove -n shop rate-limit audit
  meshery-filters remove -f filter.yaml
  meshery-filters remove shop/rate-limit --consul --config adapter.yaml --no-adapter`,
		ValidArgsFunction: a.completeFilters(true),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 && len(files) == 0 {
				return usage("say what to remove: a filter's name, or -f FILE")
			}
			docs, err := a.readDocuments(files, true)
			if err != nil {
				return err
			}
			for _, arg := range args {
				key, err := filter.ParseKey(arg, cmp.Or(a.namespace, "default"))
				if err != nil {
					return usageError{err}
				}
				docs = append(docs, filter.Document{Metadata: filter.Metadata{Name: key.Name, Namespace: key.Namespace}})
			}
			for i, d := range docs {
				docs[i] = filter.Document{APIVersion: filter.APIVersion, Kind: filter.Kind, Metadata: d.Metadata,
					Spec: filter.Spec{Mesh: d.Spec.Mesh, Wait: d.Spec.Wait, Rollout: d.Spec.Rollout}}
			}
			body, err := bodyOf(docs)
			if err != nil {
				return err
			}
			return a.start(cmd.Context(), w, &meshes.ApplyRuleRequest{OpName: "remove_filter", Namespace: a.namespace, CustomBody: body})
		},
	}
	filesFlag(cmd, &files)
	a.namespaceFlag(cmd, "namespace of names and documents without one (default: \"default\")")
	w.flags(cmd)
	w.cluster.flags(cmd, "whose mesh the filters are for; the adapter gets that one context of it")
	w.aloneFlag(cmd)
	a.outputFlag(cmd)
	a.adapterFlags(cmd)
	return cmd
}
