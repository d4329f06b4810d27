package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// library is the least adapter that the adapter library's runtime makes (build/library), as a process of its own.
type library struct {
	process
	conn *grpc.ClientConn
}

// buildLibrary builds build/library the way the adapter is built. It is found from the folder that the bench runs in.
func (b *bench) buildLibrary(ctx context.Context) (program string, err error) {
	b.say("building an adapter of the adapter library; the first time takes minutes")
	program = filepath.Join(b.dir, "library")
	root, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("find the project's folder: %w", err)
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, ".")
	cmd.Dir = filepath.Join(string(root[:len(root)-1]), "build", "library")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build build/library: %w\n%s", err, text)
	}
	return program, nil
}

// startLibrary returns once it answers calls, and how long that took.
func startLibrary(ctx context.Context, program, log string) (l *library, took time.Duration, err error) {
	// It takes no other port than one that it is told.
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, 0, err
	}
	addr := free.Addr().String()
	free.Close()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, 0, err
	}
	began := time.Now()
	l = &library{}
	if l.process, err = startProcess(exec.Command(program, port), log); err != nil {
		return nil, 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			c.Close()
			break
		}
		if pause(ctx, time.Millisecond) != nil {
			return nil, 0, l.failed(errors.New("the library's adapter does not answer"))
		}
	}
	took = time.Since(began)
	if l.conn, err = grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		return nil, 0, l.failed(err)
	}
	return l, took, nil
}

func (l *library) stop() error {
	if l.conn != nil {
		l.conn.Close()
	}
	return l.kill() // it takes no notice of signals
}

func (l *library) grpcConn() *grpc.ClientConn { return l.conn }

// tell has events told; those who hear them read in them when that was.
func (l *library) tell(ctx context.Context, n int) (map[key]time.Time, error) {
	_, err := meshes.NewMeshServiceClient(l.conn).ApplyOperation(ctx, &meshes.ApplyRuleRequest{OpName: "tell",
		OperationId: "bench-" + rand.Text(), CustomBody: strconv.Itoa(n)})
	return nil, err
}
