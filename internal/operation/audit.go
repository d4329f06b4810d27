package operation

import (
	"time"

	"github.com/meshery/meshery-filters/internal/audit"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Audit writes down who asked for what, and what came of it; audit.Log does.
type Audit interface {
	// Accepted writes that an operation was accepted, and Ended what became of it, each once. It is on disk then.
	Accepted(audit.Entry) error
	Ended(audit.Entry) error
	// Count writes what has no effect, soon, or counts it with others like it. It does not wait.
	Count(audit.Entry)
}

var _ Audit = (*audit.Log)(nil)

type unaudited struct{}

func (unaudited) Accepted(audit.Entry) error { return nil }
func (unaudited) Ended(audit.Entry) error    { return nil }
func (unaudited) Count(audit.Entry)          {}

func (j job) entry() audit.Entry {
	e := audit.Entry{Operation: j.ID, Accepted: j.Accepted, Key: j.Operation, Delete: j.Delete, Targets: j.Targets, Who: j.Caller.Who(j.Username)}
	for _, f := range j.Filters {
		e.Documents = append(e.Documents, f.Key.String())
	}
	for _, k := range j.Remove {
		e.Documents = append(e.Documents, k.String())
	}
	return e
}

func (j job) accepted() audit.Entry {
	e := j.entry()
	e.Time = j.Accepted
	return e
}

// ended is what became of a job: code is that of the failure, if it was one.
func (j job) ended(code string) audit.Entry {
	e := j.entry()
	e.Time, e.Result = time.Now(), audit.Succeeded
	if code != "" {
		e.Result, e.Code, e.Problem = audit.Failed, code, meaning(code)
	}
	return e
}

func meaning(code string) string {
	for _, k := range problem.All() {
		if k.Code == code {
			return k.Summary
		}
	}
	return ""
}

// aside writes down a request that has no effect: it was refused, or without an error accepted before.
func (r *Runner) aside(q Request, err error) {
	e := audit.Entry{Result: audit.Repeated, Operation: q.ID, Key: q.Operation, Delete: q.Delete, Who: q.Caller.Who(q.Username)}
	if err != nil {
		p := problem.Of(err)
		e.Result, e.Code, e.Problem = audit.Refused, p.Kind.Code, p.Kind.Summary
	}
	r.Audit.Count(e)
}
