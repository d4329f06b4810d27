// Package browser tests the pages as people use them: in a Chromium, through a real Envoy, against the real program.
package browser

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/meshery/meshery-filters/internal/envoy"
)

// program is the path of the binary that TestMain builds.
var program string

// patience bounds every wait; it is long, since other tests may share the machine.
const patience = 60 * time.Second

func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() {
		fmt.Println("browser: skipped, since -short is set")
		return
	}
	dir, err := os.MkdirTemp("", "meshery-filters-browser-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	program = filepath.Join(dir, "meshery-filters")
	build := exec.Command("go", "build", "-o", program, "github.com/meshery/meshery-filters")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the program: %v\n%s", err, out)
		os.RemoveAll(dir)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// text is a buffer that a process writes while a test reads.
type text struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *text) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *text) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// environment is the test's own, less what would configure an adapter.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "MESHERY_") || strings.HasPrefix(e, "DEBUG=") })
}

// adapter is a running `serve`.
type adapter struct {
	t         *testing.T
	addresses struct{ GRPC, XDS, HTTP string }
}

// newAdapter starts one with free ports and a state directory of its own.
func newAdapter(t *testing.T, flags ...string) *adapter {
	t.Helper()
	state := filepath.Join(t.TempDir(), "state")
	cmd := exec.Command(program, append([]string{"serve", "--state-dir", state, "--grpc-addr", "127.0.0.1:0", "--xds-addr", "127.0.0.1:0",
		"--http-addr", "127.0.0.1:0", "--imagehub-addr", "127.0.0.1:0"}, flags...)...)
	log := &text{}
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = environment(), log, log, 5*time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("the adapter: %v", err)
			}
		case <-time.After(patience):
			_ = cmd.Process.Kill()
			t.Errorf("the adapter did not stop: %v", <-ended)
		}
		if t.Failed() {
			said := log.String()
			t.Logf("the adapter's log ends:\n%s", said[max(0, len(said)-4000):])
		}
	})
	a := &adapter{t: t}
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		data, err := os.ReadFile(filepath.Join(state, "addresses.json"))
		if err == nil {
			err = json.Unmarshal(data, &a.addresses)
		}
		if err == nil {
			return a
		}
		if time.Now().After(deadline) {
			t.Fatalf("the adapter is not ready within %s: %v", patience, err)
		}
	}
}

// command runs one of the command line's, against the adapter, that must succeed.
func (a *adapter) command(stdin string, args ...string) string {
	a.t.Helper()
	code, out := a.try(stdin, args...)
	if code != 0 {
		a.t.Fatalf("%v: exit code %d\n%s", args, code, out)
	}
	return out
}

// try runs one to its end, whichever that is.
func (a *adapter) try(stdin string, args ...string) (code int, out string) {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(a.t.Context(), 2*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, append(args, "--server", a.addresses.GRPC)...)
	cmd.Env, cmd.Stdin, cmd.WaitDelay = environment(), strings.NewReader(stdin), 5*time.Second
	said, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		a.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(said)
}

// imageHub starts the application and returns its address.
func (a *adapter) imageHub() string {
	a.t.Helper()
	_, rest, ok := strings.Cut(a.command("", "run", "imagehub"), "http://")
	if !ok {
		a.t.Fatal("the imagehub operation does not say where Image Hub is")
	}
	return strings.TrimRight(strings.Fields(rest)[0], ".,;")
}

var findEnvoy = sync.OnceValues(func() (envoy.Binary, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return envoy.Find(ctx, "")
})

// proxy starts an Envoy that gets its filters from the adapter, and waits until its listener is open.
func (a *adapter) proxy(id, group, upstream string) (addr string, stop func()) {
	a.t.Helper()
	p, stop := a.startProxy(id, group, upstream)
	ctx, cancel := context.WithTimeout(a.t.Context(), patience)
	defer cancel()
	addr, err := p.ListenerAddr(ctx, envoy.ListenerName)
	if err == nil {
		err = p.Ready(ctx)
	}
	if err != nil {
		a.t.Fatal(err)
	}
	return addr, stop
}

// startProxy starts one and waits for nothing.
func (a *adapter) startProxy(id, group, upstream string) (p *envoy.Process, stop func()) {
	a.t.Helper()
	binary, err := findEnvoy()
	if err != nil {
		a.t.Fatal(err)
	}
	bootstrap, err := envoy.Bootstrap{Group: group, NodeID: id, XDSAddr: a.addresses.XDS, Listen: "127.0.0.1:0", Upstream: upstream,
		Admin: "127.0.0.1:0"}.YAML()
	if err != nil {
		a.t.Fatal(err)
	}
	p, err = envoy.Start(a.t.Context(), binary, envoy.ProcessOptions{Bootstrap: bootstrap, Dir: a.t.TempDir(), Concurrency: 1, Log: &text{}})
	if err != nil {
		a.t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		if err := p.Stop(context.WithoutCancel(a.t.Context())); err != nil {
			a.t.Error(err)
		}
	})
	a.t.Cleanup(stop)
	return p, stop
}
