package cli

import (
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
	"github.com/meshery/meshery-filters/oam"
)

// completeTimeout bounds what a shell waits for an adapter when it completes a word.
const completeTimeout = 2 * time.Second

// completion is how an argument is completed.
type completion = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective)

// completeFilters completes the names of filters that the adapter has: one, or several.
func (a *app) completeFilters(several bool) completion {
	return func(cmd *cobra.Command, args []string, _ string) (names []string, _ cobra.ShellCompDirective) {
		c, err := a.dial()
		if err != nil || len(args) > 0 && !several {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer c.close()
		resp, _ := call(cmd.Context(), c, completeTimeout, c.filters.List, &filterspb.ListRequest{})
		for _, chain := range resp.GetChains() {
			for _, f := range chain.GetFilters() {
				names = append(names, f.GetNamespace()+"/"+f.GetName())
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeOperations completes the keys of the adapter's operations.
func (a *app) completeOperations(cmd *cobra.Command, args []string, _ string) (keys []string, _ cobra.ShellCompDirective) {
	c, err := a.dial()
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer c.close()
	resp, _ := call(cmd.Context(), c, completeTimeout, c.meshes.SupportedOperations, &meshes.SupportedOperationsRequest{})
	for _, o := range resp.GetOps() {
		keys = append(keys, o.GetKey())
	}
	return keys, cobra.ShellCompDirectiveNoFileComp
}

// completeFields completes the paths of a document's fields.
func completeFields(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return oam.Fields(), cobra.ShellCompDirectiveNoFileComp
}
