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

// life is a connection that knows when its client was last heard of.
type life struct {
	net.Conn
	of    *lives
	heard atomic.Int64 // since the lives' epoch
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
