// Package limit counts what clients take, so that one that takes too much is refused, and nothing grows with what is
// refused: the memory that clients are remembered in is bounded, too.
package limit

import (
	"cmp"
	"container/list"
	"crypto/x509"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Bounds of what clients may take. What is 0 is not bounded.
type Bounds struct {
	Rate      int // things that one client may begin in a second; twice as many at once, after a pause
	PerClient int // things that one client may have at once
	Total     int // things that all clients may have at once
}

// remembered is how many clients that have nothing at the moment are remembered. Who is forgotten begins anew.
const remembered = 10_000

// Clients are those that have something, or had not long ago.
type Clients struct {
	what   string
	bounds Bounds

	mu    sync.Mutex
	total int
	byKey map[string]*client
	idle  *list.List // of the clients that have nothing, least recent first
}

type client struct {
	key    string
	has    int
	recent *rate.Limiter
	idle   *list.Element // nil while it has something
}

// New makes Clients that share the bounds; what names the things they take, such as "calls".
func New(what string, b Bounds) *Clients {
	return &Clients{what: what, bounds: b, byKey: map[string]*client{}, idle: list.New()}
}

// Take gives the client one more, until it calls release, or says why it gets none; release is not nil then, either, and
// may be called more than once.
func (c *Clients) Take(key string) (release func(), refused error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.client(key)
	switch {
	case c.bounds.Rate > 0 && !k.recent.Allow():
		return func() {}, fmt.Errorf("%s begins more than %d %s a second", key, c.bounds.Rate, c.what)
	case c.bounds.PerClient > 0 && k.has >= c.bounds.PerClient:
		return func() {}, fmt.Errorf("%s has as many %s as one client may have at once: %d", key, c.what, k.has)
	case c.bounds.Total > 0 && c.total >= c.bounds.Total:
		return func() {}, fmt.Errorf("all clients together have %d %s, the most that there may be at once", c.total, c.what)
	}
	k.has++
	c.total++
	if k.idle != nil {
		c.idle.Remove(k.idle)
		k.idle = nil
	}
	return sync.OnceFunc(func() { c.release(k) }), nil
}

func (c *Clients) release(k *client) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k.has--
	c.total--
	if k.has == 0 {
		k.idle = c.idle.PushBack(k)
		c.forget()
	}
}

// client finds a client or makes it. The lock is held.
func (c *Clients) client(key string) *client {
	k := c.byKey[key]
	if k == nil {
		k = &client{key: key, recent: rate.NewLimiter(rate.Limit(c.bounds.Rate), 2*c.bounds.Rate)}
		c.byKey[key] = k
		k.idle = c.idle.PushBack(k)
		c.forget()
	} else if k.idle != nil {
		c.idle.MoveToBack(k.idle)
	}
	return k
}

// forget lets go of clients that have nothing when there are too many of them. The lock is held.
func (c *Clients) forget() {
	for c.idle.Len() > remembered {
		k := c.idle.Remove(c.idle.Front()).(*client)
		delete(c.byKey, k.key)
	}
}

// Total is how many things are taken now.
func (c *Clients) Total() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.total
}

// maxKey bounds a key, in bytes.
const maxKey = 256

// Key tells clients apart: by the name of the verified certificate, or where there is none (nil) by the address that
// they come from, of IPv6 by the network of 64 bits.
func Key(certificate *x509.Certificate, from net.Addr) string {
	if certificate != nil {
		name := certificate.Subject.String()
		if len(certificate.URIs) > 0 {
			name = cmp.Or(name, certificate.URIs[0].String())
		}
		name = cmp.Or(name, "serial number "+certificate.SerialNumber.Text(16))
		return "the certificate " + name[:min(len(name), maxKey)]
	}
	return Host(from)
}

// Host is the part of Key that an address gives.
func Host(from net.Addr) string {
	if from == nil {
		return "an unknown address"
	}
	text := from.String()
	addr, err := netip.ParseAddrPort(text)
	if err != nil {
		return "the address " + text[:min(len(text), maxKey)]
	}
	ip := addr.Addr().Unmap().WithZone("")
	if ip.Is4() || ip.IsLoopback() {
		return "the address " + ip.String()
	}
	net64, err := ip.Prefix(64)
	if err != nil {
		return "the address " + ip.String()
	}
	return "the network " + net64.String()
}

// Retry is when it makes sense to try again what was refused.
const Retry = time.Second
