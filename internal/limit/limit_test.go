package limit

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// take takes n and returns how many were given, and what gives them back.
func take(c *Clients, key string, n int) (given int, release func(), last error) {
	var all []func()
	for range n {
		r, err := c.Take(key)
		if err != nil {
			last = err
			continue
		}
		given++
		all = append(all, r)
	}
	return given, func() {
		for _, r := range all {
			r()
			r() // which changes nothing
		}
	}, last
}

func TestAClientGetsWhatItMayHaveAndOthersTheRest(t *testing.T) {
	c := New("calls", Bounds{PerClient: 3, Total: 5})
	a, releaseA, err := take(c, "a", 10)
	if a != 3 || !strings.Contains(err.Error(), "a has as many calls as one client may have at once: 3") {
		t.Errorf("a got %d: %v", a, err)
	}
	b, releaseB, err := take(c, "b", 10)
	if b != 2 || !strings.Contains(err.Error(), "all clients together have 5 calls") {
		t.Errorf("b got %d: %v", b, err)
	}
	releaseA()
	if n, release, _ := take(c, "b", 10); n != 1 {
		t.Errorf("b got %d more", n)
	} else {
		release()
	}
	releaseB()
	if c.Total() != 0 {
		t.Errorf("%d are taken when all were given back", c.Total())
	}
	if n, _, _ := take(New("calls", Bounds{}), "a", 10_000); n != 10_000 {
		t.Errorf("without bounds %d are given", n)
	}
}

func TestAClientThatIsTooFastIsRefusedAndAnotherIsNot(t *testing.T) {
	c := New("calls", Bounds{Rate: 100})
	begun := time.Now()
	n, release, err := take(c, "a", 100_000)
	// Twice the rate at once, and what came with the time it took.
	if most := 200 + int(time.Since(begun).Seconds()*100) + 1; n < 200 || n > most || !strings.Contains(err.Error(), "100 calls a second") {
		t.Errorf("%d of 100000 were given, %d at most: %v", n, most, err)
	}
	if n, _, _ := take(c, "b", 200); n != 200 {
		t.Errorf("another client gets %d", n)
	}
	release()
}

func TestClientsAreForgottenButNotWhatTheyHave(t *testing.T) {
	c := New("calls", Bounds{Rate: 1000, PerClient: 1, Total: 100_000})
	if _, err := c.Take("has one"); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range 5 * remembered {
		release, err := c.Take(fmt.Sprintf("client %d", i))
		if err != nil {
			t.Fatal(err)
		}
		release()
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if n := len(c.byKey); n != remembered+1 {
		t.Errorf("%d clients are remembered", n)
	}
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 8<<20 {
		t.Errorf("50000 clients leave %d bytes", grown)
	}
	if _, err := c.Take("has one"); err == nil {
		t.Error("what a client has was forgotten")
	}
}

func TestClientsAreToldApartByCertificateElseByAddress(t *testing.T) {
	uri, err := url.Parse("spiffe://example.org/a")
	if err != nil {
		t.Fatal(err)
	}
	at := func(s string) net.Addr {
		a, err := net.ResolveTCPAddr("tcp", s)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	one, other := at("192.0.2.1:1"), at("192.0.2.2:1")
	for _, c := range []struct {
		cert *x509.Certificate
		from net.Addr
		want string
	}{
		{nil, one, "the address 192.0.2.1"},
		{nil, at("192.0.2.1:2"), "the address 192.0.2.1"},
		{nil, at("[::ffff:192.0.2.1]:2"), "the address 192.0.2.1"},
		{nil, at("[::1]:2"), "the address ::1"},
		{nil, at("[2001:db8::1]:1"), "the network 2001:db8::/64"},
		{nil, at("[2001:db8::2:3]:1"), "the network 2001:db8::/64"},
		{nil, &net.UnixAddr{Name: "/run/x"}, "the address /run/x"},
		{nil, nil, "an unknown address"},
		{&x509.Certificate{Subject: pkix.Name{CommonName: "a"}}, one, "the certificate CN=a"},
		{&x509.Certificate{Subject: pkix.Name{CommonName: "a"}}, other, "the certificate CN=a"},
		{&x509.Certificate{URIs: []*url.URL{uri}}, one, "the certificate spiffe://example.org/a"},
		{&x509.Certificate{SerialNumber: big.NewInt(255)}, one, "the certificate serial number ff"},
	} {
		if got := Key(c.cert, c.from); got != c.want {
			t.Errorf("%v, %v is %q, want %q", c.cert, c.from, got, c.want)
		}
	}
	if n := len(Key(&x509.Certificate{Subject: pkix.Name{CommonName: strings.Repeat("x", 100_000)}}, nil)); n > 300 {
		t.Errorf("a key has %d bytes", n)
	}
}

func TestConnectionsBeyondTheBoundAreClosedUnread(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var why []error
	l := Listen(inner, Bounds{PerClient: 5}, func(err error) {
		mu.Lock()
		defer mu.Unlock()
		why = append(why, err)
	})
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { _, _ = io.Copy(c, c); c.Close() })
		}
	})
	defer serving.Wait()
	defer l.Close()
	// answered opens a connection and says whether it is answered; one that is not is closed again.
	answered := func() (net.Conn, bool) {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return nil, false // it was closed before the dialler had it
		}
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err = c.Write([]byte("x")); err == nil {
			_, err = io.ReadFull(c, make([]byte, 1))
		}
		if err != nil {
			c.Close()
		}
		return c, err == nil
	}
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for i := range 5 {
		c, ok := answered()
		if !ok {
			t.Fatalf("connection %d is not answered", i)
		}
		open = append(open, c)
	}
	for range 100 {
		if c, ok := answered(); ok {
			c.Close()
			t.Error("a connection beyond the bound is answered")
		}
	}
	mu.Lock()
	if len(why) != 100 || !strings.Contains(errors.Join(why...).Error(), "127.0.0.1 has as many connections as one client may have at once: 5") {
		t.Errorf("%d refusals: %v", len(why), why[0])
	}
	mu.Unlock()
	open[0].Close()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if c, ok := answered(); ok {
			c.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatal("a connection that was closed still counts")
		}
	}
}
