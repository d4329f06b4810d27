package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestTrySendsRequestsThroughTheFilter(t *testing.T) {
	realEnvoy(t)
	r := run(t, "try", probe, "--config", `{"stamp":{"header":"x-stamp","value":"tried"},"logOnRequest":"seen: it"}`,
		"--path", "/a?b=c", "--path", "z", "-H", "X-User: ann", "--once").want(t, exitOK)
	for _, want := range []string{"Envoy 1.", "listens at http://127.0.0.1:", "is loaded", "[info] seen: it", "GET /a?b=c: 200 OK", "  x-stamp: tried",
		"  | GET /a?b=c", "  | x-user: ann", "GET z: 200 OK", "  | GET /z", "Statistics:", "downstream_rq_2xx: 2", "latency in ms: P50"} {
		if !strings.Contains(r.out, want) {
			t.Errorf("no %q in:\n%s%s", want, r.out, r.err)
		}
	}
}

func TestTryShowsACrash(t *testing.T) {
	realEnvoy(t)
	run(t, "try", probe, "--config", `{"trapPath":"/trap"}`, "--path", "/trap", "--failure-policy", "open", "--path", "/next", "--once").
		want(t, exitOK, "GET /trap: 503", "[envoy error]", "unreachable", "GET /next: 200")
}

func TestTryEndsWithTheReasonWhenTheFilterIsRefused(t *testing.T) {
	realEnvoy(t)
	run(t, "try", probe, "--config", `{"refuse":"not like this"}`).want(t, exitFailed, "not like this", "meshery-filters-1014")
	run(t, "try", "try_test.go").want(t, exitFailed, "meshery-filters-1013")
}

func TestTryReloadsOnSaveAndKeepsTheLastGoodBuild(t *testing.T) {
	realEnvoy(t)
	dir := t.TempDir()
	module, err := os.ReadFile(probe)
	if err != nil {
		t.Fatal(err)
	}
	file := put(t, dir, "My Filter.wasm", string(module))
	config := put(t, dir, "config.json", `{"stamp":{"header":"x-stamp","value":"first"}}`)
	try := start(t, nil, "try", file, "--config-file", config, "--watch")
	try.out.waitFor(t, patience, "listens at http://", "is loaded")
	url := regexp.MustCompile(`http://[0-9.:]+`).FindString(try.out.String())
	stamp := func(want string) {
		t.Helper()
		if got := fetch(t, url).Header.Get("x-stamp"); got != want {
			t.Errorf("the stamp is %q, want %q", got, want)
		}
	}
	stamp("first")

	// A configuration that is refused.
	put(t, dir, "config.json", `{"refuse":"not like this"}`)
	try.err.waitFor(t, patience, "not like this", "Nothing was changed", "next save")
	stamp("first")

	// A build that is no module, as a compiler leaves it that was stopped midway.
	put(t, dir, "config.json", `{"stamp":{"header":"x-stamp","value":"second"}}`)
	try.out.waitFor(t, patience, "is loaded", "is loaded")
	stamp("second")
	put(t, dir, filepath.Base(file), string(module[:len(module)/2]))
	try.err.waitFor(t, patience, "next save", "the module is not one that Envoy can run", "next save")
	stamp("second")

	// A build that is gone, and then a good one.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	put(t, dir, "config.json", `{"stamp":{"header":"x-stamp","value":"third"}}`)
	put(t, dir, filepath.Base(file), string(module))
	try.out.waitFor(t, patience, "is loaded", "is loaded", "is loaded")
	stamp("third")

	try.interrupt()
	if code := try.wait(t, patience); code != exitOK {
		t.Errorf("exit code %d: %s", code, try.err.String())
	}
	try.out.waitFor(t, time.Second, "Statistics:", "downstream_rq_2xx: 5")
	if n := strings.Count(try.out.String(), "listens at"); n != 1 {
		t.Errorf("the Envoy was started %d times", n)
	}
}

func TestEnvoysLogIsSiftedForTheFiltersLines(t *testing.T) {
	var out text
	l := &filterLog{screen: &screen{out: &out}, prefix: "wasm log try/a root: with colon try/a: "}
	const head = "[2026-11-24 16:04:40.123][25][%s][%s] [source/extensions/common/wasm/context.cc:1196] %s\n"
	log := fmt.Sprintf(head, "info", "wasm", "wasm log try/a root: with colon try/a: one: two") +
		"of two lines\n" +
		fmt.Sprintf(head, "info", "wasm", "wasm log other: not ours") +
		"nor this\n" +
		fmt.Sprintf(head, "debug", "wasm", "Base Wasm created 3 now active") +
		fmt.Sprintf(head, "error", "wasm", "Function: proxy_on_request_headers failed: Uncaught RuntimeError: unreachable") +
		"Proxy-Wasm plugin in-VM backtrace:\n" +
		"not a line of the log\n" +
		strings.Repeat("x", 3*maxLogLine)
	for _, piece := range regexp.MustCompile(`(?s).{1,97}`).FindAllString(log, -1) {
		if n, err := l.Write([]byte(piece)); n != len(piece) || err != nil {
			t.Fatal(n, err)
		}
	}
	got := out.String()
	const want = "[info] one: two\n  of two lines\n[envoy error] Function: proxy_on_request_headers failed: Uncaught RuntimeError: unreachable\n" +
		"  Proxy-Wasm plugin in-VM backtrace:\n  not a line of the log\n"
	if !strings.HasPrefix(got, want) {
		t.Errorf("got:\n%.2000s\nwant:\n%s", got, want)
	}
	if len(l.rest) > maxLogLine+97 {
		t.Errorf("a line without end is kept whole: %d bytes", len(l.rest))
	}
}

func TestAFilterIsNamedForItsFile(t *testing.T) {
	for file, want := range map[string]string{"a.wasm": "a", "/x/My Filter_2.wasm": "my-filter-2", "-.wasm": "filter", "": "filter",
		strings.Repeat("a", 62) + "-b.wasm": strings.Repeat("a", 62)} {
		if got := labelOf(file); got != want {
			t.Errorf("%q is named %q, want %q", file, got, want)
		}
	}
}
