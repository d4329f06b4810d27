package proof

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/layer5io/meshery-adapter-library/meshes"
	natsserver "github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// subscriber is a program on a NATS of its own that follows the adapter's events.
type subscriber struct {
	url string

	mu      sync.Mutex
	events  map[string][]subscriberEvent // by operation, each once, in the order they first came
	wrong   []string
	doubled int
}

type subscriberEvent struct {
	Operation string `json:"operation_id"`
	Sequence  uint64 `json:"sequence"`
	Type      int    `json:"event_type"`
	Summary   string `json:"summary"`
	Details   string `json:"details"`
	Last      bool   `json:"last"`
}

func newSubscriber(t *testing.T) *subscriber {
	t.Helper()
	broker, err := natsserver.NewServer(&natsserver.Options{Host: "127.0.0.1", Port: natsserver.RANDOM_PORT, NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	broker.Start()
	t.Cleanup(func() { broker.Shutdown(); broker.WaitForShutdown() })
	if !broker.ReadyForConnections(patience) {
		t.Fatal("the broker does not start")
	}
	return subscribe(t, broker.ClientURL())
}

// subscribe follows what a broker tells, and comes back whenever it was away.
func subscribe(t *testing.T, url string) *subscriber {
	t.Helper()
	s := &subscriber{url: url, events: map[string][]subscriberEvent{}}
	nc := connectNATS(t, url)
	if _, err := nc.Subscribe("meshery.adapters.filters.events.*", func(m *nats.Msg) { s.take(m.Subject, m.Data) }); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return s
}

// connectNATS connects to servers that may be away for a while.
func connectNATS(t *testing.T, url string) *nats.Conn {
	t.Helper()
	closed := make(chan struct{})
	nc, err := nats.Connect(url, nats.MaxReconnects(-1), nats.ReconnectWait(time.Second), nats.ClosedHandler(func(*nats.Conn) { close(closed) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close(); <-closed })
	return nc
}

func (s *subscriber) take(subject string, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var envelope struct{ Object subscriberEvent }
	if err := json.Unmarshal(data, &envelope); err != nil {
		s.wrong = append(s.wrong, fmt.Sprintf("%s: %v", subject, err))
		return
	}
	e := envelope.Object
	seen := s.events[e.Operation]
	switch next := uint64(len(seen) + 1); {
	case e.Sequence < next:
		s.doubled++
		if e != seen[e.Sequence-1] {
			s.wrong = append(s.wrong, fmt.Sprintf("event %d of %s was %q and is %q", e.Sequence, e.Operation, seen[e.Sequence-1].Summary, e.Summary))
		}
	case e.Sequence > next:
		s.wrong = append(s.wrong, fmt.Sprintf("event %d of %s comes where %d should", e.Sequence, e.Operation, next))
	case len(seen) > 0 && seen[len(seen)-1].Last:
		s.wrong = append(s.wrong, fmt.Sprintf("%s tells on after its end: %s", e.Operation, e.Summary))
	default:
		s.events[e.Operation] = append(seen, e)
	}
}

// end is the last event of an operation, if it came.
func (s *subscriber) end(id string) (subscriberEvent, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	story := s.events[id]
	if len(story) == 0 || !story[len(story)-1].Last {
		return subscriberEvent{}, false
	}
	return story[len(story)-1], true
}

// story is what an operation has told so far.
func (s *subscriber) story(id string) []subscriberEvent {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.events[id])
}

// again is how many events came that had come before.
func (s *subscriber) again() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.doubled
}

// follower acknowledges whatever chain it is sent, connects again whenever its stream ends, and remembers the version.
type follower struct {
	mu      sync.Mutex
	version string
}

func (f *follower) runs() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	version, _, _ := strings.Cut(f.version, "~") // behind which the adapter keeps its bytes of it apart
	return version
}

// dialOften connects to an adapter that is away for moments only.
func dialOften(t *testing.T, addr string) *grpc.ClientConn {
	t.Helper()
	often := grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond}, MinConnectTimeout: 5 * time.Second}
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(often))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func startFollower(t *testing.T, addr, id, group string) *follower {
	t.Helper()
	f := &follower{}
	conn := dialOften(t, addr)
	ctx, cancel := context.WithCancel(context.Background())
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		for ctx.Err() == nil {
			f.follow(ctx, conn, id, group)
			time.Sleep(20 * time.Millisecond) // as a proxy waits before it connects again
		}
	}()
	t.Cleanup(func() { cancel(); conn.Close(); <-gone })
	return f
}

func (f *follower) follow(ctx context.Context, conn *grpc.ClientConn, id, group string) {
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
	if err != nil {
		return
	}
	node := &core.Node{Id: id, Cluster: group, UserAgentName: "envoy", UserAgentVersionType: &core.Node_UserAgentBuildVersion{
		UserAgentBuildVersion: &core.BuildVersion{Version: &typev3.SemanticVersion{MajorNumber: 1, MinorNumber: 40}}}}
	q := &discovery.DiscoveryRequest{Node: node, TypeUrl: "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig", ResourceNames: []string{"meshery.filters"}}
	for stream.Send(q) == nil {
		m, err := stream.Recv()
		if err != nil {
			return
		}
		f.mu.Lock()
		f.version = m.GetVersionInfo()
		f.mu.Unlock()
		q = &discovery.DiscoveryRequest{TypeUrl: q.TypeUrl, ResourceNames: q.ResourceNames, ResponseNonce: m.GetNonce(), VersionInfo: m.GetVersionInfo()}
	}
}

// replica is an adapter that is killed and started again.
type replica struct {
	t     *testing.T
	args  []string
	state string
	// seen is where this process finds the state directory, and within what runs the adapter, where that is elsewhere.
	seen   string
	within []string
	// program is what is run, where that is another than the one of all tests.
	program string
	*process
	grpc, xds string
	meshes    meshes.MeshServiceClient
	filters   filterspb.FilterServiceClient
	health    healthpb.HealthClient
}

func newReplica(t *testing.T, args ...string) *replica {
	t.Helper()
	r := &replica{t: t, state: filepath.Join(t.TempDir(), "state")}
	r.seen = r.state
	ports := fixedPorts(t)
	r.grpc, r.xds = ports[1], ports[3]
	r.args = append(append([]string{"serve", "--state-dir", r.state, "--imagehub-addr", "127.0.0.1:0"}, ports...), args...)
	conn := dialOften(t, r.grpc)
	t.Cleanup(func() { conn.Close() })
	r.meshes, r.filters = meshes.NewMeshServiceClient(conn), filterspb.NewFilterServiceClient(conn)
	r.health = healthpb.NewHealthClient(conn)
	return r
}

// serves is an error unless the health service says so, or says the opposite.
func (r *replica) serves(want bool) error {
	ctx, cancel := context.WithTimeout(r.t.Context(), 5*time.Second)
	defer cancel()
	h, err := r.health.Check(ctx, &healthpb.HealthCheckRequest{})
	if err == nil && (h.GetStatus() == healthpb.HealthCheckResponse_SERVING) != want {
		err = fmt.Errorf("it says %s", h.GetStatus())
	}
	return err
}

func (r *replica) start() {
	r.t.Helper()
	if err := os.Remove(filepath.Join(r.seen, "addresses.json")); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.EROFS) {
		r.t.Fatal(err)
	}
	command := append(append(slices.Clone(r.within), cmp.Or(r.program, program)), r.args...)
	r.process = launchCommand(r.t, exec.Command(command[0], command[1:]...))
}

// ready waits until the adapter takes requests.
func (r *replica) ready() {
	r.t.Helper()
	path := filepath.Join(r.seen, "addresses.json")
	eventually(r.t, "the adapter is ready", func() error {
		select {
		case <-r.process.ended:
			r.t.Fatalf("the adapter ended: %v\n%s", r.err, r.log.String())
		default:
		}
		_, err := os.Stat(path)
		return err
	})
}

// torture is what adapters are put through: who asks them for operations, and who looks at what becomes of those.
type torture struct {
	t *testing.T
	*replica
	others    []*replica // that share its store
	heard     *subscriber
	run       string
	followers []*follower // the ith is in groupOf(i)
	envoys    []*proxy

	mu       sync.Mutex
	asked    string // for last, accepted or not yet
	accepted []string
	want     map[string]int32 // priority by filter
}

// newTorture starts nothing yet. The adapter delivers its events to where heard listens, unless args say otherwise.
func newTorture(t *testing.T, heard *subscriber, args ...string) *torture {
	t.Helper()
	return &torture{t: t, replica: newReplica(t, append([]string{"--nats-url", heard.url}, args...)...), heard: heard,
		want: map[string]int32{}, run: strconv.FormatInt(time.Now().UnixNano(), 36)}
}

func (x *torture) replicas() []*replica { return append([]*replica{x.replica}, x.others...) }

func groupOf(i int) string { return fmt.Sprintf("group-%d", i%2) }

// startProxies starts a real Envoy of each group, and more proxies that only acknowledge.
func (x *torture) startProxies() {
	x.t.Helper()
	backend := upstream(x.t)
	for i := range 2 {
		at := x.replicas()[i%len(x.replicas())].xds
		x.followers = append(x.followers, startFollower(x.t, at, fmt.Sprintf("proxy-%d", i), groupOf(i)))
		x.envoys = append(x.envoys, startProxy(x.t, proxyOptions{id: fmt.Sprintf("envoy-%d", i), group: groupOf(i), upstream: backend, xds: at}))
	}
}

// submit asks for the ith operation until it is accepted, as a client does that knows what it wants.
func (x *torture) submit(ctx context.Context, i int) error {
	name := fmt.Sprintf("filter-%d", i%4)
	q := &meshes.ApplyRuleRequest{OpName: "apply_filter", OperationId: fmt.Sprintf("%s-%d", x.run, i), Username: "torture",
		CustomBody: document(name, map[string]any{"target": target(groupOf(i)), "module": map[string]any{"builtin": "headers"},
			"priority": i, "config": map[string]any{"response": map[string]any{"x-" + name: strconv.Itoa(i)}}})}
	x.mu.Lock()
	_, there := x.want["default/"+name]
	x.asked = q.OperationId
	x.mu.Unlock()
	remove := there && i%7 == 6
	if remove {
		q.OpName, q.CustomBody = "remove_filter", document(name, nil)
	}
	for try := i; ; try++ {
		each, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err := x.replicas()[try%(1+len(x.others))].meshes.ApplyOperation(each, q)
		cancel()
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if text := err.Error(); !strings.Contains(text, "Unavailable") && !strings.Contains(text, "DeadlineExceeded") {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.accepted = append(x.accepted, q.OperationId)
	if delete(x.want, "default/"+name); !remove {
		x.want["default/"+name] = int32(i)
	}
	return nil
}

// ahead is how many operations are asked for before the first of them has ended; then it is one a second. A machine that is too
// slow for more is not what is tested.
const ahead = 100

// load asks for operations until stop, which returns once the last is accepted.
func (x *torture) load() (stop func()) {
	ctx, cancel := context.WithCancel(x.t.Context())
	asking := make(chan error, 1)
	go func() {
		// A request is never broken off, for then nobody would know whether it was accepted.
		for i := 0; ctx.Err() == nil; i++ {
			if err := x.submit(x.t.Context(), i); err != nil {
				asking <- err
				return
			}
			time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond)
			for begun := time.Now(); ctx.Err() == nil && i >= ahead && time.Since(begun) < time.Second; {
				if _, ok := x.heard.end(fmt.Sprintf("%s-%d", x.run, i-ahead)); ok {
					break
				}
				time.Sleep(5 * time.Millisecond)
			}
		}
		asking <- nil
	}()
	return func() {
		x.t.Helper()
		cancel()
		if err := <-asking; err != nil {
			x.t.Fatal(err)
		}
	}
}

// ended waits until everything that was asked for so far has ended. The adapter may have begun what its client does not
// know to be accepted.
func (x *torture) ended(limit time.Duration) {
	x.t.Helper()
	x.mu.Lock()
	ids := slices.Clone(x.accepted)
	if x.asked != "" && !slices.Contains(ids, x.asked) {
		ids = append(ids, x.asked)
	}
	x.mu.Unlock()
	deadline := time.Now().Add(limit)
	for _, id := range ids {
		for {
			if _, ok := x.heard.end(id); ok {
				break
			}
			if time.Now().After(deadline) {
				log := x.log.String()
				x.t.Fatalf("operation %s has not ended; it told %v\n%s", id, x.heard.story(id), log[max(0, len(log)-4000):])
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// rounds counts to n, or for as long or as far as `make torture` asks for: TORTURE_KILLS is how many kills its longest
// test does, of whose share the others do theirs, and TORTURE_TIME, which comes before it, for how long each goes on.
func rounds(t *testing.T, n int) iter.Seq[int] {
	t.Helper()
	const most = 100 // of the longest, in CI
	var limit time.Duration
	if text := os.Getenv("TORTURE_TIME"); text != "" {
		var err error
		if limit, err = time.ParseDuration(text); err != nil {
			t.Fatalf("TORTURE_TIME: %v", err)
		}
	} else if text := os.Getenv("TORTURE_KILLS"); text != "" {
		kills, err := strconv.Atoi(text)
		if err != nil {
			t.Fatalf("TORTURE_KILLS: %v", err)
		}
		n = max(n, n*kills/most)
	}
	began := time.Now()
	return func(yield func(int) bool) {
		for i := 0; limit > 0 && time.Since(began) < limit || limit == 0 && i < n; i++ {
			if !yield(i) {
				return
			}
		}
	}
}

// TestAKilledAdapterLosesNothingThatItAccepted kills the adapter at moments of chance, its start included.
func TestAKilledAdapterLosesNothingThatItAccepted(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	x := newTorture(t, newSubscriber(t))
	x.start()
	x.ready()
	x.startProxies()
	stop := x.load()
	var slowest time.Duration
	kills := 0
	for kill := range rounds(t, 100) {
		kills++
		if kill%3 != 2 {
			x.ready()
		}
		time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
		x.process.end(t, syscall.SIGKILL)
		x.start()
		if kill%2 == 1 { // so that none meets three kills, and is rightly set aside
			x.ready()
			began := time.Now()
			x.ended(patience)
			slowest = max(slowest, time.Since(began))
		}
	}
	x.ready()
	stop()
	x.ended(patience)
	x.check()
	t.Logf("%d kills, %d operations, %d events came again; after a start everything that was left had ended within %s",
		kills, len(x.accepted), x.heard.again(), slowest)
	x.process.end(t, syscall.SIGTERM)
	x.audited()
}

// audited makes sure that the audit log of an adapter that has ended tells of every operation twice: that it was
// accepted, and what became of it.
func (x *torture) audited() {
	x.t.Helper()
	text, err := os.ReadFile(filepath.Join(x.seen, "audit.jsonl"))
	if err != nil {
		x.t.Fatal(err)
	}
	told := map[string]string{}
	for line := range strings.Lines(string(text)) {
		var e struct{ Operation, Result string }
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			x.t.Fatalf("%v: %q", err, line)
		}
		if e.Result != "repeated" && e.Result != "refused" {
			told[e.Operation] += e.Result + " "
		}
	}
	for _, id := range x.accepted {
		if told[id] != "accepted succeeded " {
			x.t.Errorf("the audit log tells of %s: %q", id, told[id])
		}
	}
}

// check compares what the subscriber heard, what the adapter keeps and what the proxies run.
func (x *torture) check() {
	t := x.t
	t.Helper()
	x.heard.mu.Lock()
	for _, text := range x.heard.wrong {
		t.Error(text)
	}
	for id, story := range x.heard.events {
		if last := story[len(story)-1]; !last.Last || last.Type == 2 {
			t.Errorf("%s ended with: %s\n%s", id, last.Summary, last.Details)
		}
	}
	x.heard.mu.Unlock()
	for _, r := range x.replicas() {
		x.agree(r)
	}
}

// agree waits until an adapter keeps what was asked for, and the proxies run it.
func (x *torture) agree(r *replica) {
	t := x.t
	t.Helper()
	eventually(t, "the proxies run the chains that the adapter keeps", func() error {
		list, err := r.filters.List(t.Context(), &filterspb.ListRequest{})
		if err != nil {
			return err
		}
		have, chains := map[string]int32{}, map[string]*filterspb.Chain{}
		for _, c := range list.GetChains() {
			chains[c.GetTarget().GetName()] = c
			for _, f := range c.GetFilters() {
				have[f.GetNamespace()+"/"+f.GetName()] = f.GetPriority()
			}
		}
		for i, f := range x.followers {
			if c := chains[groupOf(i)]; c != nil && f.runs() != c.GetVersion() {
				return fmt.Errorf("proxy %d runs %s, and the chain of %s has version %s", i, f.runs(), groupOf(i), c.GetVersion())
			}
		}
		for i, p := range x.envoys {
			var names []string
			for _, f := range chains[groupOf(i)].GetFilters() {
				names = append(names, f.GetNamespace()+"/"+f.GetName())
			}
			s, err := p.Admin().SlotConfig(t.Context())
			if err != nil {
				return err
			}
			var runs []string
			for _, f := range s.Filters {
				runs = append(runs, f.Name)
			}
			if c := chains[groupOf(i)]; !slices.Equal(runs, names) || c != nil && s.Version != c.GetVersion() {
				return fmt.Errorf("%s runs %v, version %s, and the chain is %v", p.id, runs, s.Version, c)
			}
		}
		if fmt.Sprint(have) != fmt.Sprint(x.want) {
			return fmt.Errorf("the adapter keeps %v, want %v", have, x.want)
		}
		return nil
	})
}
