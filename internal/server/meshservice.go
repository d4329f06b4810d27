package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// What the adapter calls itself. Meshery compares names with these, so they do not change.
const (
	meshName      = "Envoy Filters"
	componentType = "adapter"
)

// Bounds of what comes with a request beside its body.
const (
	maxKubeconfigs = 16
	maxKubeconfig  = 1 << 20 // bytes
	maxContextName = 1 << 10 // bytes
)

// meshServiceName is what every generation of Meshery's servers calls.
const meshServiceName = "meshes.MeshService"

// meshService is the union of the RPCs that those generations call.
type meshService interface {
	meshes.MeshServiceServer
	CreateMeshInstance(context.Context, *filterspb.CreateMeshInstanceRequest) (*filterspb.CreateMeshInstanceResponse, error)
	Provision(context.Context, *filterspb.ProvisionRequest) (*filterspb.ProvisionResponse, error)
}

// meshServiceDesc adds to the library's service what its generated code lacks.
func meshServiceDesc() *grpc.ServiceDesc {
	return &grpc.ServiceDesc{
		ServiceName: meshServiceName,
		HandlerType: (*meshService)(nil),
		Methods: append(slices.Clone(meshes.MeshService_ServiceDesc.Methods),
			method("CreateMeshInstance", meshService.CreateMeshInstance),
			method("Provision", meshService.Provision)),
		Streams:  meshes.MeshService_ServiceDesc.Streams,
		Metadata: meshes.MeshService_ServiceDesc.Metadata,
	}
}

// method is what protoc-gen-go-grpc generates for a call that is no stream.
func method[Req, Resp any](name string, call func(meshService, context.Context, *Req) (*Resp, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(srv any, ctx context.Context, dec func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
		req := new(Req)
		if err := dec(req); err != nil {
			return nil, err
		}
		handle := func(ctx context.Context, req any) (any, error) { return call(srv.(meshService), ctx, req.(*Req)) }
		info := &grpc.UnaryServerInfo{Server: srv, FullMethod: "/" + meshServiceName + "/" + name}
		return intercept(ctx, req, info, handle)
	}}
}

type meshServer struct {
	meshes.UnimplementedMeshServiceServer
	server *Server
}

var _ meshService = (*meshServer)(nil)

// CreateMeshInstance takes the kubeconfig for the operations that follow on this connection: older servers send it in no
// other way, and on every connection. It is kept in memory until the connection ends.
func (m *meshServer) CreateMeshInstance(ctx context.Context, r *filterspb.CreateMeshInstanceRequest) (*filterspb.CreateMeshInstanceResponse, error) {
	var mistakes []problem.Field
	if len(r.GetK8SConfig()) > maxKubeconfig {
		mistakes = append(mistakes, problem.Field{Path: "k8sConfig", Cause: "it is larger than 1 MiB"})
	}
	if len(r.GetContextName()) > maxContextName {
		mistakes = append(mistakes, problem.Field{Path: "contextName", Cause: "it is longer than 1024 bytes"})
	}
	if err := problem.InvalidRequest.WithFields("", mistakes); err != nil {
		return nil, err
	}
	if c := m.server.lives.of(ctx); c != nil && !c.hold(inContext(string(r.GetK8SConfig()), r.GetContextName())) {
		return nil, problem.TooMuch.New("the kubeconfigs of all connections are larger than %d MiB", maxHeld>>20)
	}
	return &filterspb.CreateMeshInstanceResponse{}, nil
}

func (m *meshServer) MeshName(context.Context, *meshes.MeshNameRequest) (*meshes.MeshNameResponse, error) {
	return &meshes.MeshNameResponse{Name: meshName}, nil
}

func (m *meshServer) MeshVersions(context.Context, *meshes.MeshVersionsRequest) (*meshes.MeshVersionsResponse, error) {
	return &meshes.MeshVersionsResponse{Version: m.server.EnvoyVersions}, nil
}

func (m *meshServer) ComponentInfo(context.Context, *meshes.ComponentInfoRequest) (*meshes.ComponentInfoResponse, error) {
	return &meshes.ComponentInfoResponse{Type: componentType, Name: operation.ComponentName, Version: m.server.Version, GitSha: m.server.GitSHA}, nil
}

func (m *meshServer) SupportedOperations(context.Context, *meshes.SupportedOperationsRequest) (*meshes.SupportedOperationsResponse, error) {
	out := &meshes.SupportedOperationsResponse{}
	for _, row := range m.server.Operations.Catalogue() {
		out.Ops = append(out.Ops, &meshes.SupportedOperation{Key: row.Key, Value: row.Description, Category: meshes.OpCategory(row.Category)})
	}
	return out, nil
}

func (m *meshServer) ApplyOperation(ctx context.Context, r *meshes.ApplyRuleRequest) (*meshes.ApplyRuleResponse, error) {
	kubeconfigs, withConnection, err := m.kubeconfigs(ctx, r.GetKubeConfigs())
	if err != nil {
		return nil, err
	}
	id, err := m.server.Operations.Submit(ctx, operation.Request{
		Operation:   r.GetOpName(),
		ID:          r.GetOperationId(),
		Namespace:   r.GetNamespace(),
		Username:    r.GetUsername(),
		Body:        r.GetCustomBody(),
		Delete:      r.GetDeleteOp(),
		Kubeconfigs: kubeconfigs,
		Implied:     withConnection,
		Caller:      callerOf(ctx).asked(m.server.Roles),
	})
	if err != nil {
		return nil, err
	}
	return &meshes.ApplyRuleResponse{OperationId: id}, nil
}

// kubeconfigs are those that a request brings, or else the one that came with its connection.
func (m *meshServer) kubeconfigs(ctx context.Context, brought []string) (all []string, withConnection bool, err error) {
	if err := validateKubeconfigs(brought); err != nil {
		return nil, false, err
	}
	if came := m.server.lives.of(ctx).holds(); len(brought) == 0 && came != "" {
		return []string{came}, true, nil
	}
	return brought, false, nil
}

// StreamEvents sends every operation's events: first what may not have reached the clients before, then what happens.
// Its headers are sent once it misses nothing. A client that reads too slowly gets a warning in place of what it missed,
// and the stream goes on: Meshery opens it only once.
//
// A client that sends the metadata key liveOnly gets what happens from now on, and is not counted.
func (m *meshServer) StreamEvents(_ *meshes.EventsRequest, out meshes.MeshService_StreamEventsServer) error {
	ctx, events := out.Context(), m.server.Events
	from, oldest := events.Cursor(), time.Time{}
	var counted *listener
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get(liveOnly)) == 0 {
		counted = m.server.listeners.join(ctx, m.server.lives.of(ctx))
		defer counted.leave()
		from, oldest = counted.received, time.Now().Add(-caughtUpAge)
	}
	sub := events.Subscribe(from, "")
	if err := out.SendHeader(nil); err != nil {
		return err
	}
	next, sent := sub.Next, func(uint64) {}
	if counted != nil {
		next = func(ctx context.Context) (event.Event, error) { return counted.next(ctx, sub) }
		sent = counted.sent
	}
	for {
		e, err := next(ctx)
		if errors.Is(err, problem.EventsMissed) {
			e, err = m.missed(problem.Of(err)), nil
		}
		if err != nil {
			return err
		}
		if e.Time.IsZero() || !e.Time.Before(oldest) {
			if err := out.Send(toEventsResponse(e)); err != nil {
				return err
			}
		}
		sent(sub.Cursor())
	}
}

// missed tells within the stream that events were skipped.
func (m *meshServer) missed(p *problem.Problem) event.Event {
	return event.Event{Type: event.Warn, Summary: p.Kind.Summary, Details: p.Details, Code: p.Kind.Code,
		Cause: p.Kind.Cause, Remedy: p.Kind.Remedy, Component: m.server.Component, Name: operation.ComponentName}
}

func toEventsResponse(e event.Event) *meshes.EventsResponse {
	return &meshes.EventsResponse{
		EventType:            meshes.EventType(e.Type),
		Summary:              e.Summary,
		Details:              e.Details,
		OperationId:          e.Operation,
		ProbableCause:        e.Cause,
		SuggestedRemediation: e.Remedy,
		ErrorCode:            e.Code,
		Component:            e.Component,
		ComponentName:        e.Name,
	}
}

// inContext is a kubeconfig whose current context is that one. One that cannot be read is left as it is: who needs it says
// what is wrong with it.
func inContext(kubeconfig, name string) string {
	var c map[string]any
	if name == "" || yaml.Unmarshal([]byte(kubeconfig), &c) != nil || c == nil {
		return kubeconfig
	}
	c["current-context"] = name
	text, err := yaml.Marshal(c)
	if err != nil {
		return kubeconfig
	}
	return string(text)
}

func validateKubeconfigs(configs []string) error {
	var mistakes []problem.Field
	if len(configs) > maxKubeconfigs {
		mistakes = append(mistakes, problem.Field{Path: "kube_configs", Cause: fmt.Sprintf("there are %d", len(configs)),
			Remedy: fmt.Sprintf("choose at most %d contexts", maxKubeconfigs)})
	}
	for i, c := range configs {
		if len(c) > maxKubeconfig {
			mistakes = append(mistakes, problem.Field{Path: fmt.Sprintf("kube_configs[%d]", i), Cause: "it is larger than 1 MiB"})
		}
	}
	return problem.InvalidRequest.WithFields("", mistakes)
}
