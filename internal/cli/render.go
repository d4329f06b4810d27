package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// newRender makes `render`.
func newRender(a *app) *cobra.Command {
	var files []string
	var remove bool
	cmd := &cobra.Command{
		Use:   "render -f FILE",
		Short: "Show what applying a document would put on its targets",
		Long: `Show what applying a document would put on its targets, and change nothing.

The adapter plans it as it would for "apply", next to what is applied now. Secrets are shown as references and modules
as their length. Fields that a mesh has no equivalent for are listed with the reason.`,
		Example: `  meshery-filters render -f filter.yaml
  meshery-filters render -f filter.yaml --delete   # what would be left`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(files) == 0 {
				return usage("say what to render with -f FILE")
			}
			docs, err := a.readDocuments(files, remove)
			if err != nil {
				return err
			}
			body, err := bodyOf(docs)
			if err != nil {
				return err
			}
			c, err := a.dial()
			if err != nil {
				return err
			}
			defer c.close()
			resp, err := call(cmd.Context(), c, planTimeout, c.filters.Plan, &filterspb.PlanRequest{
				Operation: "apply_filter", Namespace: a.namespace, Body: body, Delete: remove})
			if err != nil {
				return err
			}
			return a.printPreviews(resp.GetPreviews())
		},
	}
	filesFlag(cmd, &files)
	cmd.Flags().BoolVar(&remove, "delete", false, "show what removing the documents' filters would leave")
	a.namespaceFlag(cmd, "namespace of documents that name none (default: \"default\")")
	a.outputFlag(cmd)
	a.adapterFlags(cmd)
	return cmd
}

func (a *app) printPreviews(previews []*filterspb.Preview) error {
	type loss struct {
		Filter string `json:"filter"`
		Field  string `json:"field"`
		Reason string `json:"reason"`
	}
	type preview struct {
		Target    string   `json:"target"`
		Mesh      string   `json:"mesh"`
		Version   string   `json:"version"`
		Filters   []string `json:"filters"`
		Losses    []loss   `json:"losses"`
		Resources string   `json:"resources"` // YAML
	}
	out := struct {
		Targets []preview `json:"targets"`
	}{[]preview{}}
	for _, p := range previews {
		v := preview{Target: p.GetTarget(), Mesh: p.GetMesh(), Version: p.GetVersion(), Filters: append([]string{}, p.GetOrder()...),
			Losses: []loss{}, Resources: p.GetYaml()}
		for _, l := range p.GetLosses() {
			v.Losses = append(v.Losses, loss{l.GetFilter(), l.GetField(), l.GetReason()})
		}
		out.Targets = append(out.Targets, v)
	}
	return a.print(out, func(w io.Writer) error {
		var b strings.Builder
		for _, p := range out.Targets {
			order := strings.Join(p.Filters, ", ")
			if order == "" {
				order = "no filter"
			}
			fmt.Fprintf(&b, "---\n# %s on mesh %s, version %s\n# Requests meet: %s\n", p.Target, p.Mesh, p.Version, order)
			for _, l := range p.Losses {
				fmt.Fprintf(&b, "# No effect: %s of %s: %s\n", l.Field, l.Filter, l.Reason)
			}
			b.WriteString(p.Resources)
		}
		_, err := io.WriteString(w, b.String())
		return err
	})
}
