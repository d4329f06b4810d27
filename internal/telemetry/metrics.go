// Package telemetry measures the adapter: metrics for Prometheus, and traces for whoever takes OTLP. What it measures does
// not know of it: the other packages count, and call what they are handed.
//
// The labels of a metric have a bounded number of values: no name of a filter, user or target is one, and groups of
// proxies, whose names proxies make up, only as far as xds counts them by name.
package telemetry

import (
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
)

const prefix = "meshery_filters_"

// What became of something.
const (
	done     = "done"
	failed   = "failed"
	poisoned = "poisoned"
)

// rest is the label of what has no value of its own.
const rest = "(others)"

// row describes one metric as the documentation lists it.
type row struct {
	name, kind, help string
	labels           []string
}

// Metrics are those of one adapter. It hears of what happens, and asks Sources for what is.
type Metrics struct {
	registry *prometheus.Registry
	rows     []row
	keys     []string // operations that have a label of their own

	accepted, ended, failures *prometheus.CounterVec
	took                      *prometheus.HistogramVec
	waited                    prometheus.Histogram
	fetches, fetched          *prometheus.CounterVec
	fetchTook                 *prometheus.HistogramVec
	dryRuns                   *prometheus.CounterVec
	dryRunTook                prometheus.Histogram
	calls                     *prometheus.CounterVec
	callTook                  *prometheus.HistogramVec
	turned                    *prometheus.CounterVec
	served                    *prometheus.CounterVec
	servedBytes               prometheus.Counter
	running                   running
	spans, exported           prometheus.Counter
}

var _ operation.Observer = (*Metrics)(nil)

// maxKeys bounds the operations that have a label of their own.
const maxKeys = 100

// Build says which program this is.
type Build struct{ Version, Revision string }

// New makes Metrics.
func New(b Build) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry()}
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.gauge("build_info", "The program that runs; always 1.", "version", "revision", "goversion").
		WithLabelValues(b.Version, b.Revision, runtime.Version()).Set(1)

	m.accepted = m.counter("operations_accepted_total", "Operations that were put into the queue.", "operation")
	m.ended = m.counter("operations_total", "Operations that have ended: done, failed, or poisoned, which is set aside since the adapter ended each time it was begun.", "operation", "result")
	m.failures = m.counter("operation_failures_total", "Operations that have failed, by the code of the problem (docs/errors.md).", "code")
	m.took = m.histogram("operation_duration_seconds", "How long operations took from when a worker began them.", operationBuckets, "operation", "result")
	m.waited = m.histogram("operation_wait_seconds", "How long operations waited in the queue.", operationBuckets).WithLabelValues().(prometheus.Histogram)

	m.fetches = m.counter("module_fetches_total", "Look-ups of modules, by where the bytes came from: builtin, inline, https, oci, store, none for a document that names no source that is allowed, or address for a look at what proxies will fetch.", "source", "result")
	m.fetched = m.counter("module_fetched_bytes_total", "Bytes of the modules that were looked up.", "source")
	m.fetchTook = m.histogram("module_fetch_duration_seconds", "How long look-ups of modules took, the storing of new ones included.", fetchBuckets, "source")
	m.dryRuns = m.counter("dry_runs_total", "Runs of modules with their configuration in the sandbox.", "result")
	m.dryRunTook = m.histogram("dry_run_duration_seconds", "How long runs in the sandbox took.", fetchBuckets).WithLabelValues().(prometheus.Histogram)

	m.calls = m.counter("grpc_calls_total", "Calls that have ended or were refused, of gRPC and xDS, by full method and status code.", "method", "code")
	m.callTook = m.histogram("grpc_call_duration_seconds", "How long calls took that are no streams.", callBuckets, "method")

	m.turned = m.counter("connections_refused_total", "Connections that were closed at once, since there were too many (limits), by the configuration's key of the listener.", "listener")
	for _, listener := range []string{"grpcAddr", "xdsAddr", "httpAddr", "modulesAddr"} {
		m.turned.WithLabelValues(listener)
	}

	m.served = m.counter("module_requests_total", "Requests for modules to modulesAddr, by HTTP status code.", "code")
	m.served.WithLabelValues("200")
	m.servedBytes = m.counter("module_served_bytes_total", "Bytes of modules that proxies were sent from modulesAddr.").WithLabelValues()

	m.spans = m.counter("spans_total", "Spans of traces that have ended and are to be exported.").WithLabelValues()
	m.exported = m.counter("spans_exported_total", "Spans that the receiver has taken. What is missing is on its way or lost.").WithLabelValues()

	for _, result := range []string{done, failed} {
		m.dryRuns.WithLabelValues(result)
		for _, source := range []string{module.Builtin, module.Inline, module.HTTPS, module.OCI, module.Meshery, module.Stored, module.None, module.Address} {
			m.fetches.WithLabelValues(source, result)
		}
	}
	return m
}

var (
	operationBuckets = []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300}
	fetchBuckets     = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}
	callBuckets      = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
)

func (m *Metrics) describe(kind, name, help string, labels []string) {
	m.rows = append(m.rows, row{prefix + name, kind, help, labels})
}

func (m *Metrics) counter(name, help string, labels ...string) *prometheus.CounterVec {
	m.describe("counter", name, help, labels)
	v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + name, Help: help}, labels)
	m.registry.MustRegister(v)
	return v
}

func (m *Metrics) gauge(name, help string, labels ...string) *prometheus.GaugeVec {
	m.describe("gauge", name, help, labels)
	v := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: prefix + name, Help: help}, labels)
	m.registry.MustRegister(v)
	return v
}

func (m *Metrics) histogram(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	m.describe("histogram", name, help, labels)
	v := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: prefix + name, Help: help, Buckets: buckets}, labels)
	m.registry.MustRegister(v)
	return v
}

// Handler answers a scrape, in Prometheus' text format or as OpenMetrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{EnableOpenMetrics: true, MaxRequestsInFlight: 4,
		ErrorHandling: promhttp.ContinueOnError})
}

// Operations gives each of these keys a label, as far as there is place.
func (m *Metrics) Operations(keys []string) {
	m.keys = keys[:min(len(keys), maxKeys)]
	for _, key := range append(slices.Clone(m.keys), keys[len(m.keys):min(len(keys), len(m.keys)+1)]...) {
		key = m.key(key)
		m.accepted.WithLabelValues(key)
		for _, result := range []string{done, failed, poisoned} {
			m.ended.WithLabelValues(key, result)
		}
	}
}

func (m *Metrics) key(operation string) string {
	if slices.Contains(m.keys, operation) {
		return operation
	}
	return rest
}

// Accepted is one of operation.Observer.
func (m *Metrics) Accepted(operation string) { m.accepted.WithLabelValues(m.key(operation)).Inc() }

// Begun is one of operation.Observer.
func (m *Metrics) Begun(_ string, waited time.Duration) { m.waited.Observe(waited.Seconds()) }

// Ended is one of operation.Observer.
func (m *Metrics) Ended(operation, code string, took time.Duration) {
	result := done
	switch code {
	case "":
	case problem.Poisoned.Code:
		result = poisoned
	default:
		result = failed
	}
	if code != "" {
		m.failures.WithLabelValues(code).Inc()
	}
	m.ended.WithLabelValues(m.key(operation), result).Inc()
	m.took.WithLabelValues(m.key(operation), result).Observe(took.Seconds())
}

// DryRun is one of operation.Observer.
func (m *Metrics) DryRun(err error, took time.Duration) {
	m.dryRuns.WithLabelValues(resultOf(err)).Inc()
	m.dryRunTook.Observe(took.Seconds())
}

// Fetched hears of a look-up of a module.
func (m *Metrics) Fetched(f module.Fetch) {
	m.fetches.WithLabelValues(f.Source, resultOf(f.Err)).Inc()
	m.fetched.WithLabelValues(f.Source).Add(float64(f.Bytes))
	m.fetchTook.WithLabelValues(f.Source).Observe(f.Took.Seconds())
}

// Served hears of an answer of the module server.
func (m *Metrics) Served(status int, bytes int64) {
	m.served.WithLabelValues(strconv.Itoa(status)).Inc()
	if status < http.StatusBadRequest {
		m.servedBytes.Add(float64(bytes))
	}
}

func resultOf(err error) string {
	if err != nil {
		return failed
	}
	return done
}
