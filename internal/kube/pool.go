package kube

import (
	"crypto/sha256"
	"slices"
	"sync"
)

// poolSize is the number of kubeconfigs that a Pool remembers. One more costs whoever has been away longest a handshake
// and the questions what the cluster serves.
const poolSize = 64

// Pool keeps the clusters of the kubeconfigs that come with each request, so that connections and what a cluster serves
// outlast one operation. Kubeconfigs are told apart by their bytes: who has another token has another Cluster. Whoever
// made it calls Close.
type Pool struct {
	opts Options

	mu    sync.Mutex
	known []pooled // the one used last at the end
}

type pooled struct {
	digest  [sha256.Size]byte
	cluster *Cluster
}

// NewPool makes a Pool whose clusters have these options.
func NewPool(o Options) *Pool { return &Pool{opts: o} }

// Open is the Cluster of a kubeconfig, as Open makes it. It must not be closed: one that the Pool has forgotten goes on to
// work for whoever has it.
func (p *Pool) Open(kubeconfig []byte) (*Cluster, error) {
	digest := sha256.Sum256(kubeconfig)
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.IndexFunc(p.known, func(k pooled) bool { return k.digest == digest }); i >= 0 {
		k := p.known[i]
		p.known = append(slices.Delete(p.known, i, i+1), k)
		return k.cluster, nil
	}
	c, err := Open(kubeconfig, p.opts)
	if err != nil {
		return nil, err
	}
	if len(p.known) == poolSize {
		p.known[0].cluster.Close()
		p.known = slices.Delete(p.known, 0, 1)
	}
	p.known = append(p.known, pooled{digest, c})
	return c, nil
}

// Close ends the idle connections of every cluster.
func (p *Pool) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range p.known {
		k.cluster.Close()
	}
	p.known = nil
}
