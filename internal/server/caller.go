package server

import (
	"context"
	"crypto/x509"
	"net"
	"net/netip"
	"strings"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/meshery/meshery-filters/internal/operation"
)

// Roles say which client certificates may do what, by their URI names and common names. A pattern with :// is one of
// URI names, any other of common names; a * in it stands for any text. They hold where certificates are verified; a
// certificate that no pattern is of may do nothing but ask for health.
type Roles struct {
	Operate []string // may ask for operations, and whatever Read may
	Read    []string // may see what there is
}

// role is what a caller needs for a call.
type role int

const (
	nobody  role = iota // everybody may
	reader              // Roles.Read
	operate             // Roles.Operate
)

func (r role) String() string { return [...]string{"", "read", "operate"}[r] }

// of is the most that the certificate may do.
func (r Roles) of(c *x509.Certificate) role {
	has := func(patterns []string) bool {
		for _, p := range patterns {
			if !strings.Contains(p, "://") {
				if c.Subject.CommonName != "" && like(p, c.Subject.CommonName) {
					return true
				}
				continue
			}
			for _, u := range c.URIs {
				if like(p, u.String()) {
					return true
				}
			}
		}
		return false
	}
	switch {
	case has(r.Operate):
		return operate
	case has(r.Read):
		return reader
	}
	return nobody
}

// like says whether the pattern, in which * stands for any text, is of the whole text.
func like(pattern, text string) bool {
	parts := strings.Split(pattern, "*")
	last := len(parts) - 1
	rest, ok := strings.CutPrefix(text, parts[0])
	if !ok || last == 0 {
		return ok && rest == ""
	}
	for _, part := range parts[1:last] {
		if _, rest, ok = strings.Cut(rest, part); !ok {
			return false
		}
	}
	return strings.HasSuffix(rest, parts[last])
}

// maxName bounds what is kept of a certificate's name, in bytes.
const maxName = 256

// caller is who makes a call, as its connection tells.
type caller struct {
	certificate *x509.Certificate // verified; nil without one
	remote      net.Addr
}

func callerOf(ctx context.Context) caller {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return caller{}
	}
	c := caller{remote: p.Addr}
	if info, ok := p.AuthInfo.(credentials.TLSInfo); ok && len(info.State.VerifiedChains) > 0 {
		c.certificate = info.State.VerifiedChains[0][0]
	}
	return c
}

// name is the certificate's subject, or its first URI name where that is empty.
func (c caller) name() string {
	if c.certificate == nil {
		return ""
	}
	name := c.certificate.Subject.String()
	if name == "" && len(c.certificate.URIs) > 0 {
		name = c.certificate.URIs[0].String()
	}
	if name == "" {
		name = "serial number " + c.certificate.SerialNumber.Text(16)
	}
	return clip(name, maxName)
}

// local says whether the caller is on this machine and came over its loopback interface.
func (c caller) local() bool {
	if c.remote == nil {
		return false
	}
	addr, err := netip.ParseAddrPort(c.remote.String())
	return err == nil && addr.Addr().Unmap().IsLoopback()
}

// asked is the caller as operations know it.
func (c caller) asked(r Roles) operation.Caller {
	o := operation.Caller{Certificate: c.name(), Foreign: c.certificate == nil && !c.local()}
	if c.certificate != nil {
		o.Reader = r.of(c.certificate) < operate
		o.Serial = c.certificate.SerialNumber.Text(16)
	}
	if c.remote != nil {
		o.Remote = c.remote.String()
	}
	return o
}
