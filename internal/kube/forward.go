package kube

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"strconv"
	"sync"
	"time"

	"github.com/coder/websocket"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/problem"
)

// forwarding is the WebSocket protocol of port-forward that kubelets speak themselves: each message begins with the
// number of its channel, and the first of each channel is the port.
const (
	forwarding   = "v4.channel.k8s.io"
	dataChannel  = 0
	errorChannel = 1
	maxMessage   = 1 << 20 // bytes; kubelets send 32 KiB at most
)

// Dial connects to a port of a Pod through the API server and the Pod's kubelet, as `kubectl port-forward` does. Who may
// not is told problem.RightMissing. ctx bounds the connecting only. Bytes go both ways until one side closes; there are
// no deadlines, so whoever uses the connection has to close it in time.
func (c *Cluster) Dial(ctx context.Context, namespace, pod string, port int) (net.Conn, error) {
	item := Item{APIVersion: "v1", Kind: "Pod", Namespace: namespace, Name: pod}
	if !item.fit() || port < 1 || port > 65535 {
		return nil, problem.Internal.New("port %d of %s is none", port, clean(item.String(), maxText))
	}
	k := call{verb: "get", namespace: namespace, name: pod,
		kind: resource{GroupVersionKind: schema.GroupVersionKind{Version: "v1", Kind: "Pod"}, plural: "pods", namespaced: true}}
	u := *c.server
	u.Path = path.Join("/", u.Path, k.path(), "portforward")
	u.RawQuery = url.Values{"ports": {strconv.Itoa(port)}}.Encode()
	k.kind.plural += "/portforward" // for messages

	dialing, cancel := context.WithTimeout(ctx, c.opts.Timeout)
	defer cancel()
	ws, resp, err := websocket.Dial(dialing, u.String(), &websocket.DialOptions{HTTPClient: c.upgrading, Subprotocols: []string{forwarding}})
	if err != nil && resp != nil && resp.StatusCode != http.StatusSwitchingProtocols {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, maxText))
		r := &refusal{call: k, code: resp.StatusCode, status: statusOf(body)}
		if r.code == http.StatusForbidden && !forbidden.MatchString(r.message()) {
			r.call.verb, r.status = "create", nil // newer servers ask for this right too, and do not say so
		}
		return nil, c.problemOf(r)
	}
	if err != nil {
		return nil, c.unreachable(ctx, err)
	}
	if ws.Subprotocol() != forwarding {
		_ = ws.CloseNow()
		return nil, problem.ClusterAnswer.New("%s does not forward ports by %s", c.Host, forwarding)
	}
	ws.SetReadLimit(maxMessage)
	f := &forward{ws: ws, at: podPort(item.String() + ":" + strconv.Itoa(port))}
	f.ctx, f.stop = context.WithCancel(context.Background())
	return f, nil
}

// forward is a forwarded connection.
type forward struct {
	ws   *websocket.Conn
	at   podPort
	ctx  context.Context // ends with Close
	stop context.CancelFunc

	reading sync.Mutex
	greeted [2]bool // by channel: its first message has come
	rest    []byte  // of the last message
}

// Read gives what the Pod sends. What the kubelet says of a failure is an error.
func (f *forward) Read(p []byte) (int, error) {
	f.reading.Lock()
	defer f.reading.Unlock()
	for len(f.rest) == 0 {
		_, message, err := f.ws.Read(f.ctx)
		switch {
		case errors.Is(err, io.EOF), websocket.CloseStatus(err) == websocket.StatusNormalClosure:
			return 0, io.EOF
		case f.ctx.Err() != nil:
			return 0, net.ErrClosed
		case err != nil:
			return 0, fmt.Errorf("read from %s: %w", f.at, err)
		case len(message) == 0 || message[0] > errorChannel:
			return 0, fmt.Errorf("read from %s: a message of no channel", f.at)
		}
		channel, message := message[0], message[1:]
		if !f.greeted[channel] {
			if len(message) < 2 {
				return 0, fmt.Errorf("read from %s: a channel that begins without its port", f.at)
			}
			_ = binary.LittleEndian.Uint16(message) // the port that was asked for
			f.greeted[channel], message = true, message[2:]
		}
		if channel == errorChannel {
			if len(message) > 0 {
				return 0, fmt.Errorf("read from %s: %s", f.at, clean(string(message), maxText))
			}
			continue
		}
		f.rest = message
	}
	n := copy(p, f.rest)
	f.rest = f.rest[n:]
	return n, nil
}

func (f *forward) Write(p []byte) (int, error) {
	for n := 0; n < len(p); {
		part := p[n:min(n+32<<10, len(p))]
		if err := f.ws.Write(f.ctx, websocket.MessageBinary, append([]byte{dataChannel}, part...)); err != nil {
			if f.ctx.Err() != nil {
				err = net.ErrClosed
			}
			return n, fmt.Errorf("write to %s: %w", f.at, err)
		}
		n += len(part)
	}
	return len(p), nil
}

// Close ends the connection without waiting for the other side.
func (f *forward) Close() error {
	f.stop()
	_ = f.ws.CloseNow() // it may have ended already
	return nil
}

func (f *forward) LocalAddr() net.Addr              { return podPort("here") }
func (f *forward) RemoteAddr() net.Addr             { return f.at }
func (f *forward) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (f *forward) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (f *forward) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

// podPort is a Pod's port: Pod/shop/api-1:15000.
type podPort string

func (a podPort) Network() string { return "port-forward" }
func (a podPort) String() string  { return string(a) }
