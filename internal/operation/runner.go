package operation

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

// Modules turns a module's source into bytes that are kept by digest.
type Modules interface {
	// Resolve returns the module with SHA256 set and without inline bytes, and the bytes.
	Resolve(context.Context, filter.Module) (filter.Module, []byte, error)
	// ResolveWith is Resolve with other credentials of registries than the adapter's.
	ResolveWith(ctx context.Context, m filter.Module, secret func(name, key string) (string, error)) (filter.Module, []byte, error)
	// Hold has a module that is stored stay so for a while, before something refers to it.
	Hold(context.Context, filter.Module) error
	// Shipped returns the digests of the modules that ship with the program, by their names.
	Shipped() map[string]string
	// Address is where proxies can fetch a module from the adapter; empty when it serves none to them.
	Address(digest string) string
	// Check makes sure that the address which proxies fetch a module from gives its bytes, with their credentials.
	Check(ctx context.Context, m filter.Module, secret func(name, key string) (string, error)) error
}

// Application is Image Hub as the imagehub operation needs it.
type Application interface {
	// Start returns the address it answers on, and whether it was started just now. It is bounded by ctx, and the
	// application lives on after it.
	Start(ctx context.Context) (addr string, started bool, err error)
	// Addr is the address that it answers on; empty while it does not run.
	Addr() string
	// Stop reports whether it was running.
	Stop(ctx context.Context) (stopped bool, err error)
}

// Options are a Runner's parts. All are needed, but those that say otherwise.
type Options struct {
	Backends map[string]Backend // by mesh, of those that the adapter drives by itself
	// Clusters opens the clusters that requests bring a kubeconfig of. Default: they are not taken.
	Clusters func(kubeconfig []byte) (Cluster, error)
	// Own, when set, is the cluster of all operations on meshes of clusters; the kubeconfigs of requests are ignored.
	Own Cluster
	// Consul, when set, keeps the entries of the mesh consul, for requests without kubeconfigs. It is the adapter's own.
	Consul      Cluster
	Records     store.Records // of chains, and of which modules chains in clusters use
	Modules     Modules
	ModuleNames []string // those that builtin can name
	// StoredFilters says that Modules knows a Meshery Server, and fetches what users have stored there.
	StoredFilters bool
	ImageHub      Application
	Limiter       string // the document of imagehub_rate_limit off Kubernetes
	// HubSidecar is where a sidecar takes requests for Image Hub off Kubernetes, on the machine of Consul's agent. Default:
	// Image Hub is not registered there.
	HubSidecar string
	// ImageHubIn is Image Hub in the clusters that requests bring, or in Own.
	ImageHubIn ImageHubIn
	// Prepared are documents that each become an operation, by the key of that operation.
	Prepared  map[string]string
	Secret    func(name, key string) (string, error)
	Queue     store.Queue
	Events    Events
	Seal      Seal
	Component string // UUID of this adapter
	Workers   int    // operations that run side by side
	// AllowUnauthenticated lets callers from other hosts use the adapter's own rights without a verified certificate.
	AllowUnauthenticated bool
	// AllowWideTargets takes documents whose target is a whole mesh, or in another namespace than the request's.
	AllowWideTargets bool
	// Grace bounds how long running operations may take to finish once Run's context has ended.
	Grace time.Duration
	Log   *slog.Logger
	// Observer, when set, hears what operations do.
	Observer Observer
	// Audit writes down who asked for what. Default: nobody does.
	Audit Audit
	// Tracer, when set, makes the spans of operations. A trace goes on in the worker, after a restart too.
	Tracer trace.Tracer
}

// Observer hears what operations do, for those who measure it. It is called by several goroutines, and must not wait.
type Observer interface {
	// Accepted hears that a request of the catalogue's row operation was put into the queue.
	Accepted(operation string)
	// Begun hears that an operation is begun for the first time, and how long it waited since it was accepted.
	Begun(operation string, waited time.Duration)
	// Ended hears the end of an operation's story. code is that of its failure, and empty where it succeeded; took is
	// counted from the beginning of the attempt that ended it.
	Ended(operation, code string, took time.Duration)
	// DryRun hears how a dry run went.
	DryRun(err error, took time.Duration)
}

// unobserved is the Observer where none is set.
type unobserved struct{}

func (unobserved) Accepted(string)                     {}
func (unobserved) Begun(string, time.Duration)         {}
func (unobserved) Ended(string, string, time.Duration) {}
func (unobserved) DryRun(error, time.Duration)         {}

// Events keeps what operations tell; event.Log does.
type Events interface {
	// Append keeps an event that follows the operation's one at the position after, 0 for its first. store.ErrStale when
	// another follows that already.
	Append(ctx context.Context, e event.Event, after uint64) (position uint64, err error)
	// Of returns an operation's events, and the position of the last.
	Of(ctx context.Context, operation string) (events []event.Event, last uint64, err error)
}

// Seal hides the credentials that a waiting operation carries; store.Seal does.
type Seal interface {
	Close(text []byte, label string) []byte
	Open(sealed []byte, label string) ([]byte, error)
}

// Runner takes requests from acceptance to their last event. What it accepted it finishes, and if it has to be after a
// restart: an operation that was cut off is run again from its beginning, and tells what it has not told before.
type Runner struct {
	Options
	catalogue   []useCase
	byKey       map[string]useCase
	hubLimiters map[string]string // the documents of imagehub_rate_limit in clusters, by their mesh

	mu        sync.Mutex
	locks     map[string]*chainLock
	inUse     map[string]int               // operations that run, by the digest of a module that they have looked up
	left      map[string]map[string]string // records of chains that are gone, by the cluster that a request brought
	surveying chan struct{}                // holds whoever makes a survey
	// secrets are the values that were resolved so far, in the forms that texts may quote them in.
	secrets []string
}

// maxAttempts is how often an operation is begun whose process ends each time.
const maxAttempts = 3

// NewRunner checks the prepared documents and makes a Runner; Run makes it work.
func NewRunner(o Options) (*Runner, error) {
	if o.Observer == nil {
		o.Observer = unobserved{}
	}
	if o.Audit == nil {
		o.Audit = unaudited{}
	}
	if o.Tracer == nil {
		o.Tracer = noop.NewTracerProvider().Tracer("")
	}
	limiters := map[string]string{}
	for _, m := range hubMeshes {
		limiter, err := o.ImageHubIn.Limiter(m)
		if err != nil {
			return nil, err
		}
		limiters[m] = limiter
	}
	r := &Runner{Options: o, hubLimiters: limiters, locks: map[string]*chainLock{}, inUse: map[string]int{}, left: map[string]map[string]string{}, surveying: make(chan struct{}, 1), byKey: map[string]useCase{}}
	catalogue, err := r.useCases()
	if err != nil {
		return nil, err
	}
	r.catalogue = catalogue
	for _, u := range catalogue {
		r.byKey[u.Key] = u
	}
	return r, nil
}

// Catalogue lists what Submit takes.
func (r *Runner) Catalogue() []Row {
	rows := make([]Row, len(r.catalogue))
	for i, u := range r.catalogue {
		rows[i] = u.Row
	}
	return rows
}

// job is an accepted operation as the queue holds it: validated, with modules by digest and secrets as references.
type job struct {
	Operation string            `json:"operation"`
	ID        string            `json:"id"`
	Namespace string            `json:"namespace"`
	Username  string            `json:"username"`
	Delete    bool              `json:"delete"`
	Filters   []filter.Filter   `json:"filters,omitempty"` // to apply
	Remove    []filter.Key      `json:"remove,omitempty"`
	Component string            `json:"component,omitempty"` // of a design, which a removal of one filter is for
	Meshes    []string          `json:"meshes,omitempty"`    // that a removal or Image Hub is for; all when empty
	Rollout   filter.Rollout    `json:"rollout,omitempty"`   // of a removal
	Wait      filter.Wait       `json:"wait"`                // of a removal
	Undo      *undo             `json:"undo,omitempty"`      // what Filters or Remove came from
	Only      []string          `json:"only,omitempty"`      // clusters, by name; all when empty
	Sealed    []byte            `json:"sealed,omitempty"`    // the kubeconfigs
	Accepted  time.Time         `json:"accepted,omitzero"`
	Caller    Caller            `json:"caller,omitzero"`
	Targets   []string          `json:"targets,omitempty"` // as they were when it was accepted
	Trace     map[string]string `json:"trace,omitempty"`   // W3C trace context of the span that accepted it

	// InClusters says that what is for Consul goes to clusters, also where the adapter has a Consul of its own: Image Hub runs
	// there.
	InClusters bool `json:"inClusters,omitempty"`

	kubeconfigs []string // opened
	here        bool     // the kubeconfigs of its caller's connection are for something else
}

// undo is what an Undo asks for.
type undo struct {
	Key      filter.Key `json:"key"`
	Revision uint64     `json:"revision"` // 0: the one before the last
}

var (
	idForm   = regexp.MustCompile(`^[A-Za-z0-9_-]{1,128}$`)
	nameForm = regexp.MustCompile(`^[^\x00-\x1f\x7f]{0,253}$`)
)

// Submit accepts a request, or says all that is wrong with it. What it accepted runs, and tells its story as events of
// the id that is returned. The same id with the same content is accepted again and runs once, over restarts too and for
// a day after its end.
func (r *Runner) Submit(ctx context.Context, q Request) (id string, err error) {
	if q.ID == "" {
		q.ID = rand.Text()
	}
	j, again, err := r.submit(ctx, q)
	switch {
	case err != nil:
		r.aside(q, err)
		return "", err
	case again:
		r.aside(q, nil)
		return q.ID, nil
	}
	if err := r.Audit.Accepted(j.accepted()); err != nil {
		return "", fmt.Errorf("operation %s is accepted, and waits until that can be written down: %w", q.ID, err)
	}
	return q.ID, nil
}

// submit puts what a request asks for in the queue, unless it is or was there.
func (r *Runner) submit(ctx context.Context, q Request) (j job, again bool, err error) {
	ctx, end := r.step(ctx, "submit")
	defer func() { end(err) }()
	j = job{Operation: q.Operation, ID: q.ID, Namespace: q.Namespace, Username: q.Username, Delete: q.Delete}
	if r.Own != nil {
		q.Kubeconfigs = nil
	}
	u, err := r.decode(ctx, &j, q)
	if err != nil {
		return j, false, err
	}
	note(ctx, attrOperation.String(q.ID), attrKey.String(q.Operation))
	if !u.clusters || q.Implied && j.Undo == nil && (j.here || !r.namesCluster(j)) {
		q.Kubeconfigs = nil // nor do they count as rights of the caller's own
	}
	if err := r.permit(j, q); err != nil {
		return j, false, err
	}
	for i, f := range j.Filters {
		if f.Spec.Module.Inline == "" {
			continue
		}
		if j.Filters[i].Spec.Module, _, err = r.resolve(ctx, f, nil); err != nil {
			return j, false, named(f, err)
		}
	}
	data, err := json.Marshal(j)
	if err != nil {
		return j, false, fmt.Errorf("marshal operation %s: %w", q.ID, err)
	}
	// The digest is of what was asked for: what an Undo comes to changes, and a seal is another each time.
	hash := sha256.New()
	hash.Write(data)
	if len(q.Kubeconfigs) > 0 {
		j.kubeconfigs = q.Kubeconfigs
		secret, err := json.Marshal(q.Kubeconfigs)
		if err != nil {
			return j, false, fmt.Errorf("marshal operation %s: %w", q.ID, err)
		}
		hash.Write(secret)
		j.Sealed = r.Seal.Close(secret, q.ID)
	}
	digest := hex.EncodeToString(hash.Sum(nil))
	if j.Undo != nil {
		if again, err := r.Queue.Known(ctx, q.ID, digest); again || err != nil {
			return j, again, err
		}
		if err := r.readUndo(ctx, &j, r.elsewhere(q.Kubeconfigs), q.Implied); err != nil {
			return j, false, err
		}
		if len(j.Only) == 0 { // it is for plain Envoys
			j.kubeconfigs, j.Sealed = nil, nil
		}
	}
	for _, f := range j.Filters {
		if err := r.Modules.Hold(ctx, f.Spec.Module); err != nil {
			return j, false, err
		}
	}
	keys, targets, err := r.touches(ctx, j)
	if err != nil {
		return j, false, err
	}
	j.Accepted, j.Caller, j.Targets = time.Now().UTC(), q.Caller, targets
	j.remember(ctx)
	if data, err = json.Marshal(j); err != nil {
		return j, false, fmt.Errorf("marshal operation %s: %w", q.ID, err)
	}
	putting, put := r.step(ctx, "enqueue")
	var behind string
	behind, again, err = r.Queue.Put(putting, store.Entry{ID: q.ID, Keys: keys, Data: data, Digest: digest, Secret: j.Sealed != nil})
	put(err)
	if err != nil {
		return j, false, err
	}
	if again {
		return j, true, nil
	}
	r.Observer.Accepted(j.Operation)
	if behind != "" {
		// A worker may have begun it meanwhile; then it does not wait, and the event is stale.
		e := event.Event{Operation: q.ID, Sequence: 1, Time: time.Now().UTC(), Summary: waits + behind,
			Details: "both touch the same filter or target", Component: r.Component, Name: ComponentName}
		if _, err := r.Events.Append(context.WithoutCancel(ctx), e, 0); err != nil && !errors.Is(err, store.ErrStale) {
			r.Log.Warn("event not kept", "operation", q.ID, "err", err)
		}
		r.Log.Info("operation waits", "operation", q.ID, "behind", behind)
	}
	return j, false, nil
}

// decode finds what a request asks for, and makes a job of it.
func (r *Runner) decode(ctx context.Context, j *job, q Request) (u useCase, err error) {
	_, end := r.step(ctx, "decode")
	defer func() { end(err) }()
	if err := validateRequest(q); err != nil {
		return u, err
	}
	u, ok := r.byKey[q.Operation]
	if !ok {
		return u, problem.UnknownOperation.New("%q", clip(q.Operation))
	}
	if q.Delete && u.remove == nil {
		return u, problem.DeleteRefused.New("%s", q.Operation)
	}
	prepare := u.apply
	if q.Delete {
		prepare = u.remove
	}
	return u, prepare(ctx, j, q)
}

func validateRequest(q Request) error {
	var mistakes []problem.Field
	if !idForm.MatchString(q.ID) {
		mistakes = append(mistakes, problem.Field{Path: "operation_id", Cause: fmt.Sprintf("%q is not an operation id", clip(q.ID)),
			Remedy: "use 1 to 128 letters, digits, dashes and underscores, or leave it empty"})
	}
	if q.Namespace != "" && !filter.IsDNSLabel(q.Namespace) {
		mistakes = append(mistakes, problem.Field{Path: "namespace", Cause: fmt.Sprintf("%q is not a namespace's name", clip(q.Namespace)),
			Remedy: "use at most 63 lower-case letters, digits and dashes, or leave it empty for default"})
	}
	if !nameForm.MatchString(q.Username) {
		mistakes = append(mistakes, problem.Field{Path: "username", Cause: "it is too long or has control characters", Remedy: "use at most 253 characters"})
	}
	return problem.InvalidRequest.WithFields("", mistakes)
}

// touches lists what an operation must not share with one that runs at the same time: its filters, where they go, and
// where they are now. It also names these targets for people. Where filters are in a cluster now is not asked here: the
// cluster may be slow, and its inventories tell who was first.
func (r *Runner) touches(ctx context.Context, j job) (keys, targets []string, err error) {
	places, err := r.places(j)
	if err != nil {
		return nil, nil, err
	}
	if j.Operation == opImageHub || j.Operation == opLimiter || j.Operation == ComponentName {
		places = append(places, r.passed(j)...)
	}
	for _, pl := range places {
		touch := func(mesh string, t filter.Target) {
			keys = append(keys, pl.key("target|"+mesh+"|"+t.ID()))
			targets = append(targets, pl.on(t))
		}
		filters := slices.Clone(j.Remove)
		for _, f := range pl.of(j.Filters) {
			filters = append(filters, f.Key)
			touch(f.Spec.Mesh, f.Spec.Target)
		}
		for _, k := range filters {
			keys = append(keys, pl.key("filter|"+k.String()))
		}
		if j.Operation == opImageHub || j.Operation == ComponentName {
			if pl.cluster != nil && pl.agent == nil {
				for _, m := range hubMeshes {
					touch(m, hubTarget(j.Namespace))
				}
			} else {
				keys = append(keys, "imagehub")
			}
		}
		if pl.cluster != nil {
			continue
		}
		held, err := pl.holding(ctx, filters...)
		if err != nil {
			return nil, nil, err
		}
		for _, c := range held {
			touch(c.Mesh, c.Target)
		}
	}
	slices.Sort(keys)
	slices.Sort(targets)
	return slices.Compact(keys), slices.Compact(targets), nil
}

// Run works on accepted operations until ctx ends. Those that run then have Grace to finish; what is left is done after
// the next start.
func (r *Runner) Run(ctx context.Context) error {
	work, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	defer context.AfterFunc(ctx, r.Queue.Close)()
	var g errgroup.Group
	for range r.Workers {
		g.Go(func() error {
			for {
				c, err := r.Queue.Next(work)
				if errors.Is(err, problem.ShuttingDown) || work.Err() != nil {
					return nil
				}
				if err != nil {
					return fmt.Errorf("take operation from queue: %w", err)
				}
				r.execute(work, c)
			}
		})
	}
	finished := make(chan error, 1)
	go func() { finished <- g.Wait() }()
	select {
	case err := <-finished:
		if err == nil && ctx.Err() == nil {
			err = problem.StoreFailed.New("the queue has ended")
		}
		return err
	case <-ctx.Done():
	}
	timer := time.NewTimer(r.Grace)
	defer timer.Stop()
	select {
	case err := <-finished:
		return err
	case <-timer.C:
		cut() // every step of an operation ends with its context
		return <-finished
	}
}

func (r *Runner) newStory(ctx context.Context, id string) *story {
	return &story{ctx: ctx, operation: id, component: r.Component, events: r.Events, log: r.Log, redact: r.redact, step: r.step}
}

// execute runs one operation to its last event, whatever happens in it, unless its time is up or another adapter has
// it.
func (r *Runner) execute(work context.Context, c store.Claim) {
	e := c.Entry()
	ctx, cut := context.WithCancelCause(work)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-c.Lost():
			cut(store.ErrLost)
		case <-ctx.Done():
		}
	}()
	defer func() { cut(nil); <-watched }()
	s := r.newStory(ctx, e.ID)
	s.claim = c
	j := job{ID: e.ID}
	_ = json.Unmarshal(e.Data, &j) // tell says if it cannot be read
	over, err := s.resume()
	if err == nil {
		err = r.Audit.Accepted(j.accepted()) // which the process that accepted it may not have come to
	}
	if err == nil && !over {
		err = r.tell(ctx, s, e)
	}
	if err == nil && (over || s.over) {
		err = r.Audit.Ended(j.ended(s.code))
	}
	ending := context.WithoutCancel(ctx)
	switch {
	case err == nil && (over || s.over):
		err = c.Done(ending)
	case errors.Is(context.Cause(ctx), store.ErrLost):
		err = c.Release(ending) // this process may claim it again
	default:
		err = errors.Join(err, c.Release(ending))
	}
	switch {
	case errors.Is(err, store.ErrLost):
		r.Log.Warn("another adapter has taken the operation over", "operation", e.ID)
	case err != nil: // it is still in the queue, and is begun again
		r.Log.Error("operation not ended", "operation", e.ID, "err", err)
		wait := time.NewTimer(time.Second)
		defer wait.Stop()
		select {
		case <-wait.C:
		case <-work.Done():
		}
	}
}

// tell runs an operation and tells its story. store.ErrAway says that it came no further, and is to be begun again.
func (r *Runner) tell(ctx context.Context, s *story, e store.Entry) (away error) {
	var j job
	unread := json.Unmarshal(e.Data, &j)
	begun := time.Now()
	if s.claim.Attempt() == 1 && !j.Accepted.IsZero() {
		r.Observer.Begun(j.Operation, max(0, begun.Sub(j.Accepted))) // clocks step back
	}
	ctx, span := r.work(ctx, j, s.claim.Attempt(), begun)
	s.ctx = ctx
	defer func() {
		switch {
		case !s.over:
			fault(span, "interrupted")
		case s.code != "":
			fault(span, s.code)
		}
		span.End()
		if s.over {
			r.Observer.Ended(j.Operation, s.code, time.Since(begun))
		}
	}()
	defer func() {
		if p := recover(); p != nil {
			s.fail(r.panicked(e.ID, p))
		}
	}()
	if attempt := s.claim.Attempt(); attempt > maxAttempts {
		s.fail(problem.Poisoned.New("operation %s was begun %d times, and the adapter ended each time before it did", e.ID, attempt-1))
		return nil
	} else if attempt > 1 {
		s.again = true
		s.info("Begun again, since the adapter ended before it did", fmt.Sprintf("attempt %d of %d", attempt, maxAttempts))
	}
	if unread != nil {
		s.fail(fmt.Errorf("read operation %s: %w", e.ID, unread))
		return nil
	}
	u, ok := r.byKey[j.Operation]
	if !ok {
		s.fail(problem.UnknownOperation.New("%q", j.Operation))
		return nil
	}
	if err := r.unseal(&j); err != nil {
		s.fail(err)
		return nil
	}
	var summary, details string
	err := r.CatchUp(ctx)
	if err == nil {
		summary, details, err = u.run(ctx, s, j)
	}
	switch {
	case errors.Is(context.Cause(ctx), store.ErrLost) && err != nil: // whoever has it tells what becomes of it
	case ctx.Err() != nil && err != nil:
		s.info("The adapter stops, and goes on with this when it is back", problem.Of(err).Details)
	case errors.Is(err, store.ErrAway):
		return err
	case err != nil:
		s.fail(err)
	default:
		s.done(summary, details)
	}
	return nil
}

// CatchUp makes the backends hold what other adapters have committed.
func (r *Runner) CatchUp(ctx context.Context) error {
	for _, b := range r.Backends {
		if err := r.behind(ctx, b, func(c filter.Chain) error {
			defer r.lock(c.ID())()
			// What was read before the lock was had may be older than what this adapter has committed since.
			return r.behind(ctx, b, func(now filter.Chain) error {
				if now.ID() != c.ID() {
					return nil
				}
				return r.adopt(ctx, b, now)
			})
		}); err != nil {
			return err
		}
	}
	return nil
}

// Follow makes the backends hold what other adapters commit, soon after they did, until ctx ends. What cannot be taken over
// at the moment is tried again until it is, since nobody may change anything more. The error is that of a store whose
// records are gone.
func (r *Runner) Follow(ctx context.Context) error {
	for _, err := range r.Records.Changes(ctx) {
		if err != nil {
			return fmt.Errorf("follow what other adapters do: %w", err)
		}
		for told := ""; ; {
			err := r.CatchUp(ctx)
			if err == nil || ctx.Err() != nil {
				break
			}
			if text := err.Error(); text != told {
				told = text
				r.Log.Warn("what another adapter has done is not taken over yet", "err", err)
			}
			wait := time.NewTimer(time.Second)
			select {
			case <-wait.C:
			case <-ctx.Done():
			}
			wait.Stop()
		}
	}
	return nil
}

// behind goes through the chains that another adapter has committed and this one does not hold.
func (r *Runner) behind(ctx context.Context, b Backend, each func(filter.Chain) error) error {
	chains, err := b.Behind(ctx)
	if err != nil {
		return fmt.Errorf("see what other adapters have done: %w", err)
	}
	for _, c := range chains {
		if err := each(c); err != nil {
			return fmt.Errorf("take over the chain of %s: %w", c.Target, err)
		}
	}
	return nil
}

// adopt makes a backend hold the chain that another adapter has committed. The chain is locked.
func (r *Runner) adopt(ctx context.Context, b Backend, c filter.Chain) error {
	p, err := r.plan(ctx, b, c)
	if err != nil {
		return err
	}
	return b.Adopt(ctx, p)
}

// unseal opens the kubeconfigs for the backends of clusters.
func (r *Runner) unseal(j *job) error {
	if j.Sealed == nil {
		return nil
	}
	text, err := r.Seal.Open(j.Sealed, j.ID)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, &j.kubeconfigs); err != nil {
		return problem.Sealed.New("%s: it holds no kubeconfigs", j.ID) // the error would show them
	}
	return nil
}

// chainLock is one chain's lock, and how many hold it or wait for it.
type chainLock struct {
	sync.Mutex
	users int
}

// lock serialises changes of one chain, for operations that only find out on their way which chains they change.
func (r *Runner) lock(chain string) (unlock func()) {
	r.mu.Lock()
	l, ok := r.locks[chain]
	if !ok {
		l = new(chainLock)
		r.locks[chain] = l
	}
	l.users++
	r.mu.Unlock()
	l.Lock()
	return func() {
		l.Unlock()
		r.mu.Lock()
		defer r.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(r.locks, chain)
		}
	}
}

// List tells every chain of the adapter's own proxies, and then of its own cluster and Consul, and how far they are. What
// proxies say may quote secrets, which are hidden. What could be told is told beside an error.
func (r *Runner) List(ctx context.Context) ([]Status, error) {
	all, err := r.list(ctx, r.here())
	errs := []error{err}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	// Side by side: one that does not answer takes no time from the others.
	places := r.elsewhere(nil)
	in, failed := make([][]Status, len(places)), make([]error, len(places))
	var g errgroup.Group
	for i, pl := range places {
		g.Go(func() error {
			in[i], failed[i] = r.list(ctx, pl)
			return nil
		})
	}
	_ = g.Wait()
	errs = slices.DeleteFunc(append(errs, failed...), func(err error) bool { return err == nil })
	return slices.Concat(append([][]Status{all}, in...)...), joined(errs)
}

// Survey looks at the proxies of the adapter's own cluster and Consul for filters that nothing explains. What could not be
// looked at is part of it. One is made at a time.
func (r *Runner) Survey(ctx context.Context) (s Survey, err error) {
	select {
	case r.surveying <- struct{}{}:
		defer func() { <-r.surveying }()
	case <-ctx.Done():
		return s, ctx.Err()
	}
	places := r.elsewhere(nil)
	if len(places) == 0 {
		s.Missed = "the adapter has neither a cluster nor a Consul of its own"
	}
	for _, pl := range places {
		var found Survey
		if c, ok := pl.cluster.(Surveyed); ok {
			if found, err = c.Survey(ctx); err != nil {
				found.Missed = pl.name() + ": " + problem.Of(err).Details
			}
		}
		s = s.And(found)
	}
	return s, ctx.Err()
}

func (r *Runner) list(ctx context.Context, pl place) (out []Status, err error) {
	for _, b := range pl.backends {
		chains, err := b.List(ctx)
		if err != nil {
			return nil, fmt.Errorf("list the chains of %s: %w", pl.title(), err)
		}
		of := make([]Status, len(chains))
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(sideBySide)
		for i, c := range chains {
			g.Go(func() (err error) {
				of[i], err = r.status(gctx, pl, b, c)
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return nil, err
		}
		out = append(out, of...)
	}
	return out, pl.damage(ctx)
}

// status tells how one chain is.
func (r *Runner) status(ctx context.Context, pl place, b Backend, c filter.Chain) (Status, error) {
	p, err := b.Committed(ctx, c.Target)
	if err != nil {
		return Status{}, err
	}
	st := Status{Chain: c, Version: p.Version}
	if p.Version == "" {
		st.Problem = "it was not brought back since the adapter started; an event says why, and applying its filters again mends it"
		if pl.cluster != nil {
			st.Problem = "it is being changed, or a change of it was cut off, which applying its filters again mends"
		}
		return st, nil
	}
	for l, err := range b.Loaded(ctx, p) {
		if ctx.Err() != nil {
			return st, ctx.Err()
		}
		if err != nil { // it was replaced this very moment
			continue
		}
		st.Loaded = l
		break
	}
	drift, err := b.Drift(ctx, c)
	switch {
	case ctx.Err() != nil:
		return st, ctx.Err()
	case err != nil:
		st.Problem = r.redact(problem.Of(err).Error())
	case len(drift) > 0:
		st.Problem = "somebody else has changed it; applying it again would change: " + listed(texts(drift))
	}
	st.Loaded.Unverified = r.redact(st.Loaded.Unverified)
	st.Loaded.Proxies = slices.Clone(st.Loaded.Proxies)
	for i, proxy := range st.Loaded.Proxies {
		st.Loaded.Proxies[i].Detail = r.redact(proxy.Detail)
	}
	return st, nil
}

// Restore makes the backends hold again what they held before the process started. A chain that cannot be planned now
// is told as an event, and its proxies keep what they have.
func (r *Runner) Restore(ctx context.Context) error {
	for _, b := range r.Backends {
		chains, err := b.List(ctx)
		if err != nil {
			return fmt.Errorf("list stored chains: %w", err)
		}
		for _, c := range chains {
			p, err := r.plan(ctx, b, c)
			if err == nil {
				p.Rollout = filter.RolloutAll
				if _, err = b.Apply(ctx, p); err == nil {
					err = b.Commit(ctx, p)
				}
			}
			if err != nil {
				r.newStory(context.WithoutCancel(ctx), "restore-"+rand.Text()).fail(fmt.Errorf("restore the chain of %s: %w", c.Target, err))
			}
		}
	}
	return nil
}

// Rejected tells that a proxy refused its chain outside of any operation.
func (r *Runner) Rejected(ctx context.Context, t filter.Target, p plan.Proxy, text string) {
	s := r.newStory(context.WithoutCancel(ctx), "proxy-"+rand.Text())
	s.fail(problem.LateRejection.New("proxy %s (Envoy %s) of %s does not run its chain: %s", p.ID, p.Version, t, text))
}

func texts[S fmt.Stringer](all []S) []string {
	lines := make([]string, len(all))
	for i, s := range all {
		lines[i] = s.String()
	}
	return lines
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
