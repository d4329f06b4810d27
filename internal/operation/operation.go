// Package operation holds the use cases: the catalogue of operations, and the Runner that takes a request from
// acceptance to its last event.
package operation

import (
	"context"
	"iter"

	"github.com/meshery/meshery-filters/internal/audit"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
)

// Request asks for one operation, as any of the edges received it.
type Request struct {
	Operation   string   `json:"operation"` // a key of the catalogue
	ID          string   `json:"id"`        // [A-Za-z0-9_-]{1,128}; made up when empty
	Namespace   string   `json:"namespace"`
	Username    string   `json:"username"` // as claimed by the client; not verified
	Body        string   `json:"body"`
	Delete      bool     `json:"delete"`
	Kubeconfigs []string `json:"-"` // never logged or shown, and stored sealed while the operation waits
	// Implied says that the kubeconfigs came with the caller's connection, whatever it was to ask for. They then count for
	// documents only that name a mesh of clusters.
	Implied bool   `json:"-"`
	Caller  Caller `json:"-"`
}

// Caller is who asks for an operation, as its connection tells. The zero value is the adapter itself.
type Caller struct {
	Certificate string `json:"certificate,omitempty"` // name of the verified client certificate; empty without one
	Serial      string `json:"serial,omitempty"`      // its serial number, in hexadecimal
	Remote      string `json:"remote,omitempty"`      // address and port
	// Foreign is a caller from another host without a verified certificate.
	Foreign bool `json:"foreign,omitempty"`
	// Reader may only look: nothing is fetched or kept for it.
	Reader bool `json:"reader,omitempty"`
}

// Who is the caller, with the name that it claims, as the audit log has them.
func (c Caller) Who(username string) audit.Who {
	return audit.Who{Verified: c.Certificate != "", Certificate: c.Certificate, Serial: c.Serial, ClaimedUsername: username, Remote: c.Remote}
}

// Category is where Meshery shows an operation; the values are those of its protocol.
type Category int32

const (
	Install           Category = 0
	SampleApplication Category = 1
	Configure         Category = 2
	Validate          Category = 3
	Custom            Category = 4
)

// Row is one operation of the catalogue.
type Row struct {
	Key         string   `json:"key"`
	Description string   `json:"description"` // what a menu shows
	Category    Category `json:"category"`
	Body        string   `json:"body"`     // what the body holds: "Filter documents", or "none"
	Deletion    string   `json:"deletion"` // what delete does, in words
}

// Backend makes plans true on one mesh and proves it.
type Backend interface {
	// World reads what the mesh needs to know to plan the chain.
	World(context.Context, filter.Chain) (plan.World, error)
	// Committed returns what holds on the target: a chain, without filters when we put nothing there, and its Version,
	// which is empty while it was not brought back since the start. Resources are not part of it.
	Committed(context.Context, filter.Target) (plan.Plan, error)
	// List returns every chain that we put somewhere.
	List(context.Context) ([]filter.Chain, error)
	// Drift tells what applying a chain that holds would change, since somebody else has meddled with it.
	Drift(context.Context, filter.Chain) ([]plan.Change, error)
	// History returns the chains that targets had, oldest first.
	History(context.Context) ([]plan.Revision, error)
	// Behind returns the chains that another adapter has committed since this one read them.
	Behind(context.Context) ([]filter.Chain, error)
	// Adopt makes the plan of such a chain the one that every proxy gets.
	Adopt(context.Context, plan.Plan) error
	// Apply offers the plan to the target's proxies. Those that come later get the last committed plan until Commit.
	Apply(context.Context, plan.Plan) ([]plan.Change, error)
	// Loaded yields how far the target's proxies are with the plan: at once, and whenever that changes. It ends with
	// ctx, when the consumer stops, or after an error.
	Loaded(context.Context, plan.Plan) iter.Seq2[plan.Loaded, error]
	// Revert takes what is offered back, so that the target's proxies get the committed plan again, and returns that as
	// Committed does.
	Revert(context.Context, filter.Target) (plan.Plan, error)
	// Commit makes the plan the one that survives a restart and that every proxy of the target gets.
	Commit(context.Context, plan.Plan) error
}

// Status is one chain and how far its proxies are with it.
type Status struct {
	Chain   filter.Chain `json:"chain"`
	Version string       `json:"version"`
	Loaded  plan.Loaded  `json:"loaded"`
	// Problem says why the chain is not served to its proxies, or how it differs from what was applied; else it is empty.
	Problem string `json:"problem,omitempty"`
}

// Survey is what proxies run that nothing explains.
type Survey = plan.Survey

// Preview is what an operation would make hold on one target.
type Preview struct {
	Target  filter.Target `json:"target"`
	Mesh    string        `json:"mesh"`
	Version string        `json:"version"`
	Order   []string      `json:"order"`  // the filters' names as requests meet them
	YAML    string        `json:"yaml"`   // the resources, with module bytes as their length and digest, secrets as references
	Losses  []plan.Loss   `json:"losses"` // what the mesh cannot say
	// Changes are what would change where the resources are kept, if they are kept anywhere but here.
	Changes []plan.Change `json:"changes,omitempty"`
}
