// Package imagehub is Image Hub, Meshery's sample application: an API with which people sign up with a plan, log in, and
// pull images, and a page at / that uses it. Routes, methods and JSON fields of the API are those of the public Image
// Hub, so that its clients work unchanged but for one thing: an upgrade has to be asked for with a token or a password.
//
// What it does not do:
//   - It keeps users in memory only, as befits a sample: a restart forgets them all.
//   - It neither limits pulls nor refuses anonymous ones. That is the work of the rate-limit filter in front of it,
//     and what makes the filter's effect visible.
//   - It cannot take a token back: one issued before an upgrade names the old plan until it expires.
package imagehub

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// Bounds of what a client may send or occupy.
const (
	maxBody     = 64 << 10 // bytes
	maxHeaders  = 16 << 10 // bytes; a token takes a few hundred
	maxName     = 64       // bytes; the name ends up in tokens and in the filter's table of users
	maxPassword = 72       // bytes; bcrypt takes no more
	minKey      = 32       // bytes; RFC 7518 asks for a key as long as the hash
	maxCost     = 15       // of bcrypt; a login takes seconds then, and more would outlast the timeouts

	shutdownLimit = 10 * time.Second
)

// Plan is what a user signs up for.
type Plan struct {
	Name           string `json:"name"`
	PullsPerMinute int    `json:"pullsPerMinute"`
}

// Plans lists the plans on offer, the smallest first.
func Plans() []Plan {
	return []Plan{{"Personal", 10}, {"Team", 100}, {"Enterprise", 1000}}
}

// Options says how an App behaves. Only Key has no default.
type Options struct {
	// Key signs tokens (HS256) and must be known to the rate-limit filter: at least 32 bytes. Not used when Unsigned.
	Key []byte
	// TokenTTL is how long a token is good for; one hour by default. Unsigned tokens never expire.
	TokenTTL time.Duration
	// MaxUsers bounds the users kept, 10000 by default; one more is answered with 507.
	MaxUsers int
	// Unsigned issues and accepts the public images' tokens: base64 of JSON, which anyone can forge, so that anyone
	// can pass for anyone. For comparison with those images only.
	Unsigned bool
	// Log gets one line per sign-up, upgrade and refused login, never a password or token. Nil discards.
	Log *slog.Logger
	// Now tells the time of tokens; time.Now by default.
	Now func() time.Time
	// Cost is bcrypt's, 4 to 15, 10 by default. One more doubles the time that a login takes.
	Cost int
}

// App is Image Hub's API and page as an http.Handler. It is safe for concurrent use.
type App struct {
	mux    *http.ServeMux
	log    *slog.Logger
	users  users
	hasher hasher
	tokens tokens
}

var _ http.Handler = (*App)(nil)

// New returns an App without users, or an error that lists every option it cannot work with.
func New(o Options) (*App, error) {
	if o.TokenTTL == 0 {
		o.TokenTTL = time.Hour
	}
	if o.MaxUsers == 0 {
		o.MaxUsers = 10000
	}
	if o.Cost == 0 {
		o.Cost = bcrypt.DefaultCost
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	var errs []error
	if !o.Unsigned && len(o.Key) < minKey {
		errs = append(errs, fmt.Errorf("key has %d bytes, and must have at least %d", len(o.Key), minKey))
	}
	if o.TokenTTL < time.Second {
		errs = append(errs, fmt.Errorf("token TTL is %s, and must be at least 1s, the precision of tokens", o.TokenTTL))
	}
	if o.MaxUsers < 0 {
		errs = append(errs, fmt.Errorf("max users is %d, and must be positive", o.MaxUsers))
	}
	if o.Cost < bcrypt.MinCost || o.Cost > maxCost {
		errs = append(errs, fmt.Errorf("cost is %d, and must be %d to %d", o.Cost, bcrypt.MinCost, maxCost))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("imagehub options: %w", err)
	}

	decoy, err := bcrypt.GenerateFromPassword([]byte("nobody's"), o.Cost)
	if err != nil {
		return nil, fmt.Errorf("hash the decoy password: %w", err)
	}
	if o.Unsigned {
		o.Log.Warn("Image Hub issues unsigned tokens: anyone can pass for any user, with any plan")
	}
	a := &App{
		mux:   http.NewServeMux(),
		log:   o.Log,
		users: users{max: o.MaxUsers, known: map[string]user{}},
		hasher: hasher{
			cost:  o.Cost,
			decoy: decoy,
			// Half the cores: a flood of logins leaves the other half to pulls.
			slots: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)),
			wait:  5 * time.Second,
		},
		tokens: tokens{key: bytes.Clone(o.Key), ttl: o.TokenTTL, unsigned: o.Unsigned, now: o.Now},
	}
	a.handle("/signup", a.signup, http.MethodPost)
	a.handle("/auth", a.auth, http.MethodPost)
	a.handle("/upgrade", a.upgrade, http.MethodPost)
	a.handle("/pull", a.pull, http.MethodGet, http.MethodHead, http.MethodPost)
	a.handle("/healthz", healthz, http.MethodGet, http.MethodHead)
	if err := a.pages(); err != nil {
		return nil, err
	}
	a.mux.HandleFunc("/", notFound)
	return a, nil
}

// ServeHTTP answers one request of the API or the page.
func (a *App) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	h := w.Header()
	// A client's page may be served from another address than the API. Tokens travel in a header that pages set themselves,
	// never in a cookie, so this opens nothing to a foreign page.
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	a.mux.ServeHTTP(w, r)
}

// Run serves the API on l until ctx ends, then lets requests under way finish, for ten seconds at most. It closes l.
// It returns nil after a shutdown in which all finished.
func (a *App) Run(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:           a,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       15 * time.Second,
		WriteTimeout:      30 * time.Second,
		// Longer than the hour after which Envoy closes an idle upstream connection by default: were it shorter, a
		// request could meet a connection that is just being closed here, and fail.
		IdleTimeout:    65 * time.Minute,
		MaxHeaderBytes: maxHeaders,
		ErrorLog:       slog.NewLogLogger(a.log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()

	select {
	case err := <-served:
		return fmt.Errorf("serve image hub: %w", err)
	case <-ctx.Done():
	}
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownLimit)
	defer cancel()
	err := srv.Shutdown(bounded)
	if err != nil {
		err = fmt.Errorf("shut image hub down: %w", errors.Join(err, srv.Close()))
	}
	<-served
	return err
}

// handle registers a route with its methods, and answers CORS preflights and other methods on it.
func (a *App) handle(path string, h http.HandlerFunc, methods ...string) {
	for _, m := range methods {
		if m != http.MethodHead { // comes with GET
			a.mux.HandleFunc(m+" "+path, h)
		}
	}
	allow := strings.Join(append(methods, http.MethodOptions), ", ")
	a.mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Allow", allow)
		if r.Method == http.MethodOptions {
			w.Header().Set("Access-Control-Allow-Methods", allow)
			// By name: a star does not cover Authorization.
			w.Header().Set("Access-Control-Allow-Headers", "Authorization, Content-Type")
			w.Header().Set("Access-Control-Max-Age", "3600")
			w.WriteHeader(http.StatusNoContent)
			return
		}
		refuse(w, http.StatusMethodNotAllowed, Mistake{"method", r.URL.Path + " does not answer " + r.Method, "use one of " + allow})
	})
}

// user is one who has signed up.
type user struct {
	hash []byte
	plan string
}

// users are those who have signed up. No lock is held while a password is hashed.
type users struct {
	mu    sync.RWMutex
	max   int
	known map[string]user
}

var (
	errTaken   = errors.New("user exists")
	errFull    = errors.New("too many users")
	errUnknown = errors.New("no such user")
)

// room says why a user of that name could not be added.
func (u *users) room(name string) error {
	u.mu.RLock()
	defer u.mu.RUnlock()
	return u.roomLocked(name)
}

func (u *users) roomLocked(name string) error {
	if _, ok := u.known[name]; ok {
		return errTaken
	}
	if len(u.known) >= u.max {
		return errFull
	}
	return nil
}

func (u *users) add(name string, who user) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.roomLocked(name); err != nil {
		return err
	}
	u.known[name] = who
	return nil
}

func (u *users) find(name string) (user, bool) {
	u.mu.RLock()
	defer u.mu.RUnlock()
	who, ok := u.known[name]
	return who, ok
}

func (u *users) setPlan(name, plan string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	who, ok := u.known[name]
	if !ok {
		return errUnknown
	}
	who.plan = plan
	u.known[name] = who
	return nil
}

// hasher hashes passwords, a bounded number at once.
type hasher struct {
	cost  int
	decoy []byte        // compared for unknown users, who must take as long as known ones
	slots chan struct{} // one per hash under way
	wait  time.Duration // for a slot
}

var errBusy = errors.New("too many passwords are being checked")

// acquire takes a slot, which the caller gives back with release.
func (h *hasher) acquire(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, h.wait)
	defer cancel()
	select {
	case h.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return errBusy
	}
}

func (h *hasher) release() { <-h.slots }

func (h *hasher) hash(ctx context.Context, password string) ([]byte, error) {
	if err := h.acquire(ctx); err != nil {
		return nil, err
	}
	defer h.release()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), h.cost)
	if err != nil {
		return nil, fmt.Errorf("hash the password: %w", err)
	}
	return hash, nil
}

// matches tells whether password is the one of hash; a nil hash matches none, in the same time.
func (h *hasher) matches(ctx context.Context, hash []byte, password string) (bool, error) {
	if err := h.acquire(ctx); err != nil {
		return false, err
	}
	defer h.release()
	known := hash != nil
	if !known {
		hash = h.decoy
	}
	return bcrypt.CompareHashAndPassword(hash, []byte(password)) == nil && known, nil
}
