package server

import (
	"context"
	"slices"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/meshery/meshery-filters/internal/audit"
	"github.com/meshery/meshery-filters/internal/limit"
	"github.com/meshery/meshery-filters/internal/problem"
)

// call is what the server knows of a method before it reads a request.
type call struct {
	needs  role
	stream bool
}

// changing are the calls of meshes.MeshService that ask for a change, or lead to one.
var changing = []string{"ApplyOperation", "ProcessOAM", "Provision", "CreateMeshInstance"}

// callsOf lists the methods of the registered services.
func callsOf(g *grpc.Server) map[string]call {
	calls := map[string]call{}
	for service, info := range g.GetServiceInfo() {
		for _, m := range info.Methods {
			c := call{needs: reader, stream: m.IsClientStream || m.IsServerStream}
			switch {
			case service == healthpb.Health_ServiceDesc.ServiceName:
				c.needs = nobody // whoever watches over the adapter need not be let into it
			case service == meshServiceName && slices.Contains(changing, m.Name):
				c.needs = operate
			}
			calls["/"+service+"/"+m.Name] = c
		}
	}
	return calls
}

// refusal is the key of a context whose call is not to be answered.
type refusal struct{}

// place is what a call takes of the limits.
type place struct {
	// keep makes the place outlive the context, unless that has ended.
	keep    func() bool
	release func()
}

// placeKey is the key of a context for its call's place.
type placeKey struct{}

// maxAbandoned is how long a call's own deadline may keep its remains in memory when it is refused unread: grpc leaves
// the deadline's timer running then.
const maxAbandoned = time.Minute

// tap refuses calls before their request is read, which may be large. It is called on the connection's own goroutine and
// must not wait.
func (s *Server) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	c, who := s.calls[info.FullMethodName], callerOf(ctx)
	err := s.permit(info.FullMethodName, c, who)
	if err == nil {
		clients := s.running
		if c.stream {
			clients = s.open
		}
		var release func()
		if release, err = clients.Take(limit.Key(who.certificate, who.remote)); err == nil {
			return context.WithValue(ctx, placeKey{}, &place{context.AfterFunc(ctx, release), release}), nil
		}
		err = problem.TooMuch.New("%s: %w", info.FullMethodName, err)
	}
	if s.Audit != nil {
		p := problem.Of(err)
		s.Audit.Count(audit.Entry{Result: audit.Refused, Code: p.Kind.Code, Problem: p.Kind.Summary, Call: info.FullMethodName, Who: who.asked(s.Roles).Who("")})
	}
	err = s.toStatus(ctx, info.FullMethodName, err)
	if d, ok := ctx.Deadline(); !ok || time.Until(d) < maxAbandoned {
		if s.OnRefused != nil {
			method := info.FullMethodName
			if _, known := s.calls[method]; !known {
				method = ""
			}
			s.OnRefused(method, status.Code(err))
		}
		return ctx, err
	}
	// The call goes on, without the time to send much, to where its context is cleared away.
	ctx, cancel := context.WithCancel(context.WithValue(ctx, refusal{}, err))
	time.AfterFunc(time.Second, cancel)
	return ctx, nil
}

// begin is called when a call's handler begins, and end when it has ended: what it takes of the limits is taken until then,
// even if its client has long hung up. It fails for a call that tap let through only to be refused.
func begin(ctx context.Context) (end func(), err error) {
	if err, ok := ctx.Value(refusal{}).(error); ok {
		return nil, err
	}
	p, ok := ctx.Value(placeKey{}).(*place)
	if !ok {
		return func() {}, nil
	}
	if !p.keep() {
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	return p.release, nil
}

// waits is called by a handler that from now on only waits, and has let go of its request: others of its client get the
// place meanwhile.
func waits(ctx context.Context) {
	if p, ok := ctx.Value(placeKey{}).(*place); ok {
		p.release()
	}
}

// permit says whether the caller has the role that the call needs.
func (s *Server) permit(method string, c call, who caller) error {
	if who.certificate == nil || c.needs == nobody {
		return nil
	}
	if has := s.Roles.of(who.certificate); has < c.needs {
		return problem.RoleMissing.New("%s needs the role %s, and the client certificate %q has %s", method, c.needs, who.name(),
			map[role]string{nobody: "none", reader: "the role read"}[has])
	}
	return nil
}
