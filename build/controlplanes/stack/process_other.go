//go:build unix && !linux

package stack

import "syscall"

// processAttributes put a part into a group of its own, so that a terminal's interrupt reaches it only through stop.
func processAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
