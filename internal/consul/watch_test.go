package consul

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/plan"
)

// TestManySilentAddressesCostOneDeadline has sixty listeners that take connections and say nothing.
func TestManySilentAddressesCostOneDeadline(t *testing.T) {
	var silent []string
	for range 60 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		silent = append(silent, l.Addr().String())
	}
	c := newClient(t, func(o *Options) { o.Admin = silent })
	begun := time.Now()
	var g errgroup.Group
	g.SetLimit(8) // as a list does
	for i := range 20 {
		g.Go(func() error {
			for l, err := range c.Loaded(t.Context(), plan.Plan{Chain: on(fmt.Sprintf("service-%d", i), 1).Chain}) {
				if err == nil && (strings.Count(l.Unverified, "nothing answers") != 1 || !strings.Contains(l.Unverified, "at 60 addresses, "+silent[0]) ||
					!strings.Contains(l.Unverified, "and 50 more")) {
					err = fmt.Errorf("%s", l.Unverified)
				}
				return err
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if took := time.Since(begun); took < within || took > 3*within { // each for itself it would be 20 times that
		t.Errorf("it took %s", took)
	}
}
