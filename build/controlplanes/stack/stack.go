// Package stack finds and runs what `make controlplanes` has built, for tests. Nothing here builds it.
package stack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Folder is where the built programs of a stack are: kubernetes, istio or consul.
func Folder(ctx context.Context, name string) (string, error) {
	script, err := script()
	if err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, script, "path", name).Output()
	if err != nil {
		return "", fmt.Errorf("ask %s where %s is: %w", script, name, err)
	}
	folder := strings.TrimSpace(string(out))
	if _, err := os.Stat(folder); err != nil {
		return "", fmt.Errorf("no %s to test with; build it with `make controlplanes`: %w", name, err)
	}
	return folder, nil
}

// script finds build/controlplanes/build.sh from the folder of the package under test.
func script() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		path := filepath.Join(dir, "build", "controlplanes", "build.sh")
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("build/controlplanes/build.sh is in no folder above this one")
		}
	}
}

// FreePorts finds loopback ports that nobody listens on at the moment, all different.
func FreePorts(n int) ([]string, error) {
	var ports []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // not before all are found
		_, port, err := net.SplitHostPort(l.Addr().String())
		if err != nil {
			return nil, err
		}
		ports = append(ports, port)
	}
	return ports, nil
}
