package imagehub

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Mistake is one thing wrong with a request. A refused request is answered with {"errors": [Mistake, ...]}, all of
// them at once.
type Mistake struct {
	// Field is the body's field, or the header, or "body", "method", "path" or "server".
	Field string `json:"field"`
	// Cause says what is wrong with it.
	Cause string `json:"cause"`
	// Remedy says what to do about it.
	Remedy string `json:"remedy"`
}

// form is every body that the API takes. What it does not know it ignores, as the public API does.
type form struct {
	Username string `json:"username"`
	Password string `json:"password"`
	Plan     string `json:"plan"`
}

func (a *App) signup(w http.ResponseWriter, r *http.Request) {
	f, ok := decode(w, r)
	if !ok || !valid(w, f.checkName(), f.checkPassword(), f.checkPlan()) {
		return
	}
	// Asked before the hash, which is dear, and again with the hash in hand, which is what counts.
	err := a.users.room(f.Username)
	if err == nil {
		var hash []byte
		if hash, err = a.hasher.hash(r.Context(), f.Password); err == nil {
			err = a.users.add(f.Username, user{hash: hash, plan: f.Plan})
		}
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	a.log.Info("user signed up", "user", f.Username, "plan", f.Plan)
	answer(w, http.StatusOK, map[string]string{"username": f.Username, "plan": f.Plan})
}

func (a *App) auth(w http.ResponseWriter, r *http.Request) {
	f, ok := decode(w, r)
	if !ok || !valid(w, f.checkName(), f.checkPassword()) {
		return
	}
	who, err := a.login(r.Context(), f)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	a.answerToken(w, r, f.Username, who.plan)
}

func (a *App) upgrade(w http.ResponseWriter, r *http.Request) {
	f, ok := decode(w, r)
	if !ok {
		return
	}
	name := f.Username
	if header := r.Header.Get("Authorization"); header != "" {
		subject, err := a.tokens.user(bearer(header))
		if err != nil {
			unauthorized(w, Mistake{"Authorization", "the token " + err.Error(), "log in at /auth and send the token that it answers"})
			return
		}
		if !valid(w, f.checkPlan()) {
			return
		}
		if name != "" && name != subject {
			refuse(w, http.StatusForbidden, Mistake{"username", "is not the token's user", "leave it out, or log in as that user"})
			return
		}
		name = subject
	} else {
		if f.Password == "" {
			unauthorized(w, Mistake{"Authorization", "is missing, and the body has no password",
				`send "Authorization: Bearer <token from /auth>", or username and password in the body`})
			return
		}
		if !valid(w, f.checkName(), f.checkPassword(), f.checkPlan()) {
			return
		}
		if _, err := a.login(r.Context(), f); err != nil {
			a.fail(w, r, err)
			return
		}
	}
	if err := a.users.setPlan(name, f.Plan); err != nil {
		a.fail(w, r, err)
		return
	}
	a.log.Info("user changed plan", "user", name, "plan", f.Plan)
	a.answerToken(w, r, name, f.Plan)
}

// pull greets in plain text, as the public API does, but by name: that one sends the whole token back.
func (a *App) pull(w http.ResponseWriter, r *http.Request) {
	name, err := a.tokens.user(bearer(r.Header.Get("Authorization")))
	if err != nil {
		name = "guest"
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintf(w, "Hello, %s, welcome to Image Hub!\n", name)
}

func healthz(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, map[string]string{"status": "ok"})
}

func notFound(w http.ResponseWriter, _ *http.Request) {
	refuse(w, http.StatusNotFound, Mistake{"path", "is not part of Image Hub's API", "use one of /signup, /auth, /upgrade, /pull, /healthz"})
}

var errPassword = errors.New("wrong user name or password")

// login checks a password. Whether the name or the password is wrong shows neither in the answer nor in its time.
func (a *App) login(ctx context.Context, f form) (user, error) {
	who, _ := a.users.find(f.Username)
	ok, err := a.hasher.matches(ctx, who.hash, f.Password)
	if err != nil {
		return user{}, err
	}
	if !ok {
		return user{}, errPassword
	}
	return who, nil
}

func (a *App) answerToken(w http.ResponseWriter, r *http.Request, name, plan string) {
	token, err := a.tokens.issue(name, plan)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, map[string]string{"token": token})
}

// fail answers an error of the application's parts.
func (a *App) fail(w http.ResponseWriter, r *http.Request, err error) {
	switch {
	case errors.Is(err, errTaken):
		refuse(w, http.StatusConflict, Mistake{"username", "is taken", "choose another name, or log in at /auth"})
	case errors.Is(err, errFull):
		refuse(w, http.StatusInsufficientStorage, Mistake{"server", "keeps no more users", "restart Image Hub, which forgets them all, or let it keep more"})
	case errors.Is(err, errUnknown):
		unauthorized(w, Mistake{"username", "is not known; Image Hub forgets its users when it restarts", "sign up at /signup"})
	case errors.Is(err, errPassword):
		// Without the name: people type passwords into the wrong field.
		a.log.Info("login refused", "path", r.URL.Path)
		unauthorized(w, Mistake{"password", "user name or password is wrong", "check both, or sign up at /signup"})
	case errors.Is(err, errBusy):
		w.Header().Set("Retry-After", "1")
		refuse(w, http.StatusServiceUnavailable, Mistake{"server", "too many passwords are being checked", "try again in a second"})
	default:
		a.log.Error("request failed", "path", r.URL.Path, "error", err)
		refuse(w, http.StatusInternalServerError, Mistake{"server", "failed", "look into Image Hub's log"})
	}
}

// decode reads a form, or refuses the request and returns false.
func decode(w http.ResponseWriter, r *http.Request) (form, bool) {
	var f form
	// A client that names no type means JSON; one that names another is mistaken.
	if ct := r.Header.Get("Content-Type"); ct != "" {
		if t, _, err := mime.ParseMediaType(ct); err != nil || t != "application/json" {
			refuse(w, http.StatusUnsupportedMediaType, Mistake{"Content-Type", "is not application/json", `send a JSON object with "Content-Type: application/json"`})
			return f, false
		}
	}
	body, err := io.ReadAll(r.Body)
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		refuse(w, http.StatusRequestEntityTooLarge, Mistake{"body", fmt.Sprintf("is larger than %d bytes", maxBody), "send the documented fields only"})
		return f, false
	case err != nil:
		refuse(w, http.StatusBadRequest, Mistake{"body", "ended before it was complete", "send it again, within 15 seconds"})
		return f, false
	}
	err = json.Unmarshal(body, &f)
	var wrongType *json.UnmarshalTypeError
	switch {
	case errors.As(err, &wrongType) && wrongType.Field != "":
		refuse(w, http.StatusBadRequest, Mistake{wrongType.Field, "is a JSON " + kind(wrongType.Value), "send a string"})
	case err != nil:
		refuse(w, http.StatusBadRequest, Mistake{"body", "is not a JSON object", `send an object such as {"username": "ada", "password": "..."}`})
	}
	return f, err == nil
}

// kind drops what encoding/json adds to a value's kind: the text of a number.
func kind(value string) string {
	k, _, _ := strings.Cut(value, " ")
	return k
}

func (f form) checkName() *Mistake {
	const remedy = "use 1 to 64 bytes of printable text without spaces at its ends"
	switch {
	case f.Username == "":
		return &Mistake{"username", "is missing", remedy}
	case len(f.Username) > maxName:
		return &Mistake{"username", fmt.Sprintf("has %d bytes", len(f.Username)), remedy}
	case strings.TrimSpace(f.Username) != f.Username || strings.ContainsFunc(f.Username, unprintable):
		return &Mistake{"username", "has spaces at its ends or characters that cannot be printed", remedy}
	}
	return nil
}

func unprintable(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }

func (f form) checkPassword() *Mistake {
	switch {
	case f.Password == "":
		return &Mistake{"password", "is missing", "use 1 to 72 bytes"}
	case len(f.Password) > maxPassword:
		return &Mistake{"password", fmt.Sprintf("has %d bytes, and the hash (bcrypt) takes no more than %d", len(f.Password), maxPassword),
			"use a shorter one; letters outside ASCII take more than one byte"}
	}
	return nil
}

func (f form) checkPlan() *Mistake {
	var names []string
	for _, p := range Plans() {
		if p.Name == f.Plan {
			return nil
		}
		names = append(names, p.Name)
	}
	cause := "is not a plan on offer"
	if f.Plan == "" {
		cause = "is missing"
	}
	return &Mistake{"plan", cause, "use one of " + strings.Join(names, ", ")}
}

// valid refuses the request when there is any mistake.
func valid(w http.ResponseWriter, checks ...*Mistake) bool {
	var found []Mistake
	for _, m := range checks {
		if m != nil {
			found = append(found, *m)
		}
	}
	if len(found) > 0 {
		refuse(w, http.StatusBadRequest, found...)
	}
	return len(found) == 0
}

func unauthorized(w http.ResponseWriter, m Mistake) {
	w.Header().Set("WWW-Authenticate", "Bearer")
	refuse(w, http.StatusUnauthorized, m)
}

func refuse(w http.ResponseWriter, status int, mistakes ...Mistake) {
	answer(w, status, map[string][]Mistake{"errors": mistakes})
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // fails only when the client has left
}
