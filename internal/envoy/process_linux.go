package envoy

import "syscall"

// processAttributes put Envoy into a group of its own, so that a terminal's interrupt reaches it only through Stop, and
// have the kernel kill it when the thread that started it is gone.
func processAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// diesWithParent says whether a killed parent takes Envoy with it.
const diesWithParent = true
