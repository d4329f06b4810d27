package cli

import (
	"fmt"
	"io"
	"runtime"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
)

// newVersion makes `version`.
func newVersion(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Show this program's version, and the meshes and modules that it knows",
		Long:    `Show this program's version, the meshes it drives, the Envoys it works with and the modules it ships.`,
		Example: `  meshery-filters version -o json`,
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			v := struct {
				Version  string   `json:"version"`
				Commit   string   `json:"commit"`
				Go       string   `json:"go"`
				Platform string   `json:"platform"`
				Schema   string   `json:"schema"`
				Meshes   []string `json:"meshes"`
				MinEnvoy string   `json:"minEnvoy"`
				Modules  []string `json:"modules"`
			}{a.build.Version, a.build.Commit, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH, filter.APIVersion,
				mesh.Names(), envoy.MinVersion, filters.Names()}
			return a.print(v, func(w io.Writer) error {
				tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
				for _, l := range [][2]string{{"Version", v.Version}, {"Commit", v.Commit}, {"Go", v.Go}, {"Platform", v.Platform},
					{"Schema", v.Schema}, {"Meshes", strings.Join(v.Meshes, ", ")}, {"Envoy", v.MinEnvoy + " or later"},
					{"Modules", strings.Join(v.Modules, ", ")}} {
					if l[1] != "" {
						fmt.Fprintf(tw, "%s:\t%s\n", l[0], l[1])
					}
				}
				return tw.Flush()
			})
		},
	}
	a.outputFlag(cmd)
	return cmd
}
