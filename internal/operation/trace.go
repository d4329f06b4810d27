package operation

import (
	"context"
	"encoding/base64"
	"errors"
	"maps"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Attributes of spans. Errors are told by their code alone: their texts may quote what a user wrote.
const (
	attrOperation = attribute.Key("meshery.operation.id")
	attrKey       = attribute.Key("meshery.operation.key")
	attrAttempt   = attribute.Key("meshery.operation.attempt")
	attrCluster   = attribute.Key("meshery.cluster")
	attrTarget    = attribute.Key("meshery.target")
	attrVersion   = attribute.Key("meshery.chain.version")
	attrFilter    = attribute.Key("meshery.filter")
	attrDigest    = attribute.Key("meshery.module.digest")
	attrBytes     = attribute.Key("meshery.module.size")
	attrSequence  = attribute.Key("meshery.event.sequence")
	attrRunning   = attribute.Key("meshery.proxies.running")
	attrExpected  = attribute.Key("meshery.proxies.expected")
	attrError     = attribute.Key("error.type")
)

// step begins a part of what ctx's span tells of; end takes how it went. Where nothing is told, as at the adapter's
// start, it is no part of anything.
func (r *Runner) step(ctx context.Context, name string, about ...attribute.KeyValue) (_ context.Context, end func(error)) {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return ctx, func(error) {}
	}
	ctx, span := r.Tracer.Start(ctx, name, trace.WithAttributes(about...))
	return ctx, func(err error) {
		if err != nil {
			fault(span, codeOf(err))
		}
		span.End()
	}
}

// codeOf names what went wrong.
func codeOf(err error) string {
	if errors.Is(err, context.Canceled) {
		return "canceled"
	}
	return problem.Of(err).Kind.Code
}

func fault(span trace.Span, code string) {
	span.SetStatus(codes.Error, code)
	span.SetAttributes(attrError.String(code))
}

// note adds to ctx's span.
func note(ctx context.Context, about ...attribute.KeyValue) {
	trace.SpanFromContext(ctx).SetAttributes(about...)
}

// remember keeps in a job whose trace it belongs to.
func (j *job) remember(ctx context.Context) {
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	if len(carrier) > 0 {
		j.Trace = carrier
	}
}

// work begins the span of an attempt at an operation, in the trace of whoever asked for it. The first one shows how long
// it waited.
func (r *Runner) work(ctx context.Context, j job, attempt int, begun time.Time) (context.Context, trace.Span) {
	ctx = propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier(maps.Clone(j.Trace)))
	about := trace.WithAttributes(attrOperation.String(j.ID), attrKey.String(j.Operation))
	if attempt == 1 && !j.Accepted.IsZero() && j.Accepted.Before(begun) && len(j.Trace) > 0 {
		_, wait := r.Tracer.Start(ctx, "queue wait", trace.WithTimestamp(j.Accepted), about)
		wait.End(trace.WithTimestamp(begun))
	}
	return r.Tracer.Start(ctx, "work", trace.WithTimestamp(begun), about, trace.WithAttributes(attrAttempt.Int(attempt)))
}

// resolve finds a module's bytes. In clusters the filter's pull secret is theirs.
func (r *Runner) resolve(ctx context.Context, f filter.Filter, places []place) (m filter.Module, data []byte, err error) {
	ctx, end := r.step(ctx, "fetch module", attrFilter.String(f.Key.String()))
	defer func() { end(err) }()
	if r.Backends[f.Spec.Mesh] != nil {
		m, data, err = r.Modules.Resolve(ctx, f.Spec.Module)
	} else {
		m, data, err = r.Modules.ResolveWith(ctx, f.Spec.Module, r.pullSecret(ctx, f, places))
		if errors.Is(err, problem.ModuleUnavailable) {
			if inline := r.carried(ctx, f, places); inline != "" {
				m, data, err = r.Modules.Resolve(ctx, filter.Module{Inline: inline, SHA256: f.Spec.Module.SHA256})
			}
		}
	}
	note(ctx, attrDigest.String(m.SHA256), attrBytes.Int(len(data)))
	return m, data, err
}

// carried is the module, in base64, of a filter whose bytes are not at hand, if an object of its target still has it.
func (r *Runner) carried(ctx context.Context, f filter.Filter, places []place) (inline string) {
	if f.Spec.Module.SHA256 == "" {
		return ""
	}
	for _, pl := range places {
		b, ok := pl.backends[f.Spec.Mesh].(*clusterBackend)
		if !ok {
			continue
		}
		w, err := b.World(ctx, filter.Chain{Mesh: f.Spec.Mesh, Target: f.Spec.Target, Filters: []filter.Filter{f}})
		if err == nil && w.Modules[f.Spec.Module.SHA256].Inline != nil {
			return base64.StdEncoding.EncodeToString(w.Modules[f.Spec.Module.SHA256].Inline)
		}
	}
	return ""
}
