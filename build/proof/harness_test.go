package proof

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// program is the path of the binary that TestMain builds.
var program string

func TestMain(m *testing.M) {
	if text := os.Getenv(natsVariable); text != "" {
		os.Exit(serveNATS(text))
	}
	flag.Parse()
	if testing.Short() {
		goleak.VerifyTestMain(m)
		return
	}
	dir, err := os.MkdirTemp("", "meshery-filters-proof-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	program = filepath.Join(dir, "meshery-filters")
	build := exec.Command("go", "build", "-o", program, "github.com/meshery/meshery-filters")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the program: %v\n%s", err, out)
		os.RemoveAll(dir)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// onRealParts skips a test that runs the program and real Envoys when only quick tests are asked for.
func onRealParts(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("it runs the program and real Envoys")
	}
}

// patience bounds every wait for something that takes a moment; it is long, since other tests may share the machine.
const patience = 60 * time.Second

// eventually polls until there is no error, and fails the test with the last one.
func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
	}
	t.Fatalf("%s: not within %s: %v", what, patience, err)
}

// text is a buffer that a process writes while a test reads.
type text struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *text) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *text) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// process is a run of the program.
type process struct {
	cmd   *exec.Cmd
	log   text // what it writes to standard output and error
	ended chan struct{}
	err   error // set before ended is closed
}

// launch starts the program; the test's end kills it if nothing else has ended it. env is added to the test's own
// environment, less what would configure an adapter.
func launch(t *testing.T, env []string, args ...string) *process {
	t.Helper()
	return launchCommand(t, exec.Command(program, args...), env...)
}

// launchCommand starts another program likewise.
func launchCommand(t *testing.T, cmd *exec.Cmd, env ...string) *process {
	t.Helper()
	p := &process{cmd: cmd, ended: make(chan struct{})}
	p.cmd.Env = append(slices.DeleteFunc(os.Environ(), func(e string) bool {
		return strings.HasPrefix(e, "MESHERY_") || strings.HasPrefix(e, "DEBUG=") || strings.HasPrefix(e, "OTEL_")
	}), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	p.cmd.WaitDelay = 5 * time.Second
	// A test that is killed takes the program with it. Linux ties that to the thread that started it.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
		}
		close(p.ended)
	}()
	if err := <-started; err != nil {
		t.Fatalf("start the program: %v", err)
	}
	t.Cleanup(func() {
		select {
		case <-p.ended:
		default:
			_ = p.cmd.Process.Kill()
			<-p.ended
		}
	})
	return p
}

// wait returns the exit code of a program that ends by itself.
func (p *process) wait(t *testing.T, limit time.Duration) int {
	t.Helper()
	select {
	case <-p.ended:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(limit):
		t.Fatalf("%v did not end within %s:\n%s", p.cmd.Args[1:], limit, p.log.String())
		return -1
	}
}

// end sends a signal and waits until the process is gone.
func (p *process) end(t *testing.T, s os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatalf("signal the program: %v", err)
	}
	p.wait(t, patience)
}

// run runs the program to its end.
func run(t *testing.T, args ...string) (code int, out string) {
	t.Helper()
	p := launch(t, nil, args...)
	code = p.wait(t, patience)
	return code, p.log.String()
}

// adapter is a running `serve` and a connection to it.
type adapter struct {
	t     *testing.T
	state string
	args  []string
	env   []string
	creds credentials.TransportCredentials
	*process
	addresses struct{ GRPC, XDS, HTTP, NATS string }
	conn      *grpc.ClientConn
	meshes    meshes.MeshServiceClient
	filters   filterspb.FilterServiceClient
}

// newAdapter starts an adapter with free ports and a state directory of its own. args come after the ones that all have.
func newAdapter(t *testing.T, args ...string) *adapter {
	t.Helper()
	return newAdapterWith(t, insecure.NewCredentials(), args...)
}

// newTLSAdapter starts one that is talked to over TLS.
func newTLSAdapter(t *testing.T, conf *tls.Config, args ...string) *adapter {
	t.Helper()
	return newAdapterWith(t, credentials.NewTLS(conf), args...)
}

func newAdapterWith(t *testing.T, creds credentials.TransportCredentials, args ...string) *adapter {
	t.Helper()
	return newAdapterIn(t, nil, creds, args...)
}

// newAdapterIn starts one in an environment that has more than the test's own.
func newAdapterIn(t *testing.T, env []string, creds credentials.TransportCredentials, args ...string) *adapter {
	t.Helper()
	a := &adapter{t: t, state: filepath.Join(t.TempDir(), "state"), env: env, creds: creds}
	a.args = append([]string{"serve", "--state-dir", a.state, "--grpc-addr", "127.0.0.1:0", "--xds-addr", "127.0.0.1:0",
		"--http-addr", "127.0.0.1:0", "--imagehub-addr", "127.0.0.1:0"}, args...)
	t.Cleanup(func() {
		a.disconnect()
		select {
		case <-a.ended:
		default:
			a.end(t, syscall.SIGTERM)
		}
		if t.Failed() {
			log := a.log.String()
			t.Logf("the adapter's log ends:\n%s", log[max(0, len(log)-4000):])
		}
	})
	a.start()
	return a
}

// start runs the adapter until it is ready and connects to it.
func (a *adapter) start() {
	a.t.Helper()
	path := filepath.Join(a.state, "addresses.json")
	// A killed one leaves its file behind.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		a.t.Fatal(err)
	}
	a.process = launch(a.t, a.env, a.args...)
	eventually(a.t, "the adapter is ready", func() error {
		select {
		case <-a.ended:
			a.t.Fatalf("the adapter ended: %v\n%s", a.err, a.log.String())
		default:
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return json.Unmarshal(data, &a.addresses)
	})
	conn, err := grpc.NewClient("passthrough:///"+a.addresses.GRPC, grpc.WithTransportCredentials(a.creds))
	if err != nil {
		a.t.Fatal(err)
	}
	a.conn, a.meshes, a.filters = conn, meshes.NewMeshServiceClient(conn), filterspb.NewFilterServiceClient(conn)
}

func (a *adapter) disconnect() {
	if a.conn != nil {
		a.conn.Close()
	}
}

// stopWith ends the adapter with a signal.
func (a *adapter) stopWith(s os.Signal) {
	a.t.Helper()
	a.disconnect()
	a.end(a.t, s)
}

// submit sends an operation as Meshery does, and returns its id.
func (a *adapter) submit(key, body string, remove bool) (id string, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(a.t.Context()), patience)
	defer cancel()
	id = rand.Text()
	_, err = a.meshes.ApplyOperation(ctx, &meshes.ApplyRuleRequest{OpName: key, Username: "proof", CustomBody: body, DeleteOp: remove, OperationId: id})
	return id, err
}

// story is all events of an operation, up to its last.
func (a *adapter) story(id string) (events []*filterspb.Event, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(a.t.Context()), 2*patience)
	defer cancel()
	stream, err := a.filters.Watch(ctx, &filterspb.WatchRequest{OperationId: id})
	if err != nil {
		return nil, err
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return events, nil
		}
		if err != nil {
			return events, err
		}
		events = append(events, r.GetEvent())
	}
}

// outcome sends an operation and returns its last event, whichever it is.
func (a *adapter) outcome(key, body string, remove bool) *filterspb.Event {
	a.t.Helper()
	id, err := a.submit(key, body, remove)
	if err != nil {
		a.t.Fatalf("%s is refused: %v", key, err)
	}
	events, err := a.story(id)
	if err != nil || len(events) == 0 || !events[len(events)-1].GetLast() {
		a.t.Fatalf("the story of %s %s: %v, %v", key, id, events, err)
	}
	return events[len(events)-1]
}

// operate sends an operation that must succeed.
func (a *adapter) operate(key, body string) *filterspb.Event {
	a.t.Helper()
	last := a.outcome(key, body, false)
	if last.GetType() == filterspb.Event_ERROR {
		a.t.Fatalf("%s failed: %s [%s]\n%s", key, last.GetSummary(), last.GetErrorCode(), last.GetDetails())
	}
	return last
}

func (a *adapter) apply(documents ...string) *filterspb.Event {
	a.t.Helper()
	return a.operate("custom", strings.Join(documents, "---\n"))
}

func (a *adapter) remove(names ...string) *filterspb.Event {
	a.t.Helper()
	var documents []string
	for _, n := range names {
		documents = append(documents, document(n, nil))
	}
	return a.operate("remove_filter", strings.Join(documents, "---\n"))
}

// chain is what the adapter says of a group.
func (a *adapter) chain(group string) (*filterspb.Chain, error) {
	ctx, cancel := context.WithTimeout(a.t.Context(), patience)
	defer cancel()
	r, err := a.filters.List(ctx, &filterspb.ListRequest{})
	if err != nil {
		return nil, err
	}
	for _, c := range r.GetChains() {
		if c.GetTarget().GetName() == group {
			return c, nil
		}
	}
	return nil, fmt.Errorf("no chain of %s", group)
}

// allRun waits until that many proxies of a group run its chain, by what they told the adapter.
func (a *adapter) allRun(group string, proxies int) {
	a.t.Helper()
	eventually(a.t, fmt.Sprintf("%d proxies of %s run its chain", proxies, group), func() error {
		c, err := a.chain(group)
		if err != nil {
			return err
		}
		running := 0
		for _, p := range c.GetProxies() {
			if p.GetState() == "running" {
				running++
			}
		}
		if running != proxies || len(c.GetProxies()) != proxies {
			return fmt.Errorf("%d run it of %v", running, c.GetProxies())
		}
		return nil
	})
}

// fixedPorts gives an adapter listeners that it has again after a restart.
func fixedPorts(t *testing.T) []string {
	t.Helper()
	var args []string
	for _, flag := range []string{"--grpc-addr", "--xds-addr", "--http-addr"} {
		args = append(args, flag, fixedAddr(t))
	}
	return args
}

// fixedAddr is outside of the range that the kernel takes ports of outgoing connections from, so that none of those is in
// the way while nobody listens there.
func fixedAddr(t *testing.T) string {
	t.Helper()
	for tries := 0; ; tries++ {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(20000+mathrand.IntN(12000)))
		l, err := net.Listen("tcp", addr)
		if err == nil {
			l.Close()
			return addr
		}
		if tries == 100 {
			t.Fatalf("no free port: %v", err)
		}
	}
}

// document is a Filter document in JSON, which is YAML. Without a spec it names a filter to remove.
func document(name string, spec map[string]any) string {
	doc := map[string]any{"apiVersion": "filters.meshery.io/v1alpha1", "kind": "Filter", "metadata": map[string]any{"name": name}}
	if spec != nil {
		doc["spec"] = spec
	}
	data, err := json.Marshal(doc)
	if err != nil {
		panic(err) // maps and strings always encode
	}
	return string(data) + "\n"
}

// probeModule reads the test filter once.
var probeModule = sync.OnceValues(func() (string, error) {
	data, err := os.ReadFile(filepath.Join("..", "testfilters", "probe.wasm"))
	return base64.StdEncoding.EncodeToString(data), err
})

// probe is a document of the test filter, whose configuration says what it does. more is merged into the spec.
func probe(t *testing.T, name, group string, config map[string]any, more map[string]any) string {
	t.Helper()
	inline, err := probeModule()
	if err != nil {
		t.Fatal(err)
	}
	spec := map[string]any{"target": target(group), "module": map[string]any{"inline": inline}, "config": config}
	maps.Copy(spec, more)
	return document(name, spec)
}

func target(group string) map[string]any {
	return map[string]any{"kind": "ProxyGroup", "name": group}
}

// stamp is the configuration with which a probe marks responses.
func stamp(value string) map[string]any {
	return map[string]any{"stamp": map[string]any{"header": "x-stamp", "value": value}}
}

// findEnvoy looks for an Envoy once.
var findEnvoy = sync.OnceValues(func() (envoy.Binary, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return envoy.Find(ctx, "")
})

// proxy is a running Envoy.
type proxy struct {
	t *testing.T
	*envoy.Process
	id, addr string
}

// proxyOptions say which Envoy startProxy makes.
type proxyOptions struct {
	id, group, upstream string
	xds                 string
	tls                 *envoy.TLS
	workers             int                 // default: 1
	edit                func(string) string // of the bootstrap
	closed              bool                // its listener need not be open when startProxy returns
}

func startProxy(t *testing.T, o proxyOptions) *proxy {
	t.Helper()
	binary, err := findEnvoy()
	if err != nil {
		t.Fatal(err)
	}
	bootstrap, err := envoy.Bootstrap{Group: o.group, NodeID: o.id, XDSAddr: o.xds, XDSTLS: o.tls, Listen: "127.0.0.1:0",
		Upstream: o.upstream, Admin: "127.0.0.1:0"}.YAML()
	if err != nil {
		t.Fatal(err)
	}
	if o.edit != nil {
		bootstrap = []byte(o.edit(string(bootstrap)))
	}
	log := &text{}
	p, err := envoy.Start(t.Context(), binary, envoy.ProcessOptions{Bootstrap: bootstrap, Dir: t.TempDir(), Concurrency: max(1, o.workers), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Err(); err != nil {
			t.Errorf("Envoy %s: %v", o.id, err)
		}
		if err := p.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			text := log.String()
			t.Logf("the log of Envoy %s ends:\n%s", o.id, text[max(0, len(text)-2000):])
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	addr, err := p.ListenerAddr(ctx, envoy.ListenerName)
	if err == nil && !o.closed {
		err = p.Ready(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	return &proxy{t: t, Process: p, id: o.id, addr: addr}
}

// startProxies starts n Envoys of a group that get their chains from the adapter.
func (a *adapter) startProxies(n int, group, upstream string, workers int) []*proxy {
	a.t.Helper()
	var all []*proxy
	for i := range n {
		all = append(all, startProxy(a.t, proxyOptions{id: fmt.Sprintf("%s-%d", group, i+1), group: group, upstream: upstream,
			xds: a.addresses.XDS, workers: workers}))
	}
	return all
}

// answer sends one request on a connection of its own.
func (p *proxy) answer(path string, header map[string]string) (int, http.Header) {
	p.t.Helper()
	status, h, err := get(p.addr, path, header)
	if err != nil {
		p.t.Fatalf("GET %s through %s: %v", path, p.id, err)
	}
	return status, h
}

func get(addr, path string, header map[string]string) (int, http.Header, error) {
	var own pool
	defer own.close()
	return own.exchange(Request{Addr: addr, Path: path, Header: header, Fresh: true}, time.Now().Add(10*time.Second))
}

// holds is what Envoy itself says that it runs.
func (p *proxy) holds(names ...string) envoy.SlotState {
	p.t.Helper()
	s, err := p.Admin().SlotConfig(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	var got []string
	for _, f := range s.Filters {
		got = append(got, f.Name)
	}
	if !slices.Equal(got, names) {
		p.t.Fatalf("%s runs %v, want %v", p.id, got, names)
	}
	return s
}

// stat is a counter of Envoy's slot: config_reload, config_fail, update_rejected.
func (p *proxy) stat(name string) uint64 {
	p.t.Helper()
	full := "extension_config_discovery.http_filter." + envoy.SlotName + "." + name
	stats, err := p.Admin().Stats(p.t.Context(), "^"+strings.ReplaceAll(full, ".", `\.`)+"$")
	if err != nil {
		p.t.Fatal(err)
	}
	n, ok := stats[full]
	if !ok {
		p.t.Fatalf("%s has no statistic %s", p.id, full)
	}
	return n
}

// updated is the version that Envoy has of its chain and when it took it, as config_dump says.
func (p *proxy) updated() (version, at string) {
	p.t.Helper()
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + p.AdminAddr() + "/config_dump?resource=ecds_filters")
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	var dump struct {
		Configs []struct {
			Version     string `json:"version_info"`
			LastUpdated string `json:"last_updated"`
		} `json:"configs"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<20)).Decode(&dump); err != nil || len(dump.Configs) != 1 {
		p.t.Fatalf("config_dump of %s: %+v, %v", p.id, dump, err)
	}
	return dump.Configs[0].Version, dump.Configs[0].LastUpdated
}

// upstream answers every request with 200. It does the least that serves an Envoy, to leave the machine to what is
// proved.
func upstream(t *testing.T) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var (
		mu      sync.Mutex
		open    = map[net.Conn]struct{}{}
		closing bool
		all     sync.WaitGroup
	)
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			if closing {
				c.Close()
			} else {
				open[c] = struct{}{}
				all.Go(func() {
					answerAll(c)
					mu.Lock()
					defer mu.Unlock()
					delete(open, c)
				})
			}
			mu.Unlock()
		}
	})
	t.Cleanup(func() {
		mu.Lock()
		closing = true
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		l.Close()
		all.Wait()
	})
	return l.Addr().String()
}

// answerAll answers requests without a body until the connection ends.
func answerAll(c net.Conn) {
	defer c.Close()
	buf := make([]byte, 0, 8<<10)
	for {
		if end := bytes.Index(buf, []byte("\r\n\r\n")); end >= 0 {
			buf = append(buf[:0], buf[end+4:]...)
			if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok\n"); err != nil {
				return
			}
			continue
		}
		if len(buf) == cap(buf) {
			return
		}
		n, err := c.Read(buf[len(buf):cap(buf)])
		if err != nil {
			return
		}
		buf = buf[:len(buf)+n]
	}
}
