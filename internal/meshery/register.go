package meshery

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

// RegistrarOptions say what is registered where. All but the durations and Log are needed.
type RegistrarOptions struct {
	Client      *Client
	Definitions []Definition
	// Name of the adapter, which the model has too.
	Name string
	// Component is the adapter's UUID.
	Component string
	// Addr is where the server reaches the adapter's gRPC, HOST:PORT.
	Addr string
	// Records keep what was registered, so that a restart does not do it again: servers would list everything twice.
	Records store.Records
	// Check is how often the server is asked whether it still knows the components. Default: 1m.
	Check time.Duration
	// MinRetry and MaxRetry bound the waits after a failure. Default: 1s and 1m.
	MinRetry, MaxRetry time.Duration
	Log                *slog.Logger // none when nil
}

// Registrar has the components known to the server: at the start, when the server has lost them, and when the adapter's
// address or the components have changed. It takes nothing back: a server keeps what it knows of an adapter that is away.
//
// A server that restarts is noticed since it is asked now and then which versions it has of the model. One that cannot
// be asked that counts as restarted when it has not answered in between.
type Registrar struct {
	options    RegistrarOptions
	host, port string
	want       string // digest of what is to be registered where
	record     string // key

	posted map[string]int // definitions that the server has, of a registration that was broken off, by dialect

	registered atomic.Bool
	count      atomic.Uint64
	failed     atomic.Uint64
}

// registration is what Records keep.
type registration struct {
	Digest  string `json:"digest"`
	Dialect string `json:"dialect"`
	// Unlisted says that the server did not list what it had taken, so that its lists say nothing.
	Unlisted bool `json:"unlisted,omitempty"`
}

// dialect is one generation's way to register.
type dialect struct {
	name, path string
	traits     string                           // path of traits
	body       func(*Registrar, Definition) any // nil where this generation does not have the definition
	listing    string                           // path of what the server has
	lists      func(r *Registrar, answer []byte) (bool, error)
}

// dialects begin with the newest. Which one a server speaks shows when it is tried.
var dialects = []dialect{
	{"connection", "/api/meshmodels/components", "", (*Registrar).entity, "", (*Registrar).listsModels},
	{"host", "/api/meshmodel/components/register", "", (*Registrar).entity, "", (*Registrar).listsModels},
	{"oam v0.5", "/api/oam/workload", "/api/oam/trait", (*Registrar).workload, "/api/oam/workload?trim=true", (*Registrar).listsWorkloads},
	{"oam", "/api/experimental/oam/workload", "/api/experimental/oam/trait", (*Registrar).workload, "/api/experimental/oam/workload?trim=true", (*Registrar).listsWorkloads},
}

const (
	maxRegistered = 64 << 10 // bytes of the answer to a registration
	maxListing    = 32 << 20 // bytes: servers of 2021 list the schemas of all components of everybody
)

// NewRegistrar makes a Registrar. Nothing is registered until Run. problem.InvalidConfiguration when Addr is none.
func NewRegistrar(o RegistrarOptions) (*Registrar, error) {
	host, port, err := net.SplitHostPort(o.Addr)
	if _, errPort := strconv.ParseUint(port, 10, 16); err != nil || errPort != nil || host == "" {
		return nil, problem.InvalidConfiguration.WithFields("", []problem.Field{{Path: "meshery.adapterAddr",
			Cause: "it is not an address that a server can reach", Remedy: "write HOST:PORT"}})
	}
	if o.Check <= 0 {
		o.Check = time.Minute
	}
	o.MinRetry, o.MaxRetry = retries(o.MinRetry, o.MaxRetry)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	hash := sha256.New()
	if err := json.NewEncoder(hash).Encode([]any{o.Client.options.Server, o.Addr, o.Component, o.Definitions}); err != nil {
		return nil, problem.Internal.New("the components for Meshery: %w", err)
	}
	return &Registrar{options: o, host: host, port: port, want: hex.EncodeToString(hash.Sum(nil)),
		record: "meshery/registration/" + o.Component, posted: map[string]int{}}, nil
}

func retries(least, most time.Duration) (time.Duration, time.Duration) {
	if least <= 0 {
		least = time.Second
	}
	if most <= 0 {
		most = time.Minute
	}
	return least, max(least, most)
}

// Registered tells whether the server knew the components when it was asked last.
func (r *Registrar) Registered() bool { return r.registered.Load() }

// Registrations count how often all components were registered, and how often that or asking for them failed.
func (r *Registrar) Registrations() (done, failed uint64) { return r.count.Load(), r.failed.Load() }

// Run registers and looks after that until ctx ends, for as long as it takes.
func (r *Registrar) Run(ctx context.Context) error {
	retry := backoff{min: r.options.MinRetry, max: r.options.MaxRetry}
	said, away, ours := "", false, false
	for ctx.Err() == nil {
		err := r.ensure(ctx, &ours, away)
		if ctx.Err() != nil {
			break
		}
		r.registered.Store(err == nil)
		if away = err != nil; away {
			r.failed.Add(1)
			if text := err.Error(); text != said { // which comes again with every attempt
				said = text
				r.options.Log.Warn("the adapter is not registered with Meshery; it goes on trying", "err", err)
			}
			retry.wait(ctx)
			continue
		}
		said = ""
		retry.reset()
		pause(ctx, r.options.Check)
	}
	return nil
}

// ensure registers unless the server has everything. ours is whether this process has registered.
func (r *Registrar) ensure(ctx context.Context, ours *bool, away bool) error {
	kept, err := r.kept(ctx)
	if err != nil {
		return err
	}
	if i := slices.IndexFunc(dialects, func(d dialect) bool { return d.name == kept.Dialect }); i >= 0 && kept.Digest == r.want {
		has, known, err := r.listed(ctx, dialects[i])
		if err != nil {
			return err
		}
		if known = known && !kept.Unlisted; known && has || !known && *ours && !away {
			return nil
		}
	}
	d, listed, err := r.register(ctx)
	if err != nil {
		return err
	}
	*ours = true
	r.count.Add(1)
	r.options.Log.Info("the adapter is registered with Meshery", "as", r.options.Addr, "generation", d.name)
	if !listed {
		r.options.Log.Warn("Meshery has taken the adapter's components and does not list them")
	}
	data, err := json.Marshal(registration{r.want, d.name, !listed})
	if err != nil {
		return problem.Internal.New("note the registration: %w", err)
	}
	return r.options.Records.Put(ctx, r.record, data)
}

func (r *Registrar) kept(ctx context.Context) (k registration, err error) {
	data, err := r.options.Records.Get(ctx, r.record)
	if err != nil || data == nil {
		return k, err
	}
	if json.Unmarshal(data, &k) != nil {
		return registration{}, nil // registering again mends it
	}
	return k, nil
}

// register tries one dialect after the other until the server takes one, and lists what it has taken where it can be asked
// that. A server that reads another generation's body may take it and make nothing of it.
func (r *Registrar) register(ctx context.Context) (taken dialect, listed bool, err error) {
	var refusals []error
	for _, d := range dialects {
		refused, err := r.in(ctx, d)
		if err != nil {
			return d, false, err
		}
		if refused != nil {
			refusals = append(refusals, refused)
			continue
		}
		has, known, err := r.listed(ctx, d)
		if err != nil {
			return d, false, err
		}
		delete(r.posted, d.name)
		if has || !known {
			return d, true, nil
		}
		if taken.name == "" {
			taken = d
		}
	}
	if taken.name != "" {
		return taken, false, nil
	}
	for _, err := range refusals { // whoever has to sign in is told so first: the other generations' paths are missing anyway
		if errors.Is(err, problem.MesheryUnauthorized) {
			return taken, false, err
		}
	}
	return taken, false, problem.MesheryRefused.New("no generation's registration is taken: %w", errors.Join(refusals...))
}

// in registers every definition in one dialect, from where it was broken off. refused is why the server does not speak it.
func (r *Registrar) in(ctx context.Context, d dialect) (refused, err error) {
	for i, def := range r.options.Definitions {
		body := d.body(r, def)
		if body == nil || i < r.posted[d.name] {
			continue
		}
		text, err := json.Marshal(body)
		if err != nil {
			return nil, problem.Internal.New("write the registration of %s: %w", def.Kind, err)
		}
		path := d.path
		if def.Trait != nil {
			path = d.traits
		}
		answer, err := r.options.Client.Do(ctx, http.MethodPost, path, "application/json", text, maxRegistered)
		if i == 0 && errors.Is(err, problem.MesheryUnauthorized) {
			return err, nil
		}
		if err != nil {
			return nil, err
		}
		refusal := answer.Refusal("POST " + path)
		if refusal != nil && def.Trait != nil && answer.Status/100 == 4 { // designs do without
			r.options.Log.Warn("Meshery does not take a trait", "trait", def.Kind, "err", refusal)
			refusal = nil
		}
		switch {
		case refusal == nil:
			r.posted[d.name] = i + 1
		case i == 0 && answer.Status < http.StatusInternalServerError && answer.Status != http.StatusTooManyRequests && answer.Status != http.StatusRequestTimeout:
			return refusal, nil
		default:
			return nil, refusal
		}
	}
	return nil, nil
}

// listed asks whether the server has everything; known is false where it cannot be asked.
func (r *Registrar) listed(ctx context.Context, d dialect) (has, known bool, err error) {
	path := d.listing
	if path == "" {
		path = "/api/meshmodels/models/" + r.options.Name + "?pagesize=all"
	}
	answer, err := r.options.Client.Do(ctx, http.MethodGet, path, "", nil, maxListing)
	switch {
	case errors.Is(err, problem.MesheryUnauthorized), err == nil && answer.Status/100 == 4:
		return false, false, nil
	case err != nil:
		return false, false, err
	}
	if err := answer.Refusal("GET " + path); err != nil {
		return false, false, err
	}
	if has, err = d.lists(r, answer.Body); err != nil { // another page, such as the one for signing in
		return false, false, nil
	}
	return has, true, nil
}

// entity is the body of servers with meshmodels. The newest read the connection, those before them the host.
func (r *Registrar) entity(d Definition) any {
	if d.Entity == nil {
		return nil
	}
	port, _ := strconv.Atoi(r.port) // which NewRegistrar has seen to be one
	return struct {
		Connection any    `json:"connection"`
		Host       any    `json:"host"`
		EntityType string `json:"entityType"`
		Entity     []byte `json:"entity"`
	}{
		map[string]any{"id": r.options.Component, "name": r.options.Name, "kind": r.options.Name, "type": "platform", "subType": "adapter",
			"status": "registered", "schemaVersion": "connections.meshery.io/v1beta3",
			"metadata": map[string]any{"host_name": r.host, "hostname": r.host, "port": port}},
		struct {
			Hostname string
			Port     int
			Metadata string
		}{r.host, port, r.options.Component},
		"component", d.Entity,
	}
}

// workload is the body of servers that know of OAM only, of a trait as well.
func (r *Registrar) workload(d Definition) any {
	definition := d.Workload
	if d.Trait != nil {
		definition = d.Trait
	}
	if definition == nil {
		return nil
	}
	return struct {
		Host       string            `json:"host"`
		Definition json.RawMessage   `json:"oam_definition"`
		Schema     string            `json:"oam_ref_schema"`
		Metadata   map[string]string `json:"metadata"` // by which pages of v0.5 tell the adapters' components apart
	}{net.JoinHostPort(r.host, r.port), definition, d.Schema, map[string]string{"adapter.meshery.io/name": r.options.Name}}
}

// listsModels looks for the model in every version.
func (r *Registrar) listsModels(answer []byte) (bool, error) {
	var l struct {
		Models []struct{ Name, Version string }
	}
	if err := json.Unmarshal(answer, &l); err != nil {
		return false, fmt.Errorf("read the models: %w", err)
	}
	has := map[string]bool{}
	for _, m := range l.Models {
		has[m.Version] = has[m.Version] || m.Name == r.options.Name
	}
	return !slices.ContainsFunc(r.options.Definitions, func(d Definition) bool { return d.Entity != nil && !has[d.Version] }), nil
}

// listsWorkloads looks for every kind at the adapter's address.
func (r *Registrar) listsWorkloads(answer []byte) (bool, error) {
	var l []struct {
		Host       string
		Definition struct {
			Metadata struct{ Name string }
		} `json:"oam_definition"`
	}
	if err := json.Unmarshal(answer, &l); err != nil {
		return false, fmt.Errorf("read the workloads: %w", err)
	}
	has := map[string]bool{}
	for _, w := range l {
		has[w.Definition.Metadata.Name] = has[w.Definition.Metadata.Name] || w.Host == net.JoinHostPort(r.host, r.port)
	}
	return !slices.ContainsFunc(r.options.Definitions, func(d Definition) bool { return d.Workload != nil && !has[d.Kind] }), nil
}
