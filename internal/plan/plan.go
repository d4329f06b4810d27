// Package plan holds what passes between a mesh, which is pure, and a backend, which is not: the World that a chain
// lands in, the Plan of what must hold there, what Changed, and what is proved to be Loaded.
package plan

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshery/meshery-filters/internal/filter"
)

// World is what a mesh needs to know and only a backend can read.
type World struct {
	// Modules says, by digest, where each module's bytes can be had.
	Modules map[string]Code
	// Proxies are those of the target that are connected now (plain Envoy).
	Proxies []Proxy
	// Cluster is what a Kubernetes cluster serves and holds, of what the mesh Reads there.
	Cluster Cluster
	// Held is the chain that holds on the target, as far as a cluster knows.
	Held filter.Chain
}

// Code is where a module's bytes can be had: every place there is, for the mesh to choose from.
type Code struct {
	Inline []byte // the bytes, shared by all who hold the Code: never to be changed
	Path   string // a file on the proxies' machines
	URL    string // the adapter's own address of them as proxies reach it
}

// Source is an address that proxies fetch a module from by themselves.
type Source struct {
	Filter filter.Key
	URL    string
	SHA256 string // of the module
}

// Proxy is one connected Envoy.
type Proxy struct {
	ID      string `json:"id"`      // its node's id
	Version string `json:"version"` // of Envoy: 1.40.0; empty when it does not say
}

// Plan is what must hold on a target so that its proxies run a chain. The same chain in the same world gives the same
// plan. An empty chain's plan takes everything away.
type Plan struct {
	// Chain is what the plan is for, with secrets as references, for the backend to record.
	Chain filter.Chain
	// Version changes whenever Resources or Objects do, and only then.
	Version string
	// Resources are what proxies get over xDS. They hold resolved secrets and must not be logged.
	Resources []*anypb.Any
	// Objects are what an API has to keep: Kubernetes' resources. They hold resolved secrets and must not be logged.
	Objects []Object
	// Sources are where proxies will fetch modules: addresses that must give these very bytes before the plan goes out, since
	// a proxy that cannot load a module serves errors.
	Sources []Source
	// Proxies are those that the objects are for. Nil: the mesh cannot tell, or it is no matter of Pods.
	Proxies *Selection
	// Dropped are the objects that the target had and that the plan has no more, as Change.Subject names them. Whoever
	// applied the plan sets it, for the proof that proxies have let go of them.
	Dropped []string
	// Gone are the filters that the target had, or was offered, and that the plan has no more. Whoever applied the plan sets
	// it, for meshes where an object holds several filters.
	Gone []filter.Key
	// Versions are the resourceVersions that the objects had when they were applied, by Change.Subject. Whoever applied the
	// plan sets it; without it the proof reads them.
	Versions map[string]string
	// Restarts are the objects whose Pods restart when the plan is applied, as Change.Subject names them. Their Pods are
	// waited for before what needs them is written.
	Restarts []string
	// Again are the objects that keep, beside what the plan's chain needs, what the chain before it did: as soon as no proxy
	// has that chain any more, a plan made anew takes it away, which restarts their Pods once more.
	Again []string
	// Back says that the plan held before and is put back: Pods that restart with that may need all of it to get ready, so
	// that they are waited for at its end, and not for long.
	Back bool
	// Before is what proxies said of fetching modules before the plan was offered, by their names in Loaded and without those
	// that did not answer. Whoever applied the plan sets it, for the proof.
	Before map[string]Fetching
	// Unnamed says that proxies are not told which sandbox a filter is for: all of the same module share one.
	Unnamed bool
	// Losses are the fields that the user set and the mesh cannot say.
	Losses []Loss
	// Rollout says whether all proxies are offered the plan at once, or one first.
	Rollout filter.Rollout
}

// Fetching is how far a proxy that fetches modules by itself has come with them, all its listeners together.
type Fetching struct {
	Started   time.Time // up to a second too late
	Sandboxes []string  // that the filters of its listeners name, each with its module
	// Since it counts:
	Created uint64 // sandboxes
	Hits    uint64 // modules that it had
	Fetched uint64 // modules that it got
	Failed  uint64 // modules that it did not get
}

// Trial has one proxy run a plan before the others do.
type Trial struct {
	Apply Plan // what has to hold for that: the chain is the one that held before
	Proof Plan // what that proxy then has
}

// Object is what an API has to keep, by its apiVersion, kind, metadata.name and metadata.namespace.
type Object struct {
	// Content is JSON: map[string]any, []any, string, bool, nil and numbers.
	Content map[string]any
	// Shared says that the object is the user's. Content is then all of it, as it was read, with fields and entries of
	// lists added; nothing of the user's may be changed or left out. It is changed under its resourceVersion, never
	// made or deleted, and gets back exactly what it had.
	Shared bool
	// Read is a shared object as it was read for the plan: what Content has and Read has not is ours to add, whatever others
	// have changed in it since. Nil: Content is taken for that.
	Read map[string]any
	// Bare is, of an object that was read, what it is without all that we have added to it, and For the target for which that
	// was. Nil: nobody has looked.
	Bare map[string]any
	For  string
}

// Loss is a field that the user set and that has no effect on a mesh. It becomes a warning, never silence.
type Loss struct {
	Filter filter.Key `json:"filter"`
	Field  string     `json:"field"` // spec.match.ports
	Reason string     `json:"reason"`
}

func (l Loss) String() string { return fmt.Sprintf("%s: %s: %s", l.Filter, l.Field, l.Reason) }

// Action is what was done to a subject.
type Action string

const (
	Created   Action = "created"
	Updated   Action = "updated"
	Deleted   Action = "removed"
	Unchanged Action = "unchanged"
	// Restarted is an object of the user's whose template of Pods was updated.
	Restarted Action = "updated, which restarts its Pods"
	// Kept is an object that we made and that stays, since others may have put something into it: a namespace.
	Kept Action = "kept"
)

// Change is one thing that applying a plan did: "ProxyGroup edge" "updated", "WasmPlugin/shop/rate-limit" "created".
type Change struct {
	Subject string `json:"subject"`
	Action  Action `json:"action"`
}

func (c Change) String() string { return c.Subject + " " + string(c.Action) }

// ProxyState is how far a proxy is with a plan.
type ProxyState string

const (
	Running  ProxyState = "running"  // it accepted this very version and has it now
	Rejected ProxyState = "rejected" // it refused this version; Detail is its own text
	Waiting  ProxyState = "waiting"  // it was sent this version and has not answered
	Held     ProxyState = "held"     // it will be sent this version after the canary accepted it
	Gone     ProxyState = "gone"     // it was connected when the plan was applied and is not any more
	Apart    ProxyState = "apart"    // it takes traffic of another protocol, so that nothing of the plan can be in it
)

// ProxyStatus is one proxy's state.
type ProxyStatus struct {
	Proxy
	State    ProxyState `json:"state"`
	Expected bool       `json:"expected"` // it was connected when the plan was applied, so an operation waits for it
	Detail   string     `json:"detail,omitempty"`
	// Proof says what Running rests on, where that is not the proxy's own acknowledgement to us.
	Proof Proof `json:"proof,omitempty"`
}

// Proof is how sure it is that a proxy runs a plan.
type Proof string

const (
	Acknowledged Proof = "acknowledged" // the mesh's control plane says that the proxy took it
	Seen         Proof = "seen"         // the proxy itself shows it
)

// Loaded is what is known of a plan's proxies at one moment.
type Loaded struct {
	Proxies []ProxyStatus `json:"proxies"` // sorted by id
	// Unverified says what nobody looked at, and why: that is then neither running nor rejected. Empty: nothing.
	Unverified string `json:"unverified,omitempty"`
}

// Count says how many expected proxies are in a state.
func (l Loaded) Count(s ProxyState) (n int) {
	for _, p := range l.Proxies {
		if p.Expected && p.State == s {
			n++
		}
	}
	return n
}

// Expected says how many proxies an operation waits for: those that were connected when it began and did not leave.
func (l Loaded) Expected() (n int) {
	for _, p := range l.Proxies {
		if p.Expected && p.State != Gone {
			n++
		}
	}
	return n
}

// In lists the expected proxies in a state.
func (l Loaded) In(s ProxyState) (in []ProxyStatus) {
	for _, p := range l.Proxies {
		if p.Expected && p.State == s {
			in = append(in, p)
		}
	}
	return in
}

// By lists the expected proxies of which a proof says that they run the plan.
func (l Loaded) By(proof Proof) (by []ProxyStatus) {
	for _, p := range l.In(Running) {
		if p.Proof == proof {
			by = append(by, p)
		}
	}
	return by
}

// String is "1 of 2 proxies", or "1 of 2 proxies; 1 takes another protocol".
func (l Loaded) String() string {
	noun, apart := "proxies", 0
	for _, p := range l.Proxies {
		if p.State == Apart {
			apart++
		}
	}
	if l.Expected() == 1 {
		noun = "proxy"
	}
	text := fmt.Sprintf("%d of %d %s", l.Count(Running), l.Expected(), noun)
	if l.Unverified != "" && l.Expected() == 0 {
		text = "not verified"
	}
	switch apart {
	case 0:
		return text
	case 1:
		return text + "; 1 takes another protocol"
	}
	return fmt.Sprintf("%s; %d take another protocol", text, apart)
}

// Names lists proxies by id, at most ten of them.
func Names(proxies []ProxyStatus) string {
	const most = 10
	var ids []string
	for _, p := range proxies[:min(len(proxies), most)] {
		ids = append(ids, p.ID)
	}
	if more := len(proxies) - most; more > 0 {
		ids = append(ids, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(ids, ", ")
}

// Sort puts the proxies in the order of their ids, as Loaded promises.
func (l *Loaded) Sort() {
	slices.SortFunc(l.Proxies, func(a, b ProxyStatus) int { return cmp.Compare(a.ID, b.ID) })
}

// Revision is a chain that a target had.
type Revision struct {
	Number uint64 // grows with each change of any target
	Time   time.Time
	Chain  filter.Chain // without filters where there was none any more
	Oldest bool         // older ones of this target are not kept
}
