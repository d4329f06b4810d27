package imagehub

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"go.uber.org/goleak"
	"golang.org/x/crypto/bcrypt"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	key     = []byte("0123456789abcdef0123456789abcdef")
	morning = time.Date(2030, 1, 2, 8, 0, 0, 0, time.UTC)
)

// newApp returns an app with cheap hashes; edit may change its options.
func newApp(t *testing.T, edit func(*Options)) *App {
	t.Helper()
	o := Options{Key: key, Cost: bcrypt.MinCost}
	if edit != nil {
		edit(&o)
	}
	a, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// send sends JSON as the public page does. Headers are name, value pairs.
func send(h http.Handler, method, path, body string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func want(t *testing.T, w *httptest.ResponseRecorder, status int) {
	t.Helper()
	if w.Code != status {
		t.Fatalf("got %d %s, want %d", w.Code, w.Body, status)
	}
}

func tokenOf(t *testing.T, w *httptest.ResponseRecorder) string {
	t.Helper()
	want(t, w, http.StatusOK)
	var body map[string]string
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil || body["token"] == "" {
		t.Fatalf("no token in %s (%v)", w.Body, err)
	}
	return body["token"]
}

func mistakes(t *testing.T, w *httptest.ResponseRecorder) []Mistake {
	t.Helper()
	var body struct{ Errors []Mistake }
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil || len(body.Errors) == 0 {
		t.Fatalf("no errors in %q (%v)", w.Body, err)
	}
	for _, m := range body.Errors {
		if m.Field == "" || m.Cause == "" || m.Remedy == "" {
			t.Errorf("mistake %+v lacks a part", m)
		}
	}
	return body.Errors
}

const (
	ada      = `{"username":"ada","password":"lovelace","plan":"Personal"}`
	adaLogin = `{"username":"ada","password":"lovelace"}`
)

func adaToken(t *testing.T, a *App) string {
	t.Helper()
	want(t, send(a, "POST", "/signup", ada), http.StatusOK)
	return tokenOf(t, send(a, "POST", "/auth", adaLogin))
}

// claimsOf checks the signature by hand, as the filter does, not with the library that made it.
func claimsOf(t *testing.T, token string) map[string]any {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("token has %d parts", len(parts))
	}
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(parts[0] + "." + parts[1]))
	if got := base64.RawURLEncoding.EncodeToString(mac.Sum(nil)); got != parts[2] {
		t.Fatal("signature is not HMAC-SHA256 under the key")
	}
	if head, _ := base64.RawURLEncoding.DecodeString(parts[0]); string(head) != `{"alg":"HS256","typ":"JWT"}` {
		t.Fatalf("header is %s", head)
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var said map[string]any
	if err := json.Unmarshal(body, &said); err != nil {
		t.Fatal(err)
	}
	return said
}

func TestOptionsThatCannotWorkAreRefusedTogether(t *testing.T) {
	_, err := New(Options{Key: key[:31], TokenTTL: -1, MaxUsers: -1, Cost: 31})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, word := range []string{"key has 31 bytes", "token TTL", "max users", "cost is 31"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q does not say %q", err, word)
		}
	}
	if _, err := New(Options{Unsigned: true, Cost: bcrypt.MinCost}); err != nil {
		t.Errorf("unsigned tokens need no key: %v", err)
	}
}

func TestTokenSaysWhatTheFilterChecks(t *testing.T) {
	a := newApp(t, func(o *Options) { o.Now = func() time.Time { return morning } })
	said := claimsOf(t, adaToken(t, a))
	wanted := map[string]any{"sub": "ada", "plan": "Personal", "iat": float64(morning.Unix()), "exp": float64(morning.Add(time.Hour).Unix())}
	if fmt.Sprint(said) != fmt.Sprint(wanted) {
		t.Errorf("claims are %v, want %v", said, wanted)
	}
}

func TestUpgradeIsStored(t *testing.T) {
	for name, ask := range map[string]func(a *App, token string) *httptest.ResponseRecorder{
		"with a token": func(a *App, token string) *httptest.ResponseRecorder {
			return send(a, "POST", "/upgrade", `{"plan":"Team"}`, "Authorization", "Bearer "+token)
		},
		"with a token and the name, as the public page": func(a *App, token string) *httptest.ResponseRecorder {
			return send(a, "POST", "/upgrade", `{"username":"ada","plan":"Team"}`, "Authorization", token)
		},
		"with the password": func(a *App, _ string) *httptest.ResponseRecorder {
			return send(a, "POST", "/upgrade", `{"username":"ada","password":"lovelace","plan":"Team"}`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := newApp(t, nil)
			token := adaToken(t, a)
			if plan := claimsOf(t, tokenOf(t, ask(a, token)))["plan"]; plan != "Team" {
				t.Errorf("the fresh token's plan is %v", plan)
			}
			if plan := claimsOf(t, tokenOf(t, send(a, "POST", "/auth", adaLogin)))["plan"]; plan != "Team" {
				t.Errorf("the next login's plan is %v", plan)
			}
		})
	}
}

func TestTokenIsGoodUntilItExpires(t *testing.T) {
	now := morning
	a := newApp(t, func(o *Options) { o.TokenTTL = time.Minute; o.Now = func() time.Time { return now } })
	token := adaToken(t, a)
	ask := func() *httptest.ResponseRecorder {
		return send(a, "POST", "/upgrade", `{"plan":"Team"}`, "Authorization", "Bearer "+token)
	}
	now = morning.Add(59 * time.Second)
	want(t, ask(), http.StatusOK)
	now = morning.Add(61 * time.Second)
	w := ask()
	want(t, w, http.StatusUnauthorized)
	if m := mistakes(t, w)[0]; m.Field != "Authorization" || !strings.Contains(m.Cause, "expired") {
		t.Errorf("got %+v", m)
	}
}

func TestForgedTokensAreRefused(t *testing.T) {
	a := newApp(t, nil)
	token := adaToken(t, a)
	parts := strings.Split(token, ".")
	in := func(d time.Duration) int64 { return time.Now().Add(d).Unix() }
	sign := func(m jwt.SigningMethod, k any, c jwt.MapClaims) string {
		s, err := jwt.NewWithClaims(m, c).SignedString(k)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	good := jwt.MapClaims{"sub": "ada", "plan": "Team", "exp": in(time.Hour)}
	for reason, forged := range map[string]string{
		"algorithm none":                 sign(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, good),
		"another algorithm":              sign(jwt.SigningMethodHS512, key, good),
		"another key":                    sign(jwt.SigningMethodHS256, []byte("another"), good),
		"signature cut off":              parts[0] + "." + parts[1] + ".",
		"claims of another":              parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"bob","exp":9999999999}`)) + "." + parts[2],
		"no expiry":                      sign(jwt.SigningMethodHS256, key, jwt.MapClaims{"sub": "ada"}),
		"no user":                        sign(jwt.SigningMethodHS256, key, jwt.MapClaims{"exp": in(time.Hour)}),
		"a user that has not signed up":  sign(jwt.SigningMethodHS256, key, jwt.MapClaims{"sub": "bob", "exp": in(time.Hour)}),
		"the public images' own":         base64.RawStdEncoding.EncodeToString([]byte(`{"plan":"Personal","username":"ada"}`)),
		"no token after the scheme":      "",
		"a token behind a wrong scheme ": "Basic " + token,
	} {
		t.Run(reason, func(t *testing.T) {
			header := forged
			if !strings.HasPrefix(forged, "Basic ") {
				header = "Bearer " + forged
			}
			w := send(a, "POST", "/upgrade", `{"plan":"Team"}`, "Authorization", header)
			want(t, w, http.StatusUnauthorized)
			mistakes(t, w)
			if len(forged) > 20 && strings.Contains(w.Body.String(), forged) {
				t.Error("the answer shows the token")
			}
		})
	}
	if plan := claimsOf(t, tokenOf(t, send(a, "POST", "/auth", adaLogin)))["plan"]; plan != "Personal" {
		t.Errorf("a forged token changed the plan to %v", plan)
	}
}

func TestBadInputIsRefusedWithFieldCauseAndRemedy(t *testing.T) {
	const json400, json401 = http.StatusBadRequest, http.StatusUnauthorized
	long := strings.Repeat("x", 73)
	for _, c := range []struct {
		name, method, path, body string
		headers                  []string // $TOKEN stands for ada's
		status                   int
		fields                   []string
		says                     string
	}{
		{"signup without fields", "POST", "/signup", `{}`, nil, json400, []string{"username", "password", "plan"}, "missing"},
		{"signup with null", "POST", "/signup", `null`, nil, json400, []string{"username", "password", "plan"}, "missing"},
		{"signup with an unknown plan", "POST", "/signup", `{"username":"bob","password":"x","plan":"personal"}`, nil, json400, []string{"plan"}, "Personal, Team, Enterprise"},
		{"signup of a taken name", "POST", "/signup", `{"username":"ada","password":"other","plan":"Team"}`, nil, http.StatusConflict, []string{"username"}, "taken"},
		{"signup with 73 bytes of password", "POST", "/signup", `{"username":"bob","password":"` + long + `","plan":"Team"}`, nil, json400, []string{"password"}, "bcrypt"},
		{"signup with a long name", "POST", "/signup", `{"username":"` + long + `","password":"x","plan":"Team"}`, nil, json400, []string{"username"}, "64 bytes"},
		{"signup with a line break in the name", "POST", "/signup", `{"username":"a\nb","password":"x","plan":"Team"}`, nil, json400, []string{"username"}, "printed"},
		{"signup with a name that is not UTF-8", "POST", "/signup", "{\"username\":\"a\xff\",\"password\":\"x\",\"plan\":\"Team\"}", nil, json400, []string{"username"}, "printed"},
		{"signup with a space before the name", "POST", "/signup", `{"username":" ada","password":"x","plan":"Team"}`, nil, json400, []string{"username"}, "spaces"},
		{"signup with a number for a password", "POST", "/signup", `{"username":"bob","password":733100287331,"plan":"Team"}`, nil, json400, []string{"password"}, "number"},
		{"signup with a list", "POST", "/signup", `[]`, nil, json400, []string{"body"}, "JSON object"},
		{"signup with half an object", "POST", "/signup", `{"username":`, nil, json400, []string{"body"}, "JSON object"},
		{"signup with two objects", "POST", "/signup", ada + ada, nil, json400, []string{"body"}, "JSON object"},
		{"signup without a body", "POST", "/signup", ``, nil, json400, []string{"body"}, "JSON object"},
		{"signup with a form", "POST", "/signup", `username=bob`, []string{"Content-Type", "application/x-www-form-urlencoded"}, http.StatusUnsupportedMediaType, []string{"Content-Type"}, "application/json"},
		{"signup with a broken content type", "POST", "/signup", ada, []string{"Content-Type", "json;;"}, http.StatusUnsupportedMediaType, []string{"Content-Type"}, "application/json"},
		{"signup over 64 KiB", "POST", "/signup", `{"username":"` + strings.Repeat("x", maxBody) + `"}`, nil, http.StatusRequestEntityTooLarge, []string{"body"}, "65536"},
		{"signup by GET", "GET", "/signup", ``, nil, http.StatusMethodNotAllowed, []string{"method"}, "POST"},
		{"login with a wrong password", "POST", "/auth", `{"username":"ada","password":"byron"}`, nil, json401, []string{"password"}, "wrong"},
		{"login of nobody", "POST", "/auth", `{"username":"bob","password":"byron"}`, nil, json401, []string{"password"}, "wrong"},
		{"login of nobody with the decoy's password", "POST", "/auth", `{"username":"bob","password":"nobody's"}`, nil, json401, []string{"password"}, "wrong"},
		{"login without a password", "POST", "/auth", `{"username":"ada"}`, nil, json400, []string{"password"}, "missing"},
		{"login with 73 bytes of password", "POST", "/auth", `{"username":"ada","password":"` + long + `"}`, nil, json400, []string{"password"}, "72"},
		{"login by DELETE", "DELETE", "/auth", ``, nil, http.StatusMethodNotAllowed, []string{"method"}, "POST"},
		{"upgrade as the public API allows it, by name alone", "POST", "/upgrade", `{"username":"ada","plan":"Team"}`, nil, json401, []string{"Authorization"}, "missing"},
		{"upgrade with a wrong password", "POST", "/upgrade", `{"username":"ada","password":"byron","plan":"Team"}`, nil, json401, []string{"password"}, "wrong"},
		{"upgrade to an unknown plan", "POST", "/upgrade", `{"plan":"Gold"}`, []string{"Authorization", "Bearer $TOKEN"}, json400, []string{"plan"}, "Personal, Team, Enterprise"},
		{"upgrade with the password to no plan", "POST", "/upgrade", adaLogin, nil, json400, []string{"plan"}, "missing"},
		{"upgrade of another user", "POST", "/upgrade", `{"username":"bob","plan":"Team"}`, []string{"Authorization", "Bearer $TOKEN"}, http.StatusForbidden, []string{"username"}, "token's user"},
		{"upgrade with a bad token and the right password", "POST", "/upgrade", `{"username":"ada","password":"lovelace","plan":"Team"}`, []string{"Authorization", "Bearer x"}, json401, []string{"Authorization"}, "JWT"},
		{"upgrade by PUT", "PUT", "/upgrade", `{}`, nil, http.StatusMethodNotAllowed, []string{"method"}, "POST"},
		{"pull by DELETE", "DELETE", "/pull", ``, nil, http.StatusMethodNotAllowed, []string{"method"}, "GET, HEAD, POST"},
		{"healthz by POST", "POST", "/healthz", ``, nil, http.StatusMethodNotAllowed, []string{"method"}, "GET"},
		{"an unknown path", "GET", "/push", ``, nil, http.StatusNotFound, []string{"path"}, "/pull"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var log bytes.Buffer
			a := newApp(t, func(o *Options) { o.Log = slog.New(slog.NewJSONHandler(&log, nil)) })
			token := adaToken(t, a)
			headers := slices.Clone(c.headers)
			for i := range headers {
				headers[i] = strings.ReplaceAll(headers[i], "$TOKEN", token)
			}
			w := send(a, c.method, c.path, c.body, headers...)
			want(t, w, c.status)
			if got := w.Header().Get("Content-Type"); got != "application/json" {
				t.Errorf("content type %q", got)
			}
			var fields []string
			for _, m := range mistakes(t, w) {
				fields = append(fields, m.Field)
			}
			if !slices.Equal(fields, c.fields) {
				t.Errorf("names %v, want %v", fields, c.fields)
			}
			if !strings.Contains(w.Body.String(), c.says) {
				t.Errorf("%s does not say %q", w.Body, c.says)
			}
			if (c.status == json401) != (w.Header().Get("WWW-Authenticate") == "Bearer") {
				t.Errorf("WWW-Authenticate is %q", w.Header().Get("WWW-Authenticate"))
			}
			if c.status == http.StatusMethodNotAllowed && !strings.Contains(w.Header().Get("Allow"), c.says) {
				t.Errorf("Allow is %q", w.Header().Get("Allow"))
			}
			for _, secret := range []string{"lovelace", "byron", "733100287331", token} {
				if strings.Contains(w.Body.String()+log.String(), secret) {
					t.Errorf("%q is in the answer or the log", secret)
				}
			}
			if plan := claimsOf(t, tokenOf(t, send(a, "POST", "/auth", adaLogin)))["plan"]; plan != "Personal" {
				t.Errorf("a refused request changed the plan to %v", plan)
			}
		})
	}
}

func TestWhatThePublicApiTakesIsTaken(t *testing.T) {
	a := newApp(t, nil)
	want(t, send(a, "POST", "/signup", `{"username":"ada","password":"lovelace","plan":"Team","email":"a@example.org"}`, "Content-Type", "application/json;charset=utf-8"), http.StatusOK)
	r := httptest.NewRequest("POST", "/auth", strings.NewReader(adaLogin)) // names no content type
	w := httptest.NewRecorder()
	a.ServeHTTP(w, r)
	tokenOf(t, w)
	longest := strings.Repeat("x", maxPassword)
	want(t, send(a, "POST", "/signup", `{"username":"bob","password":"`+longest+`","plan":"Team"}`), http.StatusOK)
	tokenOf(t, send(a, "POST", "/auth", `{"username":"bob","password":"`+longest+`"}`))
	want(t, send(a, "POST", "/auth", `{"username":"bob","password":"`+longest[1:]+`y"}`), http.StatusUnauthorized)
}

func TestPullGreetsByNameAndNeverLimits(t *testing.T) {
	a := newApp(t, nil)
	token := adaToken(t, a)
	for _, c := range []struct{ name, method, header, body string }{
		{"with the scheme", "GET", "Bearer " + token, "Hello, ada, welcome to Image Hub!\n"},
		{"with the scheme in small letters", "POST", "bearer  " + token, "Hello, ada, welcome to Image Hub!\n"},
		{"bare, as the public page", "GET", token, "Hello, ada, welcome to Image Hub!\n"},
		{"without a token", "GET", "", "Hello, guest, welcome to Image Hub!\n"},
		{"with another's token", "GET", "Bearer " + token + "x", "Hello, guest, welcome to Image Hub!\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for range 20 { // twice Personal's limit
				w := send(a, c.method, "/pull", "", "Authorization", c.header)
				want(t, w, http.StatusOK)
				if w.Body.String() != c.body {
					t.Fatalf("got %q, want %q", w.Body, c.body)
				}
			}
		})
	}
}

func TestHeadIsAnsweredWhereGetIs(t *testing.T) {
	a := newApp(t, nil)
	for _, path := range []string{"/pull", "/healthz"} {
		want(t, send(a, "HEAD", path, ""), http.StatusOK)
	}
	want(t, send(a, "HEAD", "/signup", ""), http.StatusMethodNotAllowed)
}

func TestHealthzAnswersOk(t *testing.T) {
	w := send(newApp(t, nil), "GET", "/healthz", "")
	want(t, w, http.StatusOK)
	if strings.TrimSpace(w.Body.String()) != `{"status":"ok"}` {
		t.Errorf("got %s", w.Body)
	}
}

func TestPreflightLetsAPageElsewhereSendItsToken(t *testing.T) {
	a := newApp(t, nil)
	for _, path := range []string{"/signup", "/auth", "/upgrade", "/pull"} {
		w := send(a, "OPTIONS", path, "", "Origin", "http://page.example", "Access-Control-Request-Headers", "authorization,content-type")
		want(t, w, http.StatusNoContent)
		h := w.Header()
		if h.Get("Access-Control-Allow-Origin") != "*" || !strings.Contains(h.Get("Access-Control-Allow-Headers"), "Authorization") || !strings.Contains(h.Get("Access-Control-Allow-Methods"), "POST") {
			t.Errorf("%s answers %v", path, h)
		}
	}
}

func TestUnsignedTokensAreThePublicImages(t *testing.T) {
	a := newApp(t, func(o *Options) { o.Unsigned, o.Key = true, nil })
	token := adaToken(t, a)
	if decoded, _ := base64.RawStdEncoding.DecodeString(token); string(decoded) != `{"plan":"Personal","username":"ada"}` {
		t.Fatalf("token is %q of %s", token, decoded)
	}
	// Padded, as other encoders of the same token do.
	for _, sent := range []string{token, token + "==", "Bearer " + token} {
		if w := send(a, "GET", "/pull", "", "Authorization", sent); !strings.HasPrefix(w.Body.String(), "Hello, ada,") {
			t.Errorf("%q is greeted with %q", sent, w.Body)
		}
	}
	fresh := tokenOf(t, send(a, "POST", "/upgrade", `{"username":"ada","plan":"Team"}`, "Authorization", token))
	if decoded, _ := base64.RawStdEncoding.DecodeString(fresh); string(decoded) != `{"plan":"Team","username":"ada"}` {
		t.Errorf("fresh token is of %s", decoded)
	}
	for _, bad := range []string{"!", "bm9wZQ", base64.RawStdEncoding.EncodeToString([]byte(`{"plan":"Team"}`))} {
		want(t, send(a, "POST", "/upgrade", `{"plan":"Team"}`, "Authorization", bad), http.StatusUnauthorized)
	}
}

func TestPasswordsAreKeptAsBcryptHashesOnly(t *testing.T) {
	a := newApp(t, nil)
	adaToken(t, a)
	who, _ := a.users.find("ada")
	if cost, err := bcrypt.Cost(who.hash); err != nil || cost != bcrypt.MinCost {
		t.Errorf("kept %q: cost %d, %v", who.hash, cost, err)
	}
	if strings.Contains(fmt.Sprintf("%s", a.users.known), "lovelace") {
		t.Error("the password is kept in clear")
	}
}

// Both compare a hash, and hashes of one cost take as long. That the decoy is compared shows when it costs much more than
// a user's: then nobody's login cannot be as fast, however busy the machine is.
func TestLoginTakesAsLongForNobodyAsForAUser(t *testing.T) {
	a := newApp(t, nil)
	want(t, send(a, "POST", "/signup", ada), http.StatusOK)
	known, _ := a.users.find("ada")
	user, err := bcrypt.Cost(known.hash)
	nobody, nerr := bcrypt.Cost(a.hasher.decoy)
	if err != nil || nerr != nil || user != nobody {
		t.Errorf("a user's hash costs %d, nobody's %d, %v, %v", user, nobody, err, nerr)
	}
	if a.hasher.decoy, err = bcrypt.GenerateFromPassword([]byte("x"), user+8); err != nil {
		t.Fatal(err)
	}
	a.hasher.wait = time.Minute
	fastest := func(times int, body string) time.Duration {
		best := time.Hour
		for range times {
			begin := time.Now()
			want(t, send(a, "POST", "/auth", body), http.StatusUnauthorized)
			best = min(best, time.Since(begin))
		}
		return best
	}
	if known, unknown := fastest(20, `{"username":"ada","password":"x"}`), fastest(1, `{"username":"bob","password":"x"}`); unknown < 4*known {
		t.Errorf("a user's login takes %s, nobody's %s, and should be 256 times that", known, unknown)
	}
}

func TestConcurrentSignupsMakeOneUserPerNameUpToTheLimit(t *testing.T) {
	const names, each, limit = 12, 6, 8
	a := newApp(t, func(o *Options) { o.MaxUsers = limit })
	a.hasher.wait = time.Minute // however busy the machine
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		count = map[int]int{}
	)
	for i := range names * each {
		wg.Go(func() {
			body := fmt.Sprintf(`{"username":"user-%d","password":"x","plan":"Team"}`, i%names)
			code := send(a, "POST", "/signup", body).Code
			send(a, "POST", "/upgrade", strings.Replace(body, "Team", "Personal", 1))
			mu.Lock()
			count[code]++
			mu.Unlock()
		})
	}
	wg.Wait()
	if count[http.StatusOK] != limit || count[http.StatusOK]+count[http.StatusConflict]+count[http.StatusInsufficientStorage] != names*each {
		t.Errorf("answers: %v, want %d times 200, else 409 and 507", count, limit)
	}
	w := send(a, "POST", "/signup", `{"username":"late","password":"x","plan":"Team"}`)
	want(t, w, http.StatusInsufficientStorage)
	mistakes(t, w)
}

func TestAFloodOfPasswordsWaitsAndStopsNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newApp(t, nil)
		token := adaToken(t, a)
		for range cap(a.hasher.slots) {
			a.hasher.slots <- struct{}{}
		}
		signup := make(chan *httptest.ResponseRecorder)
		go func() { signup <- send(a, "POST", "/signup", `{"username":"bob","password":"x","plan":"Team"}`) }()
		synctest.Wait() // until it waits for a slot
		want(t, send(a, "GET", "/pull", ""), http.StatusOK)
		want(t, send(a, "POST", "/upgrade", `{"plan":"Team"}`, "Authorization", token), http.StatusOK)

		begin := time.Now()
		login := send(a, "POST", "/auth", adaLogin)
		want(t, login, http.StatusServiceUnavailable)
		if waited := time.Since(begin); waited != a.hasher.wait || login.Header().Get("Retry-After") == "" {
			t.Errorf("waited %s, headers %v", waited, login.Header())
		}
		want(t, <-signup, http.StatusServiceUnavailable)

		go func() { signup <- send(a, "POST", "/signup", `{"username":"bob","password":"x","plan":"Team"}`) }()
		synctest.Wait()
		<-a.hasher.slots
		want(t, <-signup, http.StatusOK)
	})
}

func TestShutdownLetsARequestUnderWayFinish(t *testing.T) {
	a := newApp(t, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx, l) }()

	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(conn, "POST /signup HTTP/1.1\r\nHost: imagehub\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n", len(ada))
	answers := bufio.NewReader(conn)
	if line, err := answers.ReadString('\n'); !strings.Contains(line, "100 Continue") { // the handler waits for the body
		t.Fatalf("got %q, %v", line, err)
	}
	if _, err := answers.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	cancel()
	for deadline := time.Now().Add(10 * time.Second); ; {
		probe, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			break
		}
		probe.Close()
		if time.Now().After(deadline) {
			t.Fatal("still accepts connections")
		}
	}
	_, _ = io.WriteString(conn, ada)
	resp, err := http.ReadResponse(answers, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("got %s", resp.Status)
	}
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestRunReportsAListenerThatFails(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := newApp(t, nil).Run(t.Context(), l); err == nil {
		t.Error("no error")
	}
}
