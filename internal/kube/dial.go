package kube

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"
)

// Cloud machines find their own credentials at these addresses, besides the link-local ones.
var metadata = []netip.Prefix{
	netip.MustParsePrefix("fd00:ec2::/32"),          // AWS
	netip.MustParsePrefix("fd20:ce::254/128"),       // Google Cloud
	netip.MustParsePrefix("fd00:c1::a9fe:a9fe/128"), // Oracle Cloud
	netip.MustParsePrefix("fd00:42::42/128"),        // Scaleway
	netip.MustParsePrefix("100.100.100.200/32"),     // Alibaba Cloud
	netip.MustParsePrefix("192.0.0.192/32"),         // Oracle Cloud Classic
	netip.MustParsePrefix("168.63.129.16/32"),       // Azure
}

var (
	thisNetwork = netip.MustParsePrefix("0.0.0.0/8")
	siteLocal   = netip.MustParsePrefix("fec0::/10")
	// Ranges whose addresses stand for IPv4 ones: the number says at which byte those begin.
	carriers = map[netip.Prefix]int{
		netip.MustParsePrefix("::/96"):        12, // IPv4-compatible
		netip.MustParsePrefix("64:ff9b::/96"): 12, // NAT64
		netip.MustParsePrefix("2002::/16"):    2,  // 6to4
	}
)

// refused says why an API server must not be at an address; empty means it may. Private networks and the loopback
// interface are where API servers are.
func refused(a netip.Addr) string {
	a = a.Unmap().WithZone("")
	switch {
	case a.IsLoopback():
		return ""
	case !a.IsValid() || a.IsUnspecified() || thisNetwork.Contains(a):
		return "an unspecified address"
	case a.IsLinkLocalUnicast() || siteLocal.Contains(a):
		return "a link-local address"
	case a.IsMulticast():
		return "a multicast address"
	}
	for _, p := range metadata {
		if p.Contains(a) {
			return "a cloud's metadata address"
		}
	}
	for p, at := range carriers {
		if p.Contains(a) {
			b := a.As16()
			return refused(netip.AddrFrom4([4]byte(b[at : at+4])))
		}
	}
	return ""
}

// errAddress is what a name stood for when it was dialled.
type errAddress struct{ why string }

func (e errAddress) Error() string { return e.why }

// dialer looks at the very address that is connected to, so that a name cannot stand for one address when it is checked
// and for another when it is used.
func dialer(allow Allow) func(ctx context.Context, network, address string) (net.Conn, error) {
	d := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	if !allow.LinkLocal {
		d.Control = func(_, address string, _ syscall.RawConn) error {
			a, err := netip.ParseAddrPort(address)
			if err != nil {
				return fmt.Errorf("dial %q: %w", address, err)
			}
			if why := refused(a.Addr()); why != "" {
				return errAddress{why}
			}
			return nil
		}
	}
	return d.DialContext
}
