package cli

import (
	"io"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/oam"
)

// newExplain makes `explain`.
func newExplain(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "explain [PATH]",
		Short: "Explain the Filter document, or one field of it",
		Long: `Explain the Filter document, or one field of it and what is below: what it is for, which values it takes and what holds
when it is left out.`,
		Example: `  meshery-filters explain
  meshery-filters explain spec.module
  meshery-filters explain spec.failurePolicy`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: completeFields,
		RunE: func(_ *cobra.Command, args []string) error {
			path := ""
			if len(args) > 0 {
				path = args[0]
			}
			text, err := oam.Explain(path)
			if err != nil {
				return usageError{err}
			}
			_, err = io.WriteString(a.Out, text)
			return err
		},
	}
}
