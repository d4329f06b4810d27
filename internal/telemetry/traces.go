package telemetry

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"google.golang.org/grpc/stats"
)

const (
	// tracerName is the scope of the adapter's own spans.
	tracerName = "github.com/meshery/meshery-filters"
	// farewell bounds how long the last spans may hold the adapter's end up.
	farewell = 2 * time.Second
)

// Traces hands spans to whoever OTEL_EXPORTER_OTLP_ENDPOINT names. The zero value makes none.
type Traces struct {
	provider *sdktrace.TracerProvider
	exporter *exporter
}

// NewTraces reads OpenTelemetry's environment variables. Without an endpoint in it nothing is made and nothing is sent; what
// is wrong with the variables is a warning, and nothing is sent either. instance tells this adapter from others.
//
// The SDK reads the process's environment for what is not decided here: headers, certificates, compression, time limits,
// the sampler, the batches.
func NewTraces(ctx context.Context, env []string, b Build, instance string, m *Metrics, log *slog.Logger) *Traces {
	next, err := newExporter(ctx, variables(env))
	if err != nil {
		log.Warn("no traces are exported", "err", err)
	}
	if next == nil {
		return &Traces{}
	}
	own := []attribute.KeyValue{attribute.String("service.name", "meshery-filters"), attribute.String("service.version", b.Version),
		attribute.String("service.instance.id", instance)}
	r, err := resource.New(ctx, resource.WithTelemetrySDK(), resource.WithAttributes(own...), resource.WithFromEnv())
	if err != nil {
		log.Warn("OTEL_RESOURCE_ATTRIBUTES cannot be read as a whole", "err", err)
	}
	t := &Traces{exporter: &exporter{next: next, metrics: m, log: log}}
	t.exporter.ending, t.exporter.end = context.WithCancel(context.WithoutCancel(ctx))
	t.provider = sdktrace.NewTracerProvider(sdktrace.WithResource(r), sdktrace.WithSpanProcessor(counted{m}), sdktrace.WithBatcher(t.exporter))
	log.Info("traces are exported")
	return t
}

// variables are those of an environment, with the last of each name.
func variables(env []string) func(names ...string) string {
	values := map[string]string{}
	for _, e := range env {
		if name, value, ok := strings.Cut(e, "="); ok && strings.HasPrefix(name, "OTEL_") {
			values[name] = strings.TrimSpace(value)
		}
	}
	return func(names ...string) string {
		for _, n := range names {
			if values[n] != "" {
				return values[n]
			}
		}
		return ""
	}
}

// newExporter makes what the variables ask for, which may be nothing.
func newExporter(ctx context.Context, of func(names ...string) string) (sdktrace.SpanExporter, error) {
	endpoint := of("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
	kinds := of("OTEL_TRACES_EXPORTER")
	if strings.EqualFold(of("OTEL_SDK_DISABLED"), "true") || kinds == "none" || kinds == "" && endpoint == "" {
		return nil, nil
	}
	if kinds != "" && !slices.Contains(strings.Split(kinds, ","), "otlp") {
		return nil, fmt.Errorf("OTEL_TRACES_EXPORTER is %.100q; use otlp or none", kinds)
	}
	// The SDK writes what it cannot read to standard error as it is, with the passwords and tokens that are in it.
	for _, name := range []string{"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"} {
		if u, err := url.Parse(of(name)); of(name) != "" && (err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "") {
			return nil, fmt.Errorf("the endpoint in %s is no address; write http://HOST:PORT or https://HOST:PORT", name)
		}
	}
	for _, name := range []string{"OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"} {
		if of(name) != "" && !headers(of(name)) {
			return nil, fmt.Errorf("%s are no headers; write NAME=VALUE, several separated by commas, and %%25 for %% in a value", name)
		}
	}
	switch protocol := of("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"); protocol {
	case "grpc":
		return otlptracegrpc.New(ctx)
	case "", "http/protobuf":
		return otlptracehttp.New(ctx)
	default:
		return nil, fmt.Errorf("OTEL_EXPORTER_OTLP_PROTOCOL is %.100q; use grpc or http/protobuf", protocol)
	}
}

var headerName = regexp.MustCompile("^[0-9A-Za-z!#$%&'*+.^_`|~-]+$")

// headers says whether the SDK can read all of a text with headers.
func headers(text string) bool {
	for header := range strings.SplitSeq(text, ",") {
		name, value, found := strings.Cut(header, "=")
		if _, err := url.PathUnescape(value); err != nil || !found || !headerName.MatchString(strings.TrimSpace(name)) {
			return false
		}
	}
	return true
}

// Tracer makes spans.
func (t *Traces) Tracer() trace.Tracer {
	if t.provider == nil {
		return noop.NewTracerProvider().Tracer(tracerName)
	}
	return t.provider.Tracer(tracerName)
}

// Calls are what a gRPC server gets whose calls are traced; none where nothing is. Calls that go on for days, and those
// that only look whether the adapter lives, have no span.
func (t *Traces) Calls() []stats.Handler {
	if t.provider == nil {
		return nil
	}
	traced := func(i *stats.RPCTagInfo) bool {
		return !slices.Contains([]string{streamEvents, watch}, i.FullMethodName) && !strings.HasPrefix(i.FullMethodName, "/grpc.")
	}
	return []stats.Handler{otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(t.provider), otelgrpc.WithFilter(traced),
		otelgrpc.WithMeterProvider(metricnoop.NewMeterProvider()), otelgrpc.WithPropagators(propagation.TraceContext{}))}
}

// Close sends the spans that have ended, within two seconds.
func (t *Traces) Close() {
	if t.provider == nil {
		return
	}
	defer time.AfterFunc(farewell, t.exporter.end).Stop()
	// It returns when its goroutine has ended, which needs no longer than the exporter; a time limit of its own would leave
	// that behind.
	_ = t.provider.Shutdown(context.WithoutCancel(t.exporter.ending))
	t.exporter.end()
}

// exporter tells when spans are not taken, and when they are again, instead of telling OpenTelemetry's global handler.
type exporter struct {
	next    sdktrace.SpanExporter
	metrics *Metrics
	log     *slog.Logger
	ending  context.Context // ends what is on its way
	end     context.CancelFunc
	failing atomic.Bool
}

func (e *exporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(e.ending, cancel)()
	err := e.next.ExportSpans(ctx, spans)
	if err == nil {
		e.metrics.exported.Add(float64(len(spans)))
	}
	if was := e.failing.Swap(err != nil); err != nil && !was {
		e.log.Warn("traces are not taken, and are lost", "err", clip(err.Error()))
	} else if err == nil && was {
		e.log.Info("traces are taken again")
	}
	return nil
}

func (e *exporter) Shutdown(ctx context.Context) error { return e.next.Shutdown(ctx) }

// counted counts the spans that end.
type counted struct{ metrics *Metrics }

func (c counted) OnEnd(s sdktrace.ReadOnlySpan)                 { c.metrics.spans.Inc() }
func (counted) OnStart(context.Context, sdktrace.ReadWriteSpan) {}
func (counted) Shutdown(context.Context) error                  { return nil }
func (counted) ForceFlush(context.Context) error                { return nil }

// clip bounds what a receiver may have written.
func clip(text string) string {
	const most = 500
	if len(text) > most {
		text = text[:most] + "…"
	}
	return strings.ToValidUTF8(text, "\uFFFD")
}
