package kube

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

// podsOn makes a node whose Pods all are at the address for port 15000, and a namespace with one of them.
func podsOn(t *testing.T, address string) (ns, pod string) {
	t.Helper()
	ns = namespace(t)
	kubelet, err := server.StartKubelet(t.Context(), unique("node"), func(_, pod string, port int) (string, error) {
		if port != 15000 {
			return "", fmt.Errorf("nothing listens at port %d of %s", port, pod)
		}
		return address, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(kubelet.Stop)
	must(t, "POST", "/api/v1/namespaces/"+ns+"/pods", map[string]any{"metadata": map[string]any{"name": "api-1"},
		"spec": map[string]any{"nodeName": kubelet.Node, "containers": []any{map[string]any{"name": "c", "image": "example/c:1"}}}})
	return ns, "api-1"
}

func TestAPodsPortIsReachedThroughTheAPIServerWithTheProofRole(t *testing.T) {
	admin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		fmt.Fprintf(w, "%s %x ", r.URL.Path, sha256.Sum256(body))
		_, _ = w.Write(bytes.Repeat([]byte("stats"), 100_000))
	}))
	defer admin.Close()
	ns, pod := podsOn(t, admin.Listener.Addr().String())
	c := base(t)
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return c.Dial(ctx, ns, pod, 15000) }}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	var wait sync.WaitGroup
	for i := range 4 {
		wait.Go(func() {
			sent := bytes.Repeat([]byte{byte(i)}, 100_000)
			resp, err := client.Post(fmt.Sprintf("http://pod/config_dump/%d", i), "application/octet-stream", bytes.NewReader(sent))
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			want := fmt.Sprintf("/config_dump/%d %x %s", i, sha256.Sum256(sent), strings.Repeat("stats", 100_000))
			if err != nil || string(got) != want {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	wait.Wait()
}

func TestAPortThatCannotBeReachedIsTold(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	ns, pod := podsOn(t, closed.Addr().String())
	c := base(t)
	for port, says := range map[int]string{15000: "connection refused", 80: "nothing listens at port 80"} {
		conn, err := c.Dial(t.Context(), ns, pod, port)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), "Pod/"+ns+"/"+pod) {
			t.Errorf("port %d: %v", port, err)
		}
	}
	_, err = c.Dial(t.Context(), ns, "absent", 15000)
	fails(t, err, problem.ObjectRefused, "Pod/"+ns+"/absent", "not found")
	for _, name := range []string{"../../secrets", ""} {
		if _, err := c.Dial(t.Context(), ns, name, 80); !errors.Is(err, problem.Internal) {
			t.Errorf("Pod %q: %v", name, err)
		}
	}

	without := cluster(t, server.Kubeconfig(account(t, ns, true)), Options{})
	_, err = without.Dial(t.Context(), ns, pod, 15000)
	fails(t, err, problem.RightMissing, "verb get, resource pods/portforward", "namespace "+ns)
	without = cluster(t, server.Kubeconfig(account(t, ns, true, rule("", "pods/portforward", "get"))), Options{})
	_, err = without.Dial(t.Context(), ns, pod, 15000)
	fails(t, err, problem.RightMissing, "verb create, resource pods/portforward", "namespace "+ns)
	other := other(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "a page") })
	_, err = other.Dial(t.Context(), ns, pod, 15000)
	fails(t, err, problem.ClusterAnswer)
}

func TestAForwardedConnectionEndsWithEitherSide(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ns, pod := podsOn(t, l.Addr().String())
	c := base(t)
	accepted := make(chan net.Conn, 2)
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for range 2 {
			conn, err := l.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			accepted <- conn
		}
	})
	dial := func() (here, there net.Conn) {
		t.Helper()
		here, err := c.Dial(t.Context(), ns, pod, 15000)
		if err != nil {
			t.Fatal(err)
		}
		return here, <-accepted
	}
	here, there := dial()
	if _, err := there.Write([]byte("bye")); err != nil {
		t.Fatal(err)
	}
	there.Close()
	if got, err := io.ReadAll(here); string(got) != "bye" || err != nil {
		t.Errorf("%q %v", got, err)
	}
	here.Close()

	here, there = dial()
	failed := make(chan error, 1)
	go func() {
		_, err := here.Read(make([]byte, 1))
		failed <- err
	}()
	time.Sleep(20 * time.Millisecond) // most likely it reads by now; it need not
	here.Close()
	if err := <-failed; !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
	if _, err := here.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after close: %v", err)
	}
	if _, err := there.Read(make([]byte, 1)); err == nil {
		t.Error("the other side goes on")
	}
	there.Close()
	accepting.Wait()
}
