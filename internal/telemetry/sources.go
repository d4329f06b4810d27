package telemetry

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/meshery"
	"github.com/meshery/meshery-filters/internal/xds"
)

// Sources are asked at each scrape. All but Meshery's are needed.
type Sources struct {
	// Queue counts the operations that wait and that run.
	Queue func() (waiting, running int)
	// QueueLimit is how many may be in it.
	QueueLimit int
	Groups     func() []xds.Stats
	Events     *event.Log
	Hub        *event.Hub
	// Brokers are where events are published, by a name of the configuration's.
	Brokers map[string]*event.NATS
	// Sink sends events to Meshery Server, and Registrar has the adapter registered there; nil where nothing does.
	Sink      *meshery.Sink
	Registrar *meshery.Registrar
	// Pages counts the browsers that listen to events.
	Pages func() int
	// Store gives bytes on disk by what is kept. It is bounded by ctx.
	Store func(ctx context.Context) map[string]uint64
}

// Calls that read events.
const (
	streamEvents = "/meshes.MeshService/StreamEvents"
	watch        = "/meshery.filters.v1.FilterService/Watch"
)

// storeAnswer bounds how long a scrape waits for the store, which may be an external one that is down.
const storeAnswer = 2 * time.Second

// asked is what Sources say.
type asked struct {
	Sources
	m *Metrics
	queue, queueLimit, proxies, rejections, events, delivered, backlog, connected, subscribers, missed, slow,
	calls, bytes, mesheryAnswers, mesheryRefused, registered, registrations *prometheus.Desc
}

// Ask makes scrapes ask these. It is called once, before the first scrape.
func (m *Metrics) Ask(s Sources) {
	desc := func(kind, name, help string, labels ...string) *prometheus.Desc {
		m.describe(kind, name, help, labels)
		return prometheus.NewDesc(prefix+name, help, labels, nil)
	}
	m.registry.MustRegister(&asked{Sources: s, m: m,
		queue:          desc("gauge", "queue_operations", "Operations in the queue that wait, and that run; of all adapters that share the store.", "state"),
		queueLimit:     desc("gauge", "queue_limit_operations", "How many operations the queue takes."),
		proxies:        desc("gauge", "proxies", "Connected proxies by how far they are with the chain that they should have: running, waiting (not answered), rejected, held (not asked yet). Groups without a place of their own are "+rest+".", "group", "state"),
		rejections:     desc("counter", "proxy_rejections_total", "Chains that proxies have refused (NACK).", "group"),
		events:         desc("counter", "events_total", "Events that this adapter has put into the log: info, warn, error.", "type"),
		delivered:      desc("counter", "events_delivered_total", "Events that a NATS server has confirmed to have, or Meshery Server: nats is natsURL, listen natsListen, meshery mesheryServer.", "broker"),
		backlog:        desc("gauge", "events_backlog", "Events that wait to be delivered to NATS or Meshery Server; missing while another adapter delivers them.", "broker"),
		connected:      desc("gauge", "nats_connected", "Whether the NATS server is connected.", "broker"),
		mesheryAnswers: desc("gauge", "meshery_connected", "Whether Meshery Server took the event that it was sent last."),
		mesheryRefused: desc("counter", "meshery_events_refused_total", "Events that Meshery Server has refused, or failed with, and that are not sent again."),
		registered:     desc("gauge", "meshery_registered", "Whether Meshery Server knew the adapter's components when it was asked last."),
		registrations:  desc("counter", "meshery_registrations_total", "Registrations of all components with Meshery Server: done, and failed attempts at that or at asking for it.", "result"),
		subscribers:    desc("gauge", "event_subscribers", "Who reads events now: StreamEvents and Watch over gRPC, and browsers that show the page.", "kind"),
		missed:         desc("counter", "events_missed_total", "Events that slow subscribers did not get, each as often as it was missed."),
		slow:           desc("counter", "event_subscribers_slow_total", "How often a subscriber was so slow that it missed events."),
		calls:          desc("gauge", "grpc_calls", "Calls that run now; streams are calls.", "method"),
		bytes:          desc("gauge", "store_bytes", "Bytes on disk by what is kept; missing while the store does not answer.", "kind"),
	})
}

// Describe is one of prometheus.Collector.
func (a *asked) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{a.queue, a.queueLimit, a.proxies, a.rejections, a.events, a.delivered, a.backlog, a.connected,
		a.subscribers, a.missed, a.slow, a.calls, a.bytes, a.mesheryAnswers, a.mesheryRefused, a.registered, a.registrations} {
		out <- d
	}
}

// Collect is one of prometheus.Collector.
func (a *asked) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	waiting, worked := a.Queue()
	gauge(a.queue, float64(waiting), "waiting")
	gauge(a.queue, float64(worked), "running")
	gauge(a.queueLimit, float64(a.QueueLimit))

	for _, g := range a.Groups() {
		name := g.Group
		if name == "" {
			name = rest
		}
		for state, n := range g.Proxies {
			gauge(a.proxies, float64(n), name, string(state))
		}
		counter(a.rejections, g.Rejections, name)
	}

	for t, name := range map[event.Type]string{event.Info: "info", event.Warn: "warn", event.Error: "error"} {
		counter(a.events, a.Events.Appended(t), name)
	}
	end := a.Hub.Cursor()
	delivered := func(name string, published, position uint64) {
		counter(a.delivered, published, name)
		if position > 0 {
			gauge(a.backlog, float64(end-min(position, end)), name)
		}
	}
	flag := func(yes bool) float64 {
		if yes {
			return 1
		}
		return 0
	}
	for name, b := range a.Brokers {
		delivered(name, b.Published(), b.Position())
		gauge(a.connected, flag(b.Connected()), name)
	}
	if a.Sink != nil {
		delivered("meshery", a.Sink.Published(), a.Sink.Position())
		gauge(a.mesheryAnswers, flag(a.Sink.Connected()))
		counter(a.mesheryRefused, a.Sink.Refused())
	}
	if a.Registrar != nil {
		ok, bad := a.Registrar.Registrations()
		counter(a.registrations, ok, done)
		counter(a.registrations, bad, failed)
		gauge(a.registered, flag(a.Registrar.Registered()))
	}
	missed, slow := a.Hub.Missed()
	counter(a.missed, missed)
	counter(a.slow, slow)
	running := a.m.running.all()
	for method, n := range running {
		gauge(a.calls, float64(n), method)
	}
	for kind, method := range map[string]string{"StreamEvents": streamEvents, "Watch": watch} {
		gauge(a.subscribers, float64(running[method]), kind)
	}
	gauge(a.subscribers, float64(a.Pages()), "page")

	ctx, cancel := context.WithTimeout(context.Background(), storeAnswer)
	defer cancel()
	for kind, n := range a.Store(ctx) {
		gauge(a.bytes, float64(n), kind)
	}
}
