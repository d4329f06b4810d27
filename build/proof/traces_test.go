package proof

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/layer5io/meshery-adapter-library/meshes"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// receiver takes traces as a collector does.
type receiver struct {
	collector.UnimplementedTraceServiceServer
	addr string

	mu      sync.Mutex
	spans   map[string][]*otlp.Span // by trace
	service map[string]bool         // names of services
	keys    map[string]bool         // what came with them as a credential
	all     strings.Builder
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &receiver{addr: l.Addr().String(), spans: map[string][]*otlp.Span{}, service: map[string]bool{}, keys: map[string]bool{}}
	s := grpc.NewServer()
	collector.RegisterTraceServiceServer(s, r)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	})
	return r
}

func (r *receiver) Export(ctx context.Context, q *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	md, _ := metadata.FromIncomingContext(ctx)
	for _, key := range md.Get("x-api-key") {
		r.keys[key] = true
	}
	for _, rs := range q.GetResourceSpans() {
		for _, a := range rs.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				r.service[a.GetValue().GetStringValue()] = true
			}
		}
		for _, ss := range rs.GetScopeSpans() {
			for _, s := range ss.GetSpans() {
				id := hex.EncodeToString(s.GetTraceId())
				r.spans[id] = append(r.spans[id], s)
				fmt.Fprintln(&r.all, s)
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

// trace is the spans of one trace so far.
func (r *receiver) trace(id string) []*otlp.Span {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.spans[id])
}

// env makes an adapter send its traces there, at once.
func (r *receiver) env() []string {
	return []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://" + r.addr, "OTEL_EXPORTER_OTLP_PROTOCOL=grpc", "OTEL_SERVICE_NAME=filters-under-test",
		"OTEL_EXPORTER_OTLP_HEADERS=x-api-key=of the receiver", "OTEL_BSP_SCHEDULE_DELAY=20"}
}

// caller is a span of somebody who calls the adapter.
type caller struct{ trace, span string }

func newCaller() caller {
	var id [24]byte
	rand.Read(id[:])
	return caller{hex.EncodeToString(id[:16]), hex.EncodeToString(id[16:])}
}

// submit sends an operation from within the caller's span.
func (c caller) submit(a *adapter, body string) (id string) {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(a.t.Context(), patience)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "traceparent", "00-"+c.trace+"-"+c.span+"-01")
	r, err := a.meshes.ApplyOperation(ctx, &meshes.ApplyRuleRequest{OpName: "custom", Username: "proof", CustomBody: body, OperationId: rand.Text()})
	if err != nil {
		a.t.Fatal(err)
	}
	return r.GetOperationId()
}

// tree is a trace's spans as paths of names from the caller on, sorted; spans whose parent is missing begin with "?".
func (c caller) tree(r *receiver) []string {
	spans := map[string]*otlp.Span{}
	for _, s := range r.trace(c.trace) {
		spans[hex.EncodeToString(s.GetSpanId())] = s
	}
	var paths []string
	for _, s := range spans {
		path := s.GetName()
		for {
			parent := hex.EncodeToString(s.GetParentSpanId())
			if parent == c.span {
				break
			}
			if s = spans[parent]; s == nil {
				path = "? > " + path
				break
			}
			path = s.GetName() + " > " + path
		}
		paths = append(paths, path)
	}
	slices.Sort(paths)
	return paths
}

// grows waits until the trace has these paths, and events, and nothing else.
func (c caller) grows(t *testing.T, r *receiver, want []string, events int) {
	t.Helper()
	const told = "meshes.MeshService/ApplyOperation > submit > work > event"
	for range events {
		want = append(want, told)
	}
	slices.Sort(want)
	eventually(t, "the trace is whole", func() error {
		if got := c.tree(r); !slices.Equal(got, want) {
			return fmt.Errorf("it is\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
		}
		return nil
	})
}

// named is a span of the trace with that name.
func (c caller) named(t *testing.T, r *receiver, name string) *otlp.Span {
	t.Helper()
	for _, s := range r.trace(c.trace) {
		if s.GetName() == name {
			return s
		}
	}
	t.Fatalf("no span %s", name)
	return nil
}

// attribute of a span, as text.
func attribute(s *otlp.Span, key string) string {
	for _, a := range s.GetAttributes() {
		if a.GetKey() == key {
			if text := a.GetValue().GetStringValue(); text != "" {
				return text
			}
			return fmt.Sprint(a.GetValue().GetIntValue())
		}
	}
	return ""
}

func under(prefix string, names ...string) []string {
	var all []string
	for _, n := range names {
		all = append(all, prefix+" > "+n)
	}
	return all
}

const (
	calledPath    = "meshes.MeshService/ApplyOperation"
	submittedPath = calledPath + " > submit"
	workPath      = submittedPath + " > work"
)

// accepted is what the trace of an operation has once it is accepted, with a module in its document.
func accepted() []string {
	return append([]string{calledPath, submittedPath}, under(submittedPath, "decode", "fetch module", "enqueue")...)
}

func TestAnOperationIsOneTraceFromTheCallToTheProxies(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	const group = "edge"
	r := newReceiver(t)
	a := newAdapterIn(t, r.env(), insecure.NewCredentials())
	a.startProxies(1, group, upstream(t), 1)

	// What the document holds is not the trace's business.
	private := "private-" + rand.Text()
	well := newCaller()
	id := well.submit(a, probe(t, "mark", group, stamp(private), nil))
	events, err := a.story(id)
	if err != nil {
		t.Fatal(err)
	}
	done := append(accepted(), under(submittedPath, "queue wait", "work")...)
	done = append(done, under(workPath, "fetch module", "dry run", "world", "plan", "apply", "wait for loaded", "commit")...)
	well.grows(t, r, done, len(events))
	work := well.named(t, r, "work")
	for key, want := range map[string]string{"meshery.operation.id": id, "meshery.operation.key": "custom", "meshery.operation.attempt": "1"} {
		if got := attribute(work, key); got != want {
			t.Errorf("%s of the work is %q, want %q", key, got, want)
		}
	}
	sum, err := os.ReadFile(filepath.Join("..", "testfilters", "probe.wasm.sha256"))
	if err != nil {
		t.Fatal(err)
	}
	if digest := attribute(well.named(t, r, "dry run"), "meshery.module.digest"); !strings.HasPrefix(string(sum), digest) || len(digest) != 64 {
		t.Errorf("the dry run is of the module %q", digest)
	}
	wait := well.named(t, r, "wait for loaded")
	if target, running := attribute(wait, "meshery.target"), attribute(wait, "meshery.proxies.running"); target != "ProxyGroup edge" || running != "1" {
		t.Errorf("the wait is for %q, of which %q run", target, running)
	}
	for _, s := range r.trace(well.trace) {
		if s.GetStatus().GetCode() == otlp.Status_STATUS_CODE_ERROR || s.GetEndTimeUnixNano() < s.GetStartTimeUnixNano() {
			t.Errorf("an operation that went well has the span %v", s)
		}
	}

	ill := newCaller()
	id = ill.submit(a, probe(t, "mark", group, stamp(private), map[string]any{"delivery": map[string]any{"mode": "local",
		"localPath": filepath.Join(t.TempDir(), "nowhere")}}))
	if events, err = a.story(id); err != nil {
		t.Fatal(err)
	}
	failed := append(accepted(), under(submittedPath, "queue wait", "work")...)
	failed = append(failed, under(workPath, "fetch module", "dry run", "world", "plan", "apply", "wait for loaded", "revert", "wait for loaded")...)
	ill.grows(t, r, failed, len(events))
	for _, name := range []string{"work", "wait for loaded"} {
		ok := slices.ContainsFunc(r.trace(ill.trace), func(s *otlp.Span) bool {
			return s.GetName() == name && s.GetStatus().GetCode() == otlp.Status_STATUS_CODE_ERROR && attribute(s, "error.type") == "meshery-filters-1016"
		})
		if !ok {
			t.Errorf("no span %q says that a proxy refused", name)
		}
	}

	// A call that is refused is a trace too; one that waits for events is none.
	if _, err := a.submit("no_such_operation", "", false); err == nil {
		t.Fatal("an operation that does not exist is accepted")
	}
	eventually(t, "the refused call is told", func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.spans) != 3 {
			return fmt.Errorf("there are %d traces", len(r.spans))
		}
		return nil
	})
	eventually(t, "as many spans are counted as came", func() error {
		came := float64(r.count())
		values, _ := a.scrape()
		if ended, exported := values["spans_total{}"], values["spans_exported_total{}"]; ended != came || exported != came {
			return fmt.Errorf("%v ended, %v were exported, %v came", ended, exported, came)
		}
		return nil
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	if strings.Contains(r.all.String(), private) {
		t.Error("the traces hold what the configuration does")
	}
	if strings.Contains(r.all.String(), "FilterService/Watch") {
		t.Error("a call that lasts has a span")
	}
	if !r.service["filters-under-test"] || len(r.service) != 1 || !r.keys["of the receiver"] {
		t.Errorf("the spans come from %v with the keys %v", r.service, r.keys)
	}
}

// count is how many spans came.
func (r *receiver) count() (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.spans {
		n += len(s)
	}
	return n
}

func TestATraceGoesOnAfterTheAdapterWasKilledBetweenAcceptanceAndWork(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	const group = "edge"
	r := newReceiver(t)
	a := newAdapterIn(t, r.env(), insecure.NewCredentials(), fixedPorts(t)...)
	p := a.startProxies(1, group, upstream(t), 1)[0]
	if err := syscall.Kill(p.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	awake := func() { _ = syscall.Kill(p.PID(), syscall.SIGCONT) }
	defer awake()
	patient := map[string]any{"wait": map[string]any{"timeout": "2m"}}
	first, second := newCaller(), newCaller()
	begun := first.submit(a, probe(t, "mark", group, stamp("one"), patient))
	waiting := second.submit(a, probe(t, "mark", group, stamp("two"), patient))
	second.grows(t, r, accepted(), 0)
	a.shows(map[string]float64{"queue_operations{state=running}": 1, "queue_operations{state=waiting}": 1})
	a.stopWith(syscall.SIGKILL)
	a.start()
	awake()

	for _, id := range []string{begun, waiting} {
		events, err := a.story(id)
		if err != nil {
			t.Fatal(err)
		}
		if last := events[len(events)-1]; last.GetType() != filterspb.Event_INFO {
			t.Errorf("%s ended with %v", id, last)
		}
	}
	told, err := a.story(waiting)
	if err != nil {
		t.Fatal(err)
	}
	done := append(accepted(), under(submittedPath, "queue wait", "work")...)
	// The module is tried by itself, and beside what the one before it was configured with.
	done = append(done, under(workPath, "fetch module", "dry run", "dry run", "world", "plan", "apply", "wait for loaded", "commit")...)
	second.grows(t, r, done, len(told)-1) // that it waits was told before the work
	if attempt := attribute(second.named(t, r, "work"), "meshery.operation.attempt"); attempt != "1" {
		t.Errorf("the work was attempt %s", attempt)
	}
	// What was cut off is lost, and what came of it in the end is not.
	eventually(t, "the work that was cut off is told to its end", func() error {
		for _, s := range r.trace(first.trace) {
			if s.GetName() == "work" && attribute(s, "meshery.operation.attempt") == "2" {
				return nil
			}
		}
		return fmt.Errorf("its trace is %v", first.tree(r))
	})
}

func TestAReceiverOfTracesThatIsDownOrSilentHoldsNothingUp(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections, and never answers
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	for why, c := range map[string]struct{ protocol, endpoint string }{
		"silent, grpc": {"grpc", silent.Addr().String()},
		"silent, http": {"http/protobuf", silent.Addr().String()},
		"down, grpc":   {"grpc", fixedPorts(t)[1]},
		"down, http":   {"http/protobuf", fixedPorts(t)[1]},
	} {
		t.Run(why, func(t *testing.T) {
			t.Parallel()
			// With these patience of its own the exporter would hold the end up for an hour.
			a := newAdapterIn(t, []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://" + c.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL=" + c.protocol,
				"OTEL_EXPORTER_OTLP_TIMEOUT=3600000", "OTEL_BSP_EXPORT_TIMEOUT=3600000", "OTEL_BSP_SCHEDULE_DELAY=20", "OTEL_BSP_MAX_QUEUE_SIZE=4"},
				insecure.NewCredentials())
			for i := range 5 {
				a.apply(probe(t, "mark", fmt.Sprint("group-", i), stamp("one"), nil))
			}
			a.stopWith(syscall.SIGTERM)
			if code := a.cmd.ProcessState.ExitCode(); code != 0 {
				t.Errorf("the adapter ended with %d", code)
			}
			if log := a.log.String(); !strings.Contains(log, "traces are not taken") {
				t.Errorf("the adapter does not say that its traces are lost:\n%s", log)
			}
		})
	}
}
