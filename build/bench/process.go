package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"syscall"
	"time"
)

// process is a running program whose output is in a file.
type process struct {
	cmd   *exec.Cmd
	log   string
	ended chan error
}

func startProcess(cmd *exec.Cmd, log string) (process, error) {
	out, err := os.Create(log)
	if err != nil {
		return process{}, err
	}
	defer out.Close()
	cmd.Env = []string{"HOME=" + os.Getenv("HOME")} // the user's own settings would change the figures
	cmd.Stdout, cmd.Stderr = out, out
	p := process{cmd: cmd, log: log, ended: make(chan error, 1)}
	if err := cmd.Start(); err != nil {
		return process{}, err
	}
	go func() { p.ended <- cmd.Wait() }()
	return p, nil
}

func (p process) pid() int { return p.cmd.Process.Pid }

// failed ends the process, and adds its log to why.
func (p process) failed(why error) error {
	text, _ := os.ReadFile(p.log)
	return errors.Join(fmt.Errorf("%w; its log:\n%s", why, text), p.kill())
}

func (p process) kill() error {
	_ = p.cmd.Process.Kill()
	<-p.ended
	return nil
}

// interrupt wants the process to end well by itself.
func (p process) interrupt() error {
	_ = p.cmd.Process.Signal(os.Interrupt)
	select {
	case err := <-p.ended:
		if err != nil {
			return fmt.Errorf("%s ended: %w", p.cmd.Path, err)
		}
		return nil
	case <-time.After(20 * time.Second):
		_ = p.kill()
		return fmt.Errorf("%s does not stop", p.cmd.Path)
	}
}

var goroutine = regexp.MustCompile(`(?m)^goroutine \d+ `)

// goroutines ends a program with the signal that has Go write all goroutines down, and counts them.
func (p process) goroutines() (int, error) {
	if err := p.cmd.Process.Signal(syscall.SIGQUIT); err != nil {
		return 0, err
	}
	<-p.ended
	text, err := os.ReadFile(p.log)
	if err != nil {
		return 0, err
	}
	n := len(goroutine.FindAll(text, -1))
	if n == 0 {
		return 0, fmt.Errorf("%s does not write its goroutines down", p.cmd.Path)
	}
	return n, nil
}
