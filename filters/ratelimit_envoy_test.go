package filters_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/filters"
	envoybin "github.com/meshery/meshery-filters/internal/envoy"
)

const key = "an HS256 key for tests, 32 bytes or more"

// signed is a configuration that takes JWTs; more is further members, each after a comma.
func signed(more string) string {
	return fmt.Sprintf(`{"auth":{"mode":"jwt","key":%q}%s}`, key, more)
}

// token signs a JWT that is valid for a minute.
func token(user, plan string) string {
	return sign(`{"alg":"HS256","typ":"JWT"}`,
		fmt.Sprintf(`{"sub":%q,"plan":%q,"exp":%d}`, user, plan, time.Now().Add(time.Minute).Unix()))
}

func sign(header, claims string) string {
	text := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(claims))
	mac := hmac.New(sha256.New, []byte(key))
	mac.Write([]byte(text))
	return text + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// envoy is a running proxy with one listener per configuration, in that order, all with the
// same module and VM id, in front of an upstream that answers 200 and counts.
type envoy struct {
	urls     []string
	admin    string // the file that Envoy writes its admin address to
	log      string
	upstream *atomic.Int64
}

// start runs an Envoy with two worker threads until the test ends.
func start(t *testing.T, module string, configs ...string) *envoy {
	t.Helper()
	e, cmd := launch(t, module, configs...)
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(exited) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
		if t.Failed() {
			text, _ := os.ReadFile(e.log)
			t.Logf("Envoy's log ends:\n%s", text[max(0, len(text)-4000):])
		}
	})
	deadline := time.Now().Add(20 * time.Second)
	for {
		if e.ready() {
			return e
		}
		select {
		case <-exited:
			t.Fatal("Envoy ended before it was ready")
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatal("Envoy was not ready after 20 s")
		}
	}
}

// launch starts an Envoy whose end the caller waits for.
func launch(t *testing.T, module string, configs ...string) (*envoy, *exec.Cmd) {
	t.Helper()
	if testing.Short() {
		t.Skip("it runs a real Envoy")
	}
	found, err := envoybin.Find(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	binary := found.Path
	wasm, ok := filters.Builtin(module)
	if !ok {
		var err error
		if wasm, err = os.ReadFile("../build/testfilters/" + module + ".wasm"); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	file := filepath.Join(dir, module+".wasm")
	if err := os.WriteFile(file, wasm, 0o600); err != nil {
		t.Fatal(err)
	}
	e := &envoy{admin: filepath.Join(dir, "admin"), log: filepath.Join(dir, "envoy.log"), upstream: new(atomic.Int64)}
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e.upstream.Add(1)
		// An upstream's own answer to CORS must not stand beside the filter's.
		w.Header().Set("Access-Control-Allow-Origin", "https://upstream.example")
		w.Header().Set("X-Seen-From", r.Header.Get("X-From"))
	}))
	t.Cleanup(upstream.Close)

	e.urls = make([]string, len(configs))
	var listeners strings.Builder
	for i, config := range configs {
		value, err := json.Marshal(config)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&listeners, listenerYAML, i, value, file)
	}
	bootstrap := filepath.Join(dir, "envoy.yaml")
	text := fmt.Sprintf(bootstrapYAML, listeners.String(), upstream.Listener.Addr().(*net.TCPAddr).Port)
	if err := os.WriteFile(bootstrap, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "-c", bootstrap, "--concurrency", "2", "--use-dynamic-base-id",
		"--disable-hot-restart", "--log-path", e.log, "--log-level", "warning", "--admin-address-path", e.admin)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return e, cmd
}

const listenerYAML = `
  - name: "%d"
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: test
          route_config:
            virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: ""}, route: {cluster: up}}]}]
          http_filters:
          - name: module
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm
              config:
                name: module
                configuration: {"@type": type.googleapis.com/google.protobuf.StringValue, value: %s}
                vm_config:
                  vm_id: test
                  runtime: envoy.wasm.runtime.v8
                  code: {local: {filename: %s}}
                  environment_variables: {key_values: {SHOP: books}}
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
`

const bootstrapYAML = `
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
static_resources:
  listeners: %s
  clusters:
  - name: up
    type: STATIC
    load_assignment:
      cluster_name: up
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %d}}}}]}]
`

// ready tells whether Envoy serves, and once it does, learns its listeners' addresses.
func (e *envoy) ready() bool {
	address, err := os.ReadFile(e.admin)
	if err != nil || len(address) == 0 {
		return false
	}
	admin := "http://" + string(address)
	if resp, err := http.Get(admin + "/ready"); err != nil {
		return false
	} else if _ = resp.Body.Close(); resp.StatusCode != http.StatusOK {
		return false
	}
	resp, err := http.Get(admin + "/listeners")
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) { // "0::127.0.0.1:40123"
		name, address, _ := strings.Cut(strings.TrimSpace(line), "::")
		i, err := strconv.Atoi(name)
		if err != nil || i >= len(e.urls) || strings.HasSuffix(address, ":0") {
			return false
		}
		e.urls[i] = "http://" + address
	}
	return !slices.Contains(e.urls, "")
}

// traps returns what tells of crashed VMs: panics in the log, and 503 from the workers
// whose VM is gone. Envoy has no statistic of it; by its failure policy here, such a worker
// answers nothing else from then on.
func (e *envoy) traps(t *testing.T) (told []string) {
	t.Helper()
	log, err := os.ReadFile(e.log)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, "[critical]") {
			told = append(told, line)
		}
	}
	for _, url := range e.urls {
		// Each on a connection of its own, for all workers to get some.
		for range 16 {
			client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			if got := send(t, client, http.MethodGet, url+"/"); got.status == http.StatusServiceUnavailable {
				told = append(told, url+" answered 503")
			}
		}
	}
	return told
}

// mustNotHaveTrapped fails the test if a VM has crashed.
func (e *envoy) mustNotHaveTrapped(t *testing.T) {
	t.Helper()
	if told := e.traps(t); len(told) > 0 {
		t.Errorf("a VM has crashed: %q", told)
	}
}

// answer is a response that was read to its end.
type answer struct {
	status int
	header http.Header
	body   string
}

// send makes one request; headers are pairs of name and value.
func send(t *testing.T, client *http.Client, method, url string, headers ...string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for pair := range slices.Chunk(headers, 2) {
		req.Header.Set(pair[0], pair[1])
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, string(body)}
}

func pull(t *testing.T, url, token string) answer {
	t.Helper()
	return send(t, http.DefaultClient, http.MethodGet, url+"/pull", "Authorization", "Bearer "+token)
}

func TestEachRequestGetsItsStatusAndHeaders(t *testing.T) {
	t.Parallel()
	e := start(t, "ratelimit", signed(""), `{"auth":{"mode":"unsigned"}}`)
	ann := token("ann", "Personal")
	expired := sign(`{"alg":"HS256"}`, fmt.Sprintf(`{"sub":"ann","plan":"Team","exp":%d}`, time.Now().Unix()-1))
	none := strings.TrimRight(sign(`{"alg":"none"}`, fmt.Sprintf(`{"sub":"ann","plan":"Team","exp":%d}`, time.Now().Unix()+60)), "x")
	public := base64.StdEncoding.EncodeToString([]byte(`{"username":"ann","plan":"Team"}`))
	const challenge = `Bearer realm="image-hub"`
	tests := []struct {
		name     string
		listener int
		method   string
		path     string
		headers  []string
		status   int
		want     map[string]string
		body     string
	}{
		{name: "another path is not the limiter's", path: "/auth", status: 200},
		{name: "a longer name is another path", path: "/pullother", status: 200},
		{name: "no token", path: "/pull", status: 401, body: "missing", want: map[string]string{
			"Www-Authenticate": challenge, "Content-Type": "application/json", "Access-Control-Allow-Origin": ""}},
		{name: "an encoded path", path: "/%70ull", status: 401},
		{name: "a doubled slash", path: "//pull", status: 401},
		{name: "a path below", path: "/pull/a/b?c", status: 401},
		{name: "a page can read a refusal", path: "/pull", headers: []string{"Origin", "https://a.example"}, status: 401,
			want: map[string]string{"Access-Control-Allow-Origin": "*"}},
		{name: "rubbish", path: "/pull", headers: []string{"Authorization", "Bearer rubbish"}, status: 401, body: "not a JWT",
			want: map[string]string{"Www-Authenticate": challenge + `, error="invalid_token", error_description="the token is not a JWT"`}},
		{name: "an unsigned token where signed ones are due", path: "/pull", headers: []string{"Authorization", public}, status: 401},
		{name: "an expired token", path: "/pull", headers: []string{"Authorization", expired}, status: 401, body: "expired"},
		{name: "algorithm none", path: "/pull", headers: []string{"Authorization", none}, status: 401, body: "HS256"},
		{name: "a broken signature", path: "/pull", headers: []string{"Authorization", ann[:len(ann)-4] + "AAAA"}, status: 401, body: "signature"},
		{name: "an unknown plan", path: "/pull", headers: []string{"Authorization", token("ann", "Gold")}, status: 403, body: "plan is unknown"},
		{name: "a good token", path: "/pull", headers: []string{"Authorization", "Bearer " + ann}, status: 200, want: map[string]string{
			"X-Ratelimit-Limit": "10", "X-Ratelimit-Remaining": "9", "X-Ratelimit-Reset": "6",
			"Access-Control-Allow-Origin": "https://upstream.example"}},
		{name: "a good token from a page", path: "/pull", headers: []string{"Authorization", ann, "Origin", "https://a.example"}, status: 200,
			want: map[string]string{"X-Ratelimit-Remaining": "8", "Access-Control-Allow-Origin": "*",
				"Access-Control-Expose-Headers": "retry-after, x-ratelimit-limit, x-ratelimit-remaining, x-ratelimit-reset"}},
		{name: "a preflight", method: http.MethodOptions, path: "/pull", status: 204,
			headers: []string{"Origin", "https://a.example", "Access-Control-Request-Method", "GET"},
			want: map[string]string{"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Headers": "authorization, content-type",
				"Access-Control-Max-Age": "3600"}},
		{name: "OPTIONS is no preflight by itself", method: http.MethodOptions, path: "/pull", status: 401},
		{name: "a public image's token", listener: 1, path: "/pull", headers: []string{"Authorization", public}, status: 200,
			want: map[string]string{"X-Ratelimit-Limit": "100"}},
		{name: "a malformed public token", listener: 1, path: "/pull", headers: []string{"Authorization", "bm90IGpzb24="}, status: 401},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := send(t, http.DefaultClient, test.method, e.urls[test.listener]+test.path, test.headers...)
			if got.status != test.status {
				t.Fatalf("status %d, want %d; body %q", got.status, test.status, got.body)
			}
			for name, want := range test.want {
				if values := got.header.Values(name); strings.Join(values, "|") != want {
					t.Errorf("%s: %q, want %q", name, values, want)
				}
			}
			if !strings.Contains(got.body, test.body) {
				t.Errorf("body %q, want one that contains %q", got.body, test.body)
			}
			if test.status >= 400 && !json.Valid([]byte(got.body)) {
				t.Errorf("body %q is no JSON", got.body)
			}
		})
	}
	log, err := os.ReadFile(e.log)
	if err != nil || !bytes.Contains(log, []byte("tokens are not signed")) {
		t.Errorf("no warning about unsigned tokens in Envoy's log (%v)", err)
	}
	e.mustNotHaveTrapped(t)
}

func TestExactlyTheLimitPassesOverEightConnectionsAndTwoThreads(t *testing.T) {
	t.Parallel()
	e := start(t, "ratelimit", signed(""))
	ann := token("ann", "Personal")
	const connections, each = 8, 25
	begin := time.Now()
	var statuses [connections][each]answer
	var workers sync.WaitGroup
	for i := range connections {
		workers.Go(func() {
			client := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1}}
			defer client.CloseIdleConnections()
			for j := range each {
				statuses[i][j] = send(t, client, http.MethodGet, e.urls[0]+"/pull", "Authorization", ann)
			}
		})
	}
	workers.Wait()
	if took := time.Since(begin); took > 3*time.Second {
		t.Fatalf("200 requests took %v: a bucket refills meanwhile", took)
	}
	count := map[int]int{}
	for _, answer := range slices.Concat(statuses[0][:], statuses[1][:], statuses[2][:], statuses[3][:],
		statuses[4][:], statuses[5][:], statuses[6][:], statuses[7][:]) {
		count[answer.status]++
	}
	if want := map[int]int{200: 10, 429: 190}; !maps.Equal(count, want) {
		t.Errorf("statuses %v, want %v", count, want)
	}
	if got := e.upstream.Load(); got != 10 {
		t.Errorf("the upstream saw %d requests, want 10", got)
	}
	limited := pull(t, e.urls[0], ann)
	if retry, err := strconv.Atoi(limited.header.Get("Retry-After")); err != nil || retry < 1 || retry > 6 {
		t.Errorf("Retry-After %q, want 1 to 6", limited.header.Get("Retry-After"))
	}
	if got := limited.header.Get("X-RateLimit-Remaining"); got != "0" {
		t.Errorf("X-RateLimit-Remaining %q, want 0", got)
	}
	e.mustNotHaveTrapped(t)
}

func TestAnUpgradeLiftsTheLimitAtOnce(t *testing.T) {
	t.Parallel()
	e := start(t, "ratelimit", signed(""))
	passed := func(token string, requests int) (n int) {
		for range requests {
			if pull(t, e.urls[0], token).status == http.StatusOK {
				n++
			}
		}
		return n
	}
	if n := passed(token("ann", "Personal"), 20); n != 10 {
		t.Errorf("%d of 20 passed as Personal, want 10", n)
	}
	if n := passed(token("ann", "Team"), 80); n != 80 {
		t.Errorf("%d of 80 passed after the upgrade, want all", n)
	}
}

func TestCountersAreSharedByConfigurationsOfOneVM(t *testing.T) {
	t.Parallel()
	e := start(t, "ratelimit", signed(""), signed(`,"paths":["/"]`))
	ann := token("ann", "Personal")
	for i := range 10 {
		if got := pull(t, e.urls[i%2], ann); got.status != http.StatusOK {
			t.Fatalf("request %d: status %d", i, got.status)
		}
	}
	for _, url := range e.urls {
		if got := pull(t, url, ann); got.status != http.StatusTooManyRequests {
			t.Errorf("the eleventh request: status %d, want 429", got.status)
		}
	}
}

func TestAFullTableLetsNobodyPassUnlimited(t *testing.T) {
	t.Parallel()
	// A limit of 1 refills in a minute, so that no place is free again during the test.
	e := start(t, "ratelimit", signed(`,"plans":{"One":1},"maxUsers":8`))
	var passed, refused int
	for round := range 3 {
		for user := range 40 {
			switch got := pull(t, e.urls[0], token(fmt.Sprint("user-", user), "One")); got.status {
			case http.StatusOK:
				passed++
			case http.StatusTooManyRequests:
				refused++
				if got.header.Get("Retry-After") == "" {
					t.Error("a refusal has no Retry-After")
				}
			default:
				t.Fatalf("round %d, user %d: status %d", round, user, got.status)
			}
		}
	}
	if passed != 8 || refused != 112 {
		t.Errorf("%d passed and %d were refused, want 8 and 112", passed, refused)
	}
}

func TestArbitraryRequestsNeverTrap(t *testing.T) {
	t.Parallel()
	e := start(t, "ratelimit", signed(`,"maxUsers":50`), `{"auth":{"mode":"unsigned"},"maxUsers":50}`)
	random := rand.New(rand.NewPCG(1, 2))
	seeds := []string{
		"Bearer " + token("ann", "Personal"),
		"Bearer " + token("ann", "Gold"),
		base64.StdEncoding.EncodeToString([]byte(`{"username":"ann","plan":"Personal"}`)),
		base64.StdEncoding.EncodeToString([]byte(`{"username":["ann"],"plan":{"":null}}`)),
		base64.StdEncoding.EncodeToString([]byte("\xff\xfe{\"username\":\"\\ud800\"}")),
		strings.Repeat("A", 5000),
		strings.Repeat("[", 3000),
		sign(`{"alg":"HS256"}`, strings.Repeat(`[`, 100)),
		sign(`{"alg":"HS256"}`, `{"sub":"a","plan":"Team","exp":99999999999999999999}`),
		sign(`{"alg":"HS256"}`, `{"sub":"a","plan":"Team","exp":9223372036854775807,"nbf":-9223372036854775808}`),
	}
	paths := []string{"/pull", "/pull", "/pull/x", "/%70ull", "/pull%", "/pull%f", "/..", "/%2e%2e/%2e%2e/pull", "/;;;\\", "/%00", "/%ff%fe"}
	statuses := map[int]int{}
	statusLine := regexp.MustCompile(`^HTTP/1\.1 (\d{3}) `)
	for i := range 3000 {
		// Written by hand: Go's client refuses what a hostile one sends.
		value := seeds[random.IntN(len(seeds))]
		if random.IntN(4) > 0 {
			value = mutate(random, value)
		}
		path := paths[random.IntN(len(paths))]
		if random.IntN(4) == 0 {
			path = mutate(random, path)
		}
		host := strings.TrimPrefix(e.urls[i%2], "http://")
		request := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\n", []string{"GET", "OPTIONS"}[random.IntN(2)], path, value)
		if random.IntN(2) == 0 {
			request += fmt.Sprintf("Origin: %s\r\nAccess-Control-Request-Method: %s\r\n", mutate(random, "https://a.example"), mutate(random, "GET"))
		}
		status := exchange(t, host, request+"Connection: close\r\n\r\n", statusLine)
		statuses[status]++
	}
	// 400, 404 and 0 (no answer) are Envoy's own refusals of what is no HTTP or no path.
	for status := range statuses {
		if !slices.Contains([]int{0, 200, 204, 400, 401, 403, 404, 429}, status) {
			t.Errorf("status %d: %d times", status, statuses[status])
		}
	}
	if statuses[401] < 500 || statuses[200] == 0 || statuses[429] == 0 {
		t.Errorf("the requests hardly reached the filter: %v", statuses)
	}
	t.Logf("statuses: %v", statuses)
	e.mustNotHaveTrapped(t)
	for _, url := range e.urls {
		if got := pull(t, url, ""); got.status != http.StatusUnauthorized {
			t.Errorf("afterwards, a request without token: status %d, want 401", got.status)
		}
	}
}

// exchange sends bytes on a connection of their own and returns the response's status, or
// 0 if the peer answered nothing.
func exchange(t *testing.T, host, request string, statusLine *regexp.Regexp) int {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, request); err != nil {
		return 0
	}
	head := make([]byte, 64)
	n, _ := io.ReadAtLeast(conn, head, 13)
	match := statusLine.FindSubmatch(head[:n])
	if match == nil {
		return 0
	}
	status, _ := strconv.Atoi(string(match[1]))
	return status
}

// mutate changes a few bytes of a text, or none. Control characters and spaces are left
// out: Envoy refuses them before any filter runs.
func mutate(random *rand.Rand, text string) string {
	out := []byte(text)
	for range random.IntN(4) {
		at := random.IntN(len(out) + 1)
		change := byte('!' + random.IntN(0x7f-'!'))
		if random.IntN(8) == 0 {
			change = byte(0x80 + random.IntN(0x80))
		}
		switch random.IntN(8) {
		case 0:
			out = out[:at]
		case 1, 2, 3:
			out = slices.Insert(out, at, change)
		default:
			if at < len(out) {
				out[at] = change
			}
		}
	}
	return string(out)
}

func TestABadConfigurationIsRefusedWithOneClearLine(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, module, config, want string }{
		{"unknown field", "ratelimit", signed(`,"burst":1`), "ratelimit: configuration refused: burst: is not a known field; use one of plans"},
		{"no key", "ratelimit", `{"auth":{"mode":"jwt"}}`, "ratelimit: configuration refused: auth.key: is missing; give the key"},
		{"short key", "ratelimit", `{"auth":{"mode":"jwt","key":"my-secret"}}`, "auth.key: is shorter than 32 bytes"},
		{"no configuration", "ratelimit", "", "configuration: is no JSON"},
		{"headers", "headers", `{"response":{"a b":"c"}}`, "headers: configuration refused: response.a b: is not a header name; use"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			e, cmd := launch(t, test.module, test.config)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
			defer stop()
			if err := cmd.Wait(); err == nil || ctx.Err() != nil {
				t.Fatalf("Envoy ran with it: %v, %v", err, ctx.Err())
			}
			log, err := os.ReadFile(e.log)
			if err != nil {
				t.Fatal(err)
			}
			lines := 0
			for line := range strings.Lines(string(log)) {
				if strings.Contains(line, "configuration refused") {
					lines++
					if !strings.Contains(line, test.want) {
						t.Errorf("line %q, want one that contains %q", line, test.want)
					}
				}
			}
			if lines != 1 {
				t.Errorf("%d lines about the configuration, want 1:\n%s", lines, log)
			}
			if bytes.Contains(log, []byte("my-secret")) {
				t.Error("the log tells the key")
			}
		})
	}
}

func TestHeadersSetsRequestAndResponseHeaders(t *testing.T) {
	t.Parallel()
	e := start(t, "headers", `{"request":{"x-from":"gateway"},"response":{"X-Served-By":"shop","access-control-allow-origin":"*"}}`)
	got := send(t, http.DefaultClient, http.MethodGet, e.urls[0]+"/", "X-From", "client")
	want := map[string]string{"X-Seen-From": "gateway", "X-Served-By": "shop", "Access-Control-Allow-Origin": "*"}
	for name, value := range want {
		if values := got.header.Values(name); !slices.Equal(values, []string{value}) {
			t.Errorf("%s: %q, want %q", name, values, value)
		}
	}
	e.mustNotHaveTrapped(t)
}

func TestTheProbeDoesWhatItsConfigurationSaysAndATrapIsSeen(t *testing.T) {
	t.Parallel()
	e := start(t, "probe",
		`{"stamp":{"header":"x-order","value":"a"},"env":"SHOP","localReply":{"path":"/reply","status":418},"logOnRequest":"a request came"}`,
		`{"env":"NONE"}`, "", `{"trapPath":"/trap"}`)
	got := send(t, http.DefaultClient, http.MethodGet, e.urls[0]+"/")
	if got.status != http.StatusOK || got.header.Get("X-Order") != "a" || got.header.Get("X-Probe-Env") != "books" {
		t.Errorf("status %d, headers %v", got.status, got.header)
	}
	if got := send(t, http.DefaultClient, http.MethodGet, e.urls[0]+"/reply?x"); got.status != http.StatusTeapot {
		t.Errorf("the local reply: status %d, want 418", got.status)
	}
	if got := send(t, http.DefaultClient, http.MethodGet, e.urls[1]+"/").header.Get("X-Probe-Env"); got != "(unset)" {
		t.Errorf("an unset variable: %q", got)
	}
	if got := send(t, http.DefaultClient, http.MethodGet, e.urls[2]+"/"); got.status != http.StatusOK {
		t.Errorf("without configuration: status %d", got.status)
	}
	e.mustNotHaveTrapped(t)
	if got := send(t, http.DefaultClient, http.MethodGet, e.urls[3]+"/trap"); got.status != http.StatusServiceUnavailable {
		t.Errorf("the trapping request: status %d, want 503", got.status)
	}
	if told := e.traps(t); len(told) == 0 {
		t.Error("Envoy tells of no trap: the tests would not see one")
	}
}

func TestEveryModuleHasItsDigestBesideItAndFitsItsSize(t *testing.T) {
	t.Parallel()
	if names, want := filters.Names(), []string{"headers", "ratelimit"}; !slices.Equal(names, want) {
		t.Fatalf("names %q, want %q", names, want)
	}
	for _, name := range filters.Names() {
		wasm, ok := filters.Builtin(name)
		if !ok {
			t.Fatalf("no module %s", name)
		}
		line, err := os.ReadFile(name + ".wasm.sha256")
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("%x  %s.wasm\n", sha256.Sum256(wasm), name); string(line) != want {
			t.Errorf("%s.wasm.sha256 holds %q, want %q", name, line, want)
		}
		if len(wasm) > 200_000 {
			t.Errorf("%s has %d bytes, more than 200 KB", name, len(wasm))
		}
	}
	if _, ok := filters.Builtin("../filters/headers"); ok {
		t.Error("a path is taken for a name")
	}
}
