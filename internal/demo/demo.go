// Package demo tells the story that shows the whole idea: filters are applied to two running Envoys in front of Image Hub,
// changed, refused and removed, and after each step requests are answered as they should be. Anything else ends it.
//
// The story is the same for every mesh. What differs is a Stage: that of plain Envoys is here, and Istio's is in
// build/demo, since the program imports nothing that runs a control plane.
package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/envoy"
)

// Options say how a demo runs.
type Options struct {
	// Program is the path of meshery-filters, which serves as the adapter.
	Program string
	// Report is the file that gets the report.
	Report string
	// Break is one of Breaks, or empty.
	Break string
	// Keep stays up after the last step, until the context ends.
	Keep bool
	// Out gets the story while it happens.
	Out io.Writer
}

// Breaks are the ways to sabotage a demo, to show that it notices: the limiter's digest is another one, it is never
// applied, or it is a file that the Envoys do not have.
var Breaks = []string{"digest", "nofilter", "nack"}

// ErrInterrupted is the end of a demo whose context ended before its last step did.
var ErrInterrupted = errors.New("the demo was interrupted\nWhat it started is stopped.")

// Stage is where the story happens: a mesh, with two Envoys in front of Image Hub.
type Stage interface {
	// Opening lists the first steps. After them the adapter runs (Demo.StartAdapter), and two Envoys in front of Image Hub
	// (Demo.AddEnvoy).
	Opening(*Demo) []Step
	// Place is where filters go. It is asked for after the opening.
	Place() Place
	// Limiter is the document of Image Hub's limiter, and the operation that applies it.
	Limiter() (operation, document string)
	// Running is what an Envoy itself says that it runs, with filters by their documents' names: shop/limit. The version is
	// empty where the chain as a whole has none.
	Running(context.Context, *Envoy) (version string, filters []envoy.SlotFilter, err error)
	// Invite says what one can do while the demo stays up.
	Invite(*Demo) string
	// Close ends what Opening started by itself.
	Close()
}

// Place says where filters go.
type Place struct {
	// Namespace of the filters.
	Namespace string
	// Spec has what their documents have in common: YAML in one line each, without indentation.
	Spec []string
	// Kubeconfigs of operations.
	Kubeconfigs []string
	// Refusals is a regular expression of the statistics by which an Envoy counts what it refused.
	Refusals string
	// OneFirst says that only one Envoy tries a change first.
	OneFirst bool
}

// Step is one of the story's.
type Step struct {
	Name string
	Do   func(context.Context) error
}

// Envoy is one that the story watches.
type Envoy struct {
	*envoy.Process
	// Addr is where it takes requests: host:port.
	Addr string
}

// Demo is one run and its report.
type Demo struct {
	Options
	// Dir is a folder of this run, which is removed at its end.
	Dir string
	// Addresses are the adapter's.
	Addresses Addresses
	Envoys    []*Envoy

	stage   Stage
	adapter adapter
	client  *http.Client
	parts   *errgroup.Group
	running context.Context // of what runs until the demo ends

	mu     sync.Mutex
	report report
	step   *step // the one that runs now
	heard  map[string]int
}

// report is demo.json.
type report struct {
	OK       bool    `json:"ok"`
	Break    string  `json:"break,omitempty"`
	Envoy    string  `json:"envoy"`
	Duration string  `json:"duration"`
	Steps    []*step `json:"steps"`
}

type step struct {
	Name     string          `json:"name"`
	OK       bool            `json:"ok"`
	Problem  string          `json:"problem,omitempty"`
	Requests []requestResult `json:"requests,omitempty"`
	// Background counts the requests that ran beside the step, by status; "failed" are those without an answer.
	Background map[string]int `json:"background,omitempty"`
	Envoys     []envoyState   `json:"envoys,omitempty"`
	Events     []heardEvent   `json:"events,omitempty"`
}

type requestResult struct {
	Envoy  int    `json:"envoy"`
	Method string `json:"method"`
	Path   string `json:"path"`
	Status int    `json:"status"`
}

type envoyState struct {
	PIDBefore int               `json:"pidBefore"`
	PIDAfter  int               `json:"pidAfter"`
	Version   string            `json:"chainVersion,omitempty"`
	Filters   []string          `json:"filters"`
	Stats     map[string]uint64 `json:"stats"`
}

type heardEvent struct {
	Over      string `json:"over"` // gRPC or NATS
	Operation string `json:"operation"`
	Type      string `json:"type"`
	Summary   string `json:"summary"`
	Details   string `json:"details,omitempty"`
	Code      string `json:"code,omitempty"`
}

// budget bounds the steps, which take about ten seconds once a mesh's control plane is up.
const budget = 5 * time.Minute

// Run tells the story on a stage, writes the report, and stops everything that was started. The error is ErrInterrupted,
// or names the step that does not hold.
func Run(ctx context.Context, stage Stage, o Options) (err error) {
	begun := time.Now()
	d := &Demo{Options: o, stage: stage, heard: map[string]int{}, report: report{Break: o.Break},
		client: &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}}
	if d.Dir, err = os.MkdirTemp("", "meshery-filters-demo-"); err != nil {
		return err
	}
	defer os.RemoveAll(d.Dir)
	defer stage.Close()

	running, stop := context.WithCancel(ctx)
	defer stop()
	d.parts, d.running = errgroup.WithContext(running)
	over := false // nothing that ends from now on is a failure
	defer func() {
		stop()
		if werr := ignoreCanceled(d.parts.Wait()); !over {
			err = errors.Join(err, werr)
		}
	}()
	defer d.stopEnvoys()

	steps, cancel := context.WithTimeout(d.running, budget)
	defer cancel()
	err = d.tell(steps)
	d.report.OK = err == nil
	d.report.Duration = time.Since(begun).Round(time.Millisecond).String()
	if werr := d.writeReport(); werr != nil {
		err = errors.Join(err, werr)
	}
	if ctx.Err() != nil {
		over = true
		return ErrInterrupted
	}
	if err != nil {
		return fmt.Errorf("the demo does not hold: %w", err)
	}
	fmt.Fprintf(d.Out, "\nEvery step held, in %s. The report is %s.\n", d.report.Duration, d.Report)
	if !d.Keep {
		return nil
	}
	fmt.Fprintln(d.Out, "\nThe demo stays up until Ctrl-C. To play with it:\n"+stage.Invite(d))
	<-d.running.Done()
	if over = ctx.Err() != nil; over {
		fmt.Fprintln(d.Out, "\nThe demo ends, and what it started is stopped.")
	}
	return nil
}

func ignoreCanceled(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// tell takes all steps.
func (d *Demo) tell(ctx context.Context) error {
	for _, steps := range [][]Step{d.stage.Opening(d), d.story()} {
		for _, s := range steps {
			if err := d.take(ctx, s); err != nil {
				return err
			}
		}
	}
	return nil
}

// take runs one step, with requests beside it that must never fail, and writes down how the Envoys stand after it.
func (d *Demo) take(ctx context.Context, s Step) (err error) {
	st := &step{Name: s.Name}
	d.mu.Lock()
	d.step = st
	d.report.Steps = append(d.report.Steps, st)
	d.mu.Unlock()
	fmt.Fprintf(d.Out, "\n%2d. %s\n", len(d.report.Steps), s.Name)

	before := slices.Clone(d.Envoys)
	stop := make(chan struct{})
	counts := make(chan map[string]int, 1)
	go func() { counts <- d.background(ctx, before, stop) }()
	err = s.Do(ctx)
	close(stop)
	st.Background = <-counts
	for status, n := range st.Background {
		if status != "200" {
			err = errors.Join(err, fmt.Errorf("%d requests beside the step: %s", n, status))
		}
	}
	for i, e := range d.Envoys {
		state, serr := d.envoyState(ctx, e)
		if err = errors.Join(err, serr); serr != nil {
			continue
		}
		if i < len(before) {
			state.PIDBefore = before[i].PID()
			select {
			case <-e.Done():
				err = errors.Join(err, fmt.Errorf("Envoy %d with PID %d ended", i+1, state.PIDBefore))
			default:
			}
			if state.PIDAfter != state.PIDBefore {
				err = errors.Join(err, fmt.Errorf("Envoy %d was restarted: PID %d, then %d", i+1, state.PIDBefore, state.PIDAfter))
			}
		}
		st.Envoys = append(st.Envoys, state)
	}
	st.OK = err == nil
	if err != nil {
		st.Problem = err.Error()
		fmt.Fprintf(d.Out, "    does not hold: %v\n", err)
		return fmt.Errorf("step %d, %s: %w", len(d.report.Steps), s.Name, err)
	}
	d.summarize(st)
	return nil
}

func (d *Demo) summarize(st *step) {
	d.mu.Lock()
	defer d.mu.Unlock()
	byStatus := map[int]int{}
	for _, r := range st.Requests {
		byStatus[r.Status]++
	}
	var parts []string
	for _, status := range slices.Sorted(maps.Keys(byStatus)) {
		parts = append(parts, fmt.Sprintf("%d × %d", byStatus[status], status))
	}
	line := "    holds"
	if len(parts) > 0 {
		line += ": " + strings.Join(parts, ", ")
	}
	if n := st.Background["200"]; n > 0 {
		line += fmt.Sprintf("; %d requests beside it, none failed", n)
	}
	fmt.Fprintln(d.Out, line)
}

func (d *Demo) writeReport() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	data, err := json.MarshalIndent(d.report, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(d.Report, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}
