// Package server is the gRPC edge: meshes.MeshService, which Meshery calls, and FilterService, which shows more than
// Meshery's protocol can. It copies messages to requests and back, and decides nothing.
//
// Every error leaves as the status of its problem.Problem. An error that is none, and a panic, leave as Internal with a
// random id and nothing else; what happened is in the log under that id. No request's body or kubeconfig is logged.
package server

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/stats"

	"github.com/meshery/meshery-filters/internal/audit"
	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/limit"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

const (
	// maxMessage bounds a request, in bytes: a module of 20 MiB in base64 and its document fit.
	maxMessage = 32 << 20
	// maxHeaders bounds a call's headers, in bytes. They are held as long as it runs.
	maxHeaders = 64 << 10
	// maxStreams bounds the calls that run at once on one connection.
	maxStreams = 1000
	// straggle is how long a call whose context has ended may take to notice.
	straggle = 5 * time.Second
)

// Operations is what the server needs of operation.Runner.
type Operations interface {
	// Submit accepts a request and returns its id, or a *problem.Problem.
	Submit(context.Context, operation.Request) (id string, err error)
	// Catalogue lists what Submit takes.
	Catalogue() []operation.Row
	// List returns every chain that holds filters.
	List(context.Context) ([]operation.Status, error)
	// Survey looks in proxies for filters that nothing explains.
	Survey(context.Context) (operation.Survey, error)
	// History returns what became of a filter, oldest first.
	History(ctx context.Context, namespace, name string) ([]operation.Revision, error)
	// Plan returns what a request would make hold, and changes nothing.
	Plan(context.Context, operation.Request) ([]operation.Preview, error)
}

var _ Operations = (*operation.Runner)(nil)

// Events is what the server needs of event.Hub.
type Events interface {
	Subscribe(from uint64, operation string) *event.Subscription
	// Cursor is the position of the next event, Oldest that of the oldest which is held.
	Cursor() uint64
	Oldest() uint64
}

var _ Events = (*event.Hub)(nil)

// Position remembers one position of the Events over restarts.
type Position interface {
	// Load returns the position, and whether there is one.
	Load(context.Context) (position uint64, found bool, err error)
	Save(ctx context.Context, position uint64) error
}

// Options are a Server's parts and settings.
type Options struct {
	Operations Operations
	Events     Events
	// Story reads what an operation has told, for who missed events of it. Default: nothing does, and an end that was missed
	// is waited for in vain.
	Story func(ctx context.Context, operation string) (events []event.Event, last uint64, err error)
	// EventsID is the same for as long as positions of the Events mean the same. Default: this process's.
	EventsID string
	// Left remembers where the last client of StreamEvents stood. Default: nothing does, and each begins with what
	// happens from then on.
	Left Position
	Log  *slog.Logger
	// Version and GitSHA are of this build.
	Version, GitSHA string
	// Component is the adapter's UUID.
	Component string
	// EnvoyVersions are those that the adapter supports, as users read them.
	EnvoyVersions []string
	// TLS, when set, is required of every client; nil serves in clear.
	TLS *tls.Config
	// Roles of client certificates, where TLS asks for them.
	Roles Roles
	// Audit hears of calls that are refused unread; it must not wait. Default: nobody does.
	Audit interface{ Count(audit.Entry) }
	// Calls and Streams bound what clients may have at once of calls that are answered once, and of streams.
	Calls, Streams limit.Bounds
	// ShutdownTimeout bounds how long calls may take to finish once Serve's context has ended. Streams end at once.
	// Default: 10s.
	ShutdownTimeout time.Duration
	// DesignTimeout bounds how long the answer to ProcessOAM and Provision waits for the operations of a design. Default: 15m.
	DesignTimeout time.Duration
	// Stats hear of every call that is not refused unread.
	Stats []stats.Handler
	// OnRefused hears of the other calls: the method, which is empty when there is none of that name, and the status. It
	// must not wait. Default: nobody hears.
	OnRefused func(method string, code codes.Code)
}

// Server answers gRPC on one listener.
type Server struct {
	Options
	grpc   *grpc.Server
	health *health.Server
	calls  map[string]call // by method
	// running and open are who has calls and streams.
	running, open *limit.Clients
	// stopping ends when streams must.
	stopping  context.Context
	stop      context.CancelFunc
	listeners listeners
	lives     *lives // set by Serve
}

// New makes a Server that is not ready; Serve makes it answer.
func New(o Options) *Server {
	if o.ShutdownTimeout == 0 {
		o.ShutdownTimeout = 10 * time.Second
	}
	if o.DesignTimeout == 0 {
		o.DesignTimeout = defaultDesignTimeout
	}
	if o.EventsID == "" {
		o.EventsID = rand.Text()[:8]
	}
	s := &Server{Options: o, health: health.NewServer(), running: limit.New("calls", o.Calls), open: limit.New("streams", o.Streams)}
	s.listeners.server = s
	s.stopping, s.stop = context.WithCancel(context.Background())
	settings := []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(20 * time.Second),
		// Most connections carry little, and thousands may be open: a large buffer for reading would be most of what each
		// costs.
		grpc.ReadBufferSize(4 << 10),
		grpc.InTapHandle(s.tap),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		// Meshery opens a connection for nearly every call and does not always close it, so that those without a call end
		// soon; and it keeps an event stream on which nothing may happen for days. Until a client answers a ping, what it
		// was sent last may be lost.
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 5 * time.Minute, Time: 10 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	}
	for _, h := range o.Stats {
		settings = append(settings, grpc.StatsHandler(h))
	}
	if o.TLS != nil {
		settings = append(settings, grpc.Creds(credentials.NewTLS(o.TLS)))
	}
	s.grpc = grpc.NewServer(settings...)
	s.grpc.RegisterService(meshServiceDesc(), &meshServer{server: s})
	filterspb.RegisterFilterServiceServer(s.grpc, &filterServer{server: s})
	healthpb.RegisterHealthServer(s.grpc, s.health)
	registerReflection(s.grpc)
	s.calls = callsOf(s.grpc)
	s.SetReady(false)
	return s
}

// SetReady tells clients of the health service whether the adapter works. Calls are answered either way. Once Serve
// shuts down it stays not ready.
func (s *Server) SetReady(ready bool) {
	state := healthpb.HealthCheckResponse_NOT_SERVING
	if ready {
		state = healthpb.HealthCheckResponse_SERVING
	}
	for _, service := range []string{"", meshServiceName, filterspb.FilterService_ServiceDesc.ServiceName} {
		s.health.SetServingStatus(service, state)
	}
}

// Serve answers on the listener, which it closes, until ctx ends; it is called once. Then nothing new is accepted,
// streams end with problem.ShuttingDown, and other calls have ShutdownTimeout to finish before they are cut off.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.lives = &lives{Listener: l, epoch: time.Now()}
	served := make(chan error, 1)
	go func() { served <- s.grpc.Serve(s.lives) }()
	select {
	case err := <-served:
		s.stop()
		s.grpc.Stop()
		return fmt.Errorf("serve gRPC on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	s.health.Shutdown()
	s.stop()
	stopped := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		s.listeners.saves.Wait()
		<-served
		close(stopped)
	}()
	timer := time.NewTimer(s.ShutdownTimeout)
	defer timer.Stop()
	select {
	case <-stopped:
		return nil
	case <-timer.C:
	}
	s.Log.Info("calls were cut off", "after", s.ShutdownTimeout)
	s.grpc.Stop()
	timer.Reset(straggle)
	select {
	case <-stopped:
		return nil
	case <-timer.C:
		return errors.New("stop gRPC: calls did not end with their context")
	}
}
