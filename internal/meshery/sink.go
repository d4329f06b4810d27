package meshery

import (
	"cmp"
	"context"
	"crypto/sha1"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"github.com/meshery/meshkit/broker"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

// SinkOptions say which events go where. Client, Events and Cursor are needed.
type SinkOptions struct {
	Client *Client
	// Events are what is sent.
	Events store.Log
	// Cursor keeps how far that is. One that is new begins with what is logged from now on.
	Cursor store.Cursor
	// MinRetry and MaxRetry bound the waits after a failure. Default: 1s and 1m.
	MinRetry, MaxRetry time.Duration
	// Faulty is how long the server has to answer an event with 500, and be well, before those behind it are tried.
	// Default: 10m.
	Faulty time.Duration
	Log    *slog.Logger // none when nil
}

// Sink sends every event to the server, one after the other in the order of the log. What the server does not take waits
// in the log, through any outage and restart; what it has answered is not sent again. An event whose answer did not
// arrive, or was not noted before the adapter was killed, is sent once more, with the id that it had.
//
// An event whose content the server refuses is tried a few times, and once more when the server has taken one behind it;
// then it is let go of. So is one that the server answers with 500 for long, while it tells its version when asked. A server
// that takes none of them is the one that is wrong, and everything waits.
//
// Of several adapters that share a store one sends; another takes over when it ends.
type Sink struct {
	options   SinkOptions
	start     uint64        // position of a new Cursor
	done      uint64        // position behind what was answered
	saved     time.Time     // when the Cursor was saved last
	position  atomic.Uint64 // of the next event to send
	published atomic.Uint64
	answers   atomic.Bool

	refused uint64    // position of the event that was refused last
	times   int       // how often in a row
	since   time.Time // since when events are refused, and nothing else was answered
	late    []aside   // were refused, before the server took one behind them
	left    atomic.Uint64
}

// aside is an event that was refused, while those behind it are tried.
type aside struct {
	store.Record
	why error
}

const (
	eventsPath = "/api/system/events"
	// versionPath is asked without anybody signed in.
	versionPath = "/api/system/version"
	maxVersion  = 64 << 10 // bytes of its answer
	// maxTaken bounds the answer in bytes. It repeats the event, with up to 64 KiB of details in it twice and up to six bytes
	// for each of theirs.
	maxTaken = 2 << 20
	// claimed is how long after it was saved the Cursor is sure to be held.
	claimed = time.Second
	// maxRefusals is how often in a row an event is refused before those behind it are tried, and maxAside how many are
	// refused in a row before that is taken for the server's own mistake.
	maxRefusals, maxAside = 3, 20
	// lastAnswer is how long the answer to what is under way may take when the adapter stops.
	lastAnswer = 3 * time.Second
)

// NewSink makes a Sink. Nothing is sent until Run.
func NewSink(ctx context.Context, o SinkOptions) (*Sink, error) {
	o.MinRetry, o.MaxRetry = retries(o.MinRetry, o.MaxRetry)
	if o.Faulty <= 0 {
		o.Faulty = 10 * time.Minute
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	_, next, err := o.Events.Bounds(ctx)
	if err != nil {
		return nil, err
	}
	return &Sink{options: o, start: next}, nil
}

// Connected tells whether the server took what it was sent last.
func (s *Sink) Connected() bool { return s.answers.Load() }

// Published counts the events that the server has taken since the start.
func (s *Sink) Published() uint64 { return s.published.Load() }

// Refused counts the events that the server has refused and that are not sent again.
func (s *Sink) Refused() uint64 { return s.left.Load() }

// Position is that of the next event to send; 0 while it is not known, as long as another adapter sends.
func (s *Sink) Position() uint64 { return s.position.Load() }

// Run sends until ctx ends. What is under way then is not broken off at once, so that it need not be sent again.
func (s *Sink) Run(ctx context.Context) error {
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var last *time.Timer
	draining := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		last = time.AfterFunc(lastAnswer, cancel)
		close(draining)
	})
	defer func() {
		if !stop() {
			<-draining
			last.Stop()
		}
	}()

	retry := backoff{min: s.options.MinRetry, max: s.options.MaxRetry}
	said := ""
	for ctx.Err() == nil {
		err := s.send(ctx, work, func() {
			retry.reset()
			s.answers.Store(true)
			if said != "" {
				said = ""
				s.options.Log.Info("Meshery takes events again")
			}
		})
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, store.ErrLost) {
			s.position.Store(0)
			continue // another adapter sends; wait for it to end
		}
		s.answers.Store(false)
		if text := err.Error(); text != said {
			said = text
			s.options.Log.Warn("Meshery does not take events; they wait", "err", err)
		}
		retry.wait(ctx)
	}
	return nil
}

// send sends from where the Cursor is until something fails.
func (s *Sink) send(ctx, work context.Context, works func()) error {
	position, found, err := s.options.Cursor.Take(ctx)
	if err == nil && !found {
		position = s.start
		err = s.options.Cursor.Save(work, position) // so that what comes from now on is not forgotten
	}
	if err != nil {
		return err
	}
	// The answer to the last may be known, and not be noted.
	position = max(position, s.done)
	s.position.Store(position)
	next := position // to be read; position is that of the oldest which the server has not taken
	if err := s.again(work); err != nil {
		return err
	}
	var refused []aside
	for r, err := range s.options.Events.From(ctx, position) {
		if err != nil {
			return err
		}
		if r.Position > next {
			s.options.Log.Warn("events were let go before Meshery took them", "lost", r.Position-next)
		}
		next = r.Position + 1
		if len(refused) == 0 {
			position = r.Position
		}
		// Whoever was idle may have lost the Cursor to another adapter, which has the same event before it.
		if time.Since(s.saved) > claimed {
			if err := s.save(work, position); err != nil {
				return err
			}
		}
		if err := s.post(work, r); err != nil {
			if more, errMore := s.passOver(work, r, len(refused), err); errMore != nil || !more {
				return cmp.Or(errMore, err)
			}
			refused = append(refused, aside{r, err})
			continue
		}
		s.late, refused = refused, nil
		s.since = time.Time{}
		position = next
		s.done = position
		works()
		if err := s.save(work, position); err != nil {
			return err
		}
		s.position.Store(position)
		if err := s.again(work); err != nil {
			return err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return ctx.Err()
}

// What the server may have against one event alone.
var (
	// errContent is a refusal of what an event says: the same again is refused again.
	errContent = errors.New("the event itself is refused")
	// errFault is a mistake of the server's, of which the event may be the reason.
	errFault = errors.New("the server fails with the event")
)

// passOver says whether to try what is behind an event that was refused, as others in a row before it were. That has to
// be there already: the event is tried once more just before whatever comes.
func (s *Sink) passOver(ctx context.Context, r store.Record, before int, why error) (bool, error) {
	if before == 0 && s.refused != r.Position {
		s.refused, s.times, s.since = r.Position, 0, time.Time{}
	}
	if alone, err := s.alone(ctx, why); !alone || err != nil {
		return false, err
	}
	if before == 0 {
		s.times++
	}
	if s.times < maxRefusals || before+1 >= maxAside {
		return false, nil
	}
	_, end, err := s.options.Events.Bounds(ctx)
	return r.Position+1 < end, err
}

// alone says whether it is the event that is wrong, and not the server. Of a failure the server alone can tell, and only
// after a while: what is behind it may be down, and an outage must not change the order of events.
func (s *Sink) alone(ctx context.Context, why error) (bool, error) {
	content, fault := errors.Is(why, errContent), errors.Is(why, errFault)
	switch {
	case !content && !fault:
		s.since = time.Time{}
		return false, nil
	case s.since.IsZero():
		s.since = time.Now()
	}
	if content || time.Since(s.since) < s.options.Faulty {
		return content, nil
	}
	answer, err := s.options.Client.Do(ctx, http.MethodGet, versionPath, "", nil, maxVersion)
	if err == nil {
		err = answer.Refusal("GET " + versionPath)
	}
	if err != nil {
		s.since = time.Time{}
	}
	return err == nil, err
}

// again sends what was refused before the server took what was behind it: the server may have changed in between.
func (s *Sink) again(ctx context.Context) error {
	for len(s.late) > 0 {
		late := s.late[0]
		if err := s.post(ctx, late.Record); err != nil {
			alone := errors.Is(err, errContent) || errors.Is(err, errFault) && errors.Is(late.why, errFault)
			if !alone {
				var errAlone error
				if alone, errAlone = s.alone(ctx, err); errAlone != nil || !alone {
					return cmp.Or(errAlone, err)
				}
			}
			s.left.Add(1)
			s.options.Log.Warn("Meshery refuses an event and takes those behind it; it is not sent again", "position", late.Position, "err", err)
		}
		s.late = s.late[1:]
	}
	return nil
}

func (s *Sink) save(ctx context.Context, position uint64) error {
	err := s.options.Cursor.Save(ctx, position)
	if err == nil {
		s.saved = time.Now()
	}
	return err
}

// post sends one event.
func (s *Sink) post(ctx context.Context, r store.Record) error {
	var e event.Event
	if err := json.Unmarshal(r.Data, &broker.Message{Object: &e}); err != nil {
		s.options.Log.Warn("an event that cannot be read is not sent to Meshery", "position", r.Position, "err", err)
		return nil
	}
	body, err := json.Marshal(posted(e))
	if err != nil {
		return problem.Internal.New("write event %d of operation %s: %w", e.Sequence, e.Operation, err)
	}
	answer, err := s.options.Client.Do(ctx, http.MethodPost, eventsPath, "application/json", body, maxTaken)
	if err != nil {
		return err
	}
	if answer.Status == http.StatusRequestEntityTooLarge { // the same again would be refused for ever
		s.left.Add(1)
		s.options.Log.Warn("Meshery does not take an event of this size", "operation", e.Operation, "event", e.Sequence, "bytes", len(body))
		return nil
	}
	if err := answer.Refusal("POST " + eventsPath); err != nil {
		switch answer.Status {
		case http.StatusBadRequest, http.StatusConflict, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity:
			return fmt.Errorf("%w: event %d of operation %s: %w", errContent, e.Sequence, e.Operation, err)
		case http.StatusInternalServerError:
			return fmt.Errorf("%w: event %d of operation %s: %w", errFault, e.Sequence, e.Operation, err)
		}
		return err
	}
	s.published.Add(1)
	return nil
}

// posted is an event as Meshery's servers take it. Those before the newest read names with underscores. None keeps the id
// of an event that it is sent, so that the metadata have it, too.
func posted(e event.Event) map[string]any {
	id := EventID(e.Operation, e.Sequence)
	operation := e.Operation
	if !uuidForm.MatchString(operation) {
		operation = nameID("operation " + operation)
	}
	action, severity := "deploy", map[event.Type]string{event.Info: "informational", event.Warn: "warning", event.Error: "error"}[e.Type]
	if strings.Contains(e.Summary, "removed") {
		action = "undeploy"
	}
	if e.Last && e.Type == event.Info {
		severity = "success"
	}
	metadata := map[string]any{"id": id, "operation": e.Operation, "sequence": e.Sequence, "last": e.Last}
	if e.Details != "" {
		metadata["details"] = e.Details
	}
	if e.Code != "" {
		metadata["error"] = map[string]any{"Code": e.Code, "ShortDescription": []string{e.Summary}, "LongDescription": []string{e.Details},
			"ProbableCause": []string{e.Cause}, "SuggestedRemediation": []string{e.Remedy}}
	}
	return map[string]any{
		"id": id, "category": e.Name, "action": action, "severity": severity, "status": "unread", "description": e.Summary, "metadata": metadata,
		"actedUpon": e.Component, "operationId": operation, "createdAt": e.Time,
		"acted_upon": e.Component, "operation_id": operation, "created_at": e.Time,
	}
}

// EventID is the UUID of an operation's event: the same whenever and by whichever adapter it is sent.
func EventID(operation string, sequence uint64) string {
	return nameID(fmt.Sprintf("event %s %d", operation, sequence))
}

var uuidForm = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

// namespace of the UUIDs that are made here.
var namespace = [16]byte{0x3d, 0x71, 0x0c, 0x5a, 0x9b, 0x2e, 0x4f, 0x86, 0xa1, 0x57, 0x60, 0xd4, 0x8e, 0xc3, 0x1f, 0x29}

// nameID is the UUID of a name (RFC 9562, version 5).
func nameID(name string) string {
	sum := sha1.Sum(append(namespace[:], name...))
	sum[6] = sum[6]&0x0f | 0x50
	sum[8] = sum[8]&0x3f | 0x80
	h := hex.EncodeToString(sum[:16])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
