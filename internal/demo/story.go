package demo

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/filter"
)

const (
	limiterName = "imagehub-rate-limit"
	ownName     = "my-headers"
	ownHeader   = "x-my-module"
)

// story is what follows the opening.
func (d *Demo) story() []Step {
	var personal, team string // tokens
	return []Step{
		{"Nothing limits pulls", func(ctx context.Context) (err error) {
			if personal, err = d.signUp(ctx, "ada", "Personal"); err != nil {
				return err
			}
			return errors.Join(
				d.pulls(ctx, 0, personal, 30, repeat(200, 30)),
				d.pulls(ctx, 1, "", 5, repeat(200, 5)))
		}},
		{"Apply filter: the limiter loads into both running Envoys", func(ctx context.Context) error {
			if d.Break == "nofilter" {
				return nil
			}
			if err := d.applyLimiter(ctx); err != nil {
				return err
			}
			return d.holds(ctx, limiterName)
		}},
		{"A Personal user gets 10 pulls, then 429", func(ctx context.Context) error {
			return d.pulls(ctx, 0, personal, 15, append(repeat(200, 10), repeat(429, 5)...))
		}},
		{"No token gets 401", func(ctx context.Context) error {
			return errors.Join(d.pulls(ctx, 0, "", 3, repeat(401, 3)), d.pulls(ctx, 1, "", 3, repeat(401, 3)), d.pulls(ctx, 1, "not.a.token", 1, repeat(401, 1)))
		}},
		{"An upgrade to Team lifts the limit", func(ctx context.Context) (err error) {
			if team, err = d.upgrade(ctx, personal, "Team"); err != nil {
				return err
			}
			return d.pulls(ctx, 0, team, 40, repeat(200, 40))
		}},
		{"The user's own module joins the chain before the limiter", func(ctx context.Context) error {
			if _, err := d.Operate(ctx, "custom", d.ownModule(`config: {response: {`+ownHeader+`: loaded}}`)); err != nil {
				return err
			}
			if err := d.holds(ctx, ownName, limiterName); err != nil {
				return err
			}
			// The limiter's 401 passes the filters before it on its way back, and no others.
			return d.headerIs(ctx, "loaded", 401)
		}},
		{"A broken configuration is refused, and the chain keeps working", func(ctx context.Context) error {
			refusals, err := d.refusals(ctx)
			if err != nil {
				return err
			}
			if err := d.refused(ctx, "meshery-filters-1014", d.ownModule(`config: {response: 7}`)); err != nil {
				return err
			}
			if n, err := d.refusals(ctx); err != nil || n != refusals {
				return errors.Join(err, fmt.Errorf("a proxy saw a configuration that the dry run refuses"))
			}
			return errors.Join(d.holds(ctx, ownName, limiterName), d.headerIs(ctx, "loaded", 401), d.pulls(ctx, 0, team, 5, repeat(200, 5)))
		}},
		{"What only an Envoy can refuse is taken back, and the chain keeps working", func(ctx context.Context) error {
			refusals, err := d.refusals(ctx)
			if err != nil {
				return err
			}
			if err := d.refused(ctx, "meshery-filters-1016", d.ownModule("config: {response: {x-other: y}}", d.nowhere())); err != nil {
				return err
			}
			n, err := d.refusals(ctx)
			switch {
			case err != nil:
				return err
			case n == refusals:
				return errors.New("no Envoy counts a rejection")
			case n > refusals+1 && d.stage.Place().OneFirst:
				return fmt.Errorf("%d rejections by the Envoys, want exactly 1: only one of them tries a change first", n-refusals)
			}
			return errors.Join(d.holds(ctx, ownName, limiterName), d.headerIs(ctx, "loaded", 401), d.pulls(ctx, 0, team, 5, repeat(200, 5)))
		}},
		{"Remove filter: both are unloaded, and nothing limits pulls", func(ctx context.Context) error {
			last, err := d.Operate(ctx, "remove_filter", document(ownName)+"---\n"+document(limiterName))
			if err != nil {
				return err
			}
			if !strings.Contains(last.GetSummary(), "removed") {
				return fmt.Errorf("the last event does not say removed: %s", last.GetSummary())
			}
			return errors.Join(d.holds(ctx), d.pulls(ctx, 0, personal, 30, repeat(200, 30)), d.pulls(ctx, 1, "", 3, repeat(200, 3)))
		}},
		{"Every event came over gRPC and over NATS", d.allHeard},
	}
}

// document is a Filter document: with a spec, which is lines of YAML, it can be applied, without one it names what to
// remove.
func document(name string, spec ...string) string {
	doc := fmt.Sprintf("apiVersion: %s\nkind: %s\nmetadata: {name: %s}\n", filter.APIVersion, filter.Kind, name)
	if len(spec) > 0 {
		doc += "spec:\n  " + strings.Join(spec, "\n  ") + "\n"
	}
	return doc
}

// ownModule is a document of a module that comes with it, as a user's own does.
func (d *Demo) ownModule(spec ...string) string {
	wasm, _ := filters.Builtin("headers")
	return document(ownName, slices.Concat(d.stage.Place().Spec,
		[]string{"module: {inline: " + base64.StdEncoding.EncodeToString(wasm) + "}", "phase: authn"}, spec)...)
}

// nowhere has the Envoys read the module from a file that is not there.
func (d *Demo) nowhere() string {
	return "delivery: {mode: local, localPath: " + filepath.Join(d.Dir, "nowhere") + "}"
}

func (d *Demo) applyLimiter(ctx context.Context) error {
	operation, limiter := d.stage.Limiter()
	switch d.Break {
	case "digest":
		operation, limiter = "apply_filter", strings.Replace(limiter, "{builtin: ratelimit}", "{builtin: ratelimit, sha256: "+strings.Repeat("0", 64)+"}", 1)
	case "nack":
		operation, limiter = "apply_filter", limiter+"  "+d.nowhere()+"\n"
	}
	_, err := d.Operate(ctx, operation, limiter)
	return err
}

// AddEnvoy has the story watch an Envoy that takes requests at an address.
func (d *Demo) AddEnvoy(ctx context.Context, p *envoy.Process, addr string) error {
	version, err := p.Admin().Version(ctx)
	if err != nil {
		return err
	}
	d.report.Envoy = version
	d.Envoys = append(d.Envoys, &Envoy{p, addr})
	fmt.Fprintf(d.Out, "    Envoy %d: %s, PID %d, http://%s\n", len(d.Envoys), version, p.PID(), addr)
	return nil
}

func (d *Demo) stopEnvoys() {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	for _, e := range d.Envoys {
		if err := e.Stop(ctx); err != nil {
			fmt.Fprintf(d.Out, "Envoy with PID %d: %v\n", e.PID(), err)
		}
	}
}

// request sends one request through an Envoy and writes its status down.
func (d *Demo) request(ctx context.Context, through int, method, path, token string, body any) (*http.Response, []byte, error) {
	var payload io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return nil, nil, err
		}
		payload = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+d.Envoys[through].Addr+path, payload)
	if err != nil {
		return nil, nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, nil, err
	}
	d.mu.Lock()
	d.step.Requests = append(d.step.Requests, requestResult{through + 1, method, path, resp.StatusCode})
	d.mu.Unlock()
	return resp, data, nil
}

func repeat(status, n int) []int { return slices.Repeat([]int{status}, n) }

// pulls sends n pulls one after the other and wants just these answers.
func (d *Demo) pulls(ctx context.Context, through int, token string, n int, want []int) error {
	var got []int
	for range n {
		resp, _, err := d.request(ctx, through, http.MethodGet, "/pull", token, nil)
		if err != nil {
			return fmt.Errorf("pull through Envoy %d: %w", through+1, err)
		}
		got = append(got, resp.StatusCode)
	}
	if !slices.Equal(got, want) {
		return fmt.Errorf("%d pulls through Envoy %d were answered %v, want %v", n, through+1, got, want)
	}
	return nil
}

func (d *Demo) headerIs(ctx context.Context, value string, status int) error {
	for i := range d.Envoys {
		resp, _, err := d.request(ctx, i, http.MethodGet, "/pull", "", nil)
		if err != nil {
			return err
		}
		if resp.StatusCode != status || resp.Header.Get(ownHeader) != value {
			return fmt.Errorf("Envoy %d answers %d with %s %q, want %d with %q", i+1, resp.StatusCode, ownHeader, resp.Header.Get(ownHeader), status, value)
		}
	}
	return nil
}

// token asks Image Hub for something that is answered with a token.
func (d *Demo) token(ctx context.Context, path, token string, body any) (string, error) {
	resp, data, err := d.request(ctx, 0, http.MethodPost, path, token, body)
	if err != nil {
		return "", err
	}
	var answer struct{ Token string }
	if err := json.Unmarshal(data, &answer); err != nil || answer.Token == "" {
		return "", fmt.Errorf("%s answered %d and no token", path, resp.StatusCode)
	}
	return answer.Token, nil
}

func (d *Demo) signUp(ctx context.Context, user, plan string) (token string, err error) {
	password := rand.Text()
	resp, _, err := d.request(ctx, 0, http.MethodPost, "/signup", "", map[string]string{"username": user, "password": password, "plan": plan})
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("/signup answered %d", resp.StatusCode)
	}
	return d.token(ctx, "/auth", "", map[string]string{"username": user, "password": password})
}

func (d *Demo) upgrade(ctx context.Context, token, plan string) (string, error) {
	return d.token(ctx, "/upgrade", token, map[string]string{"plan": plan})
}

// background sends requests that no filter acts on, each on a connection of its own, until stop is closed.
func (d *Demo) background(ctx context.Context, through []*Envoy, stop <-chan struct{}) map[string]int {
	counts := map[string]int{}
	if len(through) == 0 {
		return counts
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-stop:
			return counts
		case <-ctx.Done():
			return counts
		case <-tick.C:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+through[i%len(through)].Addr+"/healthz", nil)
		if err != nil {
			counts["failed"]++
			continue
		}
		resp, err := d.client.Do(req)
		if err != nil {
			if ctx.Err() == nil {
				counts["failed"]++
			}
			continue
		}
		_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<20))
		resp.Body.Close()
		if err != nil {
			counts["failed"]++
			continue
		}
		counts[strconv.Itoa(resp.StatusCode)]++
	}
}

// holds wants both Envoys to say themselves that they run just these filters, in this order, with the right bytes.
func (d *Demo) holds(ctx context.Context, names ...string) error {
	digest := func(builtin string) string {
		wasm, _ := filters.Builtin(builtin)
		sum := sha256.Sum256(wasm)
		return hex.EncodeToString(sum[:])
	}
	digests := map[string]string{limiterName: digest("ratelimit"), ownName: digest("headers")}
	for i, e := range d.Envoys {
		_, filters, err := d.stage.Running(ctx, e)
		if err != nil {
			return err
		}
		var got []string
		for _, f := range filters {
			name := strings.TrimPrefix(f.Name, d.stage.Place().Namespace+"/")
			got = append(got, name)
			if f.SHA256 != digests[name] {
				return fmt.Errorf("Envoy %d runs %s with sha256 %s, want %s", i+1, f.Name, f.SHA256, digests[name])
			}
		}
		if !slices.Equal(got, names) {
			return fmt.Errorf("Envoy %d runs %v, want %v", i+1, got, names)
		}
	}
	return nil
}

// reported are the statistics that go into the report.
const reported = `extension_config_discovery|wasm\.|http\..*downstream_rq_[1-5]xx|listener_manager`

func (d *Demo) envoyState(ctx context.Context, e *Envoy) (envoyState, error) {
	version, filters, err := d.stage.Running(ctx, e)
	if err != nil {
		return envoyState{}, err
	}
	stats, err := e.Admin().Stats(ctx, reported)
	if err != nil {
		return envoyState{}, err
	}
	state := envoyState{PIDAfter: e.PID(), Version: version, Filters: []string{}, Stats: stats}
	for _, f := range filters {
		state.Filters = append(state.Filters, fmt.Sprintf("%s sha256 %s", f.Name, f.SHA256))
	}
	return state, nil
}

// refusals is how much the Envoys have refused so far, all together.
func (d *Demo) refusals(ctx context.Context) (sum uint64, err error) {
	for _, e := range d.Envoys {
		stats, err := e.Admin().Stats(ctx, d.stage.Place().Refusals)
		if err != nil {
			return 0, err
		}
		for _, n := range stats {
			sum += n
		}
	}
	return sum, nil
}
