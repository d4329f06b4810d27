package operation

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

// Cluster is a Kubernetes cluster as one user of it, or what else keeps the objects of plans; kube.Cluster is one, and
// consul.Client. Its String is what events call it.
type Cluster interface {
	fmt.Stringer
	// Read gives what the cluster serves and holds of what is asked.
	Read(context.Context, plan.Reads) (plan.Cluster, error)
	// Targets reads what holds on every target.
	Targets(context.Context) (ClusterTargets, error)
	// Secret reads an entry of a Secret: what is missing of it, or a right to read it, is named.
	Secret(ctx context.Context, namespace, name, key string) (string, error)
	// Target reads what holds on a target.
	Target(ctx context.Context, mesh string, t filter.Target) (ClusterTarget, error)
	// Loaded is that of a Backend, by whatever proof the plan's mesh has. What cannot be looked at is problem.NotVerified.
	Loaded(context.Context, plan.Plan) iter.Seq2[plan.Loaded, error]
}

// ClusterTargets are all targets of a cluster as they were read; kube.Targets are.
type ClusterTargets interface {
	// Chains lists what we put there.
	Chains() []filter.Chain
	// Revisions are the chains that they had, oldest first.
	Revisions() []plan.Revision
	// Target is one of them, or one that has nothing.
	Target(mesh string, t filter.Target) ClusterTarget
}

// BegunTargets are ClusterTargets that know which of them are being changed, or were when somebody was cut off.
type BegunTargets interface {
	// Begun lists the chains that held before.
	Begun() []filter.Chain
}

// ClusterTarget is one target of a cluster as it was read; kube.Target is one. What is applied builds on what was read,
// and is problem.ChainChanged when somebody else has changed it meanwhile.
type ClusterTarget interface {
	// Committed returns what holds; its Version is empty while an Apply was begun and neither it nor another committed.
	Committed() plan.Plan
	// Apply makes the target hold the plan, and Commit has the cluster's inventory say so.
	Apply(context.Context, plan.Plan) ([]plan.Change, error)
	Commit(context.Context) error
	// Diff tells what Apply would change.
	Diff(context.Context, plan.Plan) ([]plan.Change, error)
	// Written says whether Apply came to write something.
	Written() bool
	// Versions are the resourceVersions of the objects as the last Apply left them, by plan.Change.Subject.
	Versions() map[string]string
	// Revisions are the chains that it had, oldest first.
	Revisions() []plan.Revision
	// Objects are those of ours that are there.
	Objects(context.Context) ([]plan.Object, error)
}

// Folder is a Cluster that puts modules where its proxies read them as files.
type Folder interface {
	// ModulePath is where a module of that digest is, or will be; empty where modules are not put anywhere.
	ModulePath(digest string) string
	// PutModule makes sure that it is there. Without bytes it cannot be put there.
	PutModule(digest string, data []byte) error
	// SweepModules deletes those that were put there, and that were not needed for the time of grace.
	SweepModules(ctx context.Context, needed map[string]bool, grace time.Duration) (deleted []string, err error)
}

// HubAgent is a Cluster at whose agent Image Hub's services are registered, behind sidecars that somebody else starts.
type HubAgent interface {
	// AddHub registers what answers at api, so that a sidecar takes requests for it at web.
	AddHub(ctx context.Context, api, web string) ([]plan.Change, error)
	// RemoveHub takes that back.
	RemoveHub(context.Context) ([]plan.Change, error)
	// HasHub says whether it is there.
	HasHub(context.Context) (bool, error)
}

// previewer is a ClusterTarget that shows what applying a plan would leave, and what that changes.
type previewer interface {
	// Preview shows the plan that is shown, which has references for secrets, and compares with the real one.
	Preview(ctx context.Context, shown, real plan.Plan) (text string, changes []plan.Change, err error)
}

// clusterBackend makes the plans of one mesh true in one cluster, for one operation.
type clusterBackend struct {
	r       *Runner
	cluster *reading
	mesh    mesh.Mesh

	mu      sync.Mutex
	targets map[string]*clusterTarget // by filter.Target.ID, as Committed read them
}

type clusterTarget struct {
	ClusterTarget
	before  plan.Plan      // what held when it was read
	dropped []string       // what the last Apply took away
	put     []plan.Change  // what the last Apply did to objects whose Pods restart with that
	tried   []filter.Chain // that were applied since
	written bool           // by any Apply since
	nobody  bool           // has a proxy there, as was seen just before the last plan was applied
}

var _ Backend = (*clusterBackend)(nil)

// reading is a cluster whose targets are read once for an operation, all at a time: before it changes one it has to know
// the others too, since its filters may move from there. Operations that touch the same filter come one after the other.
type reading struct {
	Cluster
	mu      sync.Mutex
	targets ClusterTargets
	used    map[string]bool // by filter.Chain.ID: has been changed since, or may have been
}

// all gives every target as it was when the operation began.
func (c *reading) all(ctx context.Context) (ClusterTargets, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.targets == nil {
		targets, err := c.Targets(ctx)
		if err != nil {
			return nil, err
		}
		c.targets = targets
	}
	return c.targets, nil
}

// read gives one target: as it was when the operation began, and the next time as it is then.
func (c *reading) read(ctx context.Context, mesh string, t filter.Target) (ClusterTarget, error) {
	targets, err := c.all(ctx)
	if err != nil {
		return nil, err
	}
	id := filter.Chain{Mesh: mesh, Target: t}.ID()
	c.mu.Lock()
	used := c.used[id]
	c.used[id] = true
	c.mu.Unlock()
	if used {
		return c.Target(ctx, mesh, t)
	}
	at := targets.Target(mesh, t)
	if d, ok := at.(interface{ Damaged() error }); ok && d.Damaged() != nil {
		return nil, d.Damaged()
	}
	return at, nil
}

// damage is what cannot be read of the cluster's targets.
func (c *reading) damage(ctx context.Context) []error {
	targets, err := c.all(ctx)
	if d, ok := targets.(interface{ Damaged() []error }); ok && err == nil {
		return d.Damaged()
	}
	return nil
}

// World reads what the mesh wants to know of the cluster, and has the modules' bytes where they can be had.
func (b *clusterBackend) World(ctx context.Context, c filter.Chain) (w plan.World, err error) {
	t, err := b.target(ctx, c.Target)
	if err != nil {
		return w, err
	}
	w.Held = t.Committed().Chain
	w.Modules = map[string]plan.Code{}
	missing := false
	for _, f := range c.Filters {
		digest := f.Spec.Module.SHA256
		if _, ok := w.Modules[digest]; ok {
			continue
		}
		_, data, err := b.r.Modules.Resolve(ctx, filter.Module{SHA256: digest})
		if err != nil && !errors.Is(err, problem.ModuleUnavailable) {
			return w, named(f, err)
		}
		code := plan.Code{Inline: data}
		if folder, ok := b.cluster.Cluster.(Folder); ok {
			code.Path = folder.ModulePath(digest)
		}
		w.Modules[digest] = code
		missing = missing || data == nil
	}
	if missing {
		// Another adapter may have put it there, or this one long ago: the chain itself may have it.
		objects, err := t.Objects(ctx)
		if err != nil {
			return w, err
		}
		for _, o := range objects {
			carried(o.Content, w.Modules)
		}
	}
	reads := b.mesh.Reads(c)
	if w.Cluster, err = b.cluster.Read(ctx, reads); err != nil {
		return w, err
	}
	if b.mesh.Name() == consulMesh && len(c.Filters) > 0 && !b.r.isAgent(b.cluster) && !slices.Contains(mesh.Seen(w.Cluster), consulMesh) {
		return w, problem.KindNotServed.New("%s: ServiceDefaults of consul.hashicorp.com", b.cluster)
	}
	if len(reads.Selected) == 0 {
		return w, nil
	}
	return w, b.bare(ctx, t, w.Cluster.Objects)
}

// sharing is a ClusterTarget that knows what of an object of the user's is ours.
type sharing interface {
	// Bare is the object, as it was read, without what was added to it for the target; not ok: that is nothing.
	Bare(plan.Object) (bare map[string]any, ok bool)
}

// bare has objects that were read tell what of them is ours, for whichever target: t is one of them.
func (b *clusterBackend) bare(ctx context.Context, t *clusterTarget, objects []plan.Object) error {
	all, err := b.cluster.all(ctx)
	if err != nil {
		return err
	}
	chains := all.Chains()
	if knowing, ok := all.(BegunTargets); ok {
		chains = slices.Concat(chains, knowing.Begun())
	}
	targets := []ClusterTarget{t.ClusterTarget} // as it is now
	for _, c := range chains {
		if c.ID() != t.Committed().Chain.ID() {
			targets = append(targets, all.Target(c.Mesh, c.Target))
		}
	}
	for i := range objects {
		o := &objects[i]
		o.Bare = o.Content
		for _, t := range targets {
			sharing, ok := t.(sharing)
			if !ok {
				continue
			}
			if bare, ok := sharing.Bare(*o); ok {
				o.Bare, o.For = bare, t.Committed().Chain.Target.String()
				break
			}
		}
	}
	return nil
}

// carried gives the modules their bytes, where an object has them.
func carried(v any, modules map[string]plan.Code) {
	switch t := v.(type) {
	case map[string]any:
		for _, e := range t {
			carried(e, modules)
		}
	case []any:
		for _, e := range t {
			carried(e, modules)
		}
	case string:
		data, err := base64.StdEncoding.DecodeString(t)
		if err != nil {
			return
		}
		sum := sha256.Sum256(data)
		if digest := hex.EncodeToString(sum[:]); modules[digest].Inline == nil {
			if _, ok := modules[digest]; ok {
				modules[digest] = plan.Code{Inline: data}
			}
		}
	}
}

// Committed reads the target.
func (b *clusterBackend) Committed(ctx context.Context, t filter.Target) (plan.Plan, error) {
	read, err := b.cluster.read(ctx, b.mesh.Name(), t)
	if err != nil {
		return plan.Plan{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.targets[t.ID()] = &clusterTarget{ClusterTarget: read, before: read.Committed()}
	return read.Committed(), nil
}

// List lists the chains of the mesh.
func (b *clusterBackend) List(ctx context.Context) (of []filter.Chain, err error) {
	targets, err := b.cluster.all(ctx)
	if err != nil {
		return nil, err
	}
	for _, c := range targets.Chains() {
		if c.Mesh == b.mesh.Name() {
			of = append(of, c)
		}
	}
	return of, nil
}

// begun is a target that is being changed, or was when somebody was cut off.
type begun struct {
	filter.Chain              // that held before
	keys         []filter.Key // that there are objects for, of those that were asked for
}

// Begun lists the mesh's targets that are being changed, or were when somebody was cut off, and on which there are objects
// for any of the filters.
func (b *clusterBackend) Begun(ctx context.Context, keys []filter.Key) (of []begun, err error) {
	targets, err := b.cluster.all(ctx)
	if err != nil {
		return nil, err
	}
	knowing, ok := targets.(BegunTargets)
	if !ok {
		return nil, nil
	}
	for _, c := range knowing.Begun() {
		if c.Mesh != b.mesh.Name() {
			continue
		}
		t, err := b.target(ctx, c.Target)
		if err != nil {
			return nil, err
		}
		objects, err := t.Objects(ctx)
		if err != nil {
			return nil, err
		}
		there := slices.DeleteFunc(slices.Clone(keys), func(k filter.Key) bool {
			return !slices.ContainsFunc(objects, func(o plan.Object) bool { return mesh.Carries(o, k) })
		})
		if len(there) > 0 {
			of = append(of, begun{c, there})
		}
	}
	return of, nil
}

// Drift puts the chain next to what the cluster holds.
func (b *clusterBackend) Drift(ctx context.Context, c filter.Chain) ([]plan.Change, error) {
	t, err := b.target(ctx, c.Target)
	if err != nil {
		return nil, err
	}
	p, err := b.r.plan(ctx, b, c)
	if known, ok := t.ClusterTarget.(interface {
		Drift(context.Context) ([]string, error)
	}); ok && errors.Is(err, problem.NoDelivery) {
		// Who has no module's bytes, which may have gone with the object, can still tell what became of the objects.
		if drift, err := known.Drift(ctx); err == nil && len(drift) > 0 {
			return nil, problem.Drift.New("%s", strings.Join(drift, "; "))
		}
	}
	if err != nil {
		return nil, err
	}
	changes, err := t.Diff(ctx, p)
	return slices.DeleteFunc(changes, func(c plan.Change) bool { return c.Action == plan.Unchanged }), err
}

// preview shows what a plan would make of its target.
func (b *clusterBackend) preview(ctx context.Context, shown, real plan.Plan) (string, []plan.Change, error) {
	t, err := b.target(ctx, real.Chain.Target)
	if err != nil {
		return "", nil, err
	}
	p, ok := t.ClusterTarget.(previewer)
	if !ok {
		return "", nil, problem.RenderOnly.New("spec.mesh is %q", real.Chain.Mesh)
	}
	return p.Preview(ctx, shown, real)
}

// History is what the inventories keep of the mesh's chains.
func (b *clusterBackend) History(ctx context.Context) (of []plan.Revision, err error) {
	targets, err := b.cluster.all(ctx)
	if err != nil {
		return nil, err
	}
	for _, rev := range targets.Revisions() {
		if rev.Chain.Mesh == b.mesh.Name() {
			of = append(of, rev)
		}
	}
	return of, nil
}

// Behind is nothing: what holds is read from the cluster each time.
func (b *clusterBackend) Behind(context.Context) ([]filter.Chain, error) { return nil, nil }

// Adopt has nothing to do.
func (b *clusterBackend) Adopt(context.Context, plan.Plan) error { return nil }

// target is one that Committed has read.
func (b *clusterBackend) target(ctx context.Context, t filter.Target) (*clusterTarget, error) {
	if b.read(t) == nil {
		if _, err := b.Committed(ctx, t); err != nil {
			return nil, err
		}
	}
	return b.read(t), nil
}

func (b *clusterBackend) read(t filter.Target) *clusterTarget {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.targets[t.ID()]
}

// Apply makes the target hold the plan, and remembers what went for that.
func (t *clusterTarget) Apply(ctx context.Context, p plan.Plan) ([]plan.Change, error) {
	t.tried = append(t.tried, p.Chain)
	changes, err := t.ClusterTarget.Apply(ctx, p)
	t.written = t.written || t.ClusterTarget.Written()
	t.dropped, t.put = nil, nil
	for _, c := range changes {
		if strings.HasPrefix(string(c.Action), string(plan.Restarted)) {
			t.put = append(t.put, c)
		}
		if c.Action == plan.Deleted {
			t.dropped = append(t.dropped, c.Subject)
		}
	}
	return changes, err
}

// gone are the filters that the target had or was offered, less those of a chain.
func (t *clusterTarget) gone(now filter.Chain) (keys []filter.Key) {
	for _, c := range append([]filter.Chain{t.before.Chain}, t.tried...) {
		for _, f := range c.Filters {
			if _, ok := now.Find(f.Key); !ok && !slices.Contains(keys, f.Key) {
				keys = append(keys, f.Key)
			}
		}
	}
	return keys
}

// Apply makes the cluster hold the plan. When that fails halfway, it holds what it held before, unless ctx has ended: then
// the operation is begun again, and goes on from what the inventory says.
func (b *clusterBackend) Apply(ctx context.Context, p plan.Plan) ([]plan.Change, error) {
	t, err := b.target(ctx, p.Chain.Target)
	if err != nil {
		return nil, err
	}
	if err := b.put(ctx, p.Chain); err != nil {
		return nil, err
	}
	changes, err := t.Apply(ctx, p)
	if err == nil || !t.written || ctx.Err() != nil || errors.Is(err, problem.ChainChanged) {
		return changes, stale(err)
	}
	half := *problem.Of(err)
	half.Err = err
	half.Details += "\nWhat was written before that is taken back."
	if _, err := b.Revert(context.WithoutCancel(ctx), p.Chain.Target); err != nil {
		half.Details = fmt.Sprintf("%s\nWhat was written before that could not be taken back: %v", problem.Of(half.Err).Details, err)
	} else {
		half.Details += b.restored(p.Chain.Target)
	}
	return nil, &half
}

// restored tells, a line each, which Pods restart since Revert gave back what they had.
func (b *clusterBackend) restored(t filter.Target) (lines string) {
	for _, c := range b.read(t).put {
		lines += fmt.Sprintf("\n%s has again what it had%s", c.Subject, strings.TrimPrefix(string(c.Action), string(plan.Updated)))
	}
	return lines
}

// put has the modules of a chain where proxies read them, before anything refers to them.
func (b *clusterBackend) put(ctx context.Context, c filter.Chain) error {
	folder, ok := b.cluster.Cluster.(Folder)
	if !ok {
		return nil
	}
	for _, f := range c.Filters {
		digest := f.Spec.Module.SHA256
		if mode := f.Spec.Delivery.Mode; folder.ModulePath(digest) == "" || f.Spec.Delivery.LocalPath != "" ||
			mode != filter.DeliverAuto && mode != filter.DeliverLocal {
			continue
		}
		_, data, err := b.r.Modules.Resolve(ctx, filter.Module{SHA256: digest})
		if err != nil && !errors.Is(err, problem.ModuleUnavailable) {
			return named(f, err)
		}
		if err := folder.PutModule(digest, data); err != nil {
			return named(f, err)
		}
	}
	return nil
}

// revertTimeout bounds putting back what held before.
const revertTimeout = time.Minute

// Revert makes the target hold again what it held when it was read.
func (b *clusterBackend) Revert(ctx context.Context, t filter.Target) (plan.Plan, error) {
	ctx, cancel := context.WithTimeout(ctx, revertTimeout)
	defer cancel()
	read, err := b.target(ctx, t)
	if err != nil {
		return plan.Plan{}, err
	}
	p, err := b.r.plan(ctx, b, read.before.Chain)
	if err != nil {
		return plan.Plan{}, err
	}
	p.Back = true
	if err := b.put(ctx, p.Chain); err != nil {
		return plan.Plan{}, err
	}
	if _, err := read.Apply(ctx, p); err != nil {
		return plan.Plan{}, err
	}
	if len(p.Again) > 0 { // what the plan that is taken back needed
		if p, err = b.r.plan(ctx, b, read.before.Chain); err != nil {
			return plan.Plan{}, err
		}
		p.Back = true
		if _, err := read.Apply(ctx, p); err != nil {
			return plan.Plan{}, err
		}
	}
	return p, b.Commit(ctx, p)
}

// Commit has the inventory say that the plan holds. Before that the adapter remembers the modules, which proxies may get
// from it for as long as they have the chain.
func (b *clusterBackend) Commit(ctx context.Context, p plan.Plan) error {
	t, err := b.target(ctx, p.Chain.Target)
	if err != nil {
		return err
	}
	used := usedRecord(b.cluster.String(), p.Chain, t.Revisions())
	if len(p.Chain.Filters) > 0 {
		if err := used.put(ctx, b.r.Records); err != nil {
			return fmt.Errorf("remember the modules of %s: %w", p.Chain.Target, err)
		}
	}
	if err := t.Commit(ctx); err != nil || len(p.Chain.Filters) > 0 {
		return stale(err)
	}
	if err := used.put(ctx, b.r.Records); err != nil { // they are live for longer than they need to be
		b.r.Log.Warn("modules are not forgotten", "cluster", b.cluster.String(), "target", p.Chain.Target.String(), "err", err)
	}
	return nil
}

// Loaded asks the cluster how far the target's proxies are. What nobody can look at is no error: the operation then says so.
func (b *clusterBackend) Loaded(ctx context.Context, p plan.Plan) iter.Seq2[plan.Loaded, error] {
	return func(yield func(plan.Loaded, error) bool) {
		if len(p.Objects) == 0 && len(p.Chain.Filters) > 0 { // as Committed gives it
			var err error
			if p, err = b.r.plan(ctx, b, p.Chain); err != nil {
				yield(plan.Loaded{}, err)
				return
			}
		}
		if t := b.read(p.Chain.Target); t != nil {
			if t.nobody { // nobody is to be waited for, and whoever comes gets what is there
				yield(plan.Loaded{}, nil)
				return
			}
			p.Dropped, p.Gone, p.Versions = slices.Concat(p.Dropped, t.dropped), t.gone(p.Chain), t.Versions()
		}
		for l, err := range b.cluster.Loaded(ctx, p) {
			if errors.Is(err, problem.NotVerified) {
				l, err = plan.Loaded{Unverified: strings.TrimPrefix(problem.Of(err).Details, p.Chain.Target.String()+": ")}, nil
			}
			if !yield(l, err) || err != nil || l.Unverified != "" && l.Expected() == 0 {
				return
			}
		}
	}
}

// Crowd is a Cluster that knows how many proxies a plan is for.
type Crowd interface {
	// Connected lists the plan's Pods whose proxies are connected to their control plane, by name.
	Connected(context.Context, plan.Plan) ([]plan.Pod, error)
}

// Surveyed is a Cluster whose proxies can be asked what they run.
type Surveyed interface {
	// Survey looks for Wasm filters in proxies that nothing in the cluster explains.
	Survey(context.Context) (plan.Survey, error)
}

// Fetcher is a Cluster whose proxies may fetch modules by themselves.
type Fetcher interface {
	// Before is problem.UpstreamMissing where proxies of the plan have no way to what it has them fetch, and else what they
	// say of fetching by now. What cannot be looked at is no error.
	Before(context.Context, plan.Plan) (map[string]plan.Fetching, error)
}

// Try plans that one proxy runs the plan before the others do. Nil: there is only one, or nobody can see them, or the mesh
// cannot do it.
func (b *clusterBackend) Try(ctx context.Context, held filter.Chain, next plan.Plan) (*plan.Trial, error) {
	m, tries := b.mesh.(mesh.Trier)
	crowd, knows := b.cluster.Cluster.(Crowd)
	if !tries || !knows {
		return nil, nil
	}
	pods, err := crowd.Connected(ctx, next)
	if err != nil {
		b.r.Log.Info("no proxy tries a chain first, since none can be seen", "cluster", b.cluster.String(), "target", next.Chain.Target.String(), "err", err)
	}
	if err != nil || len(pods) < 2 {
		if t := b.read(next.Chain.Target); t != nil {
			t.nobody = err == nil && len(pods) == 0
		}
		return nil, ctx.Err()
	}
	before, err := b.r.plan(ctx, b, held)
	if err != nil { // what cannot be planned any more is what the operation may be there to mend
		b.r.Log.Info("no proxy tries a chain first, since the one before cannot be planned", "cluster", b.cluster.String(), "target", next.Chain.Target.String(), "err", err)
		return nil, ctx.Err()
	}
	resolved, err := b.r.resolvedChain(ctx, b, next.Chain)
	if err != nil {
		return nil, err
	}
	w, err := b.r.world(ctx, b, next.Chain)
	if err != nil {
		return nil, err
	}
	return m.Try(before, next, resolved, w, pods[0])
}

// stale makes an error of a target that somebody else has changed one that has the operation start again from what is
// there now.
func stale(err error) error {
	if errors.Is(err, problem.ChainChanged) {
		return staleError{err}
	}
	return err
}

type staleError struct{ error }

func (e staleError) Unwrap() error      { return e.error }
func (staleError) Is(target error) bool { return target == store.ErrStale }
