package imagehub

import (
	"io/fs"
	"net/http"
	"path"
	"regexp"
	"strings"
	"testing"
)

func TestThePageLoadsNothingFromElsewhereAndCannotBeMadeTo(t *testing.T) {
	a := newApp(t, nil)
	for _, c := range []struct{ path, kind, part string }{
		{"/", "text/html; charset=utf-8", "1000 pulls a minute"},
		{"/page.js", "text/javascript; charset=utf-8", "X-RateLimit-Remaining"},
		{"/page.css", "text/css; charset=utf-8", "prefers-color-scheme"},
		{"/icon.svg", "image/svg+xml", "<svg"},
	} {
		w := send(a, "GET", c.path, "")
		want(t, w, http.StatusOK)
		h := w.Header()
		if h.Get("Content-Type") != c.kind || !strings.Contains(w.Body.String(), c.part) {
			t.Errorf("%s is %q without %q", c.path, h.Get("Content-Type"), c.part)
		}
		for name, value := range map[string]string{"Content-Security-Policy": pagePolicy, "X-Content-Type-Options": "nosniff",
			"X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "no-store"} {
			if got := h.Get(name); got != value {
				t.Errorf("%s: %s is %q", c.path, name, got)
			}
		}
		if found := regexp.MustCompile(`https?://[^"' ]*`).FindString(strings.ReplaceAll(w.Body.String(), "http://www.w3.org/2000/svg", "")); found != "" {
			t.Errorf("%s names %s", c.path, found)
		}
		if w := send(a, "HEAD", c.path, ""); w.Code != http.StatusOK {
			t.Errorf("HEAD %s: %d", c.path, w.Code)
		}
		w = send(a, "POST", c.path, "{}")
		want(t, w, http.StatusMethodNotAllowed)
		if m := mistakes(t, w); m[0].Cause != c.path+" does not answer POST" {
			t.Errorf("POST %s: %+v", c.path, m)
		}
	}
	for _, part := range []string{"'unsafe-inline'", "'unsafe-eval'", "*", "data:"} {
		if strings.Contains(pagePolicy, part) {
			t.Errorf("the policy allows %s", part)
		}
	}
}

func TestThePageHasNothingThatItsPolicyForbids(t *testing.T) {
	a := newApp(t, nil)
	html := send(a, "GET", "/", "").Body.String()
	for _, inline := range []string{`<style`, ` style=`, ` onclick=`, ` onsubmit=`, `<script>`, `javascript:`} {
		if strings.Contains(html, inline) {
			t.Errorf("the page has %s, which does not work", inline)
		}
	}
	for _, m := range regexp.MustCompile(`(?:src|href)="([^"#]+)"`).FindAllStringSubmatch(html, -1) {
		if w := send(a, "GET", "/"+m[1], ""); w.Code != http.StatusOK {
			t.Errorf("the page loads %s, which is answered with %d", m[1], w.Code)
		}
	}
	// A file that is embedded and never served would be a mistake.
	files, err := fs.Glob(pageFiles, "page/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		name := path.Base(f)
		if name == "index.html.tmpl" {
			name = ""
		}
		if w := send(a, "GET", "/"+name, ""); w.Code != http.StatusOK {
			t.Errorf("%s is not served", f)
		}
	}
}
