package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/sync/errgroup"
)

const (
	connections = 8 // each with one request at a time: a closed loop
	users       = connections
	bar         = 1.6 // CPU per request with the unsigned limiter, of that without a filter
)

const nativeLimiter = `
name: envoy.filters.http.local_ratelimit
typed_config:
  "@type": type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit
  stat_prefix: bench
  token_bucket: {max_tokens: 1000000000, tokens_per_fill: 1000000000, fill_interval: 1s}
  filter_enabled: {default_value: {numerator: 100, denominator: HUNDRED}}
  filter_enforced: {default_value: {numerator: 100, denominator: HUNDRED}}
`

// kind is an Envoy, and the requests that it is sent.
type kind struct {
	name     string
	proxy    *proxy
	requests [][]byte
	cpu      []float64 // microseconds per request, round by round
}

// measureRequests sends the same number of requests to each kind of Envoy in turn, round by round.
func (b *bench) measureRequests(ctx context.Context, a *adapter, upstream string) (err error) {
	var proxies []*proxy
	defer func() { err = errors.Join(err, stopAll(proxies)) }()
	static := func(id, filter string) (*proxy, error) {
		bootstrap, err := withFilter(id, upstream, filter)
		if err != nil {
			return nil, err
		}
		p, err := b.startEnvoy(ctx, bootstrap)
		if err == nil {
			proxies = append(proxies, p)
		}
		return p, err
	}
	filled := func(group, config string) (*proxy, error) {
		ps, err := b.startGroup(ctx, group, 1, a.addr(), upstream)
		if err != nil {
			return nil, err
		}
		proxies = append(proxies, ps...)
		if config != "" {
			err = a.put(ctx, group, 1, config)
		}
		return ps[0], err
	}
	key := rand.Text() + rand.Text()
	none, err1 := static("none", "")
	native, err2 := static("native", nativeLimiter)
	empty, err3 := filled("empty", "")
	unsigned, err4 := filled("unsigned", `{auth: {mode: unsigned}, paths: [/pull], plans: {Bench: 1000000}}`)
	signed, err5 := filled("signed", fmt.Sprintf(`{auth: {mode: jwt, key: %q}, paths: [/pull], plans: {Bench: 1000000}}`, key))
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		return err
	}
	few, err := requestsOf(users, func(user string) (string, error) {
		return base64.StdEncoding.EncodeToString(fmt.Appendf(nil, `{"username":%q,"plan":"Bench"}`, user)), nil
	})
	if err != nil {
		return err
	}
	sign := func(user string) (string, error) {
		return jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{"sub": user, "plan": "Bench", "jti": rand.Text(),
			"exp": time.Now().Add(time.Hour).Unix()}).SignedString([]byte(key))
	}
	again, err := requestsOf(users, sign)
	if err != nil {
		return err
	}
	anew, err := requestsOf(b.tokens, sign)
	if err != nil {
		return err
	}
	kinds := []*kind{
		{name: "no filter", proxy: none, requests: few},
		{name: "the slot, empty", proxy: empty, requests: few},
		{name: "native local_ratelimit", proxy: native, requests: few},
		{name: "limiter, unsigned tokens", proxy: unsigned, requests: few},
		{name: "limiter, signed tokens", proxy: signed, requests: again},
		{name: "limiter, signed, another token each time", proxy: signed, requests: anew},
	}
	for round := range b.rounds + 1 {
		b.say("requests, round %d of %d (0 warms up)", round, b.rounds)
		for i := range kinds {
			k := kinds[(i+round)%len(kinds)]
			cpu, err := k.round(ctx, b.sizes.requests)
			if err != nil {
				return fmt.Errorf("%s: %w", k.name, err)
			}
			if round > 0 {
				k.cpu = append(k.cpu, cpu)
			}
		}
	}
	s := section{Title: fmt.Sprintf("CPU of Envoy per request: %d kept-alive connections in a closed loop, %d requests a round, all of them pass",
		connections, b.sizes.requests), Columns: []string{"", "CPU", "of no filter"}}
	for _, k := range kinds {
		s.add(k.name, figureOf("µs", k.cpu), figureOf("×", combine(k.cpu, kinds[0].cpu, over)))
	}
	b.report.Sections = append(b.report.Sections, s)
	ratio := figureOf("×", combine(kinds[3].cpu, kinds[0].cpu, over)).Median
	verdict := "holds"
	if ratio > bar {
		verdict = "does not hold"
	}
	b.note("bar: the limiter with unsigned tokens takes at most %.1f × the CPU of no filter: it takes %.2f ×, so the bar %s", bar, ratio, verdict)
	b.note("the limiter remembers 1024 verified tokens in each worker; another token each time has it check every signature")
	return nil
}

// round is the Envoy's CPU per request over n requests, in microseconds.
func (k *kind) round(ctx context.Context, n int) (float64, error) {
	before, err := cpuTime(k.proxy.PID())
	if err != nil {
		return 0, err
	}
	if err := closedLoop(ctx, k.proxy.addr, k.requests, n); err != nil {
		return 0, err
	}
	after, err := cpuTime(k.proxy.PID())
	if err != nil {
		return 0, err
	}
	return float64((after - before).Microseconds()) / float64(n), nil
}

// requestsOf makes pulls with n tokens, of as many users as there are connections, one after the other.
func requestsOf(n int, token func(user string) (string, error)) ([][]byte, error) {
	requests := make([][]byte, n)
	for i := range requests {
		t, err := token("user-" + strconv.Itoa(i%users))
		if err != nil {
			return nil, err
		}
		requests[i] = []byte("GET /pull HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer " + t + "\r\n\r\n")
	}
	return requests, nil
}

// closedLoop sends n requests, each connection its share of the different ones in turn. All must be answered 200.
func closedLoop(ctx context.Context, addr string, requests [][]byte, n int) error {
	g, ctx := errgroup.WithContext(ctx)
	for i := range connections {
		g.Go(func() error {
			c, err := dial(addr)
			if err != nil {
				return err
			}
			defer c.Close()
			for j := i; j < n; j += connections {
				if err := ctx.Err(); err != nil {
					return err
				}
				status, err := c.roundTrip(requests[j%len(requests)])
				if err != nil {
					return err
				}
				if status != http.StatusOK {
					return fmt.Errorf("a request is answered %d", status)
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// conn is a client's connection, with little more than reading and writing, so that the client takes little CPU.
type conn struct {
	net.Conn
	r *bufio.Reader
}

func dial(addr string) (conn, error) {
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	return conn{c, bufio.NewReader(c)}, err
}

// roundTrip sends a request and reads the answer, whose length must be said.
func (c conn) roundTrip(request []byte) (status int, err error) {
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return 0, err
	}
	if _, err := c.Write(request); err != nil {
		return 0, err
	}
	length := 0
	for first := true; ; first = false {
		l, err := c.r.ReadSlice('\n')
		if err != nil {
			return 0, err
		}
		text := strings.TrimRight(string(l), "\r\n")
		switch name, value, _ := strings.Cut(text, ":"); {
		case first:
			if status, err = statusOf(text); err != nil {
				return 0, err
			}
		case text == "":
			_, err := io.CopyN(io.Discard, c.r, int64(length))
			return status, err
		case strings.EqualFold(name, "content-length"):
			if length, err = strconv.Atoi(strings.TrimSpace(value)); err != nil {
				return 0, err
			}
		}
	}
}
