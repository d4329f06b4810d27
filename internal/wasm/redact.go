package wasm

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"slices"
	"strings"
	"unicode"
)

const (
	redacted = "[redacted]"
	// Shorter values are no secrets, and replacing them would leave nothing of a text readable.
	shortestSecret = 4
	maxLines       = 200
	maxLine        = 4 << 10 // bytes
	// What is kept of a line beyond maxLine until it is redacted, so that the cut cannot leave the beginning
	// of a secret behind.
	maxOverhang = 64 << 10
)

// redactor replaces secrets in texts. It knows a value as it is, as it stands in JSON, in base64, and the
// lines of one that has several.
type redactor struct {
	forms    [][]byte
	overhang int
}

func newRedactor(secrets []string) redactor {
	var r redactor
	add := func(form string) {
		if len(form) >= shortestSecret && !slices.ContainsFunc(r.forms, func(f []byte) bool { return string(f) == form }) {
			r.forms = append(r.forms, []byte(form))
			r.overhang = min(maxOverhang, max(r.overhang, len(form)))
		}
	}
	for _, secret := range secrets {
		if len(secret) < shortestSecret {
			continue
		}
		add(secret)
		add(strings.TrimSpace(secret))
		for line := range strings.Lines(secret) {
			add(strings.TrimSpace(line))
		}
		for _, html := range []bool{false, true} {
			var b bytes.Buffer
			e := json.NewEncoder(&b)
			e.SetEscapeHTML(html)
			if e.Encode(secret) == nil {
				add(strings.Trim(strings.TrimSpace(b.String()), `"`))
			}
		}
		add(base64.RawStdEncoding.EncodeToString([]byte(secret)))
		add(base64.RawURLEncoding.EncodeToString([]byte(secret)))
	}
	return r
}

// texts redacts texts that came one after the other. A secret that is spread over several is found as well.
func (r redactor) texts(in []string) []string {
	joined := []byte(strings.Join(in, ""))
	secret := make([]bool, len(joined))
	for _, form := range r.forms {
		for at := 0; ; {
			i := bytes.Index(joined[at:], form)
			if i < 0 {
				break
			}
			at += i
			for j := range form {
				secret[at+j] = true
			}
			at++
		}
	}
	out := make([]string, len(in))
	at := 0
	for i, text := range in {
		var b strings.Builder
		for j := range len(text) {
			switch {
			case !secret[at+j]:
				b.WriteByte(text[j])
			case j == 0 || !secret[at+j-1]:
				b.WriteString(redacted)
			}
		}
		at += len(text)
		out[i] = b.String()
	}
	return out
}

func (r redactor) text(s string) string { return r.texts([]string{s})[0] }

// clip makes a foreign text fit for logs and terminals: valid, without control characters and of at most n
// bytes.
func clip(s string, n int) string {
	s = strings.Map(func(c rune) rune {
		if c != '\n' && c != '\t' && !unicode.IsPrint(c) {
			return unicode.ReplacementChar
		}
		return c
	}, strings.ToValidUTF8(s, string(unicode.ReplacementChar)))
	if len(s) > n {
		s = strings.ToValidUTF8(s[:n], "") + "…"
	}
	return s
}
