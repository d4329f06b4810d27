package operation

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

// place is where chains are: on the proxies that the adapter drives by itself, or in a cluster.
type place struct {
	cluster  Cluster // nil: the adapter's own proxies
	backends map[string]Backend
	agent    HubAgent // where Image Hub's services are registered; nil where they are not
}

// name is what events call the place; empty where there is but one of its kind.
func (pl place) name() string {
	if pl.cluster == nil {
		return ""
	}
	return pl.cluster.String()
}

// says puts the place's name before what a problem there tells, which may begin with the place's address itself.
func (pl place) says(details string) string {
	name := pl.name()
	host := name[strings.LastIndexByte(name, ' ')+1:]
	if begun := strings.TrimPrefix(details, name+": "); begun != details {
		return details
	}
	return name + ": " + strings.TrimPrefix(details, host+": ")
}

// key tells apart what is called the same in several places.
func (pl place) key(s string) string {
	if pl.cluster == nil {
		return s
	}
	return pl.name() + "|" + s
}

// on names a target for people.
func (pl place) on(t filter.Target) string { return t.String() + pl.suffix() }

// suffix says where something is.
func (pl place) suffix() string {
	if pl.cluster == nil {
		return ""
	}
	return " in " + pl.name()
}

// of picks the filters whose mesh is in the place.
func (pl place) of(filters []filter.Filter) (in []filter.Filter) {
	for _, f := range filters {
		if pl.backends[f.Spec.Mesh] != nil {
			in = append(in, f)
		}
	}
	return in
}

// backend finds the backend of a mesh.
func (pl place) backend(meshName string) (Backend, error) {
	if b, ok := pl.backends[meshName]; ok {
		return b, nil
	}
	if _, err := mesh.Find(meshName); err != nil {
		return nil, err
	}
	return nil, problem.RenderOnly.New("spec.mesh is %q", meshName)
}

// holding lists the place's chains that hold any of the filters.
func (pl place) holding(ctx context.Context, keys ...filter.Key) ([]filter.Chain, error) {
	var out []filter.Chain
	for _, b := range pl.backends {
		chains, err := b.List(ctx)
		if err != nil {
			return nil, fmt.Errorf("list chains: %w", err)
		}
		for _, c := range chains {
			if slices.ContainsFunc(keys, func(k filter.Key) bool { _, ok := c.Find(k); return ok }) {
				out = append(out, c)
			}
		}
	}
	slices.SortFunc(out, func(a, b filter.Chain) int { return strings.Compare(a.ID(), b.ID()) })
	return out, nil
}

// begun does f for each target that is being changed, or was when somebody was cut off, and has objects for any of the filters.
func (pl place) begun(ctx context.Context, keys []filter.Key, f func(*clusterBackend, begun) error) error {
	for _, b := range pl.backends {
		b, ok := b.(*clusterBackend)
		if !ok {
			continue
		}
		targets, err := b.Begun(ctx, keys)
		if err != nil {
			return fmt.Errorf("look for what is begun: %w", err)
		}
		for _, t := range targets {
			if err := f(b, t); err != nil {
				return err
			}
		}
	}
	return nil
}

// damage is what cannot be read of the place's targets; others can be changed all the same.
func (pl place) damage(ctx context.Context) error {
	for _, b := range pl.backends {
		if in, ok := b.(*clusterBackend); ok {
			return joined(in.cluster.damage(ctx)) // which all backends share
		}
	}
	return nil
}

// joined is what is wrong in several ways: the first kind of problem, and all that they say; nil: nothing.
func joined(errs []error) error {
	if len(errs) < 2 {
		return errors.Join(errs...)
	}
	var lines []string
	for _, err := range errs {
		lines = append(lines, problem.Of(err).Details)
	}
	p := *problem.Of(errs[0])
	p.Details, p.Err = strings.Join(lines, "\n"), errors.Join(errs...)
	return &p
}

// here is the place of the proxies that the adapter drives by itself.
func (r *Runner) here() place { return place{backends: r.Backends} }

// in is the place of a cluster, for one operation.
func (r *Runner) in(c Cluster) place {
	pl, read := place{cluster: c, backends: map[string]Backend{}}, &reading{Cluster: c, used: map[string]bool{}}
	for _, name := range mesh.Names() {
		if m, _ := mesh.Find(name); !m.OwnRights() {
			pl.backends[name] = &clusterBackend{r: r, cluster: read, mesh: m, targets: map[string]*clusterTarget{}}
		}
	}
	return pl
}

// consulMesh is the one mesh that is in a cluster or, off Kubernetes, in a Consul that the adapter knows.
var consulMesh = mesh.Consul{}.Name()

// inConsul is the place of the adapter's own Consul, for one operation.
func (r *Runner) inConsul() place {
	pl := r.in(r.Consul)
	pl.backends = map[string]Backend{consulMesh: pl.backends[consulMesh]}
	if r.HubSidecar != "" {
		pl.agent, _ = r.Consul.(HubAgent)
	}
	return pl
}

// isConsul says whether filters of a mesh go to the adapter's own Consul.
func (r *Runner) isConsul(mesh string, kubeconfigs bool) bool {
	return r.Consul != nil && mesh == consulMesh && !kubeconfigs
}

// isAgent says whether that is the adapter's own Consul, and no cluster.
func (r *Runner) isAgent(c Cluster) bool { return r.Consul != nil && c.String() == r.Consul.String() }

// toConsul says whether what a job has for Consul is for the adapter's own.
func (r *Runner) toConsul(j job) bool {
	return r.isConsul(consulMesh, len(j.kubeconfigs) > 0) && !j.InClusters && (len(j.Only) == 0 || slices.Contains(j.Only, r.Consul.String()))
}

// clusters are the places of an operation with these kubeconfigs. One that is refused is a place where everything fails.
func (r *Runner) clusters(kubeconfigs []string) (places []place) {
	if r.Own != nil {
		return []place{r.in(r.Own)}
	}
	if r.Clusters == nil {
		return nil
	}
	for i, k := range kubeconfigs {
		if slices.Contains(kubeconfigs[:i], k) {
			continue
		}
		c, err := r.Clusters([]byte(k))
		if err != nil {
			c = unopened{fmt.Sprintf("kube_configs[%d]", i), err}
		}
		places = append(places, r.in(c))
	}
	return places
}

// elsewhere are the places besides the proxies that the adapter drives: clusters, and its own Consul where a request has no
// kubeconfigs.
func (r *Runner) elsewhere(kubeconfigs []string) []place {
	places := r.clusters(kubeconfigs)
	if r.isConsul(consulMesh, len(kubeconfigs) > 0) {
		places = append(places, r.inConsul())
	}
	return places
}

// unopened is a cluster whose kubeconfig is refused.
type unopened struct {
	name string
	err  error
}

func (u unopened) String() string { return u.name }
func (u unopened) Read(context.Context, plan.Reads) (plan.Cluster, error) {
	return plan.Cluster{}, u.err
}
func (u unopened) Targets(context.Context) (ClusterTargets, error) { return nil, u.err }
func (u unopened) Secret(context.Context, string, string, string) (string, error) {
	return "", u.err
}
func (u unopened) Target(context.Context, string, filter.Target) (ClusterTarget, error) {
	return nil, u.err
}
func (u unopened) Loaded(context.Context, plan.Plan) iter.Seq2[plan.Loaded, error] {
	return func(yield func(plan.Loaded, error) bool) { yield(plan.Loaded{}, u.err) }
}

// together is what is wrong with every one of the places: the first kind of problem, and all that they say.
func together(places []place, errs []error) error {
	var lines []string
	for i, err := range errs {
		lines = append(lines, places[i].says(problem.Of(err).Details))
	}
	p := *problem.Of(errs[0])
	p.Details = strings.Join(lines, "\n")
	return &p
}

// meshes are those that a job's documents are for; none where they leave it open.
func (j job) meshes() []string {
	meshes := slices.Clone(j.Meshes)
	for _, f := range j.Filters {
		meshes = append(meshes, f.Spec.Mesh)
	}
	return meshes
}

// namesCluster says whether a job is for a mesh of clusters by name.
func (r *Runner) namesCluster(j job) bool {
	return slices.ContainsFunc(j.meshes(), func(m string) bool { return r.Backends[m] == nil })
}

// own are the places of a job that are the adapter's own, its proxies and its Consul, and the meshes that are elsewhere.
func (r *Runner) own(j job) (places []place, elsewhere []string) {
	meshes := j.meshes()
	driven := func(m string) bool { return r.Backends[m] != nil }
	if len(r.Backends) > 0 && len(meshes) == 0 || slices.ContainsFunc(meshes, driven) {
		places = append(places, r.here())
	}
	consul := func(m string) bool { return m == consulMesh && r.toConsul(j) }
	if r.Consul != nil && j.everywhere() || slices.ContainsFunc(meshes, consul) {
		places = append(places, r.inConsul())
	}
	return places, slices.DeleteFunc(meshes, func(m string) bool { return driven(m) || consul(m) })
}

// everywhere says whether a job is for all places that there are.
func (j job) everywhere() bool {
	return len(j.meshes()) == 0 && (len(j.Remove) > 0 || j.Operation == opStatus)
}

// places are those of a job.
func (r *Runner) places(j job) ([]place, error) {
	places, meshes := r.own(j)
	everywhere := j.everywhere()
	if !everywhere && len(meshes) == 0 {
		return places, nil
	}
	clusters := r.clusters(j.kubeconfigs)
	if !everywhere && r.toConsul(j) {
		for _, pl := range clusters { // which are for the documents' other meshes
			delete(pl.backends, consulMesh)
		}
	}
	if len(j.Only) > 0 {
		clusters = slices.DeleteFunc(clusters, func(pl place) bool { return !slices.Contains(j.Only, pl.name()) })
	}
	if len(clusters) == 0 && !everywhere {
		return nil, problem.ClusterMissing.New("spec.mesh is %s", strings.Join(meshes, ", "))
	}
	var refused []error
	for _, pl := range clusters {
		if u, ok := pl.cluster.(unopened); ok {
			refused = append(refused, u.err)
		}
	}
	if len(refused) > 0 && len(places)+len(clusters) == len(refused) {
		return nil, together(clusters, refused)
	}
	return append(places, clusters...), nil
}

// opened leaves out, with a warning, the clusters whose kubeconfigs are refused: who names no mesh may mean none of them.
func opened(s *story, places []place) []place {
	return slices.DeleteFunc(places, func(pl place) bool {
		u, refused := pl.cluster.(unopened)
		if refused {
			p := *problem.Of(u.err)
			p.Details = u.name + " is left out: " + p.Details
			s.warn(&p)
		}
		return refused
	})
}

// lookTimeout bounds finding out which meshes an operation's clusters have.
const lookTimeout = 10 * time.Second

// shown is the one mesh that clusters show, or plain Envoy without a cluster. Of several clusters those count that answer.
func (r *Runner) shown(ctx context.Context, kubeconfigs []string) (string, error) {
	places := r.clusters(kubeconfigs)
	if len(places) == 0 {
		if r.Consul != nil && len(r.Backends) == 0 {
			return consulMesh, nil
		}
		return mesh.Envoy{}.Name(), nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	seen, errs := make([][]string, len(places)), make([]error, len(places))
	var g errgroup.Group
	g.SetLimit(sideBySide)
	for i, pl := range places {
		g.Go(func() error {
			c, err := pl.cluster.Read(ctx, mesh.Signs())
			if ctx.Err() != nil {
				err = problem.ClusterUnreachable.New("%s did not say within %s which meshes it has", pl.name(), lookTimeout)
			}
			seen[i], errs[i] = mesh.Seen(c), err
			return nil
		})
	}
	_ = g.Wait()
	if !slices.Contains(errs, nil) {
		return "", together(places, errs)
	}
	var all, where []string
	for i, names := range seen {
		all = append(all, names...)
		for _, n := range names {
			where = append(where, n+places[i].suffix())
		}
	}
	slices.Sort(all)
	switch all = slices.Compact(all); len(all) {
	case 0:
		return "", problem.MeshNotSupported.New("spec.mesh is auto, and the request's clusters show no mesh; set spec.mesh to envoy for Envoys that the adapter configures itself")
	case 1:
		return all[0], nil
	}
	return "", problem.MeshAmbiguous.New("there are %s", strings.Join(where, ", "))
}

// sideBySide bounds how many clusters one operation works on at once.
const sideBySide = 8

// each does f in every place, side by side, and gives what came of it. A failure in one stops none of the others; of
// several places it is problem.ClustersFailed, with what became of each.
func (r *Runner) each(ctx context.Context, s *story, places []place, f func(context.Context, *story, place) (outcomes, error)) (outcomes, error) {
	done, errs := make([]outcomes, len(places)), make([]error, len(places))
	var g errgroup.Group
	g.SetLimit(sideBySide)
	for i, pl := range places {
		g.Go(func() error {
			defer func() {
				if p := recover(); p != nil {
					errs[i] = r.panicked(s.operation, p)
				}
			}()
			ctx, end := ctx, func(error) {}
			if pl.cluster != nil {
				ctx, end = r.step(ctx, "cluster", attrCluster.String(pl.name()))
			}
			done[i], errs[i] = f(ctx, s.in(pl.name()), pl)
			end(errs[i])
			for n := range done[i] {
				done[i][n].line += pl.suffix()
			}
			return nil
		})
	}
	_ = g.Wait()
	for _, err := range errs {
		if errors.Is(err, store.ErrAway) || errors.Is(err, store.ErrLost) {
			return nil, err
		}
	}
	failed := len(errs) - len(slices.DeleteFunc(slices.Clone(errs), func(err error) bool { return err != nil }))
	switch {
	case failed == 0:
		return slices.Concat(done...), nil
	case len(places) == 1:
		p := *problem.Of(errs[0])
		p.Err = errs[0]
		if places[0].cluster != nil && !strings.Contains(p.Details, places[0].name()) {
			p.Details = places[0].says(p.Details)
		}
		return nil, &p
	}
	lines := []string{fmt.Sprintf("%d of %d failed", failed, len(places))}
	for i, err := range errs {
		if p := problem.Of(err); p != nil {
			lines = append(lines, fmt.Sprintf("%s failed: %s: %s [%s]", places[i].title(), p.Kind.Summary, p.Details, p.Kind.Code))
		}
	}
	for i, err := range errs {
		for _, o := range done[i] {
			if err == nil {
				lines = append(lines, fmt.Sprintf("Done: %s; %s", o.line, o.detail))
			}
		}
	}
	return nil, problem.ClustersFailed.New("%s", strings.Join(lines, "\n"))
}

// title names the place where a sentence begins.
func (pl place) title() string {
	if pl.cluster == nil {
		return "plain Envoy"
	}
	return pl.name()
}

// panicked tells the log what went wrong, and the operation's story where to find it.
func (r *Runner) panicked(operation string, p any) error {
	id := rand.Text()
	r.Log.Error("operation panicked", "operation", operation, "id", id, "panic", p, "stack", string(debug.Stack()))
	return problem.Internal.New("operation %s stopped where it was; look for id %s in the adapter's log", operation, id)
}
