// Package problem holds the one table of coded errors that users meet: in events, in gRPC statuses and in the CLI.
//
// A Problem says what happened (Summary), to what (Details), why it may have happened (Cause) and what to do (Remedy).
// On the wire it loses its wrapped error: only Details, which must hold no secret, is shown. errors.As finds it as
// *Problem and as meshkit's *errors.Error.
package problem

import (
	"errors"
	"fmt"
	"strings"

	meshkit "github.com/meshery/meshkit/errors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Kind is one row of the table.
type Kind struct {
	// Code is stable for ever, so that users can look it up: meshery-filters-1001.
	Code string
	// Status is what a gRPC caller gets.
	Status codes.Code
	// Summary is one line without details.
	Summary string
	// Cause and Remedy are sentences for a person who has never seen the source.
	Cause, Remedy string
}

// Problem is an occurrence of a Kind.
type Problem struct {
	Kind    *Kind
	Details string  // what happened to what, by name
	Fields  []Field // the mistakes of a document or configuration, all of them
	Err     error   // the error underneath, for the log; its text is part of Details only where New put it there
}

// Field is one mistake in something a user wrote.
type Field struct {
	Path   string // spec.module.sha256
	Cause  string // what is wrong with it
	Remedy string // what to write instead; may be empty where Cause says it all
}

func (f Field) String() string {
	s := f.Cause
	if f.Path != "" {
		s = f.Path + ": " + s
	}
	if f.Remedy != "" {
		s += "; " + f.Remedy
	}
	return s
}

// New makes a Problem. An error among args that is formatted with %w or %v is kept for errors.Is and errors.As.
func (k *Kind) New(format string, args ...any) *Problem {
	p := &Problem{Kind: k, Details: fmt.Errorf(format, args...).Error()}
	for _, a := range args {
		if err, ok := a.(error); ok {
			p.Err = err
		}
	}
	return p
}

// WithFields makes a Problem of a list of mistakes, or nil when there are none. The result is an error
// and not a *Problem so that nil stays nil.
func (k *Kind) WithFields(subject string, fields []Field) error {
	if len(fields) == 0 {
		return nil
	}
	lines := make([]string, len(fields))
	for i, f := range fields {
		lines[i] = f.String()
	}
	if subject != "" {
		subject += ": "
	}
	return &Problem{Kind: k, Details: subject + strings.Join(lines, "\n"), Fields: fields}
}

// Error makes a Kind a sentinel: errors.Is(err, problem.FilterNotFound).
func (k *Kind) Error() string { return k.Code + ": " + k.Summary }

func (p *Problem) Error() string {
	if p.Details == "" {
		return p.Kind.Summary
	}
	return p.Kind.Summary + ": " + p.Details
}

// Unwrap gives the error underneath.
func (p *Problem) Unwrap() error { return p.Err }

// Is matches a Problem against its Kind.
func (p *Problem) Is(target error) bool { return target == error(p.Kind) }

// As presents the Problem as a meshkit error, the form that Meshery's own code reads.
func (p *Problem) As(target any) bool {
	if t, ok := target.(**meshkit.Error); ok {
		*t = meshkit.New(p.Kind.Code, meshkit.Alert, []string{p.Kind.Summary}, []string{p.Details},
			[]string{p.Kind.Cause}, []string{p.Kind.Remedy})
		return true
	}
	return false
}

// GRPCStatus lets grpc's status.FromError see the right code.
func (p *Problem) GRPCStatus() *status.Status {
	return status.New(p.Kind.Status, fmt.Sprintf("%s [%s] Remedy: %s", p.Error(), p.Kind.Code, p.Kind.Remedy))
}

// Of finds the Problem in err. Any other error becomes Internal, with its text as the details; nil stays nil.
func Of(err error) *Problem {
	if err == nil {
		return nil
	}
	var p *Problem
	if errors.As(err, &p) {
		return p
	}
	return Internal.New("%w", err)
}
