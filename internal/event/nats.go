package event

import (
	"cmp"
	"context"
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
	"github.com/nats-io/nats.go/jetstream"

	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
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
	// Log is what is published.
	Log store.Log
	// Cursor keeps how far that is. Default: what is logged from now on is published, and what was on its way when the
	// process ended is not.
	Cursor store.Cursor
	// DrainTimeout bounds how long Run goes on publishing what waits once it was told to stop; 2s when zero.
	DrainTimeout time.Duration
	Logger       *slog.Logger // none when nil
}

// NATS publishes the Log, in its order: with an acknowledgement for each event where a JetStream keeps the subject, else
// as core messages that the server has confirmed to have.
//
// What a server did not take waits in the Log, through any outage and restart. An outage or a restart may repeat a
// stretch of events: Object.sequence tells. A server without JetStream keeps nothing for those who are away. So that its
// restart costs them nothing, events wait for the first of them to come back, for some seconds, and what it had
// confirmed just before is published again. That is so with a Cursor only.
type NATS struct {
	options Options
	logger  *slog.Logger
	start   uint64        // position where there is no Cursor, or a new one
	up      chan struct{} // holds one token when a connection came about

	conn      atomic.Pointer[nats.Conn]
	delivered atomic.Uint64 // position of the next event to publish
	goal      atomic.Uint64 // position at which Run may end; 0 while it must not
	published atomic.Uint64 // how many events servers have confirmed to have

	kept      bool        // by a JetStream, as far as Run knows
	confirmed []confirmed // by a server without one, lately, oldest first
	refused   error       // what the server said last about an event that may not be published

	mu          sync.Mutex
	connected   time.Time // last
	lost        time.Time // the connection, last; zero when it was not since confirmed was looked at
	interrupted func()    // ends what goes on over the connection that was lost
}

// confirmed is when a server had the events from a position on.
type confirmed struct {
	position uint64
	at       time.Time
}

// NewNATS makes what publishes. Nothing is until Run. problem.InvalidConfiguration when the URL cannot be one.
func NewNATS(ctx context.Context, o Options) (*NATS, error) {
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
	_, next, err := o.Log.Bounds(ctx)
	if err != nil {
		return nil, err
	}
	return &NATS{options: o, logger: o.Logger, start: next, up: make(chan struct{}, 1)}, nil
}

// Connected tells whether a server is connected now.
func (n *NATS) Connected() bool {
	nc := n.conn.Load()
	return nc != nil && nc.IsConnected()
}

// Published counts the events that a server has confirmed to have since the start.
func (n *NATS) Published() uint64 { return n.published.Load() }

// Position is that of the next event to publish; 0 while it is not known, as long as another adapter publishes.
func (n *NATS) Position() uint64 { return n.delivered.Load() }

// Run connects, for as long as it takes, and publishes until ctx ends; then it publishes what waits, within
// DrainTimeout, and closes the connection. So stop it after those who append. It returns nil, or
// problem.InvalidConfiguration when the connection's options contradict each other.
func (n *NATS) Run(ctx context.Context) error {
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
	draining := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(draining)
		limit := time.AfterFunc(n.options.DrainTimeout, cancel)
		_, next, err := n.options.Log.Bounds(work)
		n.goal.Store(max(next, 1))
		if err != nil || n.delivered.Load() >= next {
			cancel()
			limit.Stop()
		}
	})
	defer func() {
		if !stop() {
			<-draining
		}
	}()

	failing := false
	for work.Err() == nil {
		position, err := n.position(work)
		if err == nil {
			n.advance(position, cancel)
			err = n.deliver(work, nc, position, cancel, func() {
				if failing {
					failing = false
					n.logger.Info("NATS takes events again")
				}
			})
		}
		if work.Err() != nil {
			break
		}
		if errors.Is(err, store.ErrLost) {
			continue // another adapter publishes; wait for it to end
		}
		if !failing {
			failing = true
			n.logger.Warn("NATS does not take events; they wait", "error", err)
		}
		// A server that is connected and does not answer says nothing when it does again: hence the clock.
		retry := time.NewTimer(time.Second)
		select {
		case <-n.up:
		case <-retry.C:
		case <-work.Done():
		}
		retry.Stop()
	}
	if left := n.goal.Load(); n.options.Cursor == nil && left > n.delivered.Load() {
		n.logger.Warn("NATS did not take the last events", "lost", left-n.delivered.Load())
	}
	return nil
}

// position is where to go on.
func (n *NATS) position(ctx context.Context) (uint64, error) {
	if n.options.Cursor == nil {
		return max(n.start, n.delivered.Load()), nil
	}
	position, found, err := n.options.Cursor.Take(ctx)
	if err != nil || found {
		return position, err
	}
	return n.start, n.options.Cursor.Save(ctx, n.start) // so that what comes from now on is not forgotten
}

func (n *NATS) advance(position uint64, end func()) {
	n.delivered.Store(position)
	if goal := n.goal.Load(); goal > 0 && position >= goal {
		end()
	}
}

// dial returns at once or after one attempt; the connection comes about, and back, by itself.
func (n *NATS) dial(closed chan struct{}) (*nats.Conn, error) {
	up := func(*nats.Conn) {
		n.mu.Lock()
		n.connected = time.Now()
		n.mu.Unlock()
		signal(n.up)
	}
	down := func(*nats.Conn, error) {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.lost = time.Now()
		if n.interrupted != nil {
			n.interrupted()
		}
	}
	last := ""
	return nats.Connect(n.options.URL, append(slices.Clone(n.options.Connect),
		nats.Name("meshery-filters"),
		nats.MaxReconnects(-1),
		nats.RetryOnFailedConnect(true),
		nats.IgnoreAuthErrorAbort(), // credentials may be mended at the server
		nats.ReconnectWait(500*time.Millisecond),
		nats.ReconnectBufSize(-1), // what waits, waits in the log
		// So that a server which vanished without a word is noticed.
		nats.PingInterval(10*time.Second),
		nats.FlusherTimeout(time.Second),
		nats.ConnectHandler(up),
		nats.ReconnectHandler(up),
		nats.DisconnectErrHandler(down),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			if refusesEvent(err) {
				return // flush says so to whoever publishes
			}
			if text := err.Error(); text != last { // it may come with every attempt to connect
				last = text
				n.logger.Warn("NATS refused something", "error", err)
			}
		}),
		nats.ClosedHandler(func(*nats.Conn) { close(closed) }),
	)...)
}

const (
	batch        = 256 // events that are published again if the server does not answer
	serverAnswer = 5 * time.Second
	// passing is how long before its end a server without JetStream may have confirmed what it had not passed on.
	passing = 5 * time.Second
	// returning is how long after the connection came about subscribers may take to come back too.
	returning = 10 * time.Second
)

// deliver publishes from a position on, until something fails.
func (n *NATS) deliver(ctx context.Context, nc *nats.Conn, position uint64, end, works func()) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	n.mu.Lock()
	n.interrupted = func() { cancel(errors.New("the connection was lost")) }
	n.mu.Unlock()
	if !nc.IsConnected() {
		return fmt.Errorf("not connected: %w", cmp.Or(nc.LastError(), nats.ErrNoServers))
	}
	js, err := n.keeper(ctx, nc)
	if err != nil {
		return err
	}
	if js == nil && n.options.Cursor != nil {
		position = n.goBack(position)
	}
	begun, sent, heard := position, 0, js != nil || n.options.Cursor == nil
	for r, err := range n.options.Log.From(ctx, position) {
		if err != nil {
			return err
		}
		if !heard {
			err = n.publishHeard(ctx, nc, r)
			heard = true
		} else {
			err = n.publish(ctx, nc, js, r)
		}
		if err != nil {
			return err
		}
		if sent++; sent < batch && !r.Last {
			continue
		}
		if js == nil {
			if err := n.flush(ctx, nc); err != nil {
				return err
			}
			n.confirm(begun)
		}
		begun = r.Position + 1
		works()
		n.published.Add(uint64(sent))
		sent = 0
		if n.options.Cursor != nil {
			if err := n.options.Cursor.Save(ctx, r.Position+1); err != nil {
				return err
			}
		}
		n.advance(r.Position+1, end)
	}
	return context.Cause(ctx)
}

// flush returns when the server has what was published.
func (n *NATS) flush(ctx context.Context, nc *nats.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, serverAnswer)
	defer cancel()
	if err := nc.FlushWithContext(ctx); err != nil {
		return err
	}
	// What it does not take it has said before it answered.
	if err := nc.LastError(); refusesEvent(err) && err != n.refused {
		n.refused = err
		return err
	}
	return nil
}

// refusesEvent says whether an error is that events may not be published.
func refusesEvent(err error) bool {
	return errors.Is(err, nats.ErrPermissionViolation) && strings.Contains(err.Error(), `Publish to "`+SubjectPrefix)
}

// confirm notes that the server had the events from a position on.
func (n *NATS) confirm(position uint64) {
	if n.options.Cursor == nil {
		return
	}
	now := time.Now()
	n.confirmed = slices.DeleteFunc(n.confirmed, func(c confirmed) bool { return now.Sub(c.at) > passing })
	n.confirmed = append(n.confirmed, confirmed{position, now})
}

// goBack is where to go on after the connection was lost: at what the server may not have passed on.
func (n *NATS) goBack(position uint64) uint64 {
	n.mu.Lock()
	lost := n.lost
	n.lost = time.Time{}
	n.mu.Unlock()
	if lost.IsZero() {
		return position
	}
	for _, c := range n.confirmed {
		if lost.Sub(c.at) <= passing {
			return min(position, c.position)
		}
	}
	return position
}

// publishHeard publishes the first event over a connection. As long as others may still be coming back too, it does so
// until somebody hears it.
func (n *NATS) publishHeard(ctx context.Context, nc *nats.Conn, r store.Record) error {
	inbox := nc.NewInbox()
	answers, err := nc.SubscribeSync(inbox) // of the server, when nobody subscribes to the event
	if err != nil {
		return err
	}
	defer func() { _ = answers.Unsubscribe() }()
	for {
		if err := n.publishTo(ctx, nc, nil, r, inbox); err != nil {
			return err
		}
		if err := n.flush(ctx, nc); err != nil {
			return err
		}
		n.mu.Lock()
		late := time.Since(n.connected) > returning
		n.mu.Unlock()
		if unheard, _, err := answers.Pending(); err != nil || unheard == 0 || late {
			return err
		}
		if _, err := answers.NextMsgWithContext(ctx); err != nil && !errors.Is(err, nats.ErrNoResponders) {
			return err
		}
		wait := time.NewTimer(250 * time.Millisecond)
		select {
		case <-wait.C:
		case <-ctx.Done():
		}
		wait.Stop()
	}
}

// keeper is the JetStream that keeps the events' subjects, or nil where none does.
func (n *NATS) keeper(ctx context.Context, nc *nats.Conn) (jetstream.JetStream, error) {
	if n.options.Cursor == nil {
		return nil, nil
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, serverAnswer)
	defer cancel()
	_, err = js.StreamNameBySubject(ctx, Subject("*"))
	none := errors.Is(err, nats.ErrNoResponders) || errors.Is(err, jetstream.ErrJetStreamNotEnabled) ||
		errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount) || errors.Is(nc.LastError(), nats.ErrPermissionViolation) // then it is none of ours to know
	switch {
	case err == nil:
		n.kept = true
		return js, nil
	case errors.Is(err, jetstream.ErrStreamNotFound), none && !n.kept:
		n.kept = false
		return nil, nil
	}
	return nil, fmt.Errorf("look for a stream of the events: %w", err) // it has none at the moment, as in an election
}

func (n *NATS) publish(ctx context.Context, nc *nats.Conn, js jetstream.JetStream, r store.Record) error {
	return n.publishTo(ctx, nc, js, r, "")
}

func (n *NATS) publishTo(ctx context.Context, nc *nats.Conn, js jetstream.JetStream, r store.Record, reply string) (err error) {
	m := nats.NewMsg(Subject(r.Subject))
	m.Data, m.Reply = r.Data, reply
	if js == nil {
		err = nc.PublishMsg(m)
	} else {
		ctx, cancel := context.WithTimeout(ctx, serverAnswer)
		defer cancel()
		// One after the other: of several that are on their way together a later one could be kept before an earlier.
		_, err = js.PublishMsg(ctx, m, jetstream.WithMsgID(fmt.Sprintf("%s-%d", r.Subject, r.Position)))
	}
	if errors.Is(err, nats.ErrMaxPayload) || errors.Is(err, jetstream.ErrStreamMessageExceedsMaximum) {
		// The same again would be refused for ever.
		n.logger.Warn("NATS does not take an event of this size", "operation", r.Subject, "position", r.Position, "bytes", len(r.Data))
		return nil
	}
	return err
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
