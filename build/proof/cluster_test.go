package proof

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// startCluster starts three NATS servers that keep everything three times.
func startCluster(t *testing.T) []*broker {
	t.Helper()
	var all []*broker
	var routes []string
	for i := range 3 {
		routes = append(routes, fixedAddr(t))
		all = append(all, &broker{t: t, brokerOptions: brokerOptions{Name: fmt.Sprintf("n%d", i), Addr: fixedAddr(t),
			Cluster: routes[i], StoreDir: filepath.Join(t.TempDir(), "jetstream")}})
	}
	for _, b := range all {
		b.Routes = routes
		b.start()
	}
	return all
}

// leader finds the server that leads a stream, of which all replicas are there.
func leader(t *testing.T, js jetstream.JetStream, all []*broker, name string) *broker {
	t.Helper()
	var found *broker
	eventually(t, name+" has a leader and two followers", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		stream, err := js.Stream(ctx, name)
		if err != nil {
			return err
		}
		cluster := stream.CachedInfo().Cluster
		if cluster == nil || len(cluster.Replicas) != 2 {
			return fmt.Errorf("it has %+v", cluster)
		}
		for _, peer := range cluster.Replicas {
			if peer.Offline || !peer.Current {
				return fmt.Errorf("%s is behind: %+v", peer.Name, peer)
			}
		}
		for _, b := range all {
			if b.Name == cluster.Leader {
				found = b
				return nil
			}
		}
		return fmt.Errorf("the leader is %q", cluster.Leader)
	})
	return found
}

// TestNothingAcceptedIsLostWhenLeadersOfAClusterAreKilled has two adapters share a cluster whose servers are killed, each
// when it leads a stream, and kills one of the adapters too.
func TestNothingAcceptedIsLostWhenLeadersOfAClusterAreKilled(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	all := startCluster(t)
	var urls []string
	for _, b := range all {
		urls = append(urls, b.url())
	}
	js, err := jetstream.New(connectNATS(t, strings.Join(urls, ",")))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the cluster has a leader", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		_, err := js.AccountInfo(ctx)
		return err
	})
	shared := []string{"--store-url", strings.Join(urls, ",")}
	x := newTorture(t, newSubscriber(t), shared...)
	x.others = append(x.others, newReplica(t, append([]string{"--nats-url", x.heard.url}, shared...)...))
	for _, r := range x.replicas() {
		r.start()
		r.ready()
	}
	x.startProxies()
	stop := x.load()
	kills := 0
	for range rounds(t, 1) {
		for i, name := range []string{"filters-operations", "filters-events", "KV_filters-records"} {
			b := leader(t, js, all, name)
			t.Logf("%s leads %s", b.Name, name)
			pause(500)
			b.end(t, syscall.SIGKILL)
			kills++
			if i == 1 {
				x.others[0].end(t, syscall.SIGKILL)
				x.others[0].start()
			}
			pause(4000)
			b.start()
		}
	}
	x.others[0].ready()
	stop()
	x.ended(2 * patience)
	x.check()
	t.Logf("%d kills of leaders, %d operations, %d events came again", kills, len(x.accepted), x.heard.again())
}
