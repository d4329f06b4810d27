package istiotest

import (
	"io"
	"net"
	"sync"
)

// relay hands connections on to an address, until it is cut.
type relay struct {
	listener net.Listener
	mu       sync.Mutex
	conns    []net.Conn
	over     bool
	all      sync.WaitGroup
}

func newRelay(to string) (*relay, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &relay{listener: l}
	r.all.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				_ = near.Close()
				continue
			}
			if !r.has(near, far) {
				return
			}
			for _, c := range [][2]net.Conn{{near, far}, {far, near}} {
				r.all.Go(func() { _, _ = io.Copy(c[0], c[1]); _ = near.Close(); _ = far.Close() })
			}
		}
	})
	return r, nil
}

// has notes connections, or closes them when it is too late.
func (r *relay) has(conns ...net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over {
		for _, c := range conns {
			_ = c.Close()
		}
		return false
	}
	r.conns = append(r.conns, conns...)
	return true
}

// cut ends all connections, and waits until that is done. There are no more.
func (r *relay) cut() {
	r.mu.Lock()
	r.over = true
	_ = r.listener.Close()
	for _, c := range r.conns {
		_ = c.Close()
	}
	r.mu.Unlock()
	r.all.Wait()
}
