package server

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/peer"
)

// life is a connection that knows when its client was last heard of, and the kubeconfig that it brought.
type life struct {
	net.Conn
	of    *lives
	heard atomic.Int64 // since the lives' epoch

	mu         sync.Mutex
	kubeconfig string
	closed     bool
}

// maxHeld bounds the kubeconfigs of all connections, in bytes.
const maxHeld = 64 << 20

// hold keeps a kubeconfig for the calls that follow on the connection, instead of the one before. It says whether there
// was room.
func (c *life) hold(kubeconfig string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	more := int64(len(kubeconfig) - len(c.kubeconfig))
	if c.closed || c.of.held.Add(more) > maxHeld {
		if !c.closed {
			c.of.held.Add(-more)
		}
		return c.closed // nothing follows
	}
	c.kubeconfig = kubeconfig
	return true
}

// holds is the kubeconfig; none where there is no connection.
func (c *life) holds() string {
	if c == nil {
		return ""
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.kubeconfig
}

func (c *life) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	// The end of a connection comes from the client too, unlike its loss.
	if n > 0 || errors.Is(err, io.EOF) {
		c.heard.Store(int64(time.Since(c.of.epoch)))
	}
	return n, err
}

func (c *life) Close() error {
	c.of.all.CompareAndDelete(c.RemoteAddr().String(), c)
	c.mu.Lock()
	c.of.held.Add(-int64(len(c.kubeconfig)))
	c.kubeconfig, c.closed = "", true
	c.mu.Unlock()
	return c.Conn.Close()
}

// lastHeard is when something came from the client. Of no connection it is now.
func (c *life) lastHeard() time.Time {
	if c == nil {
		return time.Now()
	}
	return c.of.epoch.Add(time.Duration(c.heard.Load()))
}

// lives is a listener whose connections are found by their clients' addresses.
type lives struct {
	net.Listener
	epoch time.Time
	all   sync.Map // *life by remote address
	held  atomic.Int64
}

func (l *lives) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	one := &life{Conn: c, of: l}
	one.heard.Store(int64(time.Since(l.epoch)))
	l.all.Store(c.RemoteAddr().String(), one)
	return one, nil
}

// of returns the connection of a call, nil when there is none.
func (l *lives) of(ctx context.Context) *life {
	client, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	if c, ok := l.all.Load(client.Addr.String()); ok {
		return c.(*life)
	}
	return nil
}
