package operation

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/problem"
)

// ComponentName is the adapter's name in Meshery: in events, in ComponentInfo and as the key of the install operation.
const ComponentName = "meshery-filters"

// story numbers and tells one operation's events. It belongs to the one worker that runs the operation.
type story struct {
	ctx       context.Context
	operation string
	component string
	sink      event.Sink
	log       *slog.Logger
	sequence  uint64
	redact    func(string) string
}

func (s *story) tell(e event.Event) {
	s.sequence++
	e.Operation, e.Sequence, e.Time = s.operation, s.sequence, time.Now().UTC()
	e.Component, e.Name = s.component, ComponentName
	if s.redact != nil {
		e.Details = s.redact(e.Details)
	}
	if err := s.sink.Emit(s.ctx, e); err != nil {
		s.log.Warn("event not delivered", "operation", e.Operation, "sequence", e.Sequence, "err", err)
	}
	s.log.Info(e.Summary, "operation", e.Operation, "sequence", e.Sequence, "details", e.Details, "code", e.Code)
}

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
	summary := p.Kind.Summary
	if first, _, _ := strings.Cut(p.Details, "\n"); first != "" && len(first) <= 200 {
		summary += ": " + first
		if s.redact != nil {
			summary = s.redact(summary)
		}
	}
	s.tell(event.Event{Type: t, Summary: summary, Details: p.Details, Code: p.Kind.Code, Cause: p.Kind.Cause,
		Remedy: p.Kind.Remedy, Last: last})
}
