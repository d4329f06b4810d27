package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// newStatus makes `status`.
func newStatus(a *app) *cobra.Command {
	var k kubeconfigFlags
	var own consulFlags
	var proxies bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show whether proxies run what was applied",
		Long: `Show for each target which filters it has and how many of its proxies run exactly them.

A proxy that rejected its chain, has not answered, or left since differs from what was applied: its target has drifted,
the proxy is listed with its own words, and the exit code is 5.
A target whose proxies nobody may look at is not verified, and the reason is told.

With --kubeconfig or --consul no adapter is asked: the proxies looked at are those of the filters that any adapter has
put into that cluster, or into the Consul of the adapter's configuration. --proxies looks for what "list --proxies"
tells of, and such filters are drift, too.`,
		Example: `  meshery-filters status
  meshery-filters status --kubeconfig ~/.kube/config --context staging
  meshery-filters status --consul --config adapter.yaml
  meshery-filters status -o json
  meshery-filters status > /dev/null || echo "look at the proxies"`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			consul, err := own.given(k)
			if err != nil {
				return err
			}
			if k.given() || consul {
				return a.statusAlone(ctx, &k, &own, proxies)
			}
			c, err := a.dial()
			if err != nil {
				return err
			}
			defer c.close()
			resp, err := call(ctx, c, callTimeout, c.filters.List, &filterspb.ListRequest{})
			if err != nil {
				return err
			}
			found := a.survey(ctx, proxies, c.survey)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := untold(resp.GetUntold()); err != nil { // before drift of what could be told
				return errors.Join(err, a.printStatus(resp.GetChains(), found))
			}
			return a.printStatus(resp.GetChains(), found)
		},
	}
	k.flags(cmd, "that is looked at")
	own.flags(cmd)
	cmd.Flags().BoolVar(&proxies, "proxies", false, "ask the proxies of the cluster or Consul for Wasm filters that no resource explains")
	a.outputFlag(cmd)
	a.adapterFlags(cmd)
	return cmd
}

// statusAlone looks at a cluster or Consul from this process.
func (a *app) statusAlone(ctx context.Context, k *kubeconfigFlags, own *consulFlags, proxies bool) error {
	return a.withoutAdapter(ctx, k, own, func(here adapterHere) error {
		chains, err := here.runner.List(ctx)
		if err != nil && len(chains) == 0 {
			return err
		}
		found := a.survey(ctx, proxies, here.runner.Survey)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return errors.Join(err, a.printStatus(server.Chains(chains), found))
	})
}

// What JSON and YAML show of a status.
type (
	statusDocument struct {
		Drifted bool          `json:"drifted"`
		Targets []chainStatus `json:"targets"`
		Survey  *plan.Survey  `json:"survey,omitempty"` // with --proxies
	}
	chainStatus struct {
		Target  string `json:"target"`
		Mesh    string `json:"mesh"`
		Version string `json:"version"`
		Drifted bool   `json:"drifted"`
		Problem string `json:"problem,omitempty"` // why it is not as it was applied, or that cannot be told
		// Unverified says what nobody looked at, and why.
		Unverified string         `json:"unverified,omitempty"`
		Running    int            `json:"running"` // proxies
		Filters    []filterStatus `json:"filters"`
		Proxies    []proxyStatus  `json:"proxies"`
	}
	filterStatus struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
		Source    string `json:"source"`
		SHA256    string `json:"sha256"`
	}
	proxyStatus struct {
		ID      string `json:"id"`
		Version string `json:"version"`
		State   string `json:"state"`
		Detail  string `json:"detail,omitempty"`
	}
)

func (a *app) printStatus(chains []*filterspb.Chain, found *plan.Survey) error {
	out := statusDocument{Targets: []chainStatus{}, Survey: found}
	var targets, drifted, unseen [][]string
	for _, c := range chains {
		l := loaded(c)
		s := chainStatus{Target: c.GetTarget().GetText(), Mesh: c.GetMesh(), Version: c.GetVersion(),
			Unverified: l.Unverified, Running: l.Count(plan.Running), Filters: []filterStatus{}, Proxies: []proxyStatus{}}
		var names []string
		for _, f := range c.GetFilters() {
			s.Filters = append(s.Filters, filterStatus{f.GetNamespace(), f.GetName(), f.GetSource(), f.GetSha256()})
			names = append(names, fmt.Sprintf("%s/%s (%s)", f.GetNamespace(), f.GetName(), filter.ShortDigest(f.GetSha256())))
		}
		for _, p := range l.Proxies {
			s.Proxies = append(s.Proxies, proxyStatus{p.ID, p.Version, string(p.State), p.Detail})
			if p.State != plan.Running && p.State != plan.Apart {
				s.Drifted = true
				drifted = append(drifted, []string{p.ID, s.Target, p.Version, string(p.State), p.Detail})
			}
		}
		state := "as applied"
		if s.Problem = c.GetProblem(); s.Problem != "" {
			s.Drifted = true
			drifted = append(drifted, []string{"", s.Target, "", "drifted", s.Problem})
		}
		if s.Unverified != "" {
			unseen = append(unseen, []string{"", s.Target, "", "not verified", s.Unverified})
		}
		switch {
		case s.Drifted:
			state = "drifted"
		case s.Unverified != "":
			state = "not verified"
		case len(l.Proxies) == 0:
			state = "waits for a proxy"
		}
		out.Drifted = out.Drifted || s.Drifted
		out.Targets = append(out.Targets, s)
		targets = append(targets, []string{s.Target, s.Mesh, l.String(), state, s.Version, strings.Join(names, ", ")})
	}
	orphans := 0
	if found != nil {
		orphans = len(found.Orphans)
		out.Drifted = out.Drifted || orphans > 0
	}
	err := a.print(out, func(w io.Writer) error {
		if len(targets) == 0 {
			_, err := io.WriteString(w, "No filter is applied.\n")
			return errors.Join(err, printSurvey(w, found, false))
		}
		err := table(w, []string{"TARGET", "MESH", "RUNNING", "STATE", "VERSION", "FILTERS"}, targets)
		if err == nil && len(drifted)+len(unseen) > 0 {
			fmt.Fprintln(w)
			err = table(w, []string{"PROXY", "TARGET", "ENVOY", "STATE", "DETAIL"}, slices.Concat(drifted, unseen))
		}
		if err == nil && found != nil {
			fmt.Fprintln(w)
		}
		return errors.Join(err, printSurvey(w, found, false))
	})
	if err != nil || !out.Drifted {
		return err
	}
	if len(drifted) == 0 {
		return exitError{problem.OrphanFilters.New("%d found", orphans), exitDrift}
	}
	count := fmt.Sprintf("proxies that differ: %d; targets that were looked at: %d", len(drifted), len(out.Targets))
	if orphans > 0 {
		count += fmt.Sprintf("\n%s: %d found [%s]", problem.OrphanFilters.Summary, orphans, problem.OrphanFilters.Code)
	}
	return exitError{problem.Drift.New("%s", count), exitDrift}
}
