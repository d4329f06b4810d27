package operation

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

// ComponentName is the adapter's name in Meshery: in events, in ComponentInfo and as the key of the install operation.
const ComponentName = "meshery-filters"

// waits begins the one event that is told before an operation is begun.
const waits = "Waits for operation "

// story numbers and tells one operation's events. It belongs to the one worker that runs the operation; what goes on in
// several places at once is told by a story for each, which in makes.
type story struct {
	whole *story // that this one is a part of; nil when it is none
	place string // what the part's events name
	mu    sync.Mutex

	ctx       context.Context // ends when nothing more can be waited for
	operation string
	component string
	events    Events
	log       *slog.Logger
	claim     store.Claim // of the operation; nil for what is none
	sequence  uint64
	last      uint64         // position of the event before
	before    map[string]int // what earlier attempts told, and how often
	again     bool           // this is not the first attempt
	over      bool           // the last event is kept
	code      string         // of the failure that the last event tells of
	lost      error          // why nothing more can be told
	redact    func(string) string
	step      func(context.Context, string, ...attribute.KeyValue) (context.Context, func(error))
}

// resume goes on where the operation's story stands, and says whether it has ended.
func (s *story) resume() (over bool, err error) {
	past, last, err := s.events.Of(s.ctx, s.operation)
	if err != nil {
		return false, fmt.Errorf("read the story of operation %s: %w", s.operation, err)
	}
	s.before = map[string]int{}
	for _, e := range past {
		s.sequence = e.Sequence
		s.before[likeness(e)]++
		over = over || e.Last
		if e.Last && e.Type == event.Error {
			s.code = e.Code
		}
		// Whatever was told beyond that it waits was told by an attempt before this one.
		s.again = s.again || e.Sequence > 1 || !strings.HasPrefix(e.Summary, waits)
	}
	s.last = last
	return over, nil
}

func likeness(e event.Event) string {
	e = e.Bounded()
	return fmt.Sprintf("%d %s\n%s", e.Type, e.Summary, e.Details)
}

// in is the part of a story that goes on in one place, which its events then name; an empty one is the whole story. It may
// not tell the last event.
func (s *story) in(place string) *story {
	if place == "" {
		return s
	}
	return &story{whole: s, place: place, operation: s.operation, again: s.again, redact: s.redact, step: s.step}
}

// holds makes sure that no other adapter has the operation; it comes before whatever has an effect.
func (s *story) holds(ctx context.Context) error {
	if s.whole != nil {
		return s.whole.holds(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lost != nil {
		return s.lost
	}
	if s.claim == nil {
		return nil
	}
	return s.claim.Hold(ctx)
}

func (s *story) tell(e event.Event) {
	if s.whole != nil {
		e.Summary = s.place + ": " + e.Summary
		s.whole.tell(e)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lost != nil || s.over {
		return
	}
	e.Summary, e.Details = s.redact(e.Summary), s.redact(e.Details)
	if e.Type != event.Error {
		e.Summary, e.Details = harmless(e.Summary), harmless(e.Details)
	}
	if like := likeness(e); !e.Last && s.before[like] > 0 {
		s.before[like]-- // an attempt before this one has told it
		return
	}
	e.Operation, e.Time = s.operation, time.Now().UTC()
	e.Component, e.Name = s.component, ComponentName
	ctx, end := s.step(s.ctx, "event")
	defer func() {
		note(ctx, attrSequence.Int64(int64(s.sequence)))
		end(s.lost)
	}()
	// What is told must be kept, or the operation must not go on as if it were.
	for complained := false; ; {
		e.Sequence = s.sequence + 1
		position, err := s.events.Append(context.WithoutCancel(s.ctx), e, s.last)
		if err == nil {
			s.sequence, s.last, s.over = e.Sequence, position, e.Last
			break
		}
		if errors.Is(err, store.ErrStale) && s.claim != nil {
			if err = s.claim.Hold(context.WithoutCancel(s.ctx)); err == nil { // it was told that it waits, just now
				if _, err = s.resume(); err == nil {
					continue
				}
			}
		}
		if !complained {
			complained = true
			s.log.Warn("event not kept", "operation", e.Operation, "sequence", e.Sequence, "err", err)
		}
		if errors.Is(err, store.ErrLost) || s.claim == nil || s.ctx.Err() != nil {
			s.lost = err
			return
		}
		wait := time.NewTimer(time.Second)
		select {
		case <-wait.C:
		case <-s.ctx.Done():
		}
		wait.Stop()
	}
	level := map[event.Type]slog.Level{event.Warn: slog.LevelWarn, event.Error: slog.LevelError}[e.Type]
	s.log.Log(s.ctx, level, e.Summary, "operation", e.Operation, "sequence", e.Sequence, "details", e.Details, "code", e.Code)
}

var errorWord = regexp.MustCompile(`(?i)(err)(or)`)

// harmless parts the word error, which may be in a filter's name or a proxy's text, by a sign that is not seen: mesheryctl
// takes every event with that word for a failure.
func harmless(text string) string { return errorWord.ReplaceAllString(text, "$1\u2060$2") }

// info tells that something has happened.
func (s *story) info(summary, details string) {
	s.tell(event.Event{Type: event.Info, Summary: summary, Details: details})
}

// done is the last event of an operation that did what it was asked to.
func (s *story) done(summary, details string) {
	s.tell(event.Event{Type: event.Info, Summary: summary, Details: details, Last: true})
}

// warn tells of something to look at that stops nothing.
func (s *story) warn(p *problem.Problem) { s.problem(p, event.Warn, false) }

// fail is the last event of an operation that did not do what it was asked to.
func (s *story) fail(err error) { s.problem(problem.Of(err), event.Error, true) }

func (s *story) problem(p *problem.Problem, t event.Type, last bool) {
	if last {
		s.code = p.Kind.Code
	}
	summary := p.Kind.Summary
	if first, _, _ := strings.Cut(p.Details, "\n"); first != "" && len(first) <= 200 {
		summary += ": " + first
	}
	s.tell(event.Event{Type: t, Summary: summary, Details: p.Details, Code: p.Kind.Code, Cause: p.Kind.Cause,
		Remedy: p.Kind.Remedy, Last: last})
}
