package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/event"
)

func newDemo(a *app) *cobra.Command {
	d := &demo{app: a, out: a.Out}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the whole idea on this machine, and check every step of it",
		Long: `Demo starts an adapter with its embedded NATS and two real Envoys in front of Image Hub, applies filters to the
running Envoys, changes and removes them, and checks after each step that requests are answered as they should be.

It writes what it saw to a report, exits with 1 when a step does not hold, and stops everything that it started.
--break sabotages it on purpose, to show that it notices: digest (the module's digest is another one), nofilter (the
filter is never applied), nack (the Envoys cannot load the module).`,
		Example: `  meshery-filters demo
  meshery-filters demo --keep`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return d.run(cmd.Context()) },
	}
	f := cmd.Flags()
	f.StringVar(&d.envoyPath, "envoy", "", "path of an Envoy, 1.39 or later (default: $ENVOY, PATH, the cache)")
	f.StringVar(&d.reportPath, "report", "demo.json", "where the report goes")
	f.StringVar(&d.sabotage, "break", "", "sabotage: digest, nofilter or nack")
	f.BoolVar(&d.keep, "keep", false, "stay up at the end and print the addresses, until Ctrl-C")
	return cmd
}

// demo is one run and its report.
type demo struct {
	app                             *app
	out                             io.Writer
	envoyPath, reportPath, sabotage string
	keep                            bool

	dir       string
	addresses addresses
	adapter   *client
	envoys    []*envoy.Process
	listeners []string
	hub       string // Image Hub's own address
	client    *http.Client

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
	Version   string            `json:"chainVersion"`
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

// demoBudget bounds the steps, which take about ten seconds.
const demoBudget = 3 * time.Minute

func (d *demo) run(ctx context.Context) (err error) {
	if !slices.Contains([]string{"", "digest", "nofilter", "nack"}, d.sabotage) {
		return usage("--break is %q; use digest, nofilter or nack", d.sabotage)
	}
	begun := time.Now()
	binary, err := envoy.Find(ctx, d.envoyPath)
	if err != nil {
		return err
	}
	d.report = report{Break: d.sabotage, Envoy: binary.Version}
	d.heard = map[string]int{}
	d.client = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	if d.dir, err = os.MkdirTemp("", "meshery-filters-demo-"); err != nil {
		return err
	}
	defer os.RemoveAll(d.dir)

	running, stop := context.WithCancel(ctx)
	defer stop()
	g, running := errgroup.WithContext(running)
	over := false // nothing that ends from now on is a failure
	defer func() {
		stop()
		if werr := ignoreCanceled(g.Wait()); !over {
			err = errors.Join(err, werr)
		}
	}()
	defer d.stopEnvoys()

	steps, cancel := context.WithTimeout(running, demoBudget)
	defer cancel()
	err = d.steps(steps, running, g, binary)
	d.report.OK = err == nil
	d.report.Duration = time.Since(begun).Round(time.Millisecond).String()
	if werr := d.writeReport(); werr != nil {
		err = errors.Join(err, werr)
	}
	if ctx.Err() != nil {
		return exitError{errors.New("the demo was interrupted\nWhat it started is stopped."), exitInterrupted}
	}
	if err != nil {
		return fmt.Errorf("the demo does not hold: %w", err)
	}
	fmt.Fprintf(d.out, "\nEvery step held, in %s. The report is %s.\n", d.report.Duration, d.reportPath)
	if !d.keep {
		return nil
	}
	d.invite()
	<-running.Done()
	if over = ctx.Err() != nil; over {
		fmt.Fprintln(d.out, "\nThe demo ends, and what it started is stopped.")
	}
	return nil
}

func ignoreCanceled(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

const (
	limiterName = "imagehub-rate-limit"
	ownName     = "my-headers"
	ownHeader   = "x-my-module"
)

// steps takes all steps within ctx. What they start in g lives as long as running.
func (d *demo) steps(ctx, running context.Context, g *errgroup.Group, binary envoy.Binary) error {
	var personal, team string // tokens
	for _, s := range []struct {
		name string
		do   func() error
	}{
		{"The adapter starts, with its embedded NATS", func() error { return d.startAdapter(ctx, running, g) }},
		{"Image Hub is deployed", func() (err error) {
			last, err := d.operate(ctx, "imagehub", "")
			if err != nil {
				return err
			}
			_, d.hub, _ = strings.Cut(last.GetSummary(), "http://")
			return nil
		}},
		{"Two Envoys start in front of it", func() error { return d.startEnvoys(ctx, binary) }},
		{"Nothing limits pulls", func() (err error) {
			if personal, err = d.signUp(ctx, "ada", "Personal"); err != nil {
				return err
			}
			return errors.Join(
				d.pulls(ctx, 0, personal, 30, repeat(200, 30)),
				d.pulls(ctx, 1, "", 5, repeat(200, 5)))
		}},
		{"Apply filter: the limiter loads into both running Envoys", func() error {
			if d.sabotage == "nofilter" {
				return nil
			}
			if err := d.applyLimiter(ctx); err != nil {
				return err
			}
			return d.holds(ctx, limiterName)
		}},
		{"A Personal user gets 10 pulls, then 429", func() error {
			return d.pulls(ctx, 0, personal, 15, append(repeat(200, 10), repeat(429, 5)...))
		}},
		{"No token gets 401", func() error {
			return errors.Join(d.pulls(ctx, 0, "", 3, repeat(401, 3)), d.pulls(ctx, 1, "", 3, repeat(401, 3)), d.pulls(ctx, 1, "not.a.token", 1, repeat(401, 1)))
		}},
		{"An upgrade to Team lifts the limit", func() (err error) {
			if team, err = d.upgrade(ctx, personal, "Team"); err != nil {
				return err
			}
			return d.pulls(ctx, 0, team, 40, repeat(200, 40))
		}},
		{"The user's own module joins the chain before the limiter", func() error {
			if _, err := d.operate(ctx, "custom", d.ownModule(`config: {response: {`+ownHeader+`: loaded}}`)); err != nil {
				return err
			}
			if err := d.holds(ctx, ownName, limiterName); err != nil {
				return err
			}
			// The limiter's 401 passes the filters before it on its way back, and no others.
			return d.headerIs(ctx, "loaded", 401)
		}},
		{"A broken configuration is refused, and the chain keeps working", func() error {
			before, err := d.updateRejected(ctx)
			if err != nil {
				return err
			}
			if err := d.refused(ctx, "meshery-filters-1014", d.ownModule(`config: {response: 7}`)); err != nil {
				return err
			}
			after, err := d.updateRejected(ctx)
			if err != nil {
				return err
			}
			if before != after {
				return fmt.Errorf("a proxy saw a configuration that the dry run refuses")
			}
			return errors.Join(d.holds(ctx, ownName, limiterName), d.headerIs(ctx, "loaded", 401), d.pulls(ctx, 0, team, 5, repeat(200, 5)))
		}},
		{"What only an Envoy can refuse is taken back, and the chain keeps working", func() error {
			before, err := d.updateRejected(ctx)
			if err != nil {
				return err
			}
			if err := d.refused(ctx, "meshery-filters-1016", d.ownModule("config: {response: {x-other: y}}\n  delivery: {mode: local, localPath: "+filepath.Join(d.dir, "nowhere")+"}")); err != nil {
				return err
			}
			after, err := d.updateRejected(ctx)
			if err != nil {
				return err
			}
			if after != before+1 {
				return fmt.Errorf("%d rejections by the Envoys, want exactly 1: only one of them tries a change first", after-before)
			}
			return errors.Join(d.holds(ctx, ownName, limiterName), d.headerIs(ctx, "loaded", 401), d.pulls(ctx, 0, team, 5, repeat(200, 5)))
		}},
		{"Remove filter: both are unloaded, and nothing limits pulls", func() error {
			body := document(ownName, "", "") + "---\n" + document(limiterName, "", "")
			last, err := d.operate(ctx, "remove_filter", body)
			if err != nil {
				return err
			}
			if !strings.Contains(last.GetSummary(), "removed") {
				return fmt.Errorf("the last event does not say removed: %s", last.GetSummary())
			}
			return errors.Join(d.holds(ctx), d.pulls(ctx, 0, personal, 30, repeat(200, 30)), d.pulls(ctx, 1, "", 3, repeat(200, 3)))
		}},
		{"Every event came over gRPC and over NATS", func() error { return d.allHeard(ctx) }},
	} {
		if err := d.take(ctx, s.name, s.do); err != nil {
			return err
		}
	}
	return nil
}

// take runs one step, with requests beside it that must never fail, and writes down how the Envoys stand after it.
func (d *demo) take(ctx context.Context, name string, do func() error) (err error) {
	st := &step{Name: name}
	d.mu.Lock()
	d.step = st
	d.report.Steps = append(d.report.Steps, st)
	d.mu.Unlock()
	fmt.Fprintf(d.out, "\n%2d. %s\n", len(d.report.Steps), name)

	var before []int
	for _, e := range d.envoys {
		before = append(before, e.PID())
	}
	stop := make(chan struct{})
	counts := make(chan map[string]int, 1)
	go func() { counts <- d.background(ctx, stop) }()
	err = do()
	close(stop)
	st.Background = <-counts
	for status, n := range st.Background {
		if status != "200" {
			err = errors.Join(err, fmt.Errorf("%d requests beside the step: %s", n, status))
		}
	}
	for i, e := range d.envoys {
		state, serr := d.envoyState(ctx, e)
		if err = errors.Join(err, serr); serr != nil {
			continue
		}
		if i < len(before) {
			state.PIDBefore = before[i]
			select {
			case <-e.Done():
				err = errors.Join(err, fmt.Errorf("Envoy %d with PID %d ended", i+1, before[i]))
			default:
			}
			if state.PIDAfter != before[i] {
				err = errors.Join(err, fmt.Errorf("Envoy %d was restarted: PID %d, then %d", i+1, before[i], state.PIDAfter))
			}
		}
		st.Envoys = append(st.Envoys, state)
	}
	st.OK = err == nil
	if err != nil {
		st.Problem = err.Error()
		fmt.Fprintf(d.out, "    does not hold: %v\n", err)
		return fmt.Errorf("step %d, %s: %w", len(d.report.Steps), name, err)
	}
	d.summarize(st)
	return nil
}

func (d *demo) summarize(st *step) {
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
	fmt.Fprintln(d.out, line)
}

func (d *demo) startAdapter(ctx, running context.Context, g *errgroup.Group) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	state := filepath.Join(d.dir, "state")
	log, err := os.Create(filepath.Join(d.dir, "adapter.log"))
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(running, self, "serve", "--grpc-addr", "127.0.0.1:0", "--xds-addr", "127.0.0.1:0",
		"--http-addr", "127.0.0.1:0", "--nats-listen", "127.0.0.1:0", "--state-dir", state, "--imagehub-addr", "127.0.0.1:0")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the adapter: %w", err)
	}
	ended := make(chan struct{})
	g.Go(func() error {
		defer log.Close()
		defer close(ended)
		if err := cmd.Wait(); err != nil && running.Err() == nil {
			tail, _ := os.ReadFile(log.Name())
			return fmt.Errorf("the adapter ended: %w\n%s", err, lastLines(tail, 20))
		}
		return nil
	})
	err = poll(ctx, 20*time.Second, func() error {
		select {
		case <-ended:
			return errors.New("the adapter ended")
		default:
		}
		data, err := os.ReadFile(filepath.Join(state, addressesFile))
		if err != nil {
			return err
		}
		return json.Unmarshal(data, &d.addresses)
	})
	if err != nil {
		tail, _ := os.ReadFile(log.Name())
		return fmt.Errorf("the adapter is not ready: %w\n%s", err, lastLines(tail, 20))
	}
	fmt.Fprintf(d.out, "    PID %d: gRPC %s, xDS %s, NATS %s\n", cmd.Process.Pid, d.addresses.GRPC, d.addresses.XDS, d.addresses.NATS)
	d.app.adapter = address{server: d.addresses.GRPC}
	if d.adapter, err = d.app.dial(); err != nil {
		return err
	}
	return d.listen(running, g)
}

// listen prints and keeps every event from gRPC and from NATS.
func (d *demo) listen(ctx context.Context, g *errgroup.Group) error {
	nc, err := nats.Connect(d.addresses.NATS, nats.Name("meshery-filters demo"))
	if err != nil {
		return fmt.Errorf("connect to NATS: %w", err)
	}
	sub, err := nc.SubscribeSync(event.SubjectPrefix + ">")
	if err != nil {
		nc.Close()
		return fmt.Errorf("subscribe to NATS: %w", err)
	}
	if err := nc.FlushTimeout(5 * time.Second); err != nil {
		nc.Close()
		return fmt.Errorf("subscribe to NATS: %w", err)
	}
	g.Go(func() error {
		defer nc.Close()
		for {
			m, err := sub.NextMsgWithContext(ctx)
			if err != nil {
				return ignoreCanceled(ctx.Err())
			}
			var envelope struct{ Object event.Event }
			if err := json.Unmarshal(m.Data, &envelope); err != nil {
				return fmt.Errorf("an event over NATS: %w", err)
			}
			e := envelope.Object
			d.hear(heardEvent{"NATS", e.Operation, meshes.EventType(e.Type).String(), e.Summary, e.Details, e.Code})
		}
	})
	stream, err := d.adapter.meshes.StreamEvents(ctx, &meshes.EventsRequest{})
	if err != nil {
		return fmt.Errorf("stream events: %w", err)
	}
	if _, err := stream.Header(); err != nil { // it comes when the adapter listens to this stream
		return fmt.Errorf("stream events: %w", err)
	}
	g.Go(func() error {
		defer d.adapter.close()
		for {
			e, err := stream.Recv()
			if err != nil {
				if ctx.Err() != nil {
					return nil
				}
				return fmt.Errorf("stream events: %w", err)
			}
			d.hear(heardEvent{"gRPC", e.GetOperationId(), e.GetEventType().String(), e.GetSummary(), e.GetDetails(), e.GetErrorCode()})
		}
	})
	return nil
}

func (d *demo) hear(e heardEvent) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.step != nil {
		d.step.Events = append(d.step.Events, e)
	}
	d.heard[e.Over+"\x00"+e.Operation+"\x00"+e.Summary]++
	fmt.Fprintf(d.out, "    %s  %-5s %s\n", e.Over, e.Type, e.Summary)
}
