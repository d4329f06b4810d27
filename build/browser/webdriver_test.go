package browser

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// tab is a page in a headless Chromium, driven over W3C WebDriver, which is JSON over HTTP.
type tab struct {
	t       *testing.T
	session string // URL
	client  *http.Client
}

// Keys as WebDriver spells them.
const (
	keyTab   = "\ue004"
	keyEnter = "\ue007"
	keySpace = "\ue00d"
	keyDown  = "\ue015"
)

// chromeFlags keep the browser from everything but the page. Without the background flags it looks for its maker's
// hosts at every start.
var chromeFlags = []string{"--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
	"--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,1000", "--lang=en-GB"}

var driverPort = regexp.MustCompile(`started successfully on port (\d+)`)

// newTab starts a browser of its own, with an empty profile.
func newTab(t *testing.T, flags ...string) *tab {
	t.Helper()
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("%v; build/chromium.sh installs it", err)
	}
	driver := exec.Command("chromedriver", "--port=0")
	// Its own group, so that the browser goes with it whatever happens.
	driver.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	driver.WaitDelay = 5 * time.Second
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	driver.Stdout, driver.Stderr = in, in
	err = driver.Start()
	in.Close()
	if err != nil {
		out.Close()
		t.Fatalf("%v; build/chromium.sh installs it", err)
	}
	port := make(chan string, 1)
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer close(port)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if m := driverPort.FindStringSubmatch(lines.Text()); m != nil {
				port <- m[1]
			}
		}
	}()
	t.Cleanup(func() {
		_ = syscall.Kill(-driver.Process.Pid, syscall.SIGKILL)
		_ = driver.Wait()
		out.Close()
		<-read
	})
	b := &tab{t: t, client: &http.Client{Timeout: patience}}
	t.Cleanup(b.client.CloseIdleConnections)
	select {
	case p, ok := <-port:
		if !ok {
			t.Fatal("chromedriver ended before it said its port")
		}
		b.session = "http://127.0.0.1:" + p + "/session"
	case <-time.After(patience):
		t.Fatalf("chromedriver did not say its port within %s", patience)
	}
	args := append([]string{"--user-data-dir=" + t.TempDir()}, append(chromeFlags, flags...)...)
	if os.Getuid() == 0 {
		args = append(args, "--no-sandbox") // which Chromium refuses to set up as root
	}
	var made struct{ SessionID string }
	b.ask("POST", "", map[string]any{"capabilities": map[string]any{"alwaysMatch": map[string]any{
		"goog:chromeOptions": map[string]any{"binary": chromium, "args": args},
		"goog:loggingPrefs":  map[string]string{"browser": "ALL"},
	}}}, &made)
	b.session += "/" + made.SessionID
	t.Cleanup(func() {
		if t.Failed() {
			b.shoot("failed")
		}
		if _, err := b.send("DELETE", "", nil); err != nil {
			t.Errorf("close the browser: %v", err)
		}
	})
	return b
}

// send sends one command and returns its value.
func (b *tab) send(method, path string, body any) (json.RawMessage, error) {
	var data []byte
	if method == "POST" {
		if body == nil {
			body = struct{}{}
		}
		var err error
		if data, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	req, err := http.NewRequestWithContext(context.Background(), method, b.session+path, bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	resp, err := b.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct{ Value json.RawMessage }
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<20)).Decode(&answer); err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		var said struct{ Error, Message string }
		_ = json.Unmarshal(answer.Value, &said)
		first, _, _ := strings.Cut(said.Message, "\n")
		return nil, fmt.Errorf("%s: %s", said.Error, first)
	}
	return answer.Value, nil
}

func (b *tab) ask(method, path string, body, into any) {
	b.t.Helper()
	value, err := b.send(method, path, body)
	if err == nil && into != nil {
		err = json.Unmarshal(value, into)
	}
	if err != nil {
		b.t.Fatalf("%s %s: %v", method, path, err)
	}
}

func (b *tab) open(url string) {
	b.t.Helper()
	b.ask("POST", "/url", map[string]string{"url": url}, nil)
}

// js evaluates an expression in the page.
func (b *tab) js(expression string, into any) {
	b.t.Helper()
	b.ask("POST", "/execute/sync", map[string]any{"script": "return " + expression, "args": []any{}}, into)
}

// until waits for an expression to be true, and shows another when it does not become so.
func (b *tab) until(expression, instead string) {
	b.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		var yes bool
		if b.js("!!("+expression+")", &yes); yes {
			return
		}
		if time.Now().After(deadline) {
			var now any
			b.js(instead, &now)
			b.t.Fatalf("not within %s: %s\n%s is %v", patience, expression, instead, now)
		}
	}
}

// text is what an element shows.
func (b *tab) text(css string) (text string) {
	b.t.Helper()
	b.js(fmt.Sprintf("document.querySelector(%q)?.innerText ?? ''", css), &text)
	return text
}

// shows waits until an element shows all of the words.
func (b *tab) shows(css string, words ...string) {
	b.t.Helper()
	list, err := json.Marshal(words)
	if err != nil {
		b.t.Fatal(err)
	}
	text := fmt.Sprintf("(document.querySelector(%q)?.innerText ?? '')", css)
	b.until(fmt.Sprintf("%s.every((w) => %s.includes(w))", list, text), text)
}

// element finds one as WebDriver names it.
func (b *tab) element(css string) string {
	b.t.Helper()
	found := map[string]string{}
	b.ask("POST", "/element", map[string]string{"using": "css selector", "value": css}, &found)
	for _, id := range found {
		return id
	}
	b.t.Fatalf("no %s", css)
	return ""
}

// click clicks as a person does: the element must be visible and in nobody's shadow.
func (b *tab) click(css string) {
	b.t.Helper()
	b.ask("POST", "/element/"+b.element(css)+"/click", nil, nil)
}

// keys types into whatever has the focus.
func (b *tab) keys(text string) {
	b.t.Helper()
	active := map[string]string{}
	b.ask("GET", "/element/active", nil, &active)
	for _, id := range active {
		b.ask("POST", "/element/"+id+"/value", map[string]string{"text": text}, nil)
	}
}

// focused is the id of the element that has the focus.
func (b *tab) focused() (id string) {
	b.t.Helper()
	b.js("document.activeElement?.id ?? ''", &id)
	return id
}

// tabTo presses Tab until the element has the focus.
func (b *tab) tabTo(id string) {
	b.t.Helper()
	var passed []string
	for range 40 {
		if b.focused() == id {
			return
		}
		passed = append(passed, b.focused())
		b.keys(keyTab)
	}
	b.t.Fatalf("Tab does not get to %s, but to %v", id, passed)
}

// named checks that a screen reader has a name for everything that can be operated, and what role it has.
func (b *tab) named() {
	b.t.Helper()
	var found []map[string]string
	b.ask("POST", "/elements", map[string]string{"using": "css selector",
		"value": "a[href], button, input, select, summary, progress, [tabindex='0'], main, section, form[aria-labelledby]"}, &found)
	if len(found) == 0 {
		b.t.Fatal("nothing can be operated")
	}
	for _, f := range found {
		for _, id := range f {
			var shown bool
			b.ask("GET", "/element/"+id+"/displayed", nil, &shown)
			var role, label, tag string
			b.ask("GET", "/element/"+id+"/computedrole", nil, &role)
			b.ask("GET", "/element/"+id+"/computedlabel", nil, &label)
			b.ask("GET", "/element/"+id+"/name", nil, &tag)
			if shown && label == "" && tag != "main" {
				b.t.Errorf("a %s (%s) has no name", role, tag)
			}
			if shown && (role == "" || role == "generic" || role == "none") {
				b.t.Errorf("the %s %q has the role %q", tag, label, role)
			}
		}
	}
}

// clean checks that the page made the browser complain of nothing but refusals that it asked for.
func (b *tab) clean(expected ...string) {
	b.t.Helper()
	var log []struct{ Level, Message string }
	b.ask("POST", "/se/log", map[string]string{"type": "browser"}, &log)
	for _, l := range log {
		known := false
		for _, e := range expected {
			known = known || strings.Contains(l.Message, e)
		}
		if !known {
			b.t.Errorf("the browser says: %s %s", l.Level, l.Message)
		}
	}
}

// shoot takes a picture of the whole page; `go test -artifacts` keeps it.
func (b *tab) shoot(name string) {
	b.t.Helper()
	value, err := b.send("GET", "/screenshot", nil)
	var text string
	if err == nil {
		err = json.Unmarshal(value, &text)
	}
	var png []byte
	if err == nil {
		png, err = base64.StdEncoding.DecodeString(text)
	}
	if err == nil && len(png) == 0 {
		err = errors.New("it is empty")
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(b.t.ArtifactDir(), name+".png"), png, 0o600)
	}
	if err != nil {
		b.t.Errorf("take a picture: %v", err)
	}
}

// resize sets the window's size.
func (b *tab) resize(width, height int) {
	b.t.Helper()
	b.ask("POST", "/window/rect", map[string]int{"width": width, "height": height}, nil)
}
