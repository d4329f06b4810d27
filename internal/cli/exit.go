package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"google.golang.org/grpc/codes"

	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// The exit codes.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitUnreachable = 3
	exitTimeout     = 4
	exitDrift       = 5
	exitInterrupted = 130
)

// exits is the table of exit codes, as help shows it.
var exits = []struct {
	code    int
	meaning string
}{
	{exitOK, "it worked"},
	{exitFailed, "the operation failed, or something else went wrong"},
	{exitUsage, "the command line, a document or a module is not valid; nothing was changed"},
	{exitUnreachable, "the adapter does not answer"},
	{exitTimeout, "it took too long: --timeout passed, or proxies did not answer in time"},
	{exitDrift, "status found proxies that differ from what was applied"},
	{exitInterrupted, "interrupted while waiting; the operation goes on"},
}

func exitCodes() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, e := range exits {
		fmt.Fprintf(w, "  %d\t%s\n", e.code, e.meaning)
	}
	w.Flush() // to memory, which does not fail
	return strings.TrimSuffix(b.String(), "\n")
}

// untold is why an adapter's answer is not whole, which fails the command after what it could tell is printed; nil: it is.
func untold(u *filterspb.Untold) error {
	if u == nil {
		return nil
	}
	kind := kindOf(u.GetErrorCode())
	if kind == nil { // of a newer adapter
		kind = &problem.Kind{Code: u.GetErrorCode(), Summary: "not all could be told"}
	}
	return exitError{&problem.Problem{Kind: kind, Details: u.GetDetails()}, exitFailed}
}

// usageError is a command line that is not understood.
type usageError struct{ error }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// exitError is an error with an exit code of its own.
type exitError struct {
	error
	exit int
}

func (e exitError) Unwrap() error { return e.error }

// failure is how a command ended, as its user is told.
type failure struct {
	exit    int
	summary string
	details []string // lines
	cause   string
	remedy  string
	code    string // of problem's table
}

// explain finds out what to tell of an error. began says that the command line was understood.
func explain(err error, began bool) failure {
	var coded exitError
	var wrong usageError
	var p *problem.Problem
	switch {
	case errors.As(err, &wrong) || !began:
		summary, details, _ := strings.Cut(err.Error(), "\n")
		return failure{exit: exitUsage, summary: summary, details: lines(details)}
	case errors.As(err, &p):
		f := ofProblem(p)
		if errors.As(err, &coded) {
			f.exit = coded.exit
		}
		return f
	case errors.As(err, &coded):
		summary, details, _ := strings.Cut(err.Error(), "\n")
		return failure{exit: coded.exit, summary: summary, details: lines(details)}
	case errors.Is(err, context.DeadlineExceeded):
		return failure{exit: exitTimeout, summary: err.Error()}
	case errors.Is(err, context.Canceled):
		return failure{exit: exitInterrupted, summary: "interrupted"}
	}
	return failure{exit: exitFailed, summary: err.Error()}
}

func ofProblem(p *problem.Problem) failure {
	f := failure{exit: exitFailed, summary: p.Kind.Summary, cause: p.Kind.Cause, remedy: p.Kind.Remedy, code: p.Kind.Code}
	switch p.Kind.Status {
	case codes.InvalidArgument:
		f.exit = exitUsage
	case codes.DeadlineExceeded:
		f.exit = exitTimeout
	case codes.Unavailable:
		if p.Kind == problem.ShuttingDown {
			f.exit = exitUnreachable
		}
	}
	f.details = lines(p.Details)
	return f
}

func lines(text string) []string {
	var out []string
	for _, l := range strings.Split(text, "\n") {
		if l = strings.TrimRight(l, " \t\r"); l != "" {
			out = append(out, l)
		}
	}
	return out
}

func (f failure) print(w io.Writer) {
	fmt.Fprintf(w, "Error: %s\n", f.summary)
	for _, d := range f.details {
		fmt.Fprintf(w, "  %s\n", d)
	}
	for _, l := range []struct{ label, text string }{{"Cause", f.cause}, {"Remedy", f.remedy}, {"Code", f.code}} {
		if l.text != "" {
			fmt.Fprintf(w, "%-8s%s\n", l.label+":", l.text)
		}
	}
}
