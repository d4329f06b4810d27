package envoy

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	filterchain "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/filter_chain/v3"
	httpwasm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/wasm/v3"
	wasm "github.com/envoyproxy/go-control-plane/envoy/extensions/wasm/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/meshery/meshery-filters/filters"
)

// plain is an Envoy without a slot.
const plain = `
node: {id: plain, cluster: edge}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
static_resources:
  listeners:
  - name: ingress
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, direct_response: {status: 204}}]}]}
          http_filters:
          - {name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
`

func start(t *testing.T, bootstrap []byte, log *bytes.Buffer) *Process {
	t.Helper()
	o := ProcessOptions{Bootstrap: bootstrap, Dir: t.TempDir(), Concurrency: 1}
	if log != nil {
		o.Log, o.LogLevel = log, "info"
	}
	p, err := Start(within(t, 30*time.Second), realEnvoy(t), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return p
}

// gone says whether a process has ended; one that nobody has waited for yet counts.
func gone(pid int) bool {
	if syscall.Kill(pid, 0) == syscall.ESRCH {
		return true
	}
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && strings.HasPrefix(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " Z")
}

func status(t *testing.T, url string) int {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

func TestAnEnvoyStartsServesAndStopsWithoutATrace(t *testing.T) {
	var log bytes.Buffer
	p := start(t, []byte(plain), &log)
	ctx := within(t, 30*time.Second)
	if err := p.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	addr, err := p.ListenerAddr(ctx, ListenerName)
	if err != nil {
		t.Fatal(err)
	}
	if got := status(t, "http://"+addr); got != http.StatusNoContent {
		t.Errorf("the listener answers %d", got)
	}
	stats, err := p.Admin().Stats(ctx, `^http\.ingress\.downstream_rq_2xx$`)
	if err != nil || len(stats) != 1 || stats["http.ingress.downstream_rq_2xx"] != 1 {
		t.Errorf("statistics %v, %v", stats, err)
	}
	info, err := p.Admin().ServerInfo(ctx)
	if err != nil || info.State != "LIVE" || info.NodeID != "plain" || info.Group != "edge" || info.Concurrency != 1 {
		t.Errorf("server info %+v, %v", info, err)
	}
	version, err := p.Admin().Version(ctx)
	if err != nil || older(version, MinVersion) {
		t.Errorf("version %s, %v", version, err)
	}
	if gone(p.PID()) || p.Err() != nil {
		t.Errorf("it has ended: %v", p.Err())
	}
	if err := p.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if !gone(p.PID()) || p.Err() != nil {
		t.Errorf("after Stop: gone %v, error %v", gone(p.PID()), p.Err())
	}
	if err := p.Stop(ctx); err != nil {
		t.Errorf("the second Stop: %v", err)
	}
	if !strings.Contains(log.String(), "starting main dispatch loop") {
		t.Errorf("the log has not been handed on: %s", &log)
	}
	if err := p.Ready(ctx); err == nil {
		t.Error("a stopped process is ready")
	}
}

func TestABrokenBootstrapFailsWithEnvoysOwnText(t *testing.T) {
	b := realEnvoy(t)
	for _, c := range []struct{ name, bootstrap, want string }{
		{"an unknown field", "admin: {adress: {}}", "adress"},
		{"no YAML", "{{{", "end of map flow not found"},
		{"an address that is no one's", strings.Replace(plain, "127.0.0.1", "192.0.2.1", 1), "192.0.2.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			p, err := Start(within(t, 30*time.Second), b, ProcessOptions{Bootstrap: []byte(c.bootstrap), Dir: dir})
			if err == nil {
				_ = p.Stop(context.Background())
				t.Fatal("it started")
			}
			if !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "exit status 1") {
				t.Errorf("Envoy's text is not in: %v", err)
			}
		})
	}
}

func TestAnEnvoyThatIsKilledIsNoticedWithItsLog(t *testing.T) {
	p := start(t, []byte(plain), nil)
	ctx := within(t, 30*time.Second)
	if err := syscall.Kill(p.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		t.Fatal(ctx.Err())
	}
	if err := p.Err(); err == nil || !strings.Contains(err.Error(), "signal: killed") || !strings.Contains(err.Error(), strconv.Itoa(p.PID())) {
		t.Errorf("got %v", err)
	}
	if err := p.Ready(ctx); err == nil || !strings.Contains(err.Error(), "signal: killed") {
		t.Errorf("waiting for it says %v", err)
	}
}

func TestStopKillsAnEnvoyThatDoesNotListen(t *testing.T) {
	p := start(t, []byte(plain), nil)
	if err := syscall.Kill(p.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := p.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if !gone(p.PID()) {
		t.Error("it is still there")
	}
}

// orphanVar makes the test program the parent of an Envoy: it names the directory to run it in.
const orphanVar = "MESHERY_FILTERS_TEST_ORPHAN"

func beParent(dir string) int {
	b, err := Find(context.Background(), "")
	if err == nil {
		var p *Process
		if p, err = Start(context.Background(), b, ProcessOptions{Bootstrap: []byte(plain), Dir: dir}); err == nil {
			fmt.Println(p.PID())
			select {}
		}
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

func TestAKilledParentLeavesNoEnvoyBehind(t *testing.T) {
	if !diesWithParent {
		t.Skip("this system cannot do that")
	}
	realEnvoy(t)
	ctx := within(t, 60*time.Second)
	parent := exec.CommandContext(ctx, os.Args[0])
	parent.Env = append(os.Environ(), orphanVar+"="+t.TempDir())
	parent.Stderr = os.Stderr
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	_, err = fmt.Fscan(out, &pid)
	if err != nil {
		t.Error(err)
	} else if gone(pid) {
		t.Error("the Envoy is gone already")
	}
	_ = parent.Process.Kill()
	_ = parent.Wait() // it was killed
	if err != nil {
		return
	}
	if err := poll(ctx, func() bool { return gone(pid) }); err != nil {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		t.Errorf("the Envoy outlives its parent: %v", err)
	}
}

// adapter answers one Envoy over ADS, each push once, and tells what it says to that.
type adapter struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	addr    string
	pushes  chan *discovery.DiscoveryResponse
	answers chan string // what Envoy has against a push; empty when it took it
}

func newAdapter(t *testing.T) *adapter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a := &adapter{addr: l.Addr().String(), pushes: make(chan *discovery.DiscoveryResponse, 1), answers: make(chan string, 1)}
	s := grpc.NewServer()
	discovery.RegisterAggregatedDiscoveryServiceServer(s, a)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return a
}

func (a *adapter) StreamAggregatedResources(s discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	if _, err := s.Recv(); err != nil { // the subscription
		return err
	}
	for {
		select {
		case r := <-a.pushes:
			if err := s.Send(r); err != nil {
				return err
			}
			answer, err := s.Recv()
			if err != nil {
				return err
			}
			a.answers <- answer.GetErrorDetail().GetMessage()
		case <-s.Context().Done():
			return nil
		}
	}
}

// push sends a chain and returns what Envoy has against it.
func (a *adapter) push(t *testing.T, version string, filters ...*core.TypedExtensionConfig) string {
	t.Helper()
	chain := &filterchain.FilterChainConfig{}
	if len(filters) > 0 {
		chain.DefaultFilterChain = &filterchain.FilterChain{Filters: filters}
	}
	a.pushes <- &discovery.DiscoveryResponse{VersionInfo: version, Nonce: version, TypeUrl: resource.ExtensionConfigType,
		Resources: []*anypb.Any{pack(t, &core.TypedExtensionConfig{Name: SlotName, TypedConfig: pack(t, chain)})}}
	select {
	case answer := <-a.answers:
		return answer
	case <-within(t, 30*time.Second).Done():
		t.Fatal("Envoy does not answer")
		return ""
	}
}

// envoyOfOnesOwn has the slot's snippet with this adapter's port in it.
func (a *adapter) envoyOfOnesOwn(t *testing.T) []byte {
	_, port, _ := strings.Cut(a.addr, ":")
	return bytes.Replace(ownEnvoyWithSlot(t), []byte("port_value: 10015"), []byte("port_value: "+port), 1)
}

func pack(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func headers(t *testing.T, name string, config proto.Message) *core.TypedExtensionConfig {
	t.Helper()
	module, ok := filters.Builtin("headers")
	if !ok {
		t.Fatal("no module named headers")
	}
	return &core.TypedExtensionConfig{Name: name, TypedConfig: pack(t, &httpwasm.Wasm{Config: &wasm.PluginConfig{
		Name: name, RootId: "root-" + name, Configuration: pack(t, config), FailurePolicy: wasm.FailurePolicy_FAIL_CLOSED,
		Vm: &wasm.PluginConfig_VmConfig{VmConfig: &wasm.VmConfig{VmId: "vm-" + name, Runtime: "envoy.wasm.runtime.v8",
			Code: &core.AsyncDataSource{Specifier: &core.AsyncDataSource_Local{Local: &core.DataSource{
				Specifier: &core.DataSource_InlineBytes{InlineBytes: module}}}}}}}})}
}

func TestTheSlotKeepsItsListenerClosedUntilAChainHasCome(t *testing.T) {
	realEnvoy(t)
	a := newAdapter(t)
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) }))
	defer upstream.Close()
	text, err := Bootstrap{Group: "edge", NodeID: "edge-1", XDSAddr: a.addr, Listen: "127.0.0.1:0",
		Upstream: upstream.Listener.Addr().String(), Admin: "127.0.0.1:0"}.YAML()
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, text, nil)
	ctx := within(t, 60*time.Second)
	addr, err := p.ListenerAddr(ctx, ListenerName)
	if err != nil {
		t.Fatal(err)
	}
	// Connected, and still closed: what is missing is the chain.
	if err := poll(ctx, func() bool {
		stats, err := p.Admin().Stats(ctx, `^control_plane\.connected_state$`)
		return err == nil && stats["control_plane.connected_state"] == 1
	}); err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("tcp", addr); err == nil {
		c.Close()
		t.Error("a connection was taken before the chain had come")
	}
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if err := p.Ready(short); err == nil || !strings.Contains(err.Error(), "INITIALIZING") {
		t.Errorf("ready says %v", err)
	}
	if s, err := p.Admin().SlotConfig(ctx); err != nil || s.Version != "" || s.RejectedVersion != "" {
		t.Errorf("the slot holds %+v, %v", s, err)
	}

	if refusal := a.push(t, "empty"); refusal != "" {
		t.Fatal(refusal)
	}
	if err := p.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	if got := status(t, "http://"+addr); got != http.StatusAccepted {
		t.Errorf("through the empty slot comes %d", got)
	}
	if s, err := p.Admin().SlotConfig(ctx); err != nil || s.Version != "empty" || len(s.Filters) != 0 {
		t.Errorf("the slot holds %+v, %v", s, err)
	}
}

func TestSlotConfigTellsWhatAnEnvoyOfOnesOwnRuns(t *testing.T) {
	realEnvoy(t)
	a := newAdapter(t)
	p := start(t, a.envoyOfOnesOwn(t), nil)
	ctx := within(t, 60*time.Second)
	const first, second = `{"response": {"x-a": "<1>"}}`, `{"response":{"x-b":"2"}}`
	chain := []*core.TypedExtensionConfig{headers(t, "a", wrapperspb.String(first)), headers(t, "b", wrapperspb.Bytes([]byte(second)))}
	if refusal := a.push(t, "two", chain...); refusal != "" {
		t.Fatal(refusal)
	}
	module, _ := filters.Builtin("headers")
	sum := sha256.Sum256(module)
	digest := hex.EncodeToString(sum[:])
	want := []SlotFilter{
		{Name: "a", Type: "Wasm", RootID: "root-a", VMID: "vm-a", SHA256: digest, Configuration: first, FailurePolicy: "FAIL_CLOSED"},
		{Name: "b", Type: "Wasm", RootID: "root-b", VMID: "vm-b", SHA256: digest, Configuration: second, FailurePolicy: "FAIL_CLOSED"}}
	slot := func() SlotState {
		t.Helper()
		s, err := p.Admin().SlotConfig(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if s := slot(); s.Version != "two" || fmt.Sprint(s.Filters) != fmt.Sprint(want) {
		t.Errorf("the slot holds\n%+v and not\n%+v", s, want)
	}

	bad := headers(t, "a", wrapperspb.String("{"))
	if refusal := a.push(t, "bad", bad); !strings.Contains(refusal, "Unable to create Wasm plugin a") {
		t.Fatalf("the refusal is %q", refusal)
	}
	if s := slot(); s.Version != "two" || s.RejectedVersion != "bad" || s.Filters != nil {
		t.Errorf("after a rejection the slot holds %+v", s)
	}
	if refusal := a.push(t, "two again", chain...); refusal != "" {
		t.Fatal(refusal)
	}
	if s := slot(); s.Version != "two again" || s.RejectedVersion != "" || fmt.Sprint(s.Filters) != fmt.Sprint(want) {
		t.Errorf("with the good chain put back the slot holds %+v", s)
	}
	if refusal := a.push(t, "none"); refusal != "" {
		t.Fatal(refusal)
	}
	if s := slot(); s.Version != "none" || s.RejectedVersion != "" || s.Filters != nil {
		t.Errorf("with an empty chain the slot holds %+v", s)
	}
}

// The adapter relies on this order of things, and would have to learn of it if an Envoy came that has mended it.
func TestEnvoyAcceptsBytesThatItHasJustRejectedUnlessOthersComeBetween(t *testing.T) {
	realEnvoy(t)
	a := newAdapter(t)
	start(t, a.envoyOfOnesOwn(t), nil)
	good, bad := headers(t, "a", wrapperspb.String(`{"response":{"x-a":"1"}}`)), headers(t, "a", wrapperspb.String("{"))
	for _, c := range []struct {
		version string
		filter  *core.TypedExtensionConfig
		refused bool
	}{{"good", good, false}, {"bad", bad, true}, {"bad again", bad, false}, {"good again", good, false}, {"bad at last", bad, true}} {
		if refusal := a.push(t, c.version, c.filter); (refusal != "") != c.refused {
			t.Errorf("%s: Envoy says %q", c.version, refusal)
		}
	}
}

func TestConfigurationsReadAsTheFilterReadsThem(t *testing.T) {
	for _, c := range []struct{ name, raw, want string }{
		{"none", ``, ``},
		{"text", `{"@type":"type.googleapis.com/google.protobuf.StringValue","value":"a\u003cb"}`, `a<b`},
		{"bytes", `{"@type":"type.googleapis.com/google.protobuf.BytesValue","value":"aGk="}`, `hi`},
		{"a Struct", `{"@type":"type.googleapis.com/google.protobuf.Struct","value":{"a":1}}`, `{"a":1}`},
		{"a message", `{"@type":"type.googleapis.com/xds.type.v3.TypedStruct","type_url":"x","value":{"a":1}}`, `{"type_url":"x","value":{"a":1}}`},
	} {
		if got, err := readConfiguration([]byte(c.raw)); err != nil || got != c.want {
			t.Errorf("%s: %q, %v", c.name, got, err)
		}
	}
}

func TestAnswersOfTheAdminInterfaceAreBounded(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/server_info" {
			http.Error(w, "not today", http.StatusTeapot)
			return
		}
		for chunk := make([]byte, 1<<20); ; {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}))
	defer s.Close()
	a := Admin{Addr: s.Listener.Addr().String()}
	if _, err := a.Stats(within(t, 30*time.Second), ""); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("endless statistics: %v", err)
	}
	if _, err := a.Version(within(t, 30*time.Second)); err == nil || !strings.Contains(err.Error(), "not today") {
		t.Errorf("a failed request: %v", err)
	}
}

// writeCertificate makes a certificate that signs itself.
func writeCertificate(t *testing.T) *TLS {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"adapter.example"}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, data []byte) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	path := write("cert.pem", "CERTIFICATE", cert)
	return &TLS{CA: path, Cert: path, Key: write("key.pem", "PRIVATE KEY", private)}
}
