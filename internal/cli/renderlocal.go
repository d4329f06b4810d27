package cli

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/wasm"
)

// driven are the meshes that an adapter changes by itself. Others are rendered here, without one.
var driven = []string{"envoy"}

// assumed are the kinds that a mesh's clusters serve, for whoever renders without --cluster.
var assumed = map[string]func() []plan.Kind{"istio": mesh.Istio131, "consul": mesh.ConsulKinds}

// surroundings give what the filters of a chain find on its target: what the cluster serves and holds, and the chain that is
// there.
type surroundings func(context.Context, filter.Chain) (plan.Cluster, filter.Chain, error)

// fromFile is a cluster as a file tells it, or as the mesh's clusters usually are, with nothing on its targets.
func (a *app) fromFile(m mesh.Mesh, file string) (surroundings, error) {
	var cluster plan.Cluster
	if file != "" {
		objects, err := a.readObjects(file)
		if err != nil {
			return nil, err
		}
		cluster = plan.ClusterOf(objects)
	}
	if kinds := assumed[m.Name()]; kinds != nil && len(cluster.Kinds) == 0 {
		cluster.Kinds = kinds()
	}
	return func(_ context.Context, c filter.Chain) (plan.Cluster, filter.Chain, error) {
		return cluster, empty(c), nil
	}, nil
}

// empty is the chain before anything was put there.
func empty(c filter.Chain) filter.Chain { return filter.Chain{Mesh: c.Mesh, Target: c.Target} }

// servedFlag says where the adapter that is not asked serves modules.
func (a *app) servedFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&a.servedAt, "modules-url", "", "modulesURL of the adapter that will apply it: its `address` as proxies reach it (default: it serves no modules)")
}

func (a *app) checkServedAt() error {
	if u, err := url.Parse(a.servedAt); a.servedAt != "" && (err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
		return usage("--modules-url is the modulesURL of an adapter, such as http://HOST:PORT")
	}
	return nil
}

// resolver gives a filter the values of its secrets.
type resolver func(context.Context, filter.Filter) (filter.Filter, error)

// planLocally plans what documents make of their targets, a target at a time, without an adapter.
func (a *app) planLocally(ctx context.Context, m mesh.Mesh, docs []filter.Document, around surroundings, resolve resolver) ([]plan.Plan, error) {
	world := plan.World{Modules: map[string]plan.Code{}}
	if err := a.checkServedAt(); err != nil {
		return nil, err
	}
	modules := module.New(module.Options{Blobs: held(world.Modules), Builtin: filters.Builtin, BuiltinNames: filters.Names(), ServedAt: a.servedAt})
	named := func(f filter.Filter, err error) error {
		p := *problem.Of(err)
		p.Details = f.Key.String() + ": " + p.Details
		return &p
	}
	chains := map[string]filter.Chain{}
	clusters := map[string]plan.Cluster{}
	var order []string
	var given []filter.Filter
	wanted := map[string]filter.Chain{}
	for _, d := range docs {
		f, err := m.Complete(d.Filter(a.namespace))
		if err != nil {
			return nil, err
		}
		c := filter.Chain{Mesh: m.Name(), Target: f.Spec.Target}
		c.Filters = wanted[c.ID()].Filters
		given, wanted[c.ID()] = append(given, f), c.With(f)
	}
	for _, f := range given {
		tried, err := resolve(ctx, f)
		if err != nil {
			return nil, err
		}
		if f.Spec.Module, err = known(ctx, modules, tried); err != nil {
			return nil, named(f, err)
		}
		c := filter.Chain{Mesh: m.Name(), Target: f.Spec.Target}
		id := c.ID()
		if known, ok := chains[id]; ok {
			c = known
		} else {
			if clusters[id], c, err = around(ctx, wanted[id]); err != nil {
				return nil, err
			}
			order = append(order, id)
		}
		chains[id] = c.With(f)
	}
	var plans []plan.Plan
	for _, id := range order {
		resolved := chains[id]
		resolved.Filters = slices.Clone(resolved.Filters)
		for i := range resolved.Filters {
			f, err := resolve(ctx, resolved.Filters[i])
			if err != nil {
				return nil, err
			}
			resolved.Filters[i] = f
			if _, ok := world.Modules[f.Spec.Module.SHA256]; ok {
				continue
			}
			if _, err := known(ctx, modules, f); err != nil { // one that was there before
				return nil, named(f, err)
			}
		}
		for digest, code := range world.Modules {
			code.URL = modules.Address(digest)
			world.Modules[digest] = code
		}
		world.Cluster = clusters[id]
		p, err := m.Plan(resolved, world)
		if err != nil {
			return nil, err
		}
		p.Chain = chains[id]
		plans = append(plans, p)
	}
	return plans, nil
}

// secretless refuses a filter that refers to a secret.
func secretless(_ context.Context, f filter.Filter) (filter.Filter, error) {
	if refs := f.Secrets(); len(refs) > 0 {
		return f, problem.SecretShown.New("%s refers to %s, and without an adapter nobody resolves secrets, which would end up in what is printed", f.Key, refs[0])
	}
	return f, nil
}

// warn tells what the plans' mesh has no equivalent for, and which Pods would restart.
func (a *app) warn(plans []plan.Plan) {
	for _, p := range plans {
		for _, l := range p.Losses {
			fmt.Fprintf(a.Err, "Warning: %s: %s\n", problem.FieldLost.Summary, l)
		}
		for _, o := range p.Restarts {
			fmt.Fprintf(a.Err, "Warning: %s gets an upstream, which restarts its Pods\n", o)
		}
		for _, o := range p.Again {
			fmt.Fprintf(a.Err, "Warning: %s loses another one as soon as no sidecar needs it, which restarts its Pods once more\n", o)
		}
	}
}

// renderLocally prints what a mesh's cluster would hold.
func (a *app) renderLocally(ctx context.Context, m mesh.Mesh, docs []filter.Document, around surroundings) error {
	plans, err := a.planLocally(ctx, m, docs, around, secretless)
	if err != nil {
		return err
	}
	a.warn(plans)
	var all plan.Plan
	for _, p := range plans {
		for _, o := range p.Objects {
			all.Objects = append(all.Objects, unserved(o))
		}
	}
	if a.output == formJSON {
		items := make([]any, len(all.Objects))
		for i, o := range all.Objects {
			items[i] = o.Content
		}
		return a.print(map[string]any{"apiVersion": "v1", "kind": "List", "items": items}, nil)
	}
	text, err := plan.Manifest(all.Objects)
	if err != nil {
		return err
	}
	return write(a.Out, text, "")
}

// unserved is an object without what a server adds to it, so that it can be applied.
func unserved(o plan.Object) plan.Object {
	u := (&unstructured.Unstructured{Object: o.Content}).DeepCopy()
	delete(u.Object, "status")
	for _, field := range []string{"resourceVersion", "uid", "generation", "creationTimestamp", "managedFields"} {
		unstructured.RemoveNestedField(u.Object, "metadata", field)
	}
	return plan.Object{Content: u.Object, Shared: o.Shared}
}

// known is the filter's module by its digest, after a dry run. One that proxies get by themselves is not fetched: its
// author has said which it is.
func known(ctx context.Context, modules *module.Resolver, f filter.Filter) (filter.Module, error) {
	byThemselves := f.Spec.Delivery.Mode == filter.DeliverDirect || f.Spec.Delivery.Mode == filter.DeliverLocal
	if byThemselves && f.Spec.Module.URL != "" && f.Spec.Module.SHA256 != "" {
		return f.Spec.Module, nil
	}
	m, data, err := modules.Resolve(ctx, f.Spec.Module)
	if err != nil {
		return m, err
	}
	if _, err := wasm.Inspect(ctx, data); err != nil {
		return m, err
	}
	_, err = wasm.DryRun(ctx, data, operation.Sandbox(f, nil))
	return m, err
}

// held keeps modules by their digest, in memory and where a plan finds them.
type held map[string]plan.Code

// Put never fails.
func (h held) Put(_ context.Context, data []byte) (string, error) {
	sum := sha256.Sum256(data)
	digest := hex.EncodeToString(sum[:])
	h[digest] = plan.Code{Inline: data}
	return digest, nil
}

// Touch has nothing to do: nothing is deleted.
func (h held) Touch(_ context.Context, digest string) (bool, error) {
	_, ok := h[digest]
	return ok, nil
}

// Get gives what was put.
func (h held) Get(_ context.Context, digest string) ([]byte, error) {
	c, ok := h[digest]
	if !ok {
		return nil, problem.ModuleUnavailable.New("sha256 %s", digest)
	}
	return c.Inline, nil
}

// readObjects reads what `kubectl get -o yaml` or `-o json` printed: objects, lists of them, or both.
func (a *app) readObjects(name string) ([]plan.Object, error) {
	body, err := a.readBody("--cluster", name)
	if err != nil {
		return nil, err
	}
	wrong := func(err error) error {
		return usage("--cluster: %s is not what `kubectl get -o yaml` prints: %s", name, strings.ReplaceAll(err.Error(), "\n", " "))
	}
	var objects []plan.Object
	dec := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(body), 4096)
	for {
		var o unstructured.Unstructured
		err := dec.Decode(&o.Object)
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, wrong(err)
		}
		switch {
		case o.Object == nil: // nothing between two ---
		case o.IsList():
			list, err := o.ToList()
			if err != nil {
				return nil, wrong(err)
			}
			for i := range list.Items {
				objects = append(objects, plan.Object{Content: list.Items[i].Object})
			}
		case o.GetKind() == "" || o.GetName() == "":
			return nil, wrong(errors.New("an object has no kind or no name"))
		default:
			objects = append(objects, plan.Object{Content: o.Object})
		}
	}
}
