package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/config"
	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/store"
)

// ask posts JSON, with a token where there is one, and returns the status and the token in the answer.
func ask(t *testing.T, method, url, token string, body any) (status int, answer string) {
	t.Helper()
	data, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest(method, url, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	var a struct{ Token string }
	_ = json.Unmarshal(said, &a) // not every answer is JSON
	return resp.StatusCode, a.Token
}

// poll tries until there is no error, and returns the last one when the time is up.
func poll(ctx context.Context, limit time.Duration, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func chainVersion(t *testing.T, p *envoy.Process) string {
	t.Helper()
	slot, err := p.Admin().SlotConfig(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return slot.Version
}

func TestARestartLeavesImageHubItsLimiterAndItsTokensAsTheyWere(t *testing.T) {
	state := t.TempDir()
	a := newAdapterIn(t, state)
	ran := a.cli("run", "imagehub").want(t, exitOK, "Image Hub runs at http://").out
	_, hub, _ := strings.Cut(ran, "http://")
	hub, _, _ = strings.Cut(hub, "\n")
	p, url := a.proxyOf("default", "hub-1", hub)
	a.cli("run", "imagehub_rate_limit").want(t, exitOK, "1 of 1 proxy")
	user := map[string]string{"username": "ada", "password": "correct horse", "plan": "Personal"}
	if status, _ := ask(t, http.MethodPost, url+"/signup", "", user); status != http.StatusOK {
		t.Fatalf("/signup answers %d", status)
	}
	_, token := ask(t, http.MethodPost, url+"/auth", "", user)
	if status, _ := ask(t, http.MethodGet, url+"/pull", token, nil); status != http.StatusOK {
		t.Fatalf("a pull is answered %d", status)
	}
	before := chainVersion(t, p)

	again := func() *adapter {
		a.interrupt()
		if code := a.wait(t, patience); code != exitOK {
			t.Fatalf("the adapter ended with exit code %d: %s", code, a.err.String())
		}
		return newAdapterIn(t, state, "--xds-addr", a.at.XDS, "--imagehub-addr", hub)
	}
	a = again()
	a.err.waitFor(t, patience, "Image Hub runs again, without its users", "the adapter is ready")
	err := poll(t.Context(), patience, func() error {
		if said := a.cli("status").out; !strings.Contains(said, "1 of 1 proxy") {
			return errors.New(said)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("the proxy did not come back: %v", err)
	}
	a.cli("status").want(t, exitOK, "as applied")
	if after := chainVersion(t, p); after != before {
		t.Errorf("the proxy runs chain %s after a restart, and ran %s", after, before)
	}
	if status, _ := ask(t, http.MethodGet, url+"/pull", token, nil); status != http.StatusOK {
		t.Errorf("a pull with the token from before is answered %d", status)
	}
	if status, _ := ask(t, http.MethodPost, url+"/auth", "", user); status == http.StatusOK {
		t.Error("a user who was in memory can log in")
	}

	a.cli("run", "imagehub", "--delete").want(t, exitOK, "Image Hub removed")
	a = again()
	a.cli("run", "imagehub", "--delete").want(t, exitOK, "nothing to do")
	if strings.Contains(a.err.String(), "Image Hub runs again") {
		t.Error("Image Hub was removed, and runs again after a restart")
	}
}

func TestAnAddressThatIsTakenKeepsImageHubFromRunningAndNotTheAdapter(t *testing.T) {
	state := t.TempDir()
	a := newAdapterIn(t, state)
	a.cli("run", "imagehub").want(t, exitOK)
	a.interrupt()
	a.wait(t, patience)
	taken := anUpstream(t)
	a = newAdapterIn(t, state, "--imagehub-addr", taken)
	a.err.waitFor(t, patience, "Image Hub ran before and cannot be started again", "the adapter is ready")
	a.interrupt()
	a.wait(t, patience)
	// It is not forgotten.
	newAdapterIn(t, state).err.waitFor(t, patience, "Image Hub runs again")
}

func TestImageHubsKeyIsTheConfiguredOneOrIsMadeUpOnceAndKeptSealed(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("FILTERS_TEST_HUB", strings.Repeat("h", 40))
	t.Setenv("FILTERS_TEST_OTHER", strings.Repeat("o", 40))
	none := config.Defaults()
	named := config.Defaults()
	named.Secrets = map[string]map[string]config.Source{"imagehub": {"token-key": {Env: "FILTERS_TEST_HUB"}}}
	both := named
	both.Secrets = map[string]map[string]config.Source{"imagehub": named.Secrets["imagehub"], "other": {"key": {Env: "FILTERS_TEST_OTHER"}}}
	both.ImageHub.Key = config.SecretRef{Name: "other", Key: "key"}
	missing := config.Defaults()
	missing.Secrets = map[string]map[string]config.Source{"imagehub": {"token-key": {Env: "FILTERS_TEST_NOT_SET"}}}
	shared := config.Defaults()
	shared.SealKey = config.SealKey{Name: "any", Key: "key"}

	var log text
	logger := slog.New(slog.NewTextHandler(&log, nil))
	key := func(c config.Config, sealedWith, component string) (string, error) {
		t.Helper()
		s, err := store.Open(t.Context(), store.Options{StateDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		seal, err := store.NewSeal(sealedWith)
		if err != nil {
			t.Fatal(err)
		}
		k, err := hubKey(t.Context(), c, s.Records(), seal, component, logger)
		all, aerr := s.Records().All(t.Context())
		if aerr != nil {
			t.Fatal(aerr)
		}
		for name, value := range all {
			if k != "" && bytes.Contains(value, []byte(k)) {
				t.Errorf("%s holds the key in clear", name)
			}
		}
		return k, err
	}
	const one, two = "the first seal's key", "the second seal's key"
	made, err := key(none, one, "a")
	if err != nil || len(made) < 32 {
		t.Fatalf("the key has %d bytes: %v", len(made), err)
	}
	if k, err := key(none, one, "a"); k != made || err != nil {
		t.Errorf("another start has another key: %v", err)
	}
	if k, err := key(none, two, "b"); k == made || err != nil {
		t.Errorf("an adapter that cannot open the key of another gets none of its own: %v", err)
	}
	if k, err := key(none, one, "a"); k != made || err != nil {
		t.Errorf("another adapter has taken the key away: %v", err)
	}
	for _, c := range []struct {
		name string
		conf config.Config
		want string
	}{{"imagehub/token-key", named, strings.Repeat("h", 40)}, {"imagehub.key before it", both, strings.Repeat("o", 40)}} {
		if k, err := key(c.conf, one, "a"); k != c.want || err != nil {
			t.Errorf("%s: not the configured key, %v", c.name, err)
		}
	}
	if _, err := key(missing, one, "a"); err == nil || !strings.Contains(err.Error(), "imagehub/token-key") {
		t.Errorf("a configured key that is not there: %v", err)
	}
	of, err := key(shared, one, "a")
	if k, kerr := key(shared, one, "b"); err != nil || kerr != nil || k != of || k == made {
		t.Errorf("adapters with one sealKey do not share the key: %v, %v", err, kerr)
	}
	if log.String() != "" {
		t.Errorf("a warning for nothing: %s", log.String())
	}
	anew, err := key(shared, two, "a")
	if err != nil || anew == of {
		t.Errorf("sealKey has changed, and the key did not: %v", err)
	}
	log.waitFor(t, 0, "sealKey has changed")
	for _, k := range []string{made, of, anew} {
		if strings.Contains(log.String(), k) {
			t.Error("the log shows a key")
		}
	}
}

func TestEveryDocumentInTheOperationsFolderIsAnOperationAndOtherFilesAreLeftAlone(t *testing.T) {
	doc := func(name string) string {
		return `{"apiVersion": "filters.meshery.io/v1alpha1", "kind": "Filter", "metadata": {"name": "` + name + `"}, "spec": {"module": {"builtin": "headers"}}}`
	}
	dir := t.TempDir()
	for file, name := range map[string]string{"a.yaml": "one", "b.yml": "two", "c.json": "three"} {
		put(t, dir, file, doc(name))
	}
	for _, file := range []string{"README.md", "d.yaml~", ".e.yaml", "yaml"} {
		put(t, dir, file, "not: a: document")
	}
	var log text
	prepared, err := readPrepared(dir, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil || len(prepared) != 3 || prepared["one"] == "" || prepared["two"] == "" || prepared["three"] == "" {
		t.Errorf("%v: %v", err, prepared)
	}
	for _, file := range []string{"README.md", "d.yaml~", ".e.yaml", "yaml"} {
		log.waitFor(t, 0, file)
	}
	if strings.Contains(log.String(), "c.json") {
		t.Errorf("a document is said to be ignored:\n%s", log.String())
	}
	put(t, dir, "f.yml", doc("one"))
	if _, err := readPrepared(dir, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), `"one"`) {
		t.Errorf("two documents of one name: %v", err)
	}
	if _, err := readPrepared(dir+"/nowhere", slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "operationsDir") {
		t.Errorf("a folder that is not there: %v", err)
	}
}
