package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// newRender makes `render`.
func newRender(a *app) *cobra.Command {
	var files []string
	var remove, own bool
	var meshName, cluster string
	var k kubeconfigFlags
	cmd := &cobra.Command{
		Use:   "render -f FILE",
		Short: "Show what applying a document would put on its targets",
		Long: `Show what applying a document would put on its targets, and change nothing.

The adapter plans it as it would for "apply", next to what is applied now. Secrets are shown as references and modules
as their length. Fields that a mesh has no equivalent for are listed with the reason.

For Istio no adapter is asked: what is printed are the objects themselves, for kubectl or a Git repository, as if the
documents were all there is on their targets. Each module runs with its configuration in a sandbox first. --kubeconfig
asks a cluster what it serves and holds, and --cluster a file; without them it is taken for Istio 1.31, and targets have
to be given by labels.

With --consul the adapter is asked what it would write to its own Consul: one config entry a target, in the JSON that
"consul config write" takes.`,
		Example: `  meshery-filters render -f filter.yaml
  meshery-filters render -f filter.yaml --delete   # what would be left
  meshery-filters render -f filter.yaml --mesh istio --kubeconfig ~/.kube/config | kubectl apply --server-side -f -
  kubectl get crd,namespaces,services,deployments -A -o yaml > cluster.yaml
  meshery-filters render -f filter.yaml --mesh istio --cluster cluster.yaml
  meshery-filters render -f filter.yaml --consul | consul config write -`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(files) == 0 {
				return usage("say what to render with -f FILE")
			}
			docs, err := a.readDocuments(files, remove)
			if err != nil {
				return err
			}
			if meshName, err = consulMesh(own, meshName, cluster != "" || k.given()); err != nil {
				return err
			}
			m, err := renderedMesh(docs, meshName)
			if err != nil {
				return err
			}
			local := !own && !slices.Contains(driven, m.Name())
			switch {
			case local && remove:
				return usage("--delete is for meshes that an adapter drives; leave the documents out of what you render")
			case local && cluster == stdin && slices.Contains(files, stdin):
				return usage("--cluster and --filename cannot both be standard input")
			case cluster != "" && k.given():
				return usage("--cluster and --kubeconfig both tell of a cluster; give one of them")
			case local && k.given():
				c, err := k.open()
				if err != nil {
					return err
				}
				defer c.Close()
				return a.renderLocally(cmd.Context(), m, docs, reading(c, m))
			case local:
				around, err := a.fromFile(m, cluster)
				if err != nil {
					return err
				}
				return a.renderLocally(cmd.Context(), m, docs, around)
			case cluster != "" || k.given():
				return usage("--cluster and --kubeconfig are for meshes of a cluster, and %s is none", m.Name())
			}
			previews, err := a.previews(cmd.Context(), docs, remove)
			if err != nil {
				return err
			}
			return a.printPreviews(previews)
		},
	}
	filesFlag(cmd, &files)
	cmd.Flags().BoolVar(&remove, "delete", false, "show what removing the documents' filters would leave")
	cmd.Flags().StringVar(&meshName, "mesh", "", "`mesh` of documents that name none: "+strings.Join(mesh.Names(), ", "))
	cmd.Flags().StringVar(&cluster, "cluster", "", "`file` with what a cluster serves and holds, as \"kubectl get -o yaml\" prints it; - for standard input")
	_ = cmd.MarkFlagFilename("cluster", "yaml", "yml", "json")
	k.flags(cmd, "that is asked")
	consulFlag(cmd, &own)
	a.servedFlag(cmd)
	_ = cmd.RegisterFlagCompletionFunc("mesh", cobra.FixedCompletions(mesh.Names(), cobra.ShellCompDirectiveNoFileComp))
	a.namespaceFlag(cmd, "namespace of documents that name none (default: \"default\")")
	a.outputFlag(cmd)
	a.adapterFlags(cmd)
	return cmd
}

// consulFlag says that the adapter's own Consul is meant.
func consulFlag(cmd *cobra.Command, own *bool) {
	cmd.Flags().BoolVar(own, "consul", false, "ask the adapter about its own Consul, which consul.addr of its configuration names")
}

// consulMesh is the mesh of documents that name none, with --consul or without.
func consulMesh(own bool, given string, cluster bool) (string, error) {
	const name = "consul"
	switch {
	case !own:
		return given, nil
	case cluster:
		return "", usage("--consul is the adapter's own Consul, and no cluster")
	case given != "" && given != name:
		return "", usage("--consul is for documents of the mesh consul, and --mesh is %s", given)
	}
	return name, nil
}

// previews asks the adapter what applying documents, or removing them, would make hold.
func (a *app) previews(ctx context.Context, docs []filter.Document, remove bool) ([]*filterspb.Preview, error) {
	body, err := bodyOf(docs)
	if err != nil {
		return nil, err
	}
	c, err := a.dial()
	if err != nil {
		return nil, err
	}
	defer c.close()
	resp, err := call(ctx, c, planTimeout, c.filters.Plan, &filterspb.PlanRequest{
		Operation: "apply_filter", Namespace: a.namespace, Body: body, Delete: remove})
	return resp.GetPreviews(), err
}

// renderedMesh is the one mesh that all documents are for; those that name none get the one that is given, or plain
// Envoy.
func renderedMesh(docs []filter.Document, given string) (mesh.Mesh, error) {
	name := ""
	for i := range docs {
		s := &docs[i].Spec
		if s.Mesh == "" || s.Mesh == "auto" {
			s.Mesh = given
		}
		of := s.Mesh
		if of == "" {
			of = "envoy"
		}
		if name != "" && of != name {
			return nil, usage("the documents are for %s and for %s; render them one mesh at a time", name, of)
		}
		name = of
	}
	if given != "" && name != given {
		return nil, usage("--mesh is %s, and the documents are for %s", given, name)
	}
	return mesh.Find(name)
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
		Resources string   `json:"resources"` // YAML, or JSON of Consul's entries
		gone      []string // of Consul's entries
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
		for _, c := range p.GetChanges() {
			if c.GetAction() == string(plan.Deleted) && !strings.Contains(c.GetSubject(), ": ") {
				v.gone = append(v.gone, c.GetSubject())
			}
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
			if p.Mesh == "consul" { // whose entries go to another program, which reads no YAML
				for _, l := range p.Losses {
					fmt.Fprintf(a.Err, "Warning: %s: %s: %s: %s\n", problem.FieldLost.Summary, l.Filter, l.Field, l.Reason)
				}
				for _, gone := range p.gone {
					fmt.Fprintf(a.Err, "Nothing would be left of %s.\n", gone)
				}
				b.WriteString(p.Resources)
				continue
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
