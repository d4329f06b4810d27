package kube

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/meshery/meshery-filters/internal/address"
)

// errAddress is what a name stood for when it was dialled.
type errAddress struct{ why string }

func (e errAddress) Error() string { return e.why }

// dialer looks at the very address that is connected to, so that a name cannot stand for one address when it is checked
// and for another when it is used.
func dialer(allow Allow) func(ctx context.Context, network, address string) (net.Conn, error) {
	d := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	if !allow.LinkLocal {
		d.Control = func(_, to string, _ syscall.RawConn) error {
			a, err := netip.ParseAddrPort(to)
			if err != nil {
				return fmt.Errorf("dial %q: %w", to, err)
			}
			if why := address.Refused(a.Addr(), true); why != "" {
				return errAddress{why}
			}
			return nil
		}
	}
	return d.DialContext
}
