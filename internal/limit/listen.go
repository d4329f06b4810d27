package limit

import "net"

// Listen bounds the connections of a listener by the address they come from. One more is closed at once, before anything
// is read from it; refused hears why, and must not wait.
func Listen(l net.Listener, b Bounds, refused func(error)) net.Listener {
	return &listener{l, New("connections", b), refused}
}

type listener struct {
	net.Listener
	clients *Clients
	refused func(error)
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		release, err := l.clients.Take(Host(c.RemoteAddr()))
		if err == nil {
			return &conn{Conn: c, release: release}, nil
		}
		l.refused(err)
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // so that the kernel keeps nothing of it
		}
		c.Close()
	}
}

type conn struct {
	net.Conn
	release func()
}

func (c *conn) Close() error {
	err := c.Conn.Close()
	c.release()
	return err
}
