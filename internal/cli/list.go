package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/kube"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// newList makes `list`.
func newList(a *app) *cobra.Command {
	var k kubeconfigFlags
	var own consulFlags
	var proxies bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the filters that are applied",
		Long: `List the filters that are applied: target by target, in the order that requests meet them.

The last column tells how many of the target's proxies run the chain that the filter is part of.

With --kubeconfig no adapter is asked: what is listed are the filters that any adapter has put into that cluster, as its
inventories tell. The last column then tells whether they were applied to the end, and which of their target's objects
somebody else has deleted or changed. Orphans, which have the adapter's label and are in no inventory, are listed below.

With --consul no adapter is asked either, but the Consul of its configuration.

With --proxies the proxies are asked, too, for Wasm filters that no resource explains: one that has lost its control
plane may still run what is long deleted. In a cluster that takes the rights of the role proof and a port-forward to
each Pod of the mesh, or with -n to each of that namespace; in Consul it is the sidecars that answer at consul.admin.
An adapter looks in the cluster and the Consul of its own. Each kind of mesh is looked at for half a minute at most,
and where something is found up to a minute longer; then it says how many proxies it looked at.`,
		Example: `  meshery-filters list
  meshery-filters list --kubeconfig ~/.kube/config --context staging
  meshery-filters list --kubeconfig ~/.kube/config --proxies -n shop
  meshery-filters list --consul --config adapter.yaml
  meshery-filters list --proxies
  meshery-filters list -n shop -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			if consul, err := own.given(k); err != nil {
				return err
			} else if consul {
				return a.withoutAdapter(ctx, &k, &own, func(here adapterHere) error {
					chains, err := here.runner.List(ctx)
					if err != nil && len(chains) == 0 {
						return err
					}
					found := a.survey(ctx, proxies, here.runner.Survey)
					if ctx.Err() != nil {
						return ctx.Err()
					}
					return errors.Join(a.printList(server.Chains(chains), found), err)
				})
			}
			if k.given() {
				c, err := k.open()
				if err != nil {
					return err
				}
				defer c.Close()
				return a.listCluster(ctx, c, proxies)
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
			return errors.Join(a.printList(resp.GetChains(), found), untold(resp.GetUntold()))
		},
	}
	a.namespaceFlag(cmd, "list the filters of this namespace only")
	k.flags(cmd, "whose filters are listed")
	own.flags(cmd)
	cmd.Flags().BoolVar(&proxies, "proxies", false, "ask the proxies of the cluster or Consul for Wasm filters that no resource explains")
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
	Running       *int              `json:"running,omitempty"` // proxies
	Proxies       *int              `json:"proxies,omitempty"`
	Applied       *bool             `json:"applied,omitempty"` // to the end, as the cluster's inventory tells
	Drift         []string          `json:"drift,omitempty"`   // what of its target's objects is not as it was applied
}

// listing is what is listed, and the table of it.
type listing struct {
	Filters []listed `json:"filters"`
	Orphans []string `json:"orphans,omitempty"` // objects of ours in a cluster that no inventory has
	// Survey is what the cluster's proxies run that nothing explains; nil when they were not asked, or could not be.
	Survey *plan.Survey `json:"survey,omitempty"`
	rows   [][]string
}

func (o *listing) add(l listed, state string) {
	o.Filters = append(o.Filters, l)
	o.rows = append(o.rows, []string{l.Namespace + "/" + l.Name, l.Mesh, l.Target, l.Source, filter.ShortDigest(l.SHA256), l.Phase, strconv.Itoa(int(l.Priority)), state})
}

func (a *app) printListing(o listing, state string) error {
	return a.print(o, func(w io.Writer) error {
		var err error
		switch {
		case len(o.rows) == 0 && a.namespace != "":
			_, err = fmt.Fprintf(w, "No filter of namespace %s is applied.\n", a.namespace)
		case len(o.rows) == 0:
			_, err = io.WriteString(w, "No filter is applied.\n")
		default:
			err = table(w, []string{"FILTER", "MESH", "TARGET", "MODULE", "SHA256", "PHASE", "PRIORITY", state}, o.rows)
		}
		for _, orphan := range o.Orphans {
			_, failed := fmt.Fprintf(w, "Orphan, which no inventory has: %s\n", orphan)
			err = errors.Join(err, failed)
		}
		return errors.Join(err, printSurvey(w, o.Survey, true))
	})
}

// survey looks in proxies, if that is wanted, for filters that nothing explains. Nil: nobody looked, which is said where it
// was wanted.
func (a *app) survey(ctx context.Context, wanted bool, look func(context.Context) (plan.Survey, error)) *plan.Survey {
	if !wanted {
		return nil
	}
	s, err := look(ctx)
	if err == nil {
		return &s
	}
	if ctx.Err() == nil {
		fmt.Fprintf(a.Err, "Warning: what proxies run is not known: %s\n", problem.Of(err).Details)
	}
	return nil
}

// printSurvey says what was found and, if remedy is set, what to do about it.
func printSurvey(w io.Writer, s *plan.Survey, remedy bool) (err error) {
	if s == nil {
		return nil
	}
	var b strings.Builder
	for _, orphan := range s.Orphans {
		fmt.Fprintf(&b, "Orphan, which no resource explains: %s\n", orphan)
	}
	text := s.String()
	fmt.Fprintf(&b, "%s\n", strings.ToUpper(text[:1])+text[1:])
	if len(s.Orphans) > 0 && remedy {
		fmt.Fprintf(&b, "%s\n%s\n", problem.OrphanFilters.Cause, problem.OrphanFilters.Remedy)
	}
	if left := s.Left(); left != "" {
		fmt.Fprintln(&b, left)
	}
	_, err = io.WriteString(w, b.String())
	return err
}

// surveyTimeout leaves room for another survey that comes first.
const surveyTimeout = 6 * time.Minute

// survey has the adapter look.
func (c *client) survey(ctx context.Context) (s plan.Survey, err error) {
	resp, err := call(ctx, c, surveyTimeout, c.filters.Survey, &filterspb.SurveyRequest{})
	s = plan.Survey{Proxies: int(resp.GetProxies()), Looked: int(resp.GetLooked()), Missed: resp.GetMissed(), Files: resp.GetFiles(), Orphans: []plan.Orphan{}}
	for _, o := range resp.GetOrphans() {
		s.Orphans = append(s.Orphans, plan.Orphan{Proxy: o.GetProxy(), WasmFilter: plan.WasmFilter{Name: o.GetFilter(), SHA256: o.GetSha256(), Source: o.GetSource()}})
	}
	return s, err
}

// listCluster lists what the inventories of a cluster have.
func (a *app) listCluster(ctx context.Context, c *kube.Cluster, proxies bool) error {
	inventories, err := c.Inventories(ctx)
	if err != nil {
		return err
	}
	out := listing{Filters: []listed{}}
	for _, v := range inventories {
		applied, state := v.Version != "", "applied"
		drift, err := c.Drift(ctx, v)
		switch {
		case err != nil:
			return err
		case !applied:
			state = "a change of it was begun"
		case len(drift) > 0:
			state = "drifted: " + strings.Join(drift, "; ")
		}
		for i, f := range v.Chain.Filters {
			if a.namespace != "" && f.Key.Namespace != a.namespace {
				continue
			}
			out.add(listed{Namespace: f.Key.Namespace, Name: f.Key.Name, Labels: f.Labels, Mesh: v.Chain.Mesh, Target: v.Chain.Target.String(),
				Position: i + 1, Source: f.Spec.Module.Source(), SHA256: f.Spec.Module.SHA256, Phase: string(f.Spec.Phase), Priority: int32(f.Spec.Priority),
				FailurePolicy: string(f.Spec.FailurePolicy), Applied: &applied, Drift: drift}, state)
		}
	}
	out.Orphans, err = c.Orphans(ctx, mesh.Carriers(), inventories)
	if err != nil { // what else is listed is as good without
		fmt.Fprintf(a.Err, "Warning: orphans are not known: %s\n", problem.Of(err).Details)
	}
	out.Survey = a.survey(ctx, proxies, func(ctx context.Context) (plan.Survey, error) { return surveyed(ctx, c, a.namespace) })
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return a.printListing(out, "STATE")
}

func (a *app) printList(chains []*filterspb.Chain, found *plan.Survey) error {
	out := listing{Filters: []listed{}, Survey: found}
	for _, c := range chains {
		l := loaded(c)
		running, proxies := l.Count(plan.Running), l.Expected()
		for i, f := range c.GetFilters() {
			if a.namespace != "" && f.GetNamespace() != a.namespace {
				continue
			}
			out.add(listed{Namespace: f.GetNamespace(), Name: f.GetName(), Labels: f.GetLabels(),
				Mesh: c.GetMesh(), Target: c.GetTarget().GetText(), Position: i + 1, Source: f.GetSource(), SHA256: f.GetSha256(),
				Phase: f.GetPhase(), Priority: f.GetPriority(), FailurePolicy: f.GetFailurePolicy(),
				Running: &running, Proxies: &proxies}, l.String())
		}
	}
	return a.printListing(out, "RUNNING ON")
}

// loaded is how far a chain's proxies are.
func loaded(c *filterspb.Chain) plan.Loaded {
	l := plan.Loaded{Unverified: c.GetUnverified()}
	for _, p := range c.GetProxies() {
		l.Proxies = append(l.Proxies, plan.ProxyStatus{Proxy: plan.Proxy{ID: p.GetId(), Version: p.GetVersion()},
			State: plan.ProxyState(p.GetState()), Expected: p.GetExpected(), Detail: p.GetDetail()})
	}
	return l
}
