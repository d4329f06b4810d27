package cli

import (
	"encoding/base64"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
	"github.com/meshery/meshery-filters/filters"
)

// TestProxiesFetchModulesFromTheAdapter has Istio's own agents fetch them.
func TestProxiesFetchModulesFromTheAdapter(t *testing.T) {
	agent := func(o *istiotest.ProxyOptions) { o.Agent = true }
	m := newIstioMesh(t, agent)
	// The address that proxies know stands before the adapter's, and can be closed to some of those who come.
	var behind atomic.Pointer[url.URL]
	var fromAgents atomic.Int64
	var agentsMay, adapterMay, forged atomic.Bool
	agentsMay.Store(true)
	adapterMay.Store(true)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		may := &agentsMay
		if r.UserAgent() == "meshery-filters" {
			may = &adapterMay
		} else {
			fromAgents.Add(1)
		}
		if !may.Load() {
			http.Error(w, "not now", http.StatusForbidden)
			return
		}
		if forged.Load() && may == &agentsMay {
			_, _ = io.WriteString(w, "\x00asm\x01\x00\x00\x00")
			return
		}
		httputil.NewSingleHostReverseProxy(behind.Load()).ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	a := newAdapter(t, "--modules-addr", "127.0.0.1:0", "--modules-url", front.URL)
	behind.Store(&url.URL{Scheme: "http", Host: a.at.Modules})
	dir, whole := t.TempDir(), m.as(t, wholeUser)
	doc := func(name, module, value string) string {
		return put(t, dir, "d.yaml", istioDocument(name, "mesh: istio\n"+toLabels+"module: "+module+"\nphase: authz\nconfig: {response: {x-there: "+value+"}}"))
	}
	served := func(code int, value string, words ...string) {
		t.Helper()
		a.cli("apply", "-f", doc("x", "{builtin: headers}", value), "--kubeconfig", whole).want(t, code, words...)
	}

	// What the adapter cannot fetch, no proxy hears of.
	adapterMay.Store(false)
	served(exitFailed, "none", "meshery-filters-1090", "status 403", front.URL+"/modules/")
	m.answer(t, "")
	if n := fromAgents.Load(); n != 0 {
		t.Errorf("agents have asked %d times", n)
	}
	adapterMay.Store(true)

	// Under load, from the first time on.
	stop := m.load(t)
	served(exitOK, "one", "TrafficExtension/shop/x-api-", "created", "2 of 2 proxies")
	m.answer(t, "one")
	if n := fromAgents.Load(); n < 2 {
		t.Errorf("two agents have asked %d times", n)
	}
	served(exitOK, "two", "updated", "2 of 2 proxies")
	m.answer(t, "two")

	// The server goes, and comes back: those that run do not notice, and nothing is changed meanwhile.
	agentsMay.Store(false)
	adapterMay.Store(false)
	served(exitFailed, "three", "meshery-filters-1090")
	m.answer(t, "two")
	agentsMay.Store(true)
	adapterMay.Store(true)
	if asked, failed := stop(); len(failed) > 0 || asked < 100 {
		t.Errorf("of %d requests meanwhile %d failed: %v", asked, len(failed), failed)
	}

	// A proxy that starts later fetches it, too.
	later := istiotest.ProxyOptions{Namespace: "shop", Pod: "api-3", Labels: map[string]string{"app": "api"}}
	agent(&later)
	m.add(t, later)
	m.answer(t, "two")
	a.cli("remove", "shop/x", "--kubeconfig", whole).want(t, exitOK, "removed from", "3 of 3 proxies")
	m.answer(t, "")

	// A network that keeps the proxies away, or gives them other bytes, is not seen before. One proxy finds out, and what comes
	// of it is taken back.
	agentsMay.Store(false)
	another := doc("y", "{inline: "+anotherModule(t)+"}", "four")
	for range 2 {
		stop = m.load(t)
		a.cli("apply", "-f", another, "--kubeconfig", whole).want(t, exitFailed, "y-api", "by proxy shop/api-1", "could not fetch its module")
		_, failed := stop()
		if len(failed) == 0 || slices.ContainsFunc(failed, func(f string) bool { return !strings.HasPrefix(f, "api-1: 403") }) {
			t.Errorf("not only requests to the first proxy failed: %v", failed)
		}
		m.answer(t, "")
		agentsMay.Store(true)
		forged.Store(true)
	}
}

// anotherModule is the module headers with a section that makes it another, in base64.
func anotherModule(t *testing.T) string {
	t.Helper()
	data, ok := filters.Builtin("headers")
	if !ok {
		t.Fatal("there is no module headers")
	}
	section := "\x07another" // a name and its length, and nothing else
	data = append(append(slices.Clone(data), 0, byte(len(section))), section...)
	return base64.StdEncoding.EncodeToString(data)
}
