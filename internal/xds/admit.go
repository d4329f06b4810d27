package xds

import (
	"context"
	"crypto/x509"
	"net"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/limit"
)

// groupURI begins the URI names of a client certificate that say which groups its proxies may join; the group's name
// follows, or * for every group.
const groupURI = "meshery-filters://group/"

// AdmitCertified is an Options.Admit for servers that demand client certificates: a proxy may join the groups that its
// certificate names by a URI such as meshery-filters://group/edge, or all with meshery-filters://group/*.
func AdmitCertified(ctx context.Context, group string) error {
	cert, _ := peerOf(ctx)
	if cert == nil {
		return status.Error(codes.Unauthenticated, "a proxy must show a client certificate that the adapter's CA signed")
	}
	for _, u := range cert.URIs {
		// By its parts, since a * may be written as %2A.
		if name := u.Scheme + "://" + u.Host + u.Path; name == groupURI+group || name == groupURI+"*" {
			return nil
		}
	}
	return status.Errorf(codes.PermissionDenied, "the proxy's certificate does not have the URI name %s%s", groupURI, group)
}

// peerOf is the verified certificate of whoever is at the other end, nil without one, and its address.
func peerOf(ctx context.Context) (*x509.Certificate, net.Addr) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, nil
	}
	info, _ := p.AuthInfo.(credentials.TLSInfo)
	if len(info.State.VerifiedChains) == 0 {
		return nil, p.Addr
	}
	return info.State.VerifiedChains[0][0], p.Addr
}

func client(ctx context.Context) string { return limit.Key(peerOf(ctx)) }
