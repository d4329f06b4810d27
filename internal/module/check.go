package module

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"time"

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

// Check fetches what proxies will fetch at an address, past what is stored, and compares. The rules and limits are those of
// every fetch; only the adapter's own address may be on this machine, and in clear. What proxies would not get is
// problem.SourceUnproved.
//
// The adapter is not where proxies are: a network that keeps them away from the address is not seen here.
func (r *Resolver) Check(ctx context.Context, address, digest string) error {
	begun := time.Now()
	data, err := r.check(ctx, address, digest)
	if r.OnFetch != nil {
		r.OnFetch(Fetch{Source: Address, Bytes: len(data), Took: time.Since(begun), Err: err})
	}
	return err
}

func (r *Resolver) check(ctx context.Context, address, digest string) ([]byte, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, problem.SourceUnproved.New("it is not an address")
	}
	var data []byte
	switch {
	case address == r.Address(digest):
		data, err = r.fetch(ctx, r.own, u)
	case u.Scheme == "oci" && u.User == nil:
		data, err = r.fetchImage(ctx, u, "")
	case u.Scheme == "https" && u.User == nil:
		data, err = r.fetch(ctx, r.client, u)
	default:
		return nil, problem.SourceUnproved.New("%s is not looked at: only https and oci without credentials are", bare(u))
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("check %s: %w", bare(u), ctx.Err())
	}
	if err != nil {
		return nil, problem.SourceUnproved.New("%s", problem.Of(err).Details)
	}
	sum := sha256.Sum256(data)
	if got := hex.EncodeToString(sum[:]); got != digest {
		return nil, problem.SourceUnproved.New("%s: wanted sha256 %s, got %s", bare(u), digest, got)
	}
	return data, nil
}
