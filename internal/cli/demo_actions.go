package cli

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
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
	"github.com/meshery/meshery-filters/templates"
)

// operate sends one operation as Meshery does and waits for its last event, which must be no failure.
func (d *demo) operate(ctx context.Context, key, body string) (*filterspb.Event, error) {
	last, err := d.story(ctx, key, body)
	if err == nil && last.GetType() == filterspb.Event_ERROR {
		err = fmt.Errorf("%s failed: %s [%s]\n%s", key, last.GetSummary(), last.GetErrorCode(), last.GetDetails())
	}
	return last, err
}

func (d *demo) story(ctx context.Context, key, body string) (*filterspb.Event, error) {
	id := "demo-" + rand.Text()
	_, err := call(ctx, d.adapter, callTimeout, d.adapter.meshes.ApplyOperation,
		&meshes.ApplyRuleRequest{OpName: key, Username: "demo", CustomBody: body, OperationId: id})
	if err != nil {
		return nil, err
	}
	stream, err := d.adapter.filters.Watch(ctx, &filterspb.WatchRequest{OperationId: id})
	if err != nil {
		return nil, d.adapter.failed(ctx, err)
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return nil, d.adapter.failed(ctx, err)
		}
		if r.GetEvent().GetLast() {
			return r.GetEvent(), nil
		}
	}
}

// refused sends the custom operation and wants it to end with that code, be it at once or as its last event.
func (d *demo) refused(ctx context.Context, code, body string) error {
	last, err := d.story(ctx, "custom", body)
	if err != nil {
		return err
	}
	if last.GetType() != filterspb.Event_ERROR || last.GetErrorCode() != code {
		return fmt.Errorf("the operation ended with %q [%s], want a failure with %s", last.GetSummary(), last.GetErrorCode(), code)
	}
	fmt.Fprintf(d.out, "    the reason: %s\n", strings.ReplaceAll(last.GetDetails(), "\n", "\n      "))
	return nil
}

// document is a Filter document: with a module it can be applied, without one it names what to remove.
func document(name, module, spec string) string {
	doc := fmt.Sprintf("apiVersion: %s\nkind: %s\nmetadata: {name: %s}\n", filter.APIVersion, filter.Kind, name)
	if module != "" {
		doc += fmt.Sprintf("spec:\n  module: {%s}\n  phase: authn\n  %s\n", module, spec)
	}
	return doc
}

// ownModule is a document of a module that comes with it, as a user's own does.
func (d *demo) ownModule(spec string) string {
	wasm, _ := filters.Builtin("headers")
	return document(ownName, "inline: "+base64.StdEncoding.EncodeToString(wasm), spec)
}

func (d *demo) applyLimiter(ctx context.Context) error {
	limiter, _ := templates.ImageHubLimiter("envoy")
	switch d.sabotage {
	case "digest":
		limiter = strings.Replace(limiter, "{builtin: ratelimit}", "{builtin: ratelimit, sha256: "+strings.Repeat("0", 64)+"}", 1)
	case "nack":
		limiter += "  delivery: {mode: local, localPath: " + filepath.Join(d.dir, "nowhere") + "}\n"
	default:
		_, err := d.operate(ctx, "imagehub_rate_limit", "")
		return err
	}
	_, err := d.operate(ctx, "apply_filter", limiter)
	return err
}

func (d *demo) startEnvoys(ctx context.Context, binary envoy.Binary) error {
	for i := range 2 {
		dir := filepath.Join(d.dir, fmt.Sprintf("envoy-%d", i+1))
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		bootstrap, err := envoy.Bootstrap{Group: "default", NodeID: fmt.Sprintf("demo-%d", i+1), XDSAddr: d.addresses.XDS,
			Listen: "127.0.0.1:0", Upstream: d.hub, Admin: "127.0.0.1:0"}.YAML()
		if err != nil {
			return err
		}
		p, err := envoy.Start(ctx, binary, envoy.ProcessOptions{Bootstrap: bootstrap, Dir: dir, Concurrency: 2})
		if err != nil {
			return err
		}
		d.envoys = append(d.envoys, p)
		if err := p.Ready(ctx); err != nil { // the listener opens once the chain is there
			return err
		}
		addr, err := p.ListenerAddr(ctx, envoy.ListenerName)
		if err != nil {
			return err
		}
		d.listeners = append(d.listeners, addr)
		fmt.Fprintf(d.out, "    Envoy %d: %s, PID %d, http://%s\n", i+1, binary.Version, p.PID(), addr)
	}
	return nil
}

func (d *demo) stopEnvoys() {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	for _, e := range d.envoys {
		if err := e.Stop(ctx); err != nil {
			fmt.Fprintf(d.out, "Envoy with PID %d: %v\n", e.PID(), err)
		}
	}
}

// request sends one request through an Envoy and writes its status down.
func (d *demo) request(ctx context.Context, through int, method, path, token string, body any) (*http.Response, []byte, error) {
	var payload io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return nil, nil, err
		}
		payload = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+d.listeners[through]+path, payload)
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
func (d *demo) pulls(ctx context.Context, through int, token string, n int, want []int) error {
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

func (d *demo) headerIs(ctx context.Context, value string, status int) error {
	for i := range d.listeners {
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
func (d *demo) token(ctx context.Context, path, token string, body any) (string, error) {
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

func (d *demo) signUp(ctx context.Context, user, plan string) (token string, err error) {
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

func (d *demo) upgrade(ctx context.Context, token, plan string) (string, error) {
	return d.token(ctx, "/upgrade", token, map[string]string{"plan": plan})
}

// background sends requests that no filter acts on, each on a connection of its own, until stop is closed.
func (d *demo) background(ctx context.Context, stop <-chan struct{}) map[string]int {
	counts := map[string]int{}
	d.mu.Lock()
	listeners := slices.Clone(d.listeners)
	d.mu.Unlock()
	if len(listeners) == 0 {
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
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+listeners[i%len(listeners)]+"/healthz", nil)
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
func (d *demo) holds(ctx context.Context, names ...string) error {
	digest := func(builtin string) string {
		wasm, _ := filters.Builtin(builtin)
		sum := sha256.Sum256(wasm)
		return hex.EncodeToString(sum[:])
	}
	digests := map[string]string{"default/" + limiterName: digest("ratelimit"), "default/" + ownName: digest("headers")}
	var want []string
	for _, n := range names {
		want = append(want, "default/"+n)
	}
	for i, e := range d.envoys {
		slot, err := e.Admin().SlotConfig(ctx)
		if err != nil {
			return err
		}
		var got []string
		for _, f := range slot.Filters {
			got = append(got, f.Name)
			if f.SHA256 != digests[f.Name] {
				return fmt.Errorf("Envoy %d runs %s with sha256 %s, want %s", i+1, f.Name, f.SHA256, digests[f.Name])
			}
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("Envoy %d runs %v, want %v", i+1, got, want)
		}
	}
	return nil
}

// demoStats are the statistics that go into the report.
const demoStats = `extension_config_discovery|wasm\.|http\..*downstream_rq_[1-5]xx|listener_manager`

func (d *demo) envoyState(ctx context.Context, e *envoy.Process) (envoyState, error) {
	slot, err := e.Admin().SlotConfig(ctx)
	if err != nil {
		return envoyState{}, err
	}
	stats, err := e.Admin().Stats(ctx, demoStats)
	if err != nil {
		return envoyState{}, err
	}
	state := envoyState{PIDAfter: e.PID(), Version: slot.Version, Filters: []string{}, Stats: stats}
	for _, f := range slot.Filters {
		state.Filters = append(state.Filters, fmt.Sprintf("%s sha256 %s", f.Name, f.SHA256))
	}
	return state, nil
}

// updateRejected is how many chains the Envoys have refused so far, all together.
func (d *demo) updateRejected(ctx context.Context) (sum uint64, err error) {
	for _, e := range d.envoys {
		stats, err := e.Admin().Stats(ctx, `extension_config_discovery.*\.config_fail`)
		if err != nil {
			return 0, err
		}
		for _, n := range stats {
			sum += n
		}
	}
	return sum, nil
}

// allHeard wants every event of the run to have come both ways.
func (d *demo) allHeard(ctx context.Context) error {
	return poll(ctx, 5*time.Second, func() error {
		d.mu.Lock()
		defer d.mu.Unlock()
		var errs []error
		for key, n := range d.heard {
			over, rest, _ := strings.Cut(key, "\x00")
			other := map[string]string{"gRPC": "NATS", "NATS": "gRPC"}[over]
			if d.heard[other+"\x00"+rest] != n {
				_, summary, _ := strings.Cut(rest, "\x00")
				errs = append(errs, fmt.Errorf("%q came %d times over %s and not over %s", summary, n, over, other))
			}
		}
		if len(d.heard) == 0 {
			errs = append(errs, errors.New("no event came at all"))
		}
		return errors.Join(errs...)
	})
}

func (d *demo) writeReport() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	data, err := json.MarshalIndent(d.report, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(d.reportPath, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

// invite prints what one can do while the demo stays up.
func (d *demo) invite() {
	self, err := os.Executable()
	if err != nil {
		self = "meshery-filters"
	}
	fmt.Fprintf(d.out, `
The demo stays up until Ctrl-C. To play with it:
  export %s=%s
  %s run imagehub_rate_limit
  %[3]s status
  curl -i http://%s/pull
  curl -i http://%s/pull
Image Hub's page through the first Envoy is http://%s, the adapter's page http://%s.
Image Hub itself is http://%s, NATS %s, the Envoys' admin http://%s and http://%s.
`, envServer, d.addresses.GRPC, self, d.listeners[0], d.listeners[1], d.listeners[0], d.addresses.HTTP, d.hub, d.addresses.NATS, d.envoys[0].AdminAddr(), d.envoys[1].AdminAddr())
}

// poll tries until there is no error, and returns the last one when the time is up.
func poll(ctx context.Context, limit time.Duration, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

func lastLines(data []byte, n int) string {
	all := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(all[max(0, len(all)-n):], "\n")
}
