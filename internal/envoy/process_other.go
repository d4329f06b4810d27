//go:build unix && !linux

package envoy

import "syscall"

// processAttributes put Envoy into a group of its own, so that a terminal's interrupt reaches it only through Stop.
func processAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}

// diesWithParent says whether a killed parent takes Envoy with it.
const diesWithParent = false
