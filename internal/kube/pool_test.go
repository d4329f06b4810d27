package kube

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"

	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/internal/problem"
)

func TestAPoolKnowsItsKubeconfigsByTheirBytesAndForgetsTheOneUnusedForLongest(t *testing.T) {
	p := NewPool(Options{Log: slog.New(slog.DiscardHandler)})
	defer p.Close()
	open := func(n int) *Cluster {
		t.Helper()
		c, err := p.Open(kubeconfig(goodServer, fmt.Sprintf("token: t%d", n)))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	first, second := open(0), open(1)
	if first == second || open(0) != first {
		t.Error("clusters are not told apart by their kubeconfigs")
	}
	for n := range poolSize - 1 {
		open(100 + n)
	}
	if open(0) != first {
		t.Error("one that was used since is forgotten")
	}
	if open(1) == second || len(p.known) != poolSize {
		t.Errorf("the one unused for longest is kept; %d are known", len(p.known))
	}
	if _, err := p.Open([]byte("nothing")); !errors.Is(err, problem.KubeconfigRefused) {
		t.Errorf("got %v", err)
	}
}

func TestOperationsAtOnceShareOneClusterOfAPool(t *testing.T) {
	namespaces := make([]string, 12)
	for i := range namespaces {
		namespaces[i] = namespace(t)
	}
	p := NewPool(Options{Log: slog.New(slog.DiscardHandler)})
	defer p.Close()
	kubeconfig := server.Kubeconfig(server.Token(k8stest.Admin))
	c, err := p.Open(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	r := record(c)
	var wait sync.WaitGroup
	for _, ns := range namespaces {
		wait.Go(func() {
			c, err := p.Open(kubeconfig)
			if err == nil {
				_, err = applies(t.Context(), c, planOf(ns, "a"))
			}
			if err != nil {
				t.Errorf("%s: %v", ns, err)
			}
		})
	}
	wait.Wait()
	for _, ns := range namespaces {
		holds(t, ns, "a")
	}
	before := len(r.requests())
	apply(t, c, planOf(namespaces[0], "a"))
	if n := len(r.requests()) - before; n != 2 { // the inventory and the dry run
		t.Errorf("%d requests for what does not change: %q", n, r.requests()[before:])
	}
}
