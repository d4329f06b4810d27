package address

import (
	"net/netip"
	"testing"
)

func TestAddressesAreRefusedInEveryForm(t *testing.T) {
	for _, s := range []string{
		"127.0.0.1", "127.255.0.9", "::1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::127.0.0.1", "2002:7f00:1::",
		"0.0.0.0", "0.1.2.3", "::", "::ffff:0.0.0.0",
		"169.254.169.254", "169.254.0.1", "::ffff:169.254.169.254", "::169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1",
		"64:ff9b:1::a9fe:a9fe", "2001:0:a9fe:a9fe::1",
		"fe80::1", "fe80::1%eth0", "febf::1", "fec0::1",
		"fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "fd00:c1::a9fe:a9fe", "fd00:42::42",
		"100.100.100.200", "::ffff:100.100.100.200", "64:ff9b::6464:64c8", "192.0.0.192", "168.63.129.16",
		"224.0.0.1", "239.1.2.3", "ff02::1", "::ffff:224.0.0.1",
	} {
		if Refused(netip.MustParseAddr(s), false) == "" {
			t.Errorf("%s is allowed", s)
		}
	}
	if Refused(netip.Addr{}, true) == "" {
		t.Error("no address is allowed")
	}
}

func TestPublicAndPrivateAddressesAreAllowed(t *testing.T) {
	for _, s := range []string{
		"8.8.8.8", "10.0.0.1", "240.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "::ffff:10.0.0.1", "64:ff9b::808:808", "2002:808:808::1",
		"2606:4700::1111", "2001:4860:4860::8888", "fd12:3456::1", "fc00::1",
	} {
		if why := Refused(netip.MustParseAddr(s), false); why != "" {
			t.Errorf("%s is refused: %s", s, why)
		}
	}
}

func TestAllowingLoopbackAllowsNothingElse(t *testing.T) {
	for s, allowed := range map[string]bool{
		"127.0.0.1": true, "::1": true, "::ffff:127.0.0.1": true,
		"0.0.0.0": false, "169.254.169.254": false, "fe80::1": false, "fd00:ec2::254": false, "224.0.0.1": false,
	} {
		if got := Refused(netip.MustParseAddr(s), true) == ""; got != allowed {
			t.Errorf("%s: allowed is %v", s, got)
		}
	}
}
