package stack

import "syscall"

// processAttributes put a part into a group of its own, so that a terminal's interrupt reaches it only through stop, and
// have the kernel kill it when the thread that started it is gone.
func processAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
