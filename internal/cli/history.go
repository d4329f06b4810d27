package cli

import (
	"cmp"
	"errors"
	"io"
	"strconv"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// newHistory makes `history`.
func newHistory(a *app) *cobra.Command {
	var k kubeconfigFlags
	var own consulFlags
	cmd := &cobra.Command{
		Use:   "history NAME|NAMESPACE/NAME",
		Short: "Show what became of a filter",
		Long: `Show what became of a filter, the oldest first: as far as the last 10 changes of each target go.

A revision's number is what undo takes. With --kubeconfig or --consul no adapter is asked: it is what the inventories in
that cluster have, or in the Consul of the adapter's configuration.`,
		Example: `  meshery-filters history shop/rate-limit
  meshery-filters history rate-limit -n shop -o json
  meshery-filters history shop/rate-limit --kubeconfig ~/.kube/config
  meshery-filters history shop/rate-limit --consul --config adapter.yaml`,
		Args:              oneArg("say which filter: NAME or NAMESPACE/NAME"),
		ValidArgsFunction: a.completeFilters(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, err := filter.ParseKey(args[0], cmp.Or(a.namespace, "default"))
			if err != nil {
				return usageError{err}
			}
			if consul, err := own.given(k); err != nil {
				return err
			} else if consul {
				return a.withoutAdapter(cmd.Context(), &k, &own, func(here adapterHere) error {
					history, err := here.runner.History(cmd.Context(), key.Namespace, key.Name)
					if err != nil && len(history) == 0 {
						return err
					}
					return errors.Join(a.printHistory(server.Revisions(history)), err)
				})
			}
			if k.given() {
				c, err := k.open()
				if err != nil {
					return err
				}
				defer c.Close()
				all, err := c.Targets(cmd.Context())
				if err != nil {
					return err
				}
				history := operation.HistoryOf(all.Revisions(), key)
				if len(history) == 0 {
					return problem.FilterNotFound.New("%s: no change of it is kept in %s", key, c)
				}
				return a.printHistory(server.Revisions(history))
			}
			c, err := a.dial()
			if err != nil {
				return err
			}
			defer c.close()
			resp, err := call(cmd.Context(), c, callTimeout, c.filters.History, &filterspb.HistoryRequest{Namespace: key.Namespace, Name: key.Name})
			if err != nil {
				return err
			}
			return errors.Join(a.printHistory(resp.GetRevisions()), untold(resp.GetUntold()))
		},
	}
	a.namespaceFlag(cmd, "namespace of a name without one (default: \"default\")")
	k.flags(cmd, "whose filter it is")
	own.flags(cmd)
	a.outputFlag(cmd)
	a.adapterFlags(cmd)
	return cmd
}

// revision is one as JSON and YAML show it.
type revision struct {
	Revision uint64    `json:"revision"`
	Time     time.Time `json:"time"`
	Change   string    `json:"change"` // applied, changed, moved or removed
	Target   string    `json:"target"`
	Source   string    `json:"source"`
	SHA256   string    `json:"sha256"`
	Phase    string    `json:"phase,omitempty"`
	Priority int32     `json:"priority"`
}

func (a *app) printHistory(revisions []*filterspb.Revision) error {
	out := struct {
		Revisions []revision `json:"revisions"`
	}{[]revision{}}
	var rows [][]string
	for _, r := range revisions {
		f := r.GetFilter()
		v := revision{r.GetNumber(), r.GetTime().AsTime(), r.GetChange(), r.GetTarget().GetText(), f.GetSource(), f.GetSha256(), f.GetPhase(), f.GetPriority()}
		out.Revisions = append(out.Revisions, v)
		rows = append(rows, []string{strconv.FormatUint(v.Revision, 10), v.Time.UTC().Format(time.RFC3339), v.Change, v.Target, v.Source,
			filter.ShortDigest(v.SHA256), v.Phase, strconv.Itoa(int(v.Priority))})
	}
	return a.print(out, func(w io.Writer) error {
		return table(w, []string{"REVISION", "TIME", "CHANGE", "TARGET", "MODULE", "SHA256", "PHASE", "PRIORITY"}, rows)
	})
}

// newUndo makes `undo`.
func newUndo(a *app) *cobra.Command {
	var w waiting
	var to int
	cmd := &cobra.Command{
		Use:   "undo NAME|NAMESPACE/NAME",
		Short: "Bring a filter back to what it was",
		Long: `Bring a filter back to what it was before its last change, or at a revision that history shows.

What it was is proved and rolled out like anything that is applied. A filter that was removed comes back; one that was
applied for the first time goes. The other filters of its chain stay as they are.

With --kubeconfig it is brought back in that cluster, if it has a history there, and on plain Envoys otherwise.`,
		Example: `  meshery-filters undo shop/rate-limit
  meshery-filters undo shop/rate-limit --to 12
  meshery-filters undo shop/rate-limit --kubeconfig ~/.kube/config --no-adapter
  meshery-filters undo shop/rate-limit --consul --config adapter.yaml --no-adapter`,
		Args:              oneArg("say which filter: NAME or NAMESPACE/NAME"),
		ValidArgsFunction: a.completeFilters(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, err := filter.ParseKey(args[0], cmp.Or(a.namespace, "default"))
			if err != nil {
				return usageError{err}
			}
			if to < 0 || cmd.Flags().Changed("to") && to == 0 {
				return usage("--to: write a revision that `meshery-filters history %s` shows", args[0])
			}
			body, err := filter.Undo{Metadata: filter.Metadata{Name: key.Name, Namespace: key.Namespace}, Spec: filter.UndoSpec{Revision: to}}.Body()
			if err != nil {
				return err
			}
			return a.start(cmd.Context(), w, &meshes.ApplyRuleRequest{OpName: "custom", CustomBody: body})
		},
	}
	cmd.Flags().IntVar(&to, "to", 0, "the `revision` to bring it back to (default: the one before the last)")
	a.namespaceFlag(cmd, "namespace of a name without one (default: \"default\")")
	w.flags(cmd)
	w.cluster.flags(cmd, "whose filter it is; the adapter gets that one context of it")
	w.aloneFlag(cmd)
	a.outputFlag(cmd)
	a.adapterFlags(cmd)
	return cmd
}
