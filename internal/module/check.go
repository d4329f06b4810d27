package module

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Address is where proxies fetch a module from the adapter's module server; empty when they do not reach it.
func (r *Resolver) Address(digest string) string {
	if r.ServedAt == "" {
		return ""
	}
	u, err := url.JoinPath(r.ServedAt, servedPath, digest+".wasm")
	if err != nil { // the configuration was checked
		return ""
	}
	return u
}

// Check fetches what proxies will fetch at the module's address, past what is stored, and compares. The rules and limits are those of
// every fetch; only the adapter's own address may be on this machine, and in clear. secret gives the
// credentials that the proxies have for an image's registry. What proxies would not get is problem.SourceUnproved.
//
// The adapter is not where proxies are: a network that keeps them away from the address is not seen here.
func (r *Resolver) Check(ctx context.Context, m filter.Module, secret Secrets) error {
	begun := time.Now()
	data, err := r.check(ctx, m, secret)
	if r.OnFetch != nil {
		r.OnFetch(Fetch{Source: Address, Bytes: len(data), Took: time.Since(begun), Err: err})
	}
	return err
}

const (
	// startTime is how long the adapter's own address may lead nowhere, in all: an operation may go on before the Service
	// knows of the Pod that has just started.
	startTime  = 20 * time.Second
	startPause = 200 * time.Millisecond
)

// fetchOwn fetches from the adapter's own address, and waits while nobody is there.
func (r *Resolver) fetchOwn(ctx context.Context, u *url.URL) ([]byte, error) {
	for begun := time.Now(); ; {
		data, err := r.fetch(ctx, r.own, u)
		var nobody *net.OpError
		var unknown *net.DNSError
		if !errors.As(err, &nobody) && !errors.As(err, &unknown) || time.Since(begun) > min(startTime, r.Timeout) {
			return data, err
		}
		select {
		case <-time.After(startPause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (r *Resolver) check(ctx context.Context, m filter.Module, secret Secrets) ([]byte, error) {
	u, err := url.Parse(m.URL)
	if err != nil {
		return nil, problem.SourceUnproved.New("it is not an address")
	}
	var data []byte
	switch {
	case m.URL == r.Address(m.SHA256):
		data, err = r.fetchOwn(ctx, u)
	case u.Scheme == "oci" && u.User == nil:
		data, err = r.fetchImage(ctx, u, m.PullSecret, secret)
	case u.Scheme == "https" && u.User == nil:
		data, err = r.fetch(ctx, r.client, u)
	default:
		return nil, problem.SourceUnproved.New("%s is not looked at: only https and oci without credentials are", bare(u))
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("check %s: %w", bare(u), ctx.Err())
	}
	if errors.Is(err, problem.ClusterSecret) || errors.Is(err, problem.RightMissing) {
		return nil, err
	}
	if err != nil {
		return nil, problem.SourceUnproved.New("%s", problem.Of(err).Details)
	}
	sum := sha256.Sum256(data)
	if got := hex.EncodeToString(sum[:]); got != m.SHA256 {
		return nil, problem.SourceUnproved.New("%s: wanted sha256 %s, got %s", bare(u), m.SHA256, got)
	}
	return data, nil
}
