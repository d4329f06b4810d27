package server

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

type filterServer struct {
	filterspb.UnimplementedFilterServiceServer
	server *Server
}

var _ filterspb.FilterServiceServer = (*filterServer)(nil)

func (f *filterServer) List(ctx context.Context, _ *filterspb.ListRequest) (*filterspb.ListResponse, error) {
	chains, err := f.server.Operations.List(ctx)
	if err != nil && len(chains) == 0 {
		return nil, err
	}
	return &filterspb.ListResponse{Chains: Chains(chains), Untold: untold(err)}, nil
}

func (f *filterServer) Survey(ctx context.Context, _ *filterspb.SurveyRequest) (*filterspb.SurveyResponse, error) {
	s, err := f.server.Operations.Survey(ctx)
	if err != nil {
		return nil, err
	}
	out := &filterspb.SurveyResponse{Proxies: uint32(s.Proxies), Looked: uint32(s.Looked), Missed: clip(s.Missed, maxDetails), Files: s.Files}
	for _, o := range s.Orphans {
		out.Orphans = append(out.Orphans, &filterspb.Orphan{Proxy: o.Proxy, Filter: o.Name, Sha256: o.SHA256, Source: o.Source})
	}
	return out, nil
}

// Chains are those of a list as the service gives them, by mesh and target.
func Chains(list []operation.Status) (out []*filterspb.Chain) {
	for _, c := range list {
		out = append(out, toChain(c))
	}
	slices.SortFunc(out, func(a, b *filterspb.Chain) int {
		return cmp.Or(cmp.Compare(a.Mesh, b.Mesh), cmp.Compare(a.Target.Text, b.Target.Text))
	})
	return out
}

func (f *filterServer) Plan(ctx context.Context, r *filterspb.PlanRequest) (*filterspb.PlanResponse, error) {
	previews, err := f.server.Operations.Plan(ctx, operation.Request{
		Operation: r.GetOperation(),
		Namespace: r.GetNamespace(),
		Body:      r.GetBody(),
		Delete:    r.GetDelete(),
		Caller:    callerOf(ctx).asked(f.server.Roles),
	})
	if err != nil {
		return nil, err
	}
	out := &filterspb.PlanResponse{}
	for _, p := range previews {
		out.Previews = append(out.Previews, toPreview(p))
	}
	return out, nil
}

func (f *filterServer) History(ctx context.Context, r *filterspb.HistoryRequest) (*filterspb.HistoryResponse, error) {
	revisions, err := f.server.Operations.History(ctx, r.GetNamespace(), r.GetName())
	if err != nil && len(revisions) == 0 {
		return nil, err
	}
	return &filterspb.HistoryResponse{Revisions: Revisions(revisions), Untold: untold(err)}, nil
}

// untold says why an answer is not whole; nil where it is.
func untold(err error) *filterspb.Untold {
	p := problem.Of(err)
	if p == nil {
		return nil
	}
	return &filterspb.Untold{ErrorCode: p.Kind.Code, Details: clip(p.Details, maxDetails)}
}

// Revisions are those of a history as the service gives them.
func Revisions(history []operation.Revision) (out []*filterspb.Revision) {
	for _, rev := range history {
		c := toChain(rev.Alone())
		out = append(out, &filterspb.Revision{Number: rev.Number, Time: timestamppb.New(rev.Time), Change: rev.Change,
			Target: c.Target, Filter: c.Filters[0]})
	}
	return out
}

func (f *filterServer) Watch(r *filterspb.WatchRequest, out filterspb.FilterService_WatchServer) error {
	from, err := f.server.begin(r)
	if err != nil {
		return err
	}
	sub := f.server.Events.Subscribe(from, r.GetOperationId())
	if err := out.SendHeader(nil); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(out.Context())
	defer cancel()
	if r.GetUntilNow() {
		cancel() // Next gives what is held all the same, and does not wait for more
	}
	for {
		e, err := sub.Next(ctx)
		if err != nil && r.GetUntilNow() && errors.Is(err, context.Canceled) {
			return out.Context().Err()
		}
		if err != nil {
			return err
		}
		if err := out.Send(&filterspb.WatchResponse{Cursor: f.server.cursor(sub.Cursor()), Event: toEvent(e)}); err != nil {
			return err
		}
		if e.Last && r.GetOperationId() != "" {
			return nil
		}
	}
}

// begin finds the position that a watch begins at.
func (s *Server) begin(r *filterspb.WatchRequest) (uint64, error) {
	var mistakes []problem.Field
	if id := r.GetOperationId(); id != "" && !event.ValidOperation(id) {
		mistakes = append(mistakes, problem.Field{Path: "operation_id", Cause: "it is not an operation id",
			Remedy: "use 1 to 128 letters, digits, dashes and underscores, or leave it empty"})
	}
	if r.GetFromNow() && r.GetCursor() != "" {
		mistakes = append(mistakes, problem.Field{Path: "from_now", Cause: "it contradicts cursor", Remedy: "set one of the two"})
	}
	if r.GetFromNow() && r.GetUntilNow() {
		mistakes = append(mistakes, problem.Field{Path: "until_now", Cause: "together with from_now there is nothing to send", Remedy: "set one of the two"})
	}
	run, position, _ := strings.Cut(r.GetCursor(), ".")
	at, err := strconv.ParseUint(position, 10, 64)
	if r.GetCursor() != "" && err != nil {
		mistakes = append(mistakes, problem.Field{Path: "cursor", Cause: "it is not one that Watch gave"})
	}
	if err := problem.InvalidRequest.WithFields("", mistakes); err != nil {
		return 0, err
	}
	switch {
	case r.GetFromNow():
		return s.Events.Cursor(), nil
	case r.GetCursor() == "":
		return s.Events.Oldest(), nil
	case run != s.EventsID:
		return 0, problem.EventsMissed.New("the cursor is one of other events than the adapter keeps now; an empty one gives what it holds")
	}
	return at, nil
}

// cursor is a position as clients see it.
func (s *Server) cursor(position uint64) string {
	return s.EventsID + "." + strconv.FormatUint(position, 10)
}

func toEvent(e event.Event) *filterspb.Event {
	return &filterspb.Event{
		OperationId:          e.Operation,
		Sequence:             e.Sequence,
		Time:                 timestamppb.New(e.Time),
		Type:                 filterspb.Event_Type(e.Type),
		Summary:              e.Summary,
		Details:              e.Details,
		ErrorCode:            e.Code,
		ProbableCause:        e.Cause,
		SuggestedRemediation: e.Remedy,
		Component:            e.Component,
		ComponentName:        e.Name,
		Last:                 e.Last,
	}
}

func toChain(s operation.Status) *filterspb.Chain {
	t := s.Chain.Target
	out := &filterspb.Chain{
		Mesh:    s.Chain.Mesh,
		Version: s.Version,
		Problem: clip(s.Problem, maxDetails),
		Target: &filterspb.Target{Kind: string(t.Kind), Namespace: t.Namespace, Name: t.Name, Labels: t.Labels,
			Partition: t.Partition, Text: t.String()},
	}
	out.Unverified = clip(s.Loaded.Unverified, maxDetails)
	for _, f := range s.Chain.Filters {
		out.Filters = append(out.Filters, &filterspb.Filter{
			Namespace:     f.Key.Namespace,
			Name:          f.Key.Name,
			Labels:        f.Labels,
			Source:        f.Spec.Module.Source(),
			Sha256:        f.Spec.Module.SHA256,
			Phase:         string(f.Spec.Phase),
			Priority:      int32(f.Spec.Priority),
			FailurePolicy: string(f.Spec.FailurePolicy),
		})
	}
	for _, p := range s.Loaded.Proxies {
		out.Proxies = append(out.Proxies, &filterspb.Proxy{Id: p.ID, Version: p.Version, State: string(p.State),
			Expected: p.Expected, Detail: clip(p.Detail, maxDetails)})
	}
	return out
}

func toPreview(p operation.Preview) *filterspb.Preview {
	out := &filterspb.Preview{Mesh: p.Mesh, Target: p.Target.String(), Version: p.Version, Order: p.Order, Yaml: p.YAML}
	for _, l := range p.Losses {
		out.Losses = append(out.Losses, &filterspb.Loss{Filter: l.Filter.String(), Field: l.Field, Reason: l.Reason})
	}
	for _, c := range p.Changes {
		out.Changes = append(out.Changes, &filterspb.Change{Subject: c.Subject, Action: string(c.Action)})
	}
	return out
}
