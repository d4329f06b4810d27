package cli

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// waiting are the flags of a command that starts an operation.
type waiting struct {
	timeout time.Duration
	noWait  bool
	cluster kubeconfigFlags // that the operation brings
	consul  consulFlags
	alone   bool // in this process, without an adapter
}

func (w *waiting) flags(cmd *cobra.Command) {
	cmd.Flags().DurationVar(&w.timeout, "timeout", 0, "stop waiting after this `time`, such as 2m; the operation goes on (default: wait until it ends)")
	cmd.Flags().BoolVar(&w.noWait, "no-wait", false, "print the operation's id and do not wait for it")
}

// aloneFlag gives a command the flag to do without an adapter.
func (w *waiting) aloneFlag(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&w.alone, "no-adapter", false, "do it from here, in the cluster of --kubeconfig or with --consul, and with the rights that it has there, without an adapter")
	w.consul.flags(cmd)
}

// errTimeout is the cause of a wait that took longer than --timeout.
var errTimeout = errors.New("--timeout passed")

// maxMisses bounds how often a watch that missed events is begun anew.
const maxMisses = 5

// start sends an operation and tells its events until the last. The error is the operation's own if that failed.
func (a *app) start(ctx context.Context, w waiting, q *meshes.ApplyRuleRequest) error {
	if w.timeout < 0 {
		return usage("--timeout: %s is less than nothing; write a time such as 2m", w.timeout)
	}
	if a.servedAt != "" && !w.alone {
		return usage("--modules-url is for --no-adapter; an adapter knows where it serves modules")
	}
	own, err := w.consul.given(w.cluster)
	switch {
	case err != nil:
		return err
	case w.alone:
		return a.alone(ctx, w, q)
	case own:
		return usage("--consul goes with --no-adapter; to an adapter a document says that it is for Consul")
	}
	if q.KubeConfigs, err = w.cluster.portable(); err != nil {
		return err
	}
	c, err := a.dial()
	if err != nil {
		return err
	}
	defer c.close()
	q.OperationId, q.Username = rand.Text(), a.env("USER")
	if _, err := call(ctx, c, callTimeout, c.meshes.ApplyOperation, q); err != nil {
		return err
	}
	if w.noWait {
		return a.accepted(q.OperationId)
	}
	if w.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, w.timeout, errTimeout)
		defer cancel()
	}
	var last eventView
	err = a.watch(ctx, c, &filterspb.WatchRequest{OperationId: q.OperationId}, nil, func(e eventView) error {
		last = e
		return a.progress(e)
	})
	goesOn := func(why string, exit int) error {
		return exitError{fmt.Errorf("%s; operation %s goes on\n`meshery-filters events --operation %s --follow` tells how", why, q.OperationId, q.OperationId), exit}
	}
	// The adapter may notice the deadline, which is the only one here, before this process does.
	var coded exitError
	late := w.timeout > 0 && errors.As(err, &coded) && coded.exit == exitTimeout
	switch {
	case late || ctx.Err() != nil && errors.Is(context.Cause(ctx), errTimeout):
		return goesOn(fmt.Sprintf("no end after %s", w.timeout), exitTimeout)
	case ctx.Err() != nil:
		return goesOn("stopped waiting", exitInterrupted)
	case err != nil:
		when := ""
		if explain(err, true).exit == exitUnreachable {
			when = " when the adapter is there again"
		}
		fmt.Fprintf(a.Err, "Operation %s was accepted and goes on%s; what became of it:\n  meshery-filters events --operation %s --follow\n", q.OperationId, when, q.OperationId)
		return err
	case !last.Last:
		return goesOn("the adapter ended the stream of events before the last", exitFailed)
	}
	return last.outcome()
}

func (a *app) accepted(id string) error {
	return a.print(struct {
		Operation string `json:"operationId"`
	}{id}, func(w io.Writer) error { return write(w, []byte(id), "\n") })
}

// watch hands events to each until the stream ends, and goes on where events were missed. stands, if there is one, is
// called once the adapter has begun to answer.
func (a *app) watch(ctx context.Context, c *client, q *filterspb.WatchRequest, stands func(), each func(eventView) error) error {
	told := uint64(0) // of the one operation that is followed
	for misses := 0; ; misses++ {
		err := c.receive(ctx, q, stands, func(e eventView) error {
			if q.GetOperationId() != "" {
				if e.Sequence <= told {
					return nil
				}
				told = e.Sequence
			}
			return each(e)
		})
		if !errors.Is(err, problem.EventsMissed) || misses == maxMisses {
			return err
		}
		fmt.Fprintln(a.Err, "Some events came faster than they could be read and are not shown.")
		q.Cursor = "" // from the oldest that is left
	}
}

// receive hands the events of one stream to each.
func (c *client) receive(ctx context.Context, q *filterspb.WatchRequest, stands func(), each func(eventView) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the stream when each fails
	stream, err := c.filters.Watch(ctx, q)
	if err != nil {
		return c.failed(ctx, err)
	}
	if stands != nil {
		if _, err := stream.Header(); err != nil {
			return c.failed(ctx, err)
		}
		stands()
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return c.failed(ctx, err)
		}
		q.Cursor, q.FromNow = r.GetCursor(), false
		if err := each(toEvent(r.GetEvent())); err != nil {
			return err
		}
	}
}

// progress tells one event of an operation that is waited for. The last one is the result; the others are said on
// standard error, so that the result stands alone where output is redirected.
func (a *app) progress(e eventView) error {
	switch {
	case a.output != formTable:
		return a.printLine(e)
	case e.Last && e.Type == typeError:
		return nil // told as the command's error
	case e.Last:
		said := []string{e.Summary}
		for _, l := range lines(e.Details) {
			if l != e.Summary {
				said = append(said, l)
			}
		}
		return write(a.Out, []byte(strings.Join(said, "\n  ")), "\n")
	}
	e.say(a.Err)
	return nil
}

// say writes an event for a person: what is only progress in one line.
func (e eventView) say(w io.Writer) {
	if e.Type == typeInfo {
		fmt.Fprintln(w, e.Summary)
		return
	}
	code := ""
	if e.Code != "" {
		code = " [" + e.Code + "]"
	}
	fmt.Fprintf(w, "Warning: %s%s\n", e.Summary, code)
	for _, l := range append(lines(e.Details), lines(e.Remedy)...) {
		if !strings.HasSuffix(e.Summary, l) { // the summary may end with the details' first line
			fmt.Fprintf(w, "  %s\n", l)
		}
	}
}

// outcome is nil for the last event of an operation that did what it should, and its problem otherwise.
func (e eventView) outcome() error {
	if e.Type != typeError {
		return nil
	}
	kind := kindOf(e.Code)
	if kind == nil { // of a newer adapter
		kind = &problem.Kind{Code: e.Code, Summary: e.Summary, Cause: e.Cause, Remedy: e.Remedy}
	}
	exit := exitFailed
	if kind == problem.ProxyTimeout {
		exit = exitTimeout
	}
	return exitError{&problem.Problem{Kind: kind, Details: e.Details}, exit}
}

// eventView is an event as JSON and YAML show it.
type eventView struct {
	Operation string    `json:"operationId"`
	Sequence  uint64    `json:"sequence"`
	Time      time.Time `json:"time"`
	Type      string    `json:"type"` // info, warning or error
	Summary   string    `json:"summary"`
	Details   string    `json:"details,omitempty"`
	Code      string    `json:"code,omitempty"`
	Cause     string    `json:"cause,omitempty"`
	Remedy    string    `json:"remedy,omitempty"`
	Last      bool      `json:"last"`
}

// The types of an event.
const (
	typeInfo    = "info"
	typeWarning = "warning"
	typeError   = "error"
)

func toEvent(e *filterspb.Event) eventView {
	t := typeInfo
	switch e.GetType() {
	case filterspb.Event_WARN:
		t = typeWarning
	case filterspb.Event_ERROR:
		t = typeError
	}
	return eventView{Operation: e.GetOperationId(), Sequence: e.GetSequence(), Time: e.GetTime().AsTime(), Type: t,
		Summary: e.GetSummary(), Details: e.GetDetails(), Code: e.GetErrorCode(), Cause: e.GetProbableCause(),
		Remedy: e.GetSuggestedRemediation(), Last: e.GetLast()}
}
