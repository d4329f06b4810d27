package consul

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	shortest = 25 * time.Millisecond // between two looks
	longest  = time.Second
	within   = 5 * time.Second // of one look at one proxy
	recent   = 2 * time.Second // for as long as it counts who answered
	// effect is how long an entry may have none on any proxy before it is written once more.
	effect  = 4 * time.Second
	maxInfo = 8 << 20 // bytes of what a proxy says of itself

	parallelFirst = 256 // addresses that are asked at once who is there
)

// Loaded yields how far the plan's proxies are, by their own word at the admin addresses that the Client may ask, at once
// and whenever that changes. It ends with ctx, when the consumer stops, or after an error. Of the target's proxies that
// Consul knows and that cannot be asked, Unverified tells.
//
// Consul may miss an entry that is written a moment after something else was registered. One that has no effect on any
// proxy is therefore written once more.
//
// The texts of proxies may quote their configuration, resolved secrets included.
func (c *Client) Loaded(ctx context.Context, p plan.Plan) iter.Seq2[plan.Loaded, error] {
	return func(yield func(plan.Loaded, error) bool) {
		w := &watch{client: c, plan: p, begun: time.Now()}
		if err := w.begin(ctx); err != nil {
			yield(plan.Loaded{}, err)
			return
		}
		var last *plan.Loaded
		again := false
		for pause := shortest; ; pause = min(pause*3/2, longest) {
			if err := w.look(ctx); err != nil {
				yield(plan.Loaded{}, err)
				return
			}
			if now := w.loaded(); last == nil || !slices.Equal(last.Proxies, now.Proxies) {
				if last = &now; !yield(now, nil) {
					return
				}
				pause = shortest
			}
			if !again && time.Since(w.begun) > effect && w.ineffective() {
				again = true
				if err := c.again(ctx, p); err != nil {
					yield(plan.Loaded{}, err)
					return
				}
			}
			if fetching(p, *last) {
				pause = shortest
			}
			select {
			case <-ctx.Done():
				yield(plan.Loaded{}, ctx.Err())
				return
			case <-time.After(pause):
			}
		}
	}
}

// watch is one look after another at a plan's proxies.
type watch struct {
	client     *Client
	plan       plan.Plan
	begun      time.Time
	proxies    []*proxy
	unverified string
}

// proxy is one that is asked.
type proxy struct {
	addr, id, version string
	service           string // that it stands before
	proof             *Proof
	state             plan.ProxyState
	detail            string
}

func (p *proxy) name() string { return p.id + answersAt + p.addr }

// begin finds out which proxies there are, and which of them can be asked.
func (w *watch) begin(ctx context.Context) error {
	c := w.client
	asked, silent, err := c.sidecars(ctx)
	if err != nil {
		return err
	}
	t := w.plan.Chain.Target
	var unseen []string
	if t.Kind == filter.Service {
		known, err := c.instances(ctx, t.Name)
		if err != nil {
			return err
		}
		for _, p := range asked {
			i := slices.IndexFunc(known, func(s instance) bool { return s.ServiceID == p.id && p.service == t.Name })
			if i >= 0 {
				w.proxies = append(w.proxies, &p)
				known = slices.Delete(known, i, i+1)
			}
		}
		for _, s := range known {
			unseen = append(unseen, s.ServiceID+" on "+s.Node)
		}
		switch {
		case len(unseen) > 0:
			w.unverified = fmt.Sprintf("%s knows of proxies of %s that answer at no address of consul.admin, so that whether they run it was not seen: %s",
				c, t.Name, listed(unseen))
		case len(w.proxies) == 0:
			w.unverified = fmt.Sprintf("%s knows of no proxy of %s", c, t.Name)
		}
	} else {
		for _, p := range asked {
			w.proxies = append(w.proxies, &p)
		}
		w.unverified = fmt.Sprintf("of the mesh's proxies those %d were seen that answer at the addresses of consul.admin, and no others", len(w.proxies))
	}
	if silent != "" && (len(unseen) > 0 || len(w.proxies) == 0) {
		w.unverified += "; " + silent
	}
	for _, p := range w.proxies {
		p.proof, p.state = NewProof(w.plan, p.name()), plan.Waiting
	}
	return nil
}

// crowd is who answers at the addresses of consul.admin.
type crowd struct {
	proxies []proxy
	silent  string // where nobody does, for people; empty: nowhere
	begun   time.Time
	ended   time.Time
}

// sidecars asks at all addresses of consul.admin at once who answers there. Addresses that are silent cost time: whoever
// asks right after another that they did cost it gets the same answer.
func (c *Client) sidecars(ctx context.Context) ([]proxy, string, error) {
	select {
	case c.asking <- struct{}{}:
		defer func() { <-c.asking }()
	case <-ctx.Done():
		return nil, "", ctx.Err()
	}
	if last := c.seen; time.Since(last.ended) < recent && last.ended.Sub(last.begun) > recent {
		return last.proxies, last.silent, nil
	}
	now := crowd{begun: time.Now()}
	asked, errs := make([]*proxy, len(c.Admin)), make([]error, len(c.Admin))
	asking, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var g errgroup.Group
	g.SetLimit(parallelFirst)
	for i, addr := range c.Admin {
		g.Go(func() error {
			asked[i], errs[i] = c.identify(asking, addr)
			return nil
		})
	}
	_ = g.Wait()
	if ctx.Err() != nil {
		return nil, "", ctx.Err()
	}
	var silent []string
	var why error
	for i, p := range asked {
		if p != nil {
			now.proxies = append(now.proxies, *p)
		}
		if errs[i] != nil {
			silent, why = append(silent, c.Admin[i]), cmp.Or(why, errs[i])
		}
	}
	switch len(silent) {
	case 0:
	case 1:
		now.silent = fmt.Sprintf("nothing answers as an Envoy of Consul's at %s: %v", silent[0], why)
	default:
		now.silent = fmt.Sprintf("nothing answers as an Envoy of Consul's at %d addresses, %s: at the first, %v", len(silent), listed(silent), why)
	}
	now.ended = time.Now()
	c.seen = now
	return now.proxies, now.silent, nil
}

// listed joins names, at most ten of them.
func listed(names []string) string {
	if more := len(names) - 10; more > 0 {
		return strings.Join(names[:10], ", ") + fmt.Sprintf(" and %d more", more)
	}
	return strings.Join(names, ", ")
}

// instance is a proxy as Consul's catalog has it.
type instance struct{ Node, ServiceID, ServiceKind string }

func (c *Client) instances(ctx context.Context, service string) (all []instance, err error) {
	if _, err := c.get(ctx, call{path: "/v1/catalog/connect/" + url.PathEscape(service), whole: true}, &all); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(s instance) bool { return s.ServiceKind != "connect-proxy" }), nil
}

// identify asks who answers at an admin address. One of another namespace or partition is none.
func (c *Client) identify(ctx context.Context, addr string) (*proxy, error) {
	body, err := page(ctx, c.ask(addr), "/server_info", maxInfo)
	if err != nil {
		return nil, err
	}
	var info struct {
		Node struct {
			ID       string `json:"id"`
			Cluster  string `json:"cluster"`
			Metadata struct {
				Namespace string `json:"namespace"`
				Partition string `json:"partition"`
			} `json:"metadata"`
			Build struct {
				Version struct {
					Major int `json:"major_number"`
					Minor int `json:"minor_number"`
					Patch int `json:"patch"`
				} `json:"version"`
			} `json:"user_agent_build_version"`
		} `json:"node"`
	}
	if err := json.Unmarshal(body, &info); err != nil || info.Node.ID == "" {
		return nil, fmt.Errorf("it does not say which proxy it is")
	}
	const usual = "default"
	is := info.Node.Metadata
	if cmp.Or(is.Namespace, usual) != cmp.Or(c.Namespace, usual) || cmp.Or(is.Partition, usual) != cmp.Or(c.Partition, usual) {
		return nil, nil
	}
	v := info.Node.Build.Version
	return &proxy{addr: addr, id: info.Node.ID, service: info.Node.Cluster, version: fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch)}, nil
}

// look asks every proxy.
func (w *watch) look(ctx context.Context) error {
	g, looking := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	var mu sync.Mutex
	for _, p := range w.proxies {
		g.Go(func() error {
			asking, cancel := context.WithTimeout(looking, within)
			defer cancel()
			state, detail, err := p.proof.Look(asking, w.client.ask(p.addr))
			mu.Lock()
			defer mu.Unlock()
			if p.proof.err != nil {
				return p.proof.err
			}
			if err != nil {
				state, detail = plan.Waiting, fmt.Sprintf("it cannot be asked: %v", err)
			}
			p.state, p.detail = state, detail
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

// ineffective says whether no proxy shows anything of the plan, which one should.
func (w *watch) ineffective() bool {
	is := func(states ...plan.ProxyState) bool {
		return slices.ContainsFunc(w.proxies, func(p *proxy) bool { return slices.Contains(states, p.state) })
	}
	return is(plan.Waiting) && !is(plan.Running, plan.Rejected)
}

func (w *watch) loaded() plan.Loaded {
	l := plan.Loaded{Unverified: w.unverified}
	for _, p := range w.proxies {
		l.Proxies = append(l.Proxies, plan.ProxyStatus{Proxy: plan.Proxy{ID: p.name(), Version: p.version}, State: p.state, Expected: p.state != plan.Apart,
			Proof: proofOf(p.state, p.detail), Detail: p.detail})
	}
	l.Sort()
	return l
}

// again writes the plan's entries once more. Consul passes over what it has already, so each gets a mark.
func (c *Client) again(ctx context.Context, p plan.Plan) error {
	for _, o := range p.Objects {
		e, err := c.entryOf(ctx, o)
		if err != nil || e.raw == nil {
			return err
		}
		if !slices.ContainsFunc(e.extensions(), func(x map[string]any) bool { return isOf(x, p.Chain.Filters) }) {
			return problem.ChainChanged.New("%s: somebody has taken what was applied out of %s", c, e)
		}
		raw := e.with(nil, nil, 0)
		meta := map[string]any{pushed: time.Now().UTC().Format("20060102T150405Z")}
		for k, v := range e.meta() {
			if k != pushed {
				meta[k] = v
			}
		}
		raw["Meta"] = meta
		if _, err := c.put(ctx, e, raw); err != nil { // somebody else's write does as well
			return err
		}
		c.Log.Info("an entry had no effect and is written again", "consul", c.String(), "entry", e.String())
	}
	return nil
}
