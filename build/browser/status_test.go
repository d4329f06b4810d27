package browser

import (
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// headers is a document of the builtin headers filter, in JSON, which is YAML.
func headers(name, group string, more map[string]any) string {
	spec := map[string]any{"target": map[string]string{"kind": "ProxyGroup", "name": group}, "module": map[string]string{"builtin": "headers"},
		"config": map[string]any{"response": map[string]string{"x-" + name: "yes"}}}
	for k, v := range more {
		spec[k] = v
	}
	data, err := json.Marshal(map[string]any{"apiVersion": "filters.meshery.io/v1alpha1", "kind": "Filter", "metadata": map[string]string{"name": name}, "spec": spec})
	if err != nil {
		panic(err) // maps and strings always encode
	}
	return string(data)
}

func TestTheAdaptersPageShowsARolloutAsItHappens(t *testing.T) {
	t.Parallel()
	a := newAdapter(t)
	b := newTab(t)
	b.open("http://" + a.addresses.HTTP + "/")
	b.shows("#link", "Live")
	b.shows("#summary", "No targets")
	b.shows("#none", "No proxy is connected")
	b.shoot("status-empty")

	// Two Envoys come: the page shows them by itself.
	upstream := a.imageHub()
	_, stop := a.proxy("edge-1", "edge", upstream)
	a.proxy("edge-2", "edge", upstream)
	b.shows("#summary", "1 target, 2 proxies, none drifted")
	b.shows(".target", "ProxyGroup edge", "no filters", "edge-1", "edge-2", "1.4", "2 proxies running")
	b.named()

	// Filters come: the chain in its order, and the event that says so, live.
	a.command(headers("last", "edge", nil), "apply", "-f", "-")
	a.command(headers("early", "edge", map[string]any{"phase": "authn", "priority": 5, "failurePolicy": "open"}), "apply", "-f", "-")
	b.shows("#events li:first-child", "default/early", "runs on ProxyGroup edge", "2 of 2 proxies", "last")
	b.until("[...document.querySelectorAll('.chain .name')].map((e) => e.textContent).join() === 'default/early,default/last'", "document.querySelector('.target').innerText")
	b.shows(".target", "as applied", "builtin headers", "authn", "priority 5", "on failure open", "sha256", "version")
	b.shows("#announce", "default/early") // as a screen reader hears it
	var chains struct {
		Targets []struct {
			Target, Version string
			Drifted         bool
			Filters         []struct{ Name, SHA256 string }
		}
	}
	if err := json.Unmarshal([]byte(a.command("", "status", "-o", "json")), &chains); err != nil || len(chains.Targets) != 1 {
		t.Fatalf("%+v, %v", chains, err)
	}
	b.shows(".target", chains.Targets[0].Version, chains.Targets[0].Filters[0].SHA256[:12])
	b.shoot("status-applied")

	// A failure is an event with its code and what to do.
	if code, out := a.try(headers("broken", "edge", map[string]any{"config": map[string]any{"nonsense": true}}), "apply", "-f", "-"); code == 0 {
		t.Errorf("a broken configuration is applied: %s", out)
	}
	b.shows("#events li:first-child", "Error", "default/broken", "meshery-filters-1014")
	b.click("#events li:first-child summary")
	b.shows("#events li:first-child details", "What to do", "nonsense")
	b.click("#only")
	var visible int
	b.js("[...document.querySelectorAll('#events li')].filter((e) => e.offsetHeight > 0).length", &visible)
	if visible != 1 {
		t.Errorf("%d events are warnings or errors", visible)
	}
	b.shoot("status-error")
	b.click("#only")

	// Pausing keeps the list still, and nothing is lost.
	b.tabTo("pause")
	b.keys(keySpace)
	a.command("", "remove", "early")
	b.shows("#paused", "happened meanwhile")
	if text := b.text("#events li:first-child"); !strings.Contains(text, "default/broken") {
		t.Errorf("while paused the first event is %q", text)
	}
	b.keys(keySpace)
	b.shows("#events li:first-child", "default/early removed from ProxyGroup edge")

	// A proxy leaves, and the page says so.
	stop()
	b.shows("#summary", "1 target, 1 proxy")

	// Everything has a place on a telephone too.
	b.resize(390, 900)
	b.shoot("status-narrow")
	var over int
	b.js("document.documentElement.scrollWidth - document.documentElement.clientWidth", &over)
	if over > 0 {
		t.Errorf("on a telephone the page is %d pixels too wide", over)
	}
	b.named()
	b.clean()
}

func TestTheAdaptersPageShowsWhatDriftsAndAChangeThatWaits(t *testing.T) {
	t.Parallel()
	a := newAdapter(t)
	b := newTab(t, "--force-dark-mode")
	b.open("http://localhost:" + a.addresses.HTTP[strings.LastIndex(a.addresses.HTTP, ":")+1:] + "/")
	b.shows("#link", "Live")
	upstream := a.imageHub()

	// Nobody is there to refuse what no Envoy can load, so it is applied; the one that comes later drifts. Its name tries
	// to be more than a text.
	const name = `<img src=x onerror=document.title='caught'>`
	nowhere := filepath.Join(t.TempDir(), "nowhere")
	a.command(headers("lost", "edge", map[string]any{"delivery": map[string]string{"mode": "local", "localPath": nowhere}}), "apply", "-f", "-")
	b.shows(".target", "ProxyGroup edge", "waits for a proxy")
	a.startProxy(name, "edge", upstream)
	b.shows(".target", "drifted", name, "rejected", "Invalid path: "+nowhere)
	b.shows("#summary", "1 target, 1 proxy, 1 drifted")
	b.shows("#events li:first-child", "Error", "a proxy rejected its chain", "meshery-filters-1020")
	b.shows("#announce", "a proxy rejected its chain")
	b.until("document.title === '(1) meshery-filters'", "document.title")
	b.shoot("status-drifted")

	// One that is stopped does not answer: the change waits, and the page says so until it goes on.
	p, _ := a.startProxy("slow-1", "slow", upstream)
	b.shows("[aria-labelledby]:nth-child(2)", "ProxyGroup slow", "no filters", "running")
	if err := syscall.Kill(p.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	applied := make(chan string, 1)
	go func() {
		_, out := a.try(headers("waits", "slow", nil), "apply", "-f", "-")
		applied <- out
	}()
	b.shows("[aria-labelledby]:nth-child(2)", "rolling out", "A change is under way", "waiting", "Requests meet no filter")
	b.shoot("status-rolling-out")
	if err := syscall.Kill(p.PID(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	b.shows("[aria-labelledby]:nth-child(2)", "as applied", "default/waits", "running")
	if out := <-applied; !strings.Contains(out, "1 of 1 proxy") {
		t.Errorf("the apply ended with: %s", out)
	}
	b.clean()
}

func TestTheAdaptersPageIsRefusedUnderAForeignName(t *testing.T) {
	t.Parallel()
	a := newAdapter(t)
	port := a.addresses.HTTP[strings.LastIndex(a.addresses.HTTP, ":")+1:]
	// The name is foreign, and resolved to this machine: DNS rebinding as a browser sees it.
	b := newTab(t, "--host-resolver-rules=MAP evil.example 127.0.0.1")
	b.open(fmt.Sprintf("http://evil.example:%s/", port))
	b.shows("body", "served to this machine only")
	var status int
	b.js(fmt.Sprintf("fetch('http://evil.example:%s/api/state').then((r) => r.status)", port), &status)
	if status != http.StatusMisdirectedRequest {
		t.Errorf("its script gets %d", status)
	}
	// From its own address it is there, and a page of another port of this machine may not read it.
	b.open("http://" + a.addresses.HTTP + "/")
	b.shows("#link", "Live")
	b.open("http://" + a.imageHub() + "/healthz")
	var read string
	b.js(fmt.Sprintf("fetch('http://%s/api/state').then((r) => r.text(), (e) => 'refused: ' + e.name)", a.addresses.HTTP), &read)
	if read != "refused: TypeError" {
		t.Errorf("another page reads %q", read)
	}
}
