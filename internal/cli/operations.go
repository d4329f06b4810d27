package cli

import (
	"io"
	"strings"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"github.com/spf13/cobra"
)

// newOperations makes `operations`.
func newOperations(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "operations",
		Short:   "List what the adapter can be asked to do",
		Long:    `List what the adapter can be asked to do, from Meshery or with "run".`,
		Example: `  meshery-filters operations -o json`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.dial()
			if err != nil {
				return err
			}
			defer c.close()
			resp, err := call(cmd.Context(), c, callTimeout, c.meshes.SupportedOperations, &meshes.SupportedOperationsRequest{})
			if err != nil {
				return err
			}
			return a.printOperations(resp.GetOps())
		},
	}
	a.outputFlag(cmd)
	a.adapterFlags(cmd)
	return cmd
}

func (a *app) printOperations(ops []*meshes.SupportedOperation) error {
	type row struct {
		Key         string `json:"key"`
		Category    string `json:"category"`
		Description string `json:"description"`
	}
	out := struct {
		Operations []row `json:"operations"`
	}{[]row{}}
	for _, o := range ops {
		out.Operations = append(out.Operations, row{o.GetKey(), strings.ToLower(o.GetCategory().String()), o.GetValue()})
	}
	return a.print(out, func(w io.Writer) error {
		var rows [][]string
		for _, r := range out.Operations {
			rows = append(rows, []string{r.Key, r.Category, r.Description})
		}
		return table(w, []string{"OPERATION", "CATEGORY", "DESCRIPTION"}, rows)
	})
}
