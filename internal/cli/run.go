package cli

import (
	"github.com/layer5io/meshery-adapter-library/meshes"
	"github.com/spf13/cobra"
)

// newRun makes `run`.
func newRun(a *app) *cobra.Command {
	var files []string
	var remove bool
	var w waiting
	cmd := &cobra.Command{
		Use:   "run OPERATION",
		Short: "Run any operation of the adapter's catalogue",
		Long: `Run any operation of the adapter's catalogue, as Meshery's buttons do, and wait until it ends.

"operations" lists them. --delete undoes an operation where it can be undone.`,
		Example: `  meshery-filters run imagehub
  meshery-filters run imagehub_rate_limit
  meshery-filters run imagehub_rate_limit --delete`,
		Args:              oneArg("say which operation to run; `meshery-filters operations` lists them"),
		ValidArgsFunction: a.completeOperations,
		RunE: func(cmd *cobra.Command, args []string) error {
			q := &meshes.ApplyRuleRequest{OpName: args[0], Namespace: a.namespace, DeleteOp: remove}
			if len(files) > 0 {
				docs, err := a.readDocuments(files, remove)
				if err != nil {
					return err
				}
				if q.CustomBody, err = bodyOf(docs); err != nil {
					return err
				}
			}
			return a.start(cmd.Context(), w, q)
		},
	}
	cmd.Flags().BoolVar(&remove, "delete", false, "undo the operation")
	filesFlag(cmd, &files)
	a.namespaceFlag(cmd, "namespace of documents that name none (default: \"default\")")
	w.flags(cmd)
	w.cluster.flags(cmd, "whose mesh the filters are for; the adapter gets that one context of it")
	a.outputFlag(cmd)
	a.adapterFlags(cmd)
	return cmd
}
