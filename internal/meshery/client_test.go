package meshery

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

func client(t *testing.T, o Options) *Client {
	t.Helper()
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func writeFile(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "auth.json")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// serve answers with a handler until the test ends.
func serve(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

func TestTheCookiesAreThoseOfMesheryctl(t *testing.T) {
	for story, c := range map[string]struct {
		file, provider, want string
	}{
		"mesheryctl's file":              {`{"meshery-provider":"Meshery","token":"abc.def"}`, "", "meshery-provider=Meshery; token=abc.def"},
		"a token alone":                  {"abc.def\n", "", "token=abc.def"},
		"a provider of another name":     {`{"meshery-provider":"Meshery","token":"abc"}`, "Layer5", "meshery-provider=Layer5; token=abc"},
		"a provider with nobody's token": {"", "None", "meshery-provider=None"},
	} {
		var got []string
		url := serve(t, func(w http.ResponseWriter, r *http.Request) {
			for _, c := range r.Cookies() {
				got = append(got, c.String())
			}
		})
		o := Options{Server: url, Provider: c.provider}
		if c.file != "" {
			o.TokenFile = writeFile(t, c.file)
		}
		if _, err := client(t, o).Do(t.Context(), "GET", "/api/user", "", nil, 10); err != nil {
			t.Errorf("%s: %v", story, err)
		}
		if len(got) == 2 && got[0] > got[1] {
			got[0], got[1] = got[1], got[0]
		}
		if s := strings.Join(got, "; "); s != c.want {
			t.Errorf("%s: the cookies are %q, want %q", story, s, c.want)
		}
	}
}

func TestATokenFileThatIsNoneIsRefusedWithoutShowingIt(t *testing.T) {
	for _, text := range []string{"", "{", `{"token":""}`, "two secret words", "sec\x00ret", `{"token":"sec;ret"}`, strings.Repeat("secret", 20_000)} {
		c := client(t, Options{Server: "http://127.0.0.1:1", TokenFile: writeFile(t, text)})
		_, err := c.Do(t.Context(), "GET", "/", "", nil, 10)
		if !errors.Is(err, problem.MesheryToken) || strings.Contains(err.Error(), "ret") {
			t.Errorf("%.20q: %v", text, err)
		}
	}
	c := client(t, Options{Server: "http://127.0.0.1:1", TokenFile: filepath.Join(t.TempDir(), "none")})
	if _, err := c.Do(t.Context(), "GET", "/", "", nil, 10); !errors.Is(err, problem.MesheryToken) {
		t.Errorf("of a file that is missing: %v", err)
	}
}

func TestAServerThatRepeatsTheTokenDoesNotHaveItShown(t *testing.T) {
	const token = "eyJhbGciOi.JSUzI1"
	raw := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			io.WriteString(conn, text)
		}
	}
	for story, answer := range map[string]http.HandlerFunc{
		"a page about a mistake": func(w http.ResponseWriter, r *http.Request) { http.Error(w, r.Header.Get("Cookie"), 500) },
		"a reason":               raw("HTTP/1.1 401 no " + token + "\r\nContent-Length: 0\r\n\r\n"),
		"no HTTP at all":         raw("HTTP/1.1 " + token + "\r\n\r\n"),
	} {
		a, err := client(t, Options{Server: serve(t, answer), TokenFile: writeFile(t, token)}).Do(t.Context(), "GET", "/api", "", nil, 1000)
		if err == nil {
			err = a.Refusal("GET /api")
		}
		if err == nil || strings.Contains(err.Error(), token) {
			t.Errorf("%s: %v", story, err)
		}
	}
}

func TestAnswersBecomeTheProblemsThatTheyAre(t *testing.T) {
	file := writeFile(t, "the-token")
	for story, c := range map[string]struct {
		answer http.HandlerFunc
		want   *problem.Kind
	}{
		"401":              {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) }, problem.MesheryUnauthorized},
		"403":              {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) }, problem.MesheryUnauthorized},
		"the sign-in page": {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/provider?ref=x", http.StatusFound) }, problem.MesheryUnauthorized},
		"too long":         {func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 101)) }, problem.MesheryRefused},
		"breaks off":       {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, problem.MesheryUnreachable},
		"slower than we are": {func(_ http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body) // only then the server notices that the client has gone
			<-r.Context().Done()
		}, problem.MesheryUnreachable},
	} {
		var asked atomic.Int32
		url := serve(t, func(w http.ResponseWriter, r *http.Request) { asked.Add(1); c.answer(w, r) })
		_, err := client(t, Options{Server: url, TokenFile: file, Timeout: 200 * time.Millisecond}).Do(t.Context(), "POST", "/api", "", []byte("x"), 100)
		if !errors.Is(err, c.want) || strings.Contains(err.Error(), "the-token") || asked.Load() != 1 {
			t.Errorf("%s: asked %d times, %v", story, asked.Load(), err)
		}
	}
	for _, server := range []string{"http://127.0.0.1:1", "http://169.254.169.254", "http://[fd00:ec2::254]"} {
		if _, err := client(t, Options{Server: server, TokenFile: file}).Do(t.Context(), "GET", "/", "", nil, 1); !errors.Is(err, problem.MesheryUnreachable) {
			t.Errorf("%s: %v", server, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := client(t, Options{Server: "http://127.0.0.1:1"}).Do(ctx, "GET", "/", "", nil, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("of a caller who has gone: %v", err)
	}
	a := &Answer{Status: 400, Body: []byte(strings.Repeat("ü", 400))}
	if err := a.Refusal("POST /api"); !errors.Is(err, problem.MesheryRefused) || len(err.Error()) > 700 {
		t.Errorf("a refusal: %v", err)
	}
	for _, server := range []string{"", "localhost:9081", "ftp://host", "http://me:secret@host", "http://"} {
		if _, err := New(Options{Server: server}); !errors.Is(err, problem.InvalidConfiguration) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", server, err)
		}
	}
}
