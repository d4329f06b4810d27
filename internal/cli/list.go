package cli

import (
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// newList makes `list`.
func newList(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the filters that are applied",
		Long: `List the filters that are applied: target by target, in the order that requests meet them.

The last column tells how many of the target's proxies run the chain that the filter is part of.`,
		Example: `  meshery-filters list
  meshery-filters list -n shop -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.dial()
			if err != nil {
				return err
			}
			defer c.close()
			resp, err := call(cmd.Context(), c, callTimeout, c.filters.List, &filterspb.ListRequest{})
			if err != nil {
				return err
			}
			return a.printList(resp.GetChains())
		},
	}
	a.namespaceFlag(cmd, "list the filters of this namespace only")
	a.outputFlag(cmd)
	a.adapterFlags(cmd)
	return cmd
}

// listed is a filter as JSON and YAML show it.
type listed struct {
	Namespace     string            `json:"namespace"`
	Name          string            `json:"name"`
	Labels        map[string]string `json:"labels,omitempty"`
	Mesh          string            `json:"mesh"`
	Target        string            `json:"target"`
	Position      int               `json:"position"` // in its chain, from 1
	Source        string            `json:"source"`
	SHA256        string            `json:"sha256"`
	Phase         string            `json:"phase,omitempty"`
	Priority      int32             `json:"priority"`
	FailurePolicy string            `json:"failurePolicy"`
	Running       int               `json:"running"` // proxies
	Proxies       int               `json:"proxies"`
}

func (a *app) printList(chains []*filterspb.Chain) error {
	out := struct {
		Filters []listed `json:"filters"`
	}{[]listed{}}
	var rows [][]string
	for _, c := range chains {
		l := loaded(c)
		for i, f := range c.GetFilters() {
			if a.namespace != "" && f.GetNamespace() != a.namespace {
				continue
			}
			out.Filters = append(out.Filters, listed{Namespace: f.GetNamespace(), Name: f.GetName(), Labels: f.GetLabels(),
				Mesh: c.GetMesh(), Target: c.GetTarget().GetText(), Position: i + 1, Source: f.GetSource(), SHA256: f.GetSha256(),
				Phase: f.GetPhase(), Priority: f.GetPriority(), FailurePolicy: f.GetFailurePolicy(),
				Running: l.Count(plan.Running), Proxies: l.Expected()})
			rows = append(rows, []string{f.GetNamespace() + "/" + f.GetName(), c.GetMesh(), c.GetTarget().GetText(), f.GetSource(),
				filter.ShortDigest(f.GetSha256()), f.GetPhase(), strconv.Itoa(int(f.GetPriority())), l.String()})
		}
	}
	return a.print(out, func(w io.Writer) error {
		if len(rows) == 0 {
			_, err := io.WriteString(w, "No filter is applied.\n")
			return err
		}
		return table(w, []string{"FILTER", "MESH", "TARGET", "MODULE", "SHA256", "PHASE", "PRIORITY", "RUNNING ON"}, rows)
	})
}

// loaded is how far a chain's proxies are.
func loaded(c *filterspb.Chain) plan.Loaded {
	var l plan.Loaded
	for _, p := range c.GetProxies() {
		l.Proxies = append(l.Proxies, plan.ProxyStatus{Proxy: plan.Proxy{ID: p.GetId(), Version: p.GetVersion()},
			State: plan.ProxyState(p.GetState()), Expected: p.GetExpected(), Detail: p.GetDetail()})
	}
	return l
}
