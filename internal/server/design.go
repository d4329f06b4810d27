package server

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
	"github.com/meshery/meshery-filters/oam"
)

// defaultDesignTimeout bounds how long a design's answer waits for its operations.
const defaultDesignTimeout = 15 * time.Minute

// ProcessOAM deploys the components of a design, or removes them, for the servers before Provision.
//
// It answers when the operations have ended. The server sends one component a call, waits for the answer without a
// deadline, deploys what depends on the component only then, and shows the answer as what became of it: there is no later
// word that it would read. Whoever hangs up meanwhile ends nothing, since each operation is accepted before it is waited for.
//
// The server sends the components that depend on none of the others all at once. A call that waits for its last operation
// takes no place among those of its client: so many can wait as operations can be queued.
func (m *meshServer) ProcessOAM(ctx context.Context, r *meshes.ProcessOAMRequest) (*meshes.ProcessOAMResponse, error) {
	steps, err := oam.OAM(r.GetOamComps(), r.GetOamConfig(), r.GetDeleteOp())
	if err != nil {
		return nil, err
	}
	username, brought := r.GetUsername(), r.GetKubeConfigs()
	r.Reset() // it may be large, and the answer takes long
	message, err := m.deploy(ctx, steps, username, brought)
	if err != nil {
		return nil, err
	}
	return &meshes.ProcessOAMResponse{Message: message}, nil
}

// Provision is ProcessOAM for the newest servers.
func (m *meshServer) Provision(ctx context.Context, r *filterspb.ProvisionRequest) (*filterspb.ProvisionResponse, error) {
	steps, err := oam.Declarations(r.GetDeclarations(), r.GetDeleteOp())
	if err != nil {
		return nil, err
	}
	username, brought := r.GetUsername(), r.GetKubeConfigs()
	r.Reset()
	message, err := m.deploy(ctx, steps, username, brought)
	if err != nil {
		return nil, err
	}
	return &filterspb.ProvisionResponse{Message: message}, nil
}

// deploy does a design's operations one after the other, and tells what became of each. One that fails ends a deployment,
// for what follows may need it; a removal goes on, and fails in the end.
func (m *meshServer) deploy(ctx context.Context, steps []oam.Step, username string, brought []string) (message string, err error) {
	kubeconfigs, withConnection, err := m.kubeconfigs(ctx, brought)
	if err != nil {
		return "", err
	}
	waiting, cancel := context.WithTimeout(ctx, m.server.DesignTimeout)
	defer cancel()
	var told []string
	var failures []*problem.Problem
	for i := range steps {
		component, q := steps[i].Component, steps[i].Request
		q.ID, q.Username, q.Kubeconfigs, q.Implied = newID(), username, slices.Clone(kubeconfigs), withConnection
		q.Caller = callerOf(ctx).asked(m.server.Roles)
		remove, last := q.Delete, i == len(steps)-1
		steps[i].Request.Body = ""
		if last {
			kubeconfigs = nil
		}
		lines, err := m.operate(ctx, waiting, q, last)
		if remove && errors.Is(err, problem.FilterNotFound) {
			lines, err = append(lines, problem.Of(err).Details+" was removed before, or is another component's; there was nothing to do"), nil
		}
		if err == nil {
			told = append(told, prefixed(component, lines)...)
			continue
		}
		p := *problem.Of(err)
		p.Details = component + ": " + p.Details
		failures = append(failures, &p)
		told = append(told, prefixed(component, append(lines, fmt.Sprintf("failed: %s [%s] %s", problem.Of(err), p.Kind.Code, p.Kind.Remedy)))...)
		if !remove || waiting.Err() != nil || p.Kind == problem.ShuttingDown {
			for _, rest := range steps[i+1:] {
				told = append(told, rest.Component+": not begun")
			}
			break
		}
	}
	switch {
	case len(failures) == 0:
		return strings.Join(told, "\n"), nil
	case len(steps) == 1:
		return "", failures[0]
	}
	return "", &problem.Problem{Kind: problem.DesignFailed, Details: strings.Join(told, "\n"), Err: failures[0]}
}

// operate asks for an operation and waits for its end. What it tells is what the operation warned of, and its last event.
func (m *meshServer) operate(ctx, waiting context.Context, q operation.Request, last bool) (told []string, err error) {
	id := q.ID
	events := m.server.Events.Subscribe(m.server.Events.Cursor(), id)
	if _, err := m.server.Operations.Submit(ctx, q); err != nil {
		return nil, err
	}
	if last {
		waits(ctx)
	}
	seen := uint64(0)
	hear := func(e event.Event) (ended bool, err error) {
		if e.Sequence <= seen {
			return false, nil
		}
		seen = e.Sequence
		if e.Last && e.Type == event.Error {
			return true, failed(e)
		}
		if e.Last || e.Type == event.Warn {
			told = append(told, line(e))
		}
		return e.Last, nil
	}
	for {
		e, err := events.Next(waiting)
		switch {
		case errors.Is(err, problem.EventsMissed) && m.server.Story != nil: // this operation's end may be among them
			story, _, err := m.server.Story(waiting, id)
			if err != nil {
				return told, problem.DesignGoesOn.New("what operation %s has told cannot be read: %w", id, err)
			}
			for _, e := range story {
				if ended, err := hear(e); ended {
					return told, err
				}
			}
			continue
		case errors.Is(err, problem.EventsMissed):
			continue
		case errors.Is(err, problem.ShuttingDown):
			return told, problem.ShuttingDown.New("operation %s is accepted, and goes on when the adapter is back", id)
		case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
			return told, problem.DesignGoesOn.New("operation %s has not ended within %s", id, m.server.DesignTimeout)
		case err != nil:
			return told, err
		}
		if ended, err := hear(e); ended {
			return told, err
		}
	}
}

// failed is the Problem that an operation ended with.
func failed(e event.Event) error {
	kind := problem.DesignFailed
	if i := slices.IndexFunc(problem.All(), func(k *problem.Kind) bool { return k.Code == e.Code }); i >= 0 {
		kind = problem.All()[i]
	}
	return &problem.Problem{Kind: kind, Details: e.Details}
}

// line is an event as one line says it.
func line(e event.Event) string {
	text := e.Summary
	if e.Type == event.Warn {
		text = "warning: " + text
	}
	if !strings.Contains(text, e.Details) { // a warning's summary may have said it
		text += "; " + strings.ReplaceAll(e.Details, "\n", "; ")
	}
	return text
}

func prefixed(prefix string, lines []string) []string {
	out := make([]string, len(lines))
	for i, l := range lines {
		out[i] = prefix + ": " + l
	}
	return out
}

// newID makes an operation's id. Meshery's servers read those as UUIDs.
func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
