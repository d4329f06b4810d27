package k8stest

import (
	"errors"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	stopTimeout = 20 * time.Second // between SIGTERM and SIGKILL
	tailBytes   = 8 << 10          // of the log that an error quotes
)

// process is one running part.
type process struct {
	part string
	pid  int
	log  *tail
	done chan struct{}
	err  error // set before done is closed
}

// run starts a part of the program, and waits for its end in a goroutine that keeps its thread, since Linux takes the
// death of the thread that started a process for the death of its parent.
func run(program, part string, args []string) (*process, error) {
	p := &process{part: part, log: &tail{}, done: make(chan struct{})}
	cmd := exec.Command(program, args...)
	cmd.Args[0] = part
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
	return p, <-started
}

// stop ends the process and waits until it is gone. One that does not heed SIGTERM in time is killed.
func (p *process) stop() {
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
