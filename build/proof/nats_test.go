package proof

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	natsserver "github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// natsVariable has this test's program be a NATS server.
const natsVariable = "PROOF_NATS_SERVER"

// broker is a NATS server as a process of its own, which can be killed.
type broker struct {
	t *testing.T
	brokerOptions
	*process
}

type brokerOptions struct {
	Name, Addr string
	StoreDir   string   // of JetStream, which is off when it is empty
	Cluster    string   // the address for the others of the cluster
	Routes     []string // those of the others
}

func serveNATS(text string) int {
	var o brokerOptions
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	opts := &natsserver.Options{ServerName: o.Name, NoSigs: true, NoLog: true, JetStream: o.StoreDir != "", StoreDir: o.StoreDir}
	if o.Cluster != "" {
		opts.Cluster.Name = "proof"
		opts.Cluster.Host, opts.Cluster.Port = hostPort(o.Cluster)
	}
	opts.Host, opts.Port = hostPort(o.Addr)
	for _, r := range o.Routes {
		opts.Routes = append(opts.Routes, &url.URL{Scheme: "nats", Host: r})
	}
	s, err := natsserver.NewServer(opts)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	s.Start()
	if !s.ReadyForConnections(patience) {
		fmt.Fprintln(os.Stderr, "the server does not start")
		return 1
	}
	<-ctx.Done()
	s.Shutdown()
	s.WaitForShutdown()
	return 0
}

func hostPort(addr string) (string, int) {
	host, text, err := net.SplitHostPort(addr)
	port, perr := strconv.Atoi(text)
	if err = errors.Join(err, perr); err != nil {
		panic(err) // fixedAddr made it
	}
	return host, port
}

func (b *broker) url() string { return "nats://" + b.Addr }

// start returns when the server takes connections.
func (b *broker) start() {
	b.t.Helper()
	text, err := json.Marshal(b.brokerOptions)
	if err != nil {
		b.t.Fatal(err)
	}
	b.process = launchCommand(b.t, exec.Command(os.Args[0]), natsVariable+"="+string(text))
	eventually(b.t, "NATS takes connections", func() error {
		select {
		case <-b.ended:
			b.t.Fatalf("NATS ended: %v\n%s", b.err, b.log.String())
		default:
		}
		c, err := net.DialTimeout("tcp", b.Addr, time.Second)
		if err == nil {
			c.Close()
		}
		return err
	})
}

func startBroker(t *testing.T, jetStream bool) *broker {
	t.Helper()
	b := &broker{t: t, brokerOptions: brokerOptions{Name: "one", Addr: fixedAddr(t)}}
	if jetStream {
		b.StoreDir = filepath.Join(t.TempDir(), "jetstream")
	}
	b.start()
	return b
}

// subscribeStream has a stream of the broker's keep the events, and follows that.
func subscribeStream(t *testing.T, url string) *subscriber {
	t.Helper()
	s := &subscriber{url: url, events: map[string][]subscriberEvent{}}
	js, err := jetstream.New(connectNATS(t, url))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "events", Subjects: []string{"meshery.adapters.filters.events.*"}}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for next := uint64(1); ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
			s.read(ctx, js, &next)
		}
	}()
	t.Cleanup(func() { cancel(); <-ended })
	return s
}

// read follows the stream until something fails.
func (s *subscriber) read(ctx context.Context, js jetstream.JetStream, next *uint64) {
	each, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	stream, err := js.Stream(each, "events")
	for err == nil {
		var m *jetstream.RawStreamMsg
		if m, err = stream.GetMsg(each, *next); err == nil {
			s.take(m.Subject, m.Data)
			*next = m.Sequence + 1
		}
	}
}

// link is a network to a server. It can be cut, and it can hold everything back without a word.
type link struct {
	addr, target string

	mu    sync.Mutex
	conns map[net.Conn]struct{}
	cut   bool
	held  chan struct{} // closed when nothing is held back
}

func newLink(t *testing.T, target string) *link {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &link{addr: listener.Addr().String(), target: target, conns: map[net.Conn]struct{}{}, held: make(chan struct{})}
	close(l.held)
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			all.Go(func() { l.join(c) })
		}
	})
	t.Cleanup(func() {
		l.pass()
		l.sever()
		listener.Close()
		all.Wait()
	})
	return l
}

func (l *link) url() string { return "nats://" + l.addr }

// join passes a connection's bytes on in both directions until it ends.
func (l *link) join(near net.Conn) {
	defer near.Close()
	far, err := net.DialTimeout("tcp", l.target, 5*time.Second)
	if err != nil {
		return
	}
	defer far.Close()
	l.mu.Lock()
	cut := l.cut
	if !cut {
		l.conns[near], l.conns[far] = struct{}{}, struct{}{}
	}
	l.mu.Unlock()
	if cut {
		return
	}
	var both sync.WaitGroup
	for _, c := range [][2]net.Conn{{near, far}, {far, near}} {
		both.Go(func() {
			buf := make([]byte, 32<<10)
			for {
				n, err := c[0].Read(buf)
				l.mu.Lock()
				held := l.held
				l.mu.Unlock()
				<-held
				if n > 0 {
					if _, werr := c[1].Write(buf[:n]); werr != nil {
						err = werr
					}
				}
				if err != nil {
					near.Close()
					far.Close()
					return
				}
			}
		})
	}
	both.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, near)
	delete(l.conns, far)
}

// sever ends every connection, and lets none come about until pass.
func (l *link) sever() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = true
	for c := range l.conns {
		c.Close()
	}
}

// hold lets connections stand, and nothing through.
func (l *link) hold() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held = make(chan struct{})
}

func (l *link) pass() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = false
	select {
	case <-l.held:
	default:
		close(l.held)
	}
}

// TestEventsArriveWhateverBecomesOfTheNATSThatTheyAreDeliveredTo kills it, and cuts and stalls the way to it.
func TestEventsArriveWhateverBecomesOfTheNATSThatTheyAreDeliveredTo(t *testing.T) {
	onRealParts(t)
	for name, jetStream := range map[string]bool{"with JetStream": true, "core only": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := startBroker(t, jetStream)
			way := newLink(t, b.Addr)
			heard := subscribe
			if jetStream {
				heard = subscribeStream
			}
			x := newTorture(t, heard(t, b.url()), "--nats-url", way.url())
			x.start()
			x.ready()
			x.startProxies()
			stop := x.load()
			disturbed := 0
			for range rounds(t, 1) {
				for _, disturb := range []func(){b.restart, way.interrupt, b.restart, way.stall} {
					disturbed++
					pause(500)
					disturb()
				}
			}
			stop()
			x.ended(patience)
			x.check()
			t.Logf("%d outages, %d operations, %d events came again", disturbed, len(x.accepted), x.heard.again())
		})
	}
}

// TestNothingAcceptedIsLostWhateverBecomesOfTheStoreElsewhere kills the JetStream of storeURL, and cuts and stalls the way
// to it.
func TestNothingAcceptedIsLostWhateverBecomesOfTheStoreElsewhere(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	b := startBroker(t, true)
	way := newLink(t, b.Addr)
	x := newTorture(t, newSubscriber(t), "--store-url", way.url())
	x.start()
	x.ready()
	x.startProxies()
	stop := x.load()
	disturbed := 0
	for range rounds(t, 1) {
		for _, disturb := range []func(){b.restart, way.interrupt, way.stall, func() { b.restart(); x.process.end(t, syscall.SIGKILL); x.start(); x.ready() }} {
			disturbed++
			pause(500)
			disturb()
		}
	}
	stop()
	x.ended(patience)

	// While the store is away the adapter answers, and says so; proxies keep their chains, and new ones get them.
	b.end(t, syscall.SIGKILL)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := x.meshes.ApplyOperation(ctx, &meshes.ApplyRuleRequest{OpName: "apply_filter", Username: "torture",
		CustomBody: document("filter-9", map[string]any{"target": target(groupOf(0)), "module": map[string]any{"builtin": "headers"}})})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "storeURL does not answer") {
		t.Errorf("an operation while the store is away: %v", err)
	}
	x.check()
	eventually(t, "the health service says that no operation is taken", func() error { return x.serves(false) })
	b.start()
	eventually(t, "the health service says that operations are taken", func() error { return x.serves(true) })
	if err := x.submit(t.Context(), 1_000_000); err != nil {
		t.Fatal(err)
	}
	x.ended(patience)
	x.check()
	t.Logf("%d outages, %d operations, %d events came again", disturbed, len(x.accepted), x.heard.again())
}

// restart kills the server, and starts it after a while.
func (b *broker) restart() {
	b.t.Helper()
	b.end(b.t, syscall.SIGKILL)
	pause(500)
	b.start()
}

// interrupt cuts the link for a while.
func (l *link) interrupt() {
	l.sever()
	pause(1000)
	l.pass()
}

// stall holds the link for so long that whoever waits for an answer gives up.
func (l *link) stall() {
	l.hold()
	pause(7000)
	l.pass()
}

// pause is at most that many milliseconds long, and at least half of that.
func pause(most int) { time.Sleep(time.Duration(most/2+rand.IntN(most/2)) * time.Millisecond) }
