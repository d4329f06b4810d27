// Package proof shows on the real program and real Envoys what the other packages promise one by one: its tests build
// the binary, start it as its users do, and look at it from outside.
//
// What is not a test here is the load generator, which the bench uses too.
package proof

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Request is one kind of request of a Load: a GET without a body.
type Request struct {
	Addr   string // host:port that is connected to
	Path   string
	Header map[string]string
	// Fresh sends it on a connection of its own, which is closed after the answer. Otherwise a kept-alive one is used.
	Fresh bool
}

// Answer is what became of one request.
type Answer struct {
	Request Request
	Due     time.Time // when the schedule wanted it sent
	Sent    time.Time // when it was really sent; with Fresh that is before connecting
	Done    time.Time // when the answer had been read
	Status  int       // 0 without an answer
	Header  http.Header
	Err     error // of the connection
}

// Load is an open loop: requests are sent when their time has come, whether or not earlier ones were answered, so that a
// server that is slow meets the same number of requests as one that is quick.
type Load struct {
	// Requests are sent in turn, over and over; at least one.
	Requests []Request
	// Rate in requests a second, of all of them together.
	Rate int
	// Judge says what is wrong with an answer. It is called from many goroutines. Default: nothing is.
	Judge func(Answer) error
	// Slow is how long after it was sent a request may be answered without counting as slow. Default: 1 s.
	Slow time.Duration
	// InFlight bounds the requests, and with them the goroutines, that wait for an answer. At the bound sending stops,
	// and what is sent afterwards counts as late. Default: 2000, which only a server can reach that has failed already.
	InFlight int
}

// LateAfter is how much later than it was due a request may be sent without counting as late. The generator shares the
// machine with what it measures, so it tells its own delays from the server's.
const LateAfter = 100 * time.Millisecond

// giveUp ends a request that is not answered at all.
const giveUp = 20 * time.Second

// Of the kept-alive connections to each address at least spread wait for a request, so that requests meet old and new
// connections on every worker of the server however quick it is, and at most idleConnections.
const (
	spread          = 8
	idleConnections = 64
)

// Sample is one request in a Report; times are since the start of the load.
type Sample struct {
	Due, Sent, Done time.Duration
	Status          int
	Fresh           bool
}

// Report tells how a load went.
type Report struct {
	Sent int
	// Failed counts the requests that had no answer, or one that Judge does not accept.
	Failed int
	// Slow are those that were answered well, and later than Load.Slow after they had been sent.
	Slow []Sample
	// Late is how many requests the generator itself sent more than LateAfter after they were due.
	Late int
	// Start is when the load began, which samples are measured from.
	Start time.Time
	// Elapsed is the time from the start to the last request sent.
	Elapsed time.Duration
	// Failures are the first few that failed, in words.
	Failures []string
	// Samples are all requests in the order of their answers.
	Samples []Sample
}

// Rate is what was really sent, in requests a second.
func (r Report) Rate() float64 { return float64(r.Sent) / r.Elapsed.Seconds() }

func (r Report) String() string {
	sent := func(s Sample) time.Duration { return s.Done - s.Sent }
	due := func(s Sample) time.Duration { return s.Done - s.Due }
	return fmt.Sprintf("%d requests at %.0f/s, %d failed, %d slow, %d sent late; answered after sending p50 %s p99 %s max %s, after being due p99 %s max %s",
		r.Sent, r.Rate(), r.Failed, len(r.Slow), r.Late, Percentile(r.Samples, 50, sent), Percentile(r.Samples, 99, sent), Percentile(r.Samples, 100, sent),
		Percentile(r.Samples, 99, due), Percentile(r.Samples, 100, due))
}

// Between are the samples that were due in [from, to).
func (r Report) Between(from, to time.Duration) []Sample {
	var out []Sample
	for _, s := range r.Samples {
		if s.Due >= from && s.Due < to {
			out = append(out, s)
		}
	}
	return out
}

// Percentile is the p-th (0 to 100) of what of reads from the samples; 0 without samples.
func Percentile(samples []Sample, p float64, of func(Sample) time.Duration) time.Duration {
	if len(samples) == 0 {
		return 0
	}
	all := make([]time.Duration, len(samples))
	for i, s := range samples {
		all[i] = of(s)
	}
	slices.Sort(all)
	return all[min(len(all)-1, int(p/100*float64(len(all))))].Round(10 * time.Microsecond)
}

// Run is a load that is being sent.
type Run struct {
	load  Load
	start time.Time
	stop  context.CancelFunc
	ended chan struct{} // closed when every request was answered or given up
	sent  atomic.Int64
	pool  pool

	mu     sync.Mutex
	report Report
}

// Start begins to send; Stop must be called.
func (l Load) Start(ctx context.Context) *Run {
	l.Slow = cmp.Or(l.Slow, time.Second)
	l.InFlight = cmp.Or(l.InFlight, 2000)
	ctx, stop := context.WithCancel(ctx)
	r := &Run{load: l, start: time.Now(), stop: stop, ended: make(chan struct{})}
	r.report.Start = r.start
	go r.schedule(ctx)
	return r
}

// Sent is how many requests were sent so far.
func (r *Run) Sent() int { return int(r.sent.Load()) }

// Since is the time since the start, which samples are measured by.
func (r *Run) Since() time.Duration { return time.Since(r.start) }

// Stop ends the load, waits for the answers that are still due, and tells how it went. A second call tells the same.
func (r *Run) Stop() Report {
	r.stop()
	<-r.ended
	return r.report
}

func (r *Run) schedule(ctx context.Context) {
	defer close(r.ended)
	slots := make(chan struct{}, r.load.InFlight)
	var waiting sync.WaitGroup
	timer := time.NewTimer(0)
	defer timer.Stop()
	for i := 0; ; i++ {
		due := r.start.Add(time.Duration(int64(i) * int64(time.Second) / int64(r.load.Rate)))
		timer.Reset(time.Until(due))
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		if ctx.Err() == nil {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			break
		}
		waiting.Go(func() {
			r.note(r.send(r.load.Requests[i%len(r.load.Requests)], due))
			<-slots
		})
	}
	waiting.Wait()
	r.pool.close()
}

func (r *Run) send(q Request, due time.Time) Answer {
	a := Answer{Request: q, Due: due, Sent: time.Now()}
	r.sent.Add(1)
	a.Status, a.Header, a.Err = r.pool.exchange(q, a.Sent.Add(giveUp))
	a.Done = time.Now()
	return a
}

// note judges an answer and writes it down.
func (r *Run) note(a Answer) {
	wrong := a.Err
	if wrong == nil && r.load.Judge != nil {
		wrong = r.load.Judge(a)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := &r.report
	p.Sent++
	p.Elapsed = max(p.Elapsed, a.Sent.Sub(r.start))
	if a.Sent.Sub(a.Due) > LateAfter {
		p.Late++
	}
	s := Sample{a.Due.Sub(r.start), a.Sent.Sub(r.start), a.Done.Sub(r.start), a.Status, a.Request.Fresh}
	p.Samples = append(p.Samples, s)
	if wrong == nil {
		if s.Done-s.Sent > r.load.Slow {
			p.Slow = append(p.Slow, s)
		}
		return
	}
	p.Failed++
	if len(p.Failures) < 20 {
		p.Failures = append(p.Failures, fmt.Sprintf("%s after the start, GET %s%s (fresh connection: %t): %v",
			a.Sent.Sub(r.start).Round(time.Millisecond), a.Request.Addr, a.Request.Path, a.Request.Fresh, wrong))
	}
}

// wire is one connection that speaks HTTP/1.1. It is less than net/http's client on purpose: it never tries a request
// again, so that every reset is seen, and costs little of the machine that it measures.
type wire struct {
	conn net.Conn
	read *bufio.Reader
}

func connect(addr string, deadline time.Time) (*wire, error) {
	d := net.Dialer{Deadline: deadline}
	c, err := d.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	return &wire{c, bufio.NewReaderSize(c, 4<<10)}, nil
}

// maxAnswer bounds the body of an answer, in bytes.
const maxAnswer = 1 << 20

// exchange sends a request and reads the whole answer. keep says that the connection can be used again.
func (w *wire) exchange(q Request, deadline time.Time) (status int, h http.Header, keep bool, err error) {
	if err := w.conn.SetDeadline(deadline); err != nil {
		return 0, nil, false, err
	}
	var text strings.Builder
	fmt.Fprintf(&text, "GET %s HTTP/1.1\r\nhost: %s\r\n", q.Path, q.Addr)
	for name, value := range q.Header {
		fmt.Fprintf(&text, "%s: %s\r\n", name, value)
	}
	text.WriteString("\r\n")
	if _, err := io.WriteString(w.conn, text.String()); err != nil {
		return 0, nil, false, err
	}
	resp, err := http.ReadResponse(w.read, nil)
	if err != nil {
		return 0, nil, false, err
	}
	n, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxAnswer+1))
	if err == nil && n > maxAnswer {
		err = fmt.Errorf("the answer has more than %d bytes", maxAnswer)
	}
	if err != nil {
		return resp.StatusCode, resp.Header, false, err
	}
	return resp.StatusCode, resp.Header, !resp.Close && !q.Fresh, nil
}

// pool keeps connections that wait for a request. The zero value is ready.
type pool struct {
	mu     sync.Mutex
	closed bool
	idle   map[string][]*wire
}

func (p *pool) exchange(q Request, deadline time.Time) (status int, h http.Header, err error) {
	w := p.take(q)
	if w == nil {
		if w, err = connect(q.Addr, deadline); err != nil {
			return 0, nil, err
		}
	}
	status, h, keep, err := w.exchange(q, deadline)
	if !keep || !p.put(q.Addr, w) {
		w.conn.Close()
	}
	return status, h, err
}

// take returns the connection that has waited longest, so that all of them are in use; nil when a new one is due.
func (p *pool) take(q Request) *wire {
	p.mu.Lock()
	defer p.mu.Unlock()
	waiting := p.idle[q.Addr]
	if q.Fresh || len(waiting) < spread {
		return nil
	}
	p.idle[q.Addr] = waiting[1:]
	return waiting[0]
}

func (p *pool) put(addr string, w *wire) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || len(p.idle[addr]) >= idleConnections {
		return false
	}
	if p.idle == nil {
		p.idle = map[string][]*wire{}
	}
	p.idle[addr] = append(p.idle[addr], w)
	return true
}

func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, waiting := range p.idle {
		for _, w := range waiting {
			w.conn.Close()
		}
	}
	p.idle = nil
}
