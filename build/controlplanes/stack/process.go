package stack

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	stopTimeout  = 20 * time.Second // between SIGTERM and SIGKILL
	tailBytes    = 8 << 10          // of the log that an error quotes
	pollInterval = 50 * time.Millisecond
)

// Process is one running part of a stack. Whoever started it calls Stop.
type Process struct {
	name string
	pid  int
	log  *tail
	done chan struct{}
	err  error // set before done is closed
}

// Run starts a program under a name that it may look at, with variables on top of this process's environment. It waits
// for its end in a goroutine that keeps its thread, since Linux takes the death of the thread that started a process for
// the death of its parent.
func Run(program, name string, env []string, args ...string) (*Process, error) {
	p := &Process{name: name, log: &tail{}, done: make(chan struct{})}
	cmd := exec.Command(program, args...)
	cmd.Args[0] = name
	cmd.Env = append(cmd.Environ(), env...)
	cmd.Stdout, cmd.Stderr = p.log, p.log
	cmd.SysProcAttr = processAttributes()
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
		if p.err = cmd.Wait(); p.err == nil {
			p.err = errors.New("exit status 0")
		}
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return p, nil
}

// Await polls until ready gives no error, ctx ends, or the process does. The error quotes the end of its log.
func (p *Process) Await(ctx context.Context, ready func(context.Context) error) error {
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return p.Err()
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w: %w; its log ends:\n%s", p.name, ctx.Err(), err, p.log)
		case <-time.After(pollInterval):
		}
	}
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says why the process has ended, with the end of its log, or nil while it runs.
func (p *Process) Err() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended: %w; its log ends:\n%s", p.name, p.err, p.log)
	default:
		return nil
	}
}

// Log is the end of what it has written.
func (p *Process) Log() string { return p.log.String() }

// Stop ends the process and waits until it is gone. One that does not heed SIGTERM in time is killed.
func (p *Process) Stop() {
	select {
	case <-p.done:
		return
	default:
	}
	_ = syscall.Kill(p.pid, syscall.SIGTERM) // it may have ended meanwhile
	kill := time.NewTimer(stopTimeout)
	defer kill.Stop()
	select {
	case <-p.done:
	case <-kill.C:
		_ = syscall.Kill(p.pid, syscall.SIGKILL)
		<-p.done
	}
}

// tail remembers the end of a log.
type tail struct {
	mu  sync.Mutex
	end []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.end = append(t.end, b...)
	if over := len(t.end) - tailBytes; over > 0 {
		t.end = append(t.end[:0], t.end[over:]...)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.ToValidUTF8(string(t.end), "?")
}
