package telemetry

import (
	"cmp"
	"context"
	"maps"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
)

// Calls is what a gRPC server that is measured gets. It sees the calls of methods that the server has, and the status
// that each of them left with.
func (m *Metrics) Calls() stats.Handler { return calls{m} }

type calls struct{ *Metrics }

// Refused hears of a call that was refused unread, of which Calls does not hear.
func (m *Metrics) Refused(method string, code codes.Code) {
	m.calls.WithLabelValues(cmp.Or(method, rest), code.String()).Inc()
}

// Turned hears that a connection to a listener was closed at once.
func (m *Metrics) Turned(listener string) { m.turned.WithLabelValues(listener).Inc() }

// call is what is remembered of one that runs.
type call struct {
	method string
	stream bool
}

type callKey struct{}

func (calls) TagRPC(ctx context.Context, i *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, callKey{}, &call{method: i.FullMethodName})
}

func (c calls) HandleRPC(ctx context.Context, s stats.RPCStats) {
	switch s := s.(type) {
	case *stats.Begin:
		this := ctx.Value(callKey{}).(*call)
		this.stream = s.IsClientStream || s.IsServerStream
		c.running.add(this.method, 1)
	case *stats.End:
		this := ctx.Value(callKey{}).(*call)
		c.running.add(this.method, -1)
		c.calls.WithLabelValues(this.method, status.Code(s.Error).String()).Inc()
		if !this.stream {
			c.callTook.WithLabelValues(this.method).Observe(s.EndTime.Sub(s.BeginTime).Seconds())
		}
	}
}

func (calls) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (calls) HandleConn(context.Context, stats.ConnStats)                       {}

// running counts calls by method.
type running struct {
	mu sync.Mutex
	by map[string]int
}

func (r *running) add(method string, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.by == nil {
		r.by = map[string]int{}
	}
	r.by[method] += n
}

func (r *running) all() map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.by)
}
