package xds

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// groupURI begins the URI names of a client certificate that say which groups its proxies may join; the group's name
// follows, or * for every group.
const groupURI = "meshery-filters://group/"

// AdmitCertified is an Options.Admit for servers that demand client certificates: a proxy may join the groups that its
// certificate names by a URI such as meshery-filters://group/edge, or all with meshery-filters://group/*.
func AdmitCertified(ctx context.Context, group string) error {
	p, _ := peer.FromContext(ctx)
	var info credentials.TLSInfo
	if p != nil {
		info, _ = p.AuthInfo.(credentials.TLSInfo)
	}
	if len(info.State.VerifiedChains) == 0 {
		return status.Error(codes.Unauthenticated, "a proxy must show a client certificate that the adapter's CA signed")
	}
	for _, u := range info.State.VerifiedChains[0][0].URIs {
		// By its parts, since a * may be written as %2A.
		if name := u.Scheme + "://" + u.Host + u.Path; name == groupURI+group || name == groupURI+"*" {
			return nil
		}
	}
	return status.Errorf(codes.PermissionDenied, "the proxy's certificate does not have the URI name %s%s", groupURI, group)
}
