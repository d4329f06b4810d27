package server

import (
	"context"
	"crypto/rand"
	"errors"
	"runtime/debug"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshery/meshery-filters/internal/limit"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Bounds of an error's text: it travels in HTTP/2 headers, which every client limits.
const (
	maxDetails    = 16 << 10 // bytes
	maxViolations = 100
	maxViolation  = 1 << 10 // bytes
)

// errorDomain is ErrorInfo's domain.
const errorDomain = "filters.meshery.io"

// unary guards every call that is no stream.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	begun := time.Now()
	defer func() {
		err = s.conclude(ctx, info.FullMethod, begun, recover(), err)
	}()
	end, err := begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	return next(ctx, req)
}

// stream guards every stream, and ends its context when the server stops.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	begun := time.Now()
	ctx, cancel := context.WithCancel(ss.Context())
	defer cancel()
	defer context.AfterFunc(s.stopping, cancel)()
	defer func() {
		panicked := recover()
		if panicked == nil && err != nil && s.stopping.Err() != nil {
			err = problem.ShuttingDown.New("%s ended", info.FullMethod)
		}
		err = s.conclude(ss.Context(), info.FullMethod, begun, panicked, err)
	}()
	end, err := begin(ss.Context())
	if err != nil {
		return err
	}
	defer end()
	return next(srv, stream{ss, ctx})
}

type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s stream) Context() context.Context { return s.ctx }

// conclude turns what a handler ended with into a status, and logs the call.
func (s *Server) conclude(ctx context.Context, method string, begun time.Time, panicked any, err error) error {
	switch {
	case panicked != nil:
		id := rand.Text()
		s.Log.Error("call panicked", "method", method, "id", id, "panic", panicked, "stack", string(debug.Stack()))
		err = fault(id)
	case err == nil:
	default:
		err = s.toStatus(ctx, method, err)
	}
	s.Log.Debug("call", "method", method, "code", status.Code(err).String(), "took", time.Since(begun))
	return err
}

// toStatus gives an error its status.
func (s *Server) toStatus(ctx context.Context, method string, err error) error {
	var p *problem.Problem
	if errors.As(err, &p) {
		return problemStatus(p)
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	id := rand.Text()
	s.Log.Error("call failed", "method", method, "id", id, "error", err)
	return fault(id)
}

// fault hides what happened behind an id of the log.
func fault(id string) error { return problemStatus(problem.Internal.New("id %s", id)) }

// problemStatus adds to a problem's status what programs read: its code and fields.
func problemStatus(p *problem.Problem) error {
	shown := *p
	shown.Details = clip(p.Details, maxDetails)
	st := shown.GRPCStatus()
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{Reason: p.Kind.Code, Domain: errorDomain,
		Metadata: map[string]string{"cause": p.Kind.Cause, "remedy": p.Kind.Remedy}}}
	if len(p.Fields) > 0 {
		bad := &errdetails.BadRequest{}
		for _, f := range p.Fields[:min(len(p.Fields), maxViolations)] {
			description := f.Cause
			if f.Remedy != "" {
				description += "; " + f.Remedy
			}
			bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{
				Field: clip(f.Path, maxViolation), Description: clip(description, maxViolation)})
		}
		details = append(details, bad)
	}
	if p.Kind.Status == codes.ResourceExhausted && p.Kind != problem.EventsMissed {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(limit.Retry)})
	}
	if full, err := st.WithDetails(details...); err == nil {
		st = full
	}
	return st.Err()
}

// clip makes text fit for the wire: at most n bytes, and valid UTF-8, without which a message cannot be sent at all.
func clip(text string, n int) string {
	if len(text) > n {
		text = text[:n] + "…"
	}
	return strings.ToValidUTF8(text, "\uFFFD")
}
