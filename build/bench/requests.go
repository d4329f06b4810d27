package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/sync/errgroup"
)

const (
	connections = 8 // each with one request at a time: a closed loop
	users       = connections
	bar         = 1.6 // CPU per request with the unsigned limiter, of that without a filter
)

const (
	allPass       = "paths: [/pull], plans: {Bench: 1000000}}"
	nativeLimiter = `{name: envoy.filters.http.local_ratelimit, typed_config: {
  "@type": type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit, stat_prefix: bench,
  token_bucket: {max_tokens: 1000000000, tokens_per_fill: 1000000000, fill_interval: 1s},
  filter_enabled: {default_value: {numerator: 100}}, filter_enforced: {default_value: {numerator: 100}}}},`
)

// kind is an Envoy, static or with the adapter's filter in its slot, and the requests that it is sent.
type kind struct {
	name          string
	bootstrap     []byte
	group, config string
	requests      [][]byte
	proxy         *proxy
	cpu           []float64 // microseconds per request, round by round
}

// measureRequests sends the same number of requests to each kind of Envoy in turn, round by round.
func (b *bench) measureRequests(ctx context.Context, a *adapter, upstream string, w way) (err error) {
	key := rand.Text() + rand.Text()
	signer := func(user string) string {
		token := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{"sub": user, "plan": "Bench", "jti": rand.Text(), "exp": time.Now().Add(time.Hour).Unix()})
		text, _ := token.SignedString([]byte(key)) // it fails for other keys than bytes
		return text
	}
	few, again, anew := requestsOf(users, encoder), requestsOf(users, signer), requestsOf(b.tokens, signer)
	kinds := []*kind{
		{name: "no filter", bootstrap: static("", w, upstream), requests: few},
		{name: "the slot, empty", group: "empty", requests: few},
		{name: "native local_ratelimit", bootstrap: static(nativeLimiter, w, upstream), requests: few},
		{name: "limiter, unsigned tokens", group: "unsigned", config: "{auth: {mode: unsigned}, " + allPass, requests: few},
		{name: "limiter, signed tokens", group: "signed", config: "{auth: {mode: jwt, key: " + key + "}, " + allPass, requests: again},
		{name: "limiter, signed, another token each time", group: "anew", config: "{auth: {mode: jwt, key: " + key + "}, " + allPass, requests: anew},
	}
	var proxies []*proxy
	defer func() { err = errors.Join(err, stopAll(proxies)) }()
	for _, k := range kinds {
		if k.bootstrap != nil {
			k.proxy, err = b.startEnvoy(ctx, k.bootstrap)
		} else {
			k.group += "-" + w.name // the adapter remembers what the groups of another way had
			k.proxy, err = b.startSlotted(ctx, k.group, k.group, a.addr(), upstream, w)
		}
		if err != nil {
			return err
		}
		proxies = append(proxies, k.proxy)
		if k.config != "" {
			if err := a.put(ctx, k.group, 1, k.config); err != nil {
				return fmt.Errorf("%s: %w", k.name, err)
			}
		}
	}
	for round := range b.rounds + 1 {
		b.say("requests that %s answers, round %d of %d (0 warms up)", w.answerer, round, b.rounds)
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
	s := section{Title: fmt.Sprintf("CPU of Envoy per request that passes and that %s answers: %d kept-alive connections in a closed loop, %d requests a round",
		w.answerer, connections, b.sizes.requests), Columns: []string{"", "CPU", "of no filter"}}
	for _, k := range kinds {
		s.add(k.name, figureOf("µs", k.cpu), figureOf("×", combine(k.cpu, kinds[0].cpu, over)))
	}
	b.report.Sections = append(b.report.Sections, s)
	ratio := figureOf("×", combine(kinds[3].cpu, kinds[0].cpu, over)).Median
	verdict := "holds"
	if ratio > bar {
		verdict = "does not hold"
	}
	b.note("bar: with unsigned tokens the limiter takes at most %.1f × the CPU of no filter. Of requests that %s answers it takes %.2f ×: the bar %s",
		bar, w.answerer, ratio, verdict)
	return nil
}

// round is the Envoy's CPU per request over n requests, in microseconds.
func (k *kind) round(ctx context.Context, n int) (float64, error) {
	before, err := cpuTime(k.proxy.PID())
	if err != nil {
		return 0, err
	}
	if err := closedLoop(ctx, k.proxy.listener, k.requests, n); err != nil {
		return 0, err
	}
	after, err := cpuTime(k.proxy.PID())
	if err != nil {
		return 0, err
	}
	return float64((after - before).Microseconds()) / float64(n), nil
}

// requestsOf makes pulls with n tokens, of the users in turn.
func requestsOf(n int, token func(user string) string) [][]byte {
	requests := make([][]byte, n)
	for i := range requests {
		requests[i] = fmt.Appendf(nil, "GET /pull HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer %s\r\n\r\n", token("user-"+strconv.Itoa(i%users)))
	}
	return requests
}

// encoder makes a token as the public Image Hub images do.
func encoder(user string) string {
	return base64.StdEncoding.EncodeToString(fmt.Appendf(nil, `{"username":%q,"plan":"Bench"}`, user))
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
