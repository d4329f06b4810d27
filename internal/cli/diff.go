package cli

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/kube"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// kubeconfigFlags say which cluster a command asks by itself.
type kubeconfigFlags struct{ file, context string }

func (k *kubeconfigFlags) flags(cmd *cobra.Command, of string) {
	cmd.Flags().StringVar(&k.file, "kubeconfig", "", "kubeconfig `file` of the cluster "+of)
	cmd.Flags().StringVar(&k.context, "context", "", "`name` of the kubeconfig's context (default: its current one)")
	_ = cmd.MarkFlagFilename("kubeconfig")
}

func (k *kubeconfigFlags) given() bool { return k.file != "" || k.context != "" }

// portable is the context as an adapter can use it; nothing when none is named.
func (k *kubeconfigFlags) portable() ([]string, error) {
	if !k.given() {
		return nil, nil
	}
	if k.file == "" {
		return nil, errNoFile
	}
	text, err := kube.Portable(k.file, k.context)
	return []string{string(text)}, err
}

var errNoFile = usage("--context is one of a kubeconfig's; name the file with --kubeconfig")

// open is the cluster. Whoever opens it closes it.
func (k *kubeconfigFlags) open() (*kube.Cluster, error) {
	if k.file == "" {
		return nil, errNoFile
	}
	return kube.OpenFile(k.file, kube.Options{Context: k.context, Log: slog.New(slog.DiscardHandler)})
}

// reading reads of a cluster what the mesh wants to know, and takes its targets for empty.
func reading(c *kube.Cluster, m mesh.Mesh) surroundings {
	return func(ctx context.Context, chain filter.Chain) (plan.Cluster, filter.Chain, error) {
		cluster, err := c.Read(ctx, m.Reads(chain))
		return cluster, empty(chain), err
	}
}

// newDiff makes `diff`.
func newDiff(a *app) *cobra.Command {
	var files []string
	var meshName string
	var own bool
	var k kubeconfigFlags
	cmd := &cobra.Command{
		Use:   "diff -f FILE {--kubeconfig FILE|--consul}",
		Short: "Show what applying a document would change in a cluster or Consul",
		Long: `Show what applying a document would change in a cluster or in the adapter's Consul, and change nothing.

The documents are put next to what the adapter has applied to their targets, as the cluster's inventories tell. Each
object goes to the cluster in a server-side dry run, so that what it would refuse is refused here too: a field that
another manager owns, an invalid value, a right that is missing.

With --consul the adapter is asked what it would change in its own Consul, in which config entries and of which filters.`,
		Example: `  meshery-filters diff -f filter.yaml --mesh istio --kubeconfig ~/.kube/config
  meshery-filters diff -f filter.yaml --mesh istio --kubeconfig ~/.kube/config --context staging
  meshery-filters diff -f filter.yaml --consul`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(files) == 0 {
				return usage("say what to compare with -f FILE")
			}
			if !k.given() && !own {
				return usage("say what to compare with: --kubeconfig FILE for a cluster, --consul for the adapter's own Consul")
			}
			docs, err := a.readDocuments(files, false)
			if err != nil {
				return err
			}
			if meshName, err = consulMesh(own, meshName, k.given()); err != nil {
				return err
			}
			m, err := renderedMesh(docs, meshName)
			if err != nil {
				return err
			}
			if slices.Contains(driven, m.Name()) {
				return usage("%s is no mesh of a cluster; `meshery-filters render` shows what its proxies would get", m.Name())
			}
			if own {
				return a.diffConsul(cmd.Context(), docs)
			}
			c, err := k.open()
			if err != nil {
				return err
			}
			defer c.Close()
			return a.diff(cmd.Context(), c, m, docs)
		},
	}
	filesFlag(cmd, &files)
	cmd.Flags().StringVar(&meshName, "mesh", "", "`mesh` of documents that name none: "+strings.Join(mesh.Names(), ", "))
	_ = cmd.RegisterFlagCompletionFunc("mesh", cobra.FixedCompletions(mesh.Names(), cobra.ShellCompDirectiveNoFileComp))
	k.flags(cmd, "that is asked")
	consulFlag(cmd, &own)
	a.servedFlag(cmd)
	a.namespaceFlag(cmd, "namespace of documents that name none (default: \"default\")")
	a.outputFlag(cmd)
	a.adapterFlags(cmd)
	return cmd
}

// diffConsul prints what the adapter would change in its own Consul.
func (a *app) diffConsul(ctx context.Context, docs []filter.Document) error {
	previews, err := a.previews(ctx, docs, false)
	if err != nil {
		return err
	}
	changes := []plan.Change{}
	for _, p := range previews {
		for _, l := range p.GetLosses() {
			fmt.Fprintf(a.Err, "Warning: %s: %s: %s: %s\n", problem.FieldLost.Summary, l.GetFilter(), l.GetField(), l.GetReason())
		}
		for _, c := range p.GetChanges() {
			changes = append(changes, plan.Change{Subject: c.GetSubject(), Action: plan.Action(c.GetAction())})
		}
	}
	return a.printChanges(changes)
}

func (a *app) diff(ctx context.Context, c *kube.Cluster, m mesh.Mesh, docs []filter.Document) error {
	targets := map[string]*kube.Target{}
	plans, err := a.planLocally(ctx, m, docs, func(ctx context.Context, chain filter.Chain) (plan.Cluster, filter.Chain, error) {
		t, err := c.Target(ctx, m.Name(), chain.Target)
		if err != nil {
			return plan.Cluster{}, chain, err
		}
		targets[chain.ID()] = t
		held := t.Committed().Chain
		whole := held
		for _, f := range chain.Filters {
			whole = whole.With(f)
		}
		cluster, err := c.Read(ctx, m.Reads(whole))
		for i := range cluster.Objects {
			o := &cluster.Objects[i]
			if bare, ok := t.Bare(*o); ok {
				o.Bare, o.For = bare, chain.Target.String()
			}
		}
		return cluster, held, err
	}, func(ctx context.Context, f filter.Filter) (filter.Filter, error) {
		return f.Resolved(func(ref filter.SecretRef) (string, error) { return c.Secret(ctx, f.Key.Namespace, ref.Name, ref.Key) })
	})
	if err != nil {
		return err
	}
	a.warn(plans)
	all := []plan.Change{}
	for _, p := range plans {
		changes, err := targets[p.Chain.ID()].Diff(ctx, p)
		if err != nil {
			return err
		}
		all = append(all, changes...)
	}
	return a.printChanges(all)
}

func (a *app) printChanges(changes []plan.Change) error {
	out := struct {
		Changes []plan.Change `json:"changes"`
	}{changes}
	return a.print(out, func(w io.Writer) error {
		var b strings.Builder
		for _, ch := range out.Changes {
			action := string(ch.Action)
			if ch.Action != plan.Unchanged {
				action = "would be " + action
			}
			fmt.Fprintf(&b, "%s %s\n", ch.Subject, action)
		}
		_, err := io.WriteString(w, b.String())
		return err
	})
}
