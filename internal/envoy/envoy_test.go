package envoy

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/meshery/meshery-filters/internal/problem"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(orphanVar); dir != "" {
		os.Exit(beParent(dir))
	}
	goleak.VerifyTestMain(m)
}

// within gives a test's waiting an end.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// realEnvoy finds the Envoy that tests run; it is left out of quick runs.
func realEnvoy(t *testing.T) Binary {
	t.Helper()
	if testing.Short() {
		t.Skip("runs a real Envoy")
	}
	b, err := Find(within(t, 30*time.Second), "")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// fakeEnvoy is a program that answers --version as the text says and fails otherwise.
func fakeEnvoy(t *testing.T, version string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "envoy")
	script := "#!/bin/sh\n[ \"$1\" = --version ] || { echo 'no v8 in here' >&2; exit 3; }\necho '" + version + "'\n"
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

const (
	version138 = "envoy  version: 0ebfcfe5b0484b89ca85b761da9e05ce75dbda8d/1.38.3/Modified/RELEASE/BoringSSL"
	version140 = "envoy  version: 9e5580933739775e8bce696a57a2e1bc99368f23/1.40.0/Clean/RELEASE/BoringSSL"
)

func TestFindRefusesAnEnvoyThatCannotRunChainsAndSaysWhy(t *testing.T) {
	for _, c := range []struct{ name, version, want string }{
		{"it is too old", version138, "is Envoy 1.38.3, and chains of filters need 1.39.0 or later"},
		{"it has no v8", version140, "is Envoy 1.40.0, and cannot run WebAssembly on v8"},
		{"it is something else", "nginx version: nginx/1.27", "does not say a version that Envoy would"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := fakeEnvoy(t, c.version)
			t.Setenv("ENVOY", path)
			for origin, explicit := range map[string]string{"--envoy": path, "$ENVOY": ""} {
				_, err := Find(within(t, 30*time.Second), explicit)
				if !errors.Is(err, problem.EnvoyUnavailable) {
					t.Fatalf("got %v", err)
				}
				for _, want := range []string{origin + ": ", path, c.want} {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("%q is not in: %v", want, err)
					}
				}
			}
		})
	}
}

func TestFindSaysEveryPlaceItHasLookedAt(t *testing.T) {
	old, home := fakeEnvoy(t, version138), t.TempDir()
	t.Setenv("ENVOY", "")
	t.Setenv("HOME", home)
	for path, want := range map[string]string{filepath.Dir(old): "PATH: " + old + " is Envoy 1.38.3", t.TempDir(): "PATH: no envoy"} {
		t.Setenv("PATH", path)
		_, err := Find(within(t, 30*time.Second), "")
		if !errors.Is(err, problem.EnvoyUnavailable) {
			t.Fatalf("got %v", err)
		}
		for _, want := range []string{want, "cache: ", filepath.Join(home, cached)} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q is not in: %v", want, err)
			}
		}
	}
}

func TestFindPassesOverAnOldEnvoyOnPATHForTheCachedOne(t *testing.T) {
	b := realEnvoy(t)
	home := t.TempDir()
	place := filepath.Join(home, cached)
	if err := os.MkdirAll(filepath.Dir(place), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(b.Path, place); err != nil {
		t.Fatal(err)
	}
	t.Setenv("ENVOY", "")
	t.Setenv("HOME", home)
	t.Setenv("PATH", filepath.Dir(fakeEnvoy(t, version138)))
	got, err := Find(within(t, 30*time.Second), "")
	if err != nil {
		t.Fatal(err)
	}
	if got.Path != place || got.Version != b.Version {
		t.Errorf("found %+v", got)
	}
}

func TestVersionsCompareByNumber(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{{"1.38.3", "1.39.0", true}, {"1.39.0", "1.39.0", false}, {"1.40.0", "1.39.0", false}, {"1.9.0", "1.39.0", true}, {"2.0.0", "1.39.0", false}, {"1.39.1", "1.39.10", true}} {
		if got := older(c.a, c.b); got != c.want {
			t.Errorf("older(%s, %s) = %v", c.a, c.b, got)
		}
	}
}
