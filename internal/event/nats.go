package event

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshery/meshkit/broker"
	"github.com/nats-io/nats.go"

	"github.com/meshery/meshery-filters/internal/problem"
)

// What is published on NATS.
const (
	// SubjectPrefix and an operation's id make the subject of its events.
	SubjectPrefix = "meshery.adapters.filters.events."
	// ObjectType is the one of the envelope.
	ObjectType broker.ObjectType = "adapter-event"
)

// Subject is where the events of an operation are published.
func Subject(operation string) string { return SubjectPrefix + operation }

// ValidOperation tells whether an operation's id is [A-Za-z0-9_-]{1,128}, which makes it one token of a subject.
func ValidOperation(id string) bool {
	for _, c := range []byte(id) {
		if !(c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '_' || c == '-') {
			return false
		}
	}
	return 1 <= len(id) && len(id) <= 128
}

// Options says where events are published.
type Options struct {
	// URL of the servers, separated by commas: nats://host:4222. It may hold a password, which is never shown. Not
	// needed when Connect has an in-process server.
	URL string
	// Connect adds to how the connection is made: TLS, credentials, an in-process server.
	Connect []nats.Option
	// MaxEvents and MaxBytes bound what waits to be published; DefaultMaxEvents and DefaultMaxBytes when zero.
	MaxEvents, MaxBytes int
	// DrainTimeout bounds how long Run goes on publishing what waits once it was told to stop; 2s when zero.
	DrainTimeout time.Duration
	Logger       *slog.Logger // none when nil
}

// NATS publishes events in the envelope of Meshery's broker, each operation's in their order.
//
// The envelope's EventType is ADDED for every event, failures too: each adds to an operation's story, and a reader of
// Meshery's takes ERROR for a failure of its own. Object.event_type tells a failure.
//
// What is emitted waits in memory until the server has it, through any outage; past the bounds the oldest are dropped,
// counted and logged. An outage may repeat a stretch of events: Object.sequence tells. What waits when the process dies
// is lost, and so is what nobody subscribed to at the time.
type NATS struct {
	options Options
	logger  *slog.Logger
	wake    chan struct{} // holds one token when events wait
	up      chan struct{} // holds one token when a connection came about

	conn atomic.Pointer[nats.Conn]

	mu       sync.Mutex
	ring     ring
	dropped  uint64
	overflow bool // since the server last took something
	closed   bool
}

var _ Sink = (*NATS)(nil)

// NewNATS makes the sink. Nothing is published until Run. problem.InvalidConfiguration when the URL cannot be one.
func NewNATS(o Options) (*NATS, error) {
	for _, server := range strings.Split(o.URL, ",") {
		if o.URL == "" {
			break
		}
		// The parser's error would show a password.
		if u, err := url.Parse(strings.TrimSpace(server)); err != nil || u.Host == "" {
			return nil, problem.InvalidConfiguration.WithFields("", []problem.Field{{Path: "nats.url",
				Cause: "is not the address of NATS servers", Remedy: "write nats://host:4222, several separated by commas"}})
		}
	}
	if o.DrainTimeout <= 0 {
		o.DrainTimeout = 2 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &NATS{options: o, logger: o.Logger, wake: make(chan struct{}, 1), up: make(chan struct{}, 1),
		ring: newRing(o.MaxEvents, o.MaxBytes)}, nil
}

// Emit puts the event in line and returns. Texts are cut as Bounded says. problem.InvalidRequest when the operation's id
// is not valid, problem.ShuttingDown once Run was told to stop.
func (n *NATS) Emit(_ context.Context, e Event) error {
	if !ValidOperation(e.Operation) {
		return problem.InvalidRequest.New("the operation id %.140q is not [A-Za-z0-9_-]{1,128}", e.Operation)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return problem.ShuttingDown.New("an event of operation %s came after the end", e.Operation)
	}
	if dropped := n.ring.push(e.Bounded()); dropped > 0 {
		n.dropped += uint64(dropped)
		if !n.overflow {
			n.overflow = true
			n.logger.Warn("NATS does not take events for too long: dropping the oldest that wait", "waiting", len(n.ring.events))
		}
	}
	signal(n.wake)
	return nil
}

// Dropped is how many events were never published.
func (n *NATS) Dropped() uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dropped
}

// Connected tells whether a server is connected now.
func (n *NATS) Connected() bool {
	nc := n.conn.Load()
	return nc != nil && nc.IsConnected()
}

// Run connects, for as long as it takes, and publishes until ctx ends; then it publishes what waits, within
// DrainTimeout, and closes the connection. So stop it after those who emit. It returns nil, or
// problem.InvalidConfiguration when the connection's options contradict each other.
func (n *NATS) Run(ctx context.Context) error {
	defer n.close()
	closed := make(chan struct{})
	nc, err := n.dial(closed)
	if err != nil {
		return problem.InvalidConfiguration.New("NATS: %w", err)
	}
	n.conn.Store(nc)
	defer func() { nc.Close(); <-closed }()

	// What is under way when ctx ends is not broken off, or it would be published twice.
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(n.options.DrainTimeout, cancel) })()

	failing := false
	for {
		select {
		case <-ctx.Done():
			n.close() // what is taken from here on could be lost unseen
			n.drain(work, nc)
			return nil
		case <-n.wake:
		}
		for n.waiting() && ctx.Err() == nil {
			err := n.publish(work, nc)
			switch {
			case err == nil && failing:
				failing = false
				n.logger.Info("NATS takes events again", "dropped in all", n.Dropped())
			case err != nil && ctx.Err() == nil:
				if !failing {
					failing = true
					n.logger.Warn("NATS does not take events; they wait", "error", err)
				}
				// A server that is connected and does not answer says nothing when it does again: hence the clock.
				retry := time.NewTimer(time.Second)
				select {
				case <-n.up:
				case <-retry.C:
				case <-ctx.Done():
				}
				retry.Stop()
			}
		}
	}
}

// dial returns at once or after one attempt; the connection comes about, and back, by itself.
func (n *NATS) dial(closed chan struct{}) (*nats.Conn, error) {
	up := func(*nats.Conn) { signal(n.up) }
	last := ""
	return nats.Connect(n.options.URL, append(slices.Clone(n.options.Connect),
		nats.Name("meshery-filters"),
		nats.MaxReconnects(-1),
		nats.RetryOnFailedConnect(true),
		nats.IgnoreAuthErrorAbort(), // credentials may be mended at the server
		nats.ReconnectWait(500*time.Millisecond),
		nats.ReconnectBufSize(-1), // what waits, waits in the ring, where it is counted and bounded
		// So that a server which vanished without a word is noticed.
		nats.PingInterval(10*time.Second),
		nats.FlusherTimeout(time.Second),
		nats.ConnectHandler(up),
		nats.ReconnectHandler(up),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			if text := err.Error(); text != last { // it may come with every attempt to connect
				last = text
				n.logger.Warn("NATS refused something", "error", err)
			}
		}),
		nats.ClosedHandler(func(*nats.Conn) { close(closed) }),
	)...)
}

// publish hands what waits to the server, and lets go of it once the server has it.
func (n *NATS) publish(ctx context.Context, nc *nats.Conn) error {
	const batch = 256 // published again if the server does not answer
	if !nc.IsConnected() {
		return fmt.Errorf("not connected: %w", cmp.Or(nc.LastError(), nats.ErrNoServers))
	}
	n.mu.Lock()
	from := n.ring.first
	events := slices.Clone(n.ring.events[:min(batch, len(n.ring.events))])
	n.mu.Unlock()

	unfit := 0
	for _, e := range events {
		data, err := json.Marshal(broker.Message{ObjectType: ObjectType, EventType: broker.Add, Object: e})
		if err == nil {
			err = nc.Publish(Subject(e.Operation), data)
		}
		if errors.Is(err, nats.ErrMaxPayload) {
			// The same again would be refused for ever.
			unfit++
			n.logger.Warn("NATS does not take an event of this size", "operation", e.Operation, "sequence", e.Sequence, "bytes", len(data))
			continue
		}
		if err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := nc.FlushWithContext(ctx); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	to := from + uint64(len(events))
	n.dropped += uint64(unfit)
	n.dropped -= min(n.ring.first, to) - from // let go of while they were on their way, and arrived
	n.ring.trim(to)
	n.overflow = false
	return nil
}

// drain publishes what waits if a server is there to take it.
func (n *NATS) drain(ctx context.Context, nc *nats.Conn) {
	for n.waiting() {
		if err := n.publish(ctx, nc); err != nil {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.dropped += uint64(len(n.ring.events))
			n.logger.Warn("NATS did not take the last events", "lost", len(n.ring.events), "error", err)
			n.ring.trim(n.ring.end())
			return
		}
	}
}

func (n *NATS) waiting() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.ring.events) > 0
}

func (n *NATS) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
