// Package address tells which addresses nobody from outside may have the adapter connect to.
package address

import "net/netip"

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
	// Tunnels where the IPv4 address cannot be told for sure.
	tunnels = []netip.Prefix{
		netip.MustParsePrefix("64:ff9b:1::/48"), // NAT64 with a prefix of the network's own
		netip.MustParsePrefix("2001::/32"),      // Teredo
	}
)

// Refused says why nothing may be asked at an address: it is link-local, or one of a cloud's metadata services, or stands
// for such a one. It is empty where something may. Private networks are allowed: that is where companies keep their
// servers. So are loopback addresses if loopback says so.
func Refused(a netip.Addr, loopback bool) (why string) {
	a = a.Unmap().WithZone("")
	switch {
	case !a.IsValid() || a.IsUnspecified() || thisNetwork.Contains(a):
		return "an unspecified address"
	case a.IsLoopback():
		if loopback {
			return ""
		}
		return "a loopback address"
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
	for _, p := range tunnels {
		if p.Contains(a) {
			return "a tunnel's address"
		}
	}
	for p, at := range carriers {
		if p.Contains(a) {
			b := a.As16()
			return Refused(netip.AddrFrom4([4]byte(b[at:at+4])), loopback)
		}
	}
	return ""
}
