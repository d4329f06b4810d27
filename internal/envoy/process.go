package envoy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	startTimeout = 30 * time.Second       // until the admin interface listens
	stopTimeout  = 5 * time.Second        // between SIGTERM and SIGKILL
	pollInterval = 10 * time.Millisecond  // of files and of the admin interface
	tailBytes    = 8 << 10                // of the log that an error quotes
	drainTimeout = 500 * time.Millisecond // for the log's last lines, once the process is gone
)

// ProcessOptions say how an Envoy runs.
type ProcessOptions struct {
	// Bootstrap is YAML with an admin address. Bootstrap.YAML makes one.
	Bootstrap []byte
	// Dir is where bootstrap.yaml and admin-address.txt are written, readable by this user only. It is made if it is not
	// there, and not removed. Two processes cannot share one.
	Dir string
	// Concurrency is the number of worker threads. Default: 0, one per CPU.
	Concurrency int
	// LogLevel is trace, debug, info, warning, error, critical or off. Default: warning.
	LogLevel string
	// Log gets Envoy's log as it is written. Default: nowhere but into errors.
	Log io.Writer
	// Args are further arguments: --component-log-level wasm:debug.
	Args []string
}

// Process is a running Envoy. Whoever started it calls Stop.
type Process struct {
	pid   int
	admin string
	tail  *tail
	done  chan struct{}

	mu      sync.Mutex
	stopped bool  // we asked for its end
	err     error // set before done is closed
}

// Start runs an Envoy until its admin interface listens; Ready waits until it serves. ctx and 30 seconds bound the
// start; neither ends the process afterwards, only Stop does. On Linux the kernel kills Envoy when this program dies
// without having stopped it. The error of an Envoy that ends at once carries its last log lines.
func Start(ctx context.Context, b Binary, o ProcessOptions) (*Process, error) {
	if o.LogLevel == "" {
		o.LogLevel = "warning"
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	config, address := filepath.Join(dir, "bootstrap.yaml"), filepath.Join(dir, "admin-address.txt")
	if err := os.WriteFile(config, o.Bootstrap, 0o600); err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	// The file of an earlier run would be taken for this one's.
	if err := os.Remove(address); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	args := []string{"--config-path", config, "--admin-address-path", address, "--log-level", o.LogLevel,
		"--use-dynamic-base-id", "--disable-hot-restart"}
	if o.Concurrency > 0 {
		args = append(args, "--concurrency", strconv.Itoa(o.Concurrency))
	}
	p := &Process{tail: &tail{log: o.Log}, done: make(chan struct{})}
	cmd := exec.Command(b.Path, append(args, o.Args...)...)
	cmd.Stdout, cmd.Stderr = p.tail, p.tail // one writer, so that exec writes from one goroutine
	cmd.WaitDelay = drainTimeout
	cmd.SysProcAttr = processAttributes()
	if err := p.run(cmd); err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if p.admin, err = p.awaitAddress(ctx, address); err != nil {
		return nil, errors.Join(err, p.Stop(ctx))
	}
	return p, nil
}

// run starts cmd and waits for its end in a goroutine of its own, which ends with the process. That goroutine keeps its
// thread, since Linux takes the death of the thread that started a process for the death of its parent.
func (p *Process) run(cmd *exec.Cmd) error {
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		if err == nil {
			p.pid = cmd.Process.Pid
		}
		started <- err
		if err != nil {
			return
		}
		err = cmd.Wait()
		p.mu.Lock()
		defer p.mu.Unlock()
		if !p.stopped {
			if err == nil {
				err = errors.New("exit status 0")
			}
			p.err = fmt.Errorf("envoy (pid %d) ended by itself: %w%s", p.pid, err, p.tail.quote())
		}
		close(p.done)
	}()
	return <-started
}

// awaitAddress reads where the admin interface listens, which Envoy writes down once it does.
func (p *Process) awaitAddress(ctx context.Context, path string) (string, error) {
	for {
		data, err := os.ReadFile(path)
		if addr := strings.TrimSpace(string(data)); err == nil && addr != "" {
			if _, _, err := net.SplitHostPort(addr); err != nil {
				return "", fmt.Errorf("start envoy: it says that its admin interface is at %q: %w", clip(addr, 100), err)
			}
			return addr, nil
		}
		select {
		case <-p.done:
			return "", fmt.Errorf("start envoy: %w", p.err)
		case <-ctx.Done():
			return "", fmt.Errorf("start envoy: no admin interface yet: %w%s", ctx.Err(), p.tail.quote())
		case <-time.After(pollInterval):
		}
	}
}

// PID of the Envoy, which is also its process group.
func (p *Process) PID() int { return p.pid }

// AdminAddr is where the admin interface listens, IP:port.
func (p *Process) AdminAddr() string { return p.admin }

// Admin reads this process's admin interface.
func (p *Process) Admin() Admin { return Admin{Addr: p.admin} }

// Done is closed when the process has ended, for whatever reason.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says why a process that nobody stopped has ended, with its last log lines. It is nil while the process runs and
// after Stop.
func (p *Process) Err() error {
	select {
	case <-p.done:
		return p.err
	default:
		return nil
	}
}

// Ready waits until Envoy serves, the process ends or ctx does. One with a slot serves once it has got its chain.
func (p *Process) Ready(ctx context.Context) error {
	return p.whileRunning(ctx, func(ctx context.Context) error { return p.Admin().Ready(ctx) })
}

// ListenerAddr waits until the listener of that name is bound, and returns its address, IP:port. Bound is not open:
// Ready tells when it takes connections.
func (p *Process) ListenerAddr(ctx context.Context, name string) (addr string, err error) {
	err = p.whileRunning(ctx, func(ctx context.Context) error {
		addr, err = p.Admin().ListenerAddr(ctx, name)
		return err
	})
	return addr, err
}

// whileRunning gives f a context that ends with the process, and then says what became of it.
func (p *Process) whileRunning(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-p.done:
			err := p.err
			if err == nil {
				err = errors.New("envoy was stopped")
			}
			cancel(err)
		case <-stop:
		}
	})
	err := f(ctx)
	close(stop)
	watch.Wait()
	if err == nil {
		return nil
	}
	// An ended process refuses connections a moment before its end is known, and its log explains more.
	select {
	case <-p.done:
		if p.err != nil {
			return p.err
		}
	default:
	}
	return err
}

// Stop ends the process and waits until it is gone: SIGTERM, and SIGKILL after 5 seconds or as soon as ctx ends. One
// that has already ended by itself is no error here; Err tells.
func (p *Process) Stop(ctx context.Context) error {
	p.mu.Lock()
	select {
	case <-p.done:
		p.mu.Unlock()
		return nil
	default:
	}
	p.stopped = true
	p.mu.Unlock()
	// The group, since a wrapper script may have started the Envoy.
	if err := syscall.Kill(-p.pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("stop envoy (pid %d): %w", p.pid, err)
	}
	kill := time.NewTimer(stopTimeout)
	defer kill.Stop()
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
	case <-kill.C:
	}
	if err := syscall.Kill(-p.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("kill envoy (pid %d): %w", p.pid, err)
	}
	<-p.done
	return nil
}

// tail hands the log on and remembers its end.
type tail struct {
	log io.Writer

	mu  sync.Mutex
	end []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	t.end = append(t.end, b...)
	if len(t.end) > 2*tailBytes {
		t.end = append(t.end[:0], t.end[len(t.end)-tailBytes:]...)
	}
	t.mu.Unlock()
	if t.log != nil {
		// Envoy must not die of a log that cannot be written.
		_, _ = t.log.Write(b)
	}
	return len(b), nil
}

// quote returns the last whole lines, ready to follow an error's text; nothing when there are none.
func (t *tail) quote() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := t.end
	if len(text) > tailBytes {
		text = text[len(text)-tailBytes:]
	}
	lines := strings.Split(strings.TrimSpace(strings.ToValidUTF8(string(text), "?")), "\n")
	if len(lines) > 15 {
		lines = lines[len(lines)-15:]
	}
	if lines[0] == "" {
		return ""
	}
	return "; its log ends:\n" + strings.Join(lines, "\n")
}
