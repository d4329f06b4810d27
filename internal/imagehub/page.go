package imagehub

import (
	"bytes"
	"embed"
	"fmt"
	"html/template"
	"net/http"
)

//go:embed page
var pageFiles embed.FS

// pagePolicy lets the page load its own files and call its own API, and nothing else: what a user or an API answer puts
// into it can neither run nor send anything anywhere.
const pagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// pages registers the page and its files.
func (a *App) pages() error {
	index, err := template.ParseFS(pageFiles, "page/index.html.tmpl")
	if err != nil {
		return fmt.Errorf("parse the page: %w", err)
	}
	var body bytes.Buffer
	if err := index.Execute(&body, Plans()); err != nil {
		return fmt.Errorf("make the page: %w", err)
	}
	// Exactly /: it overlaps with no other route, which "GET /" would.
	a.handle("/{$}", file("text/html; charset=utf-8", body.Bytes()), http.MethodGet, http.MethodHead)
	for name, kind := range map[string]string{
		"page.css": "text/css; charset=utf-8",
		"page.js":  "text/javascript; charset=utf-8",
		"icon.svg": "image/svg+xml",
	} {
		data, err := pageFiles.ReadFile("page/" + name)
		if err != nil {
			return fmt.Errorf("read the page: %w", err)
		}
		a.handle("/"+name, file(kind, data), http.MethodGet, http.MethodHead)
	}
	return nil
}

func file(kind string, data []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		h := w.Header()
		h.Set("Content-Type", kind)
		h.Set("Content-Security-Policy", pagePolicy)
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("X-Frame-Options", "DENY")
		_, _ = w.Write(data) // fails only when the client has left
	}
}
