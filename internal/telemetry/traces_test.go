package telemetry

import (
	"bytes"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/protobuf/proto"
)

// overHTTP takes traces as a collector does.
type overHTTP struct {
	*httptest.Server
	mu       sync.Mutex
	requests []*collector.ExportTraceServiceRequest
}

func newOverHTTP(t *testing.T) *overHTTP {
	t.Helper()
	o := &overHTTP{}
	o.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		q := &collector.ExportTraceServiceRequest{}
		if err == nil {
			err = proto.Unmarshal(body, q)
		}
		if err != nil || r.URL.Path != "/v1/traces" {
			http.Error(w, "no", http.StatusBadRequest)
		}
		o.mu.Lock()
		defer o.mu.Unlock()
		o.requests = append(o.requests, q)
	}))
	t.Cleanup(o.Close)
	return o
}

// traces makes Traces in an environment that is the process's too.
func traces(t *testing.T, env map[string]string) (*Traces, string) {
	t.Helper()
	var list []string
	for name, value := range env {
		t.Setenv(name, value)
		list = append(list, name+"="+value)
	}
	var log bytes.Buffer
	return NewTraces(t.Context(), list, Build{Version: "v1"}, "an instance", New(Build{}), slog.New(slog.NewTextHandler(&log, nil))), log.String()
}

func TestTracesGoOverHTTPWhereNothingElseIsSaid(t *testing.T) {
	receiver := newOverHTTP(t)
	tr, _ := traces(t, map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.URL, "OTEL_EXPORTER_OTLP_HEADERS": "x-a=b, x-c=Bearer%20d=="})
	_, span := tr.Tracer().Start(t.Context(), "a step")
	span.End()
	tr.Close()
	receiver.mu.Lock()
	defer receiver.mu.Unlock()
	if len(receiver.requests) != 1 {
		t.Fatalf("%d requests came", len(receiver.requests))
	}
	got := receiver.requests[0].GetResourceSpans()[0]
	attributes := map[string]string{}
	for _, a := range got.GetResource().GetAttributes() {
		attributes[a.GetKey()] = a.GetValue().GetStringValue()
	}
	for key, want := range map[string]string{"service.name": "meshery-filters", "service.version": "v1", "service.instance.id": "an instance"} {
		if attributes[key] != want {
			t.Errorf("%s is %q, want %q", key, attributes[key], want)
		}
	}
	if name := got.GetScopeSpans()[0].GetSpans()[0].GetName(); name != "a step" {
		t.Errorf("the span is %q", name)
	}
}

func TestTheSamplerIsTheOneOfTheEnvironment(t *testing.T) {
	receiver := newOverHTTP(t)
	tr, _ := traces(t, map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.URL, "OTEL_TRACES_SAMPLER": "always_off"})
	defer tr.Close()
	_, span := tr.Tracer().Start(t.Context(), "a step")
	if span.SpanContext().IsSampled() {
		t.Error("the span is sampled")
	}
}

func TestNothingIsMadeUnlessTracesAreAskedFor(t *testing.T) {
	for why, c := range map[string]struct {
		env  map[string]string
		warn string
	}{
		"nothing is set":       {nil, ""},
		"it is switched off":   {map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}, ""},
		"there is no exporter": {map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"}, ""},
		"another exporter":     {map[string]string{"OTEL_TRACES_EXPORTER": "zipkin"}, "use otlp or none"},
		"another protocol":     {map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "use grpc or http/protobuf"},
		"no address":           {map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317"}, "write http://HOST:PORT"},
		"no address, and a password": {map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://me:hunter-of-secrets@%zz"},
			"write http://HOST:PORT"},
		"no address that another overrides": {map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://me:hunter-of-secrets@%zz",
			"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, "the endpoint in OTEL_EXPORTER_OTLP_ENDPOINT"},
		"a header without a name": {map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
			"OTEL_EXPORTER_OTLP_HEADERS": "hunter-of-secrets"}, "OTEL_EXPORTER_OTLP_HEADERS are no headers"},
		"a header whose value cannot be read": {map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
			"OTEL_EXPORTER_OTLP_TRACES_HEADERS": "a=b,authorization=Bearer%20hunter-of-secrets%"}, "write NAME=VALUE"},
		"a header's name with a space": {map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
			"OTEL_EXPORTER_OTLP_HEADERS": "Bearer hunter-of-secrets="}, "write NAME=VALUE"},
	} {
		t.Run(why, func(t *testing.T) {
			before := runtime.NumGoroutine()
			tr, log := traces(t, c.env)
			for deadline := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%d goroutines were started", runtime.NumGoroutine()-before)
				}
			}
			if (log == "") != (c.warn == "") || !strings.Contains(log, c.warn) || strings.Contains(log, "hunter-of-secrets") {
				t.Errorf("the log is %q, want %q", log, c.warn)
			}
			if len(tr.Calls()) > 0 {
				t.Error("calls are traced")
			}
			_, span := tr.Tracer().Start(t.Context(), "a step")
			if span.SpanContext().IsValid() || span.IsRecording() {
				t.Error("a span is made")
			}
			tr.Close()
		})
	}
}
