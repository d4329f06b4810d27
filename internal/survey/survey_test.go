package survey_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	wasm "github.com/envoyproxy/go-control-plane/envoy/extensions/wasm/v3"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/survey"
)

// mesh is one of so many proxies, in a time that passes at once: no machine has as many Envoys.
type mesh struct {
	proxies   int
	running   func(ctx context.Context, pod plan.Pod) ([]plan.WasmFilter, error)
	explained func(names []string) map[string]bool
}

func (m mesh) Proxies(context.Context, string) (pods []plan.Pod, err error) {
	for i := range m.proxies {
		pods = append(pods, plan.Pod{Namespace: "shop", Name: fmt.Sprintf("api-%03d", i)})
	}
	return pods, nil
}

func (m mesh) Running(ctx context.Context, pod plan.Pod) ([]plan.WasmFilter, error) {
	return m.running(ctx, pod)
}

func (m mesh) Explained(_ context.Context, names []string) (map[string]bool, error) {
	return m.explained(names), nil
}

func (m mesh) Settling() time.Duration { return 10 * time.Second }

func nothing([]string) map[string]bool { return nil }

// takes is a proxy that answers after a while.
func takes(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func look(t *testing.T, m mesh, want string, orphans int) plan.Survey {
	t.Helper()
	begun := time.Now()
	s, err := survey.Look(t.Context(), m, "")
	if err != nil || s.String() != want || len(s.Orphans) != orphans {
		t.Errorf("%s; orphans %v, %v; it should be %s, and %d", s, s.Orphans, err, want, orphans)
	}
	if took := time.Since(begun); took > 45*time.Second {
		t.Errorf("it took %s", took)
	}
	return s
}

func TestALookEndsInTimeAndSaysHowFarItCame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := func(ctx context.Context, _ plan.Pod) ([]plan.WasmFilter, error) {
			return nil, takes(ctx, 4*time.Second)
		}
		look(t, mesh{400, slow, nothing}, "looked at 56 of 400 proxies: the 30s of a look were over (344 proxies)", 0)
	})
}

func TestWhyProxiesWereNotLookedAtIsSaidInFewWords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int32
		denied := func(context.Context, plan.Pod) ([]plan.WasmFilter, error) {
			asked.Add(1)
			return nil, problem.RightMissing.New("verb create, resource pods/portforward")
		}
		look(t, mesh{400, denied, nothing}, "looked at 0 of 400 proxies: verb create, resource pods/portforward (400 proxies)", 0)
		if n := asked.Load(); n > 8 {
			t.Errorf("%d proxies of a namespace were asked that may not be", n)
		}
		ill := func(ctx context.Context, pod plan.Pod) ([]plan.WasmFilter, error) {
			switch pod.Name {
			case "api-001":
				return nil, takes(ctx, time.Hour)
			case "api-002", "api-003", "api-004", "api-005":
				return nil, errors.New("it\nfails")
			}
			return nil, nil
		}
		look(t, mesh{10, ill, nothing}, "looked at 5 of 10 proxies: shop/api-001: it did not answer within 5s; shop/api-002: it fails; shop/api-003: it fails; and 2 more proxies for other reasons", 0)
	})
}

func TestWhatIsOnItsWayOutIsNoOrphan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		filters := func(names ...string) (of []plan.WasmFilter) {
			for _, n := range names {
				of = append(of, plan.WasmFilter{Name: n})
			}
			return of
		}
		m := mesh{proxies: 3, running: func(_ context.Context, pod plan.Pod) ([]plan.WasmFilter, error) {
			late := time.Since(begun) > 9*time.Second
			switch pod.Name {
			case "api-000":
				if late {
					return filters("stays"), nil
				}
				return filters("stays", "goes"), nil
			case "api-001":
				return filters("known", "soon"), nil
			}
			if late {
				return nil, errors.New("its Pod is gone")
			}
			return filters("stays"), nil
		}, explained: func([]string) map[string]bool {
			return map[string]bool{"known": true, "soon": time.Since(begun) > 3*time.Second}
		}}
		s := look(t, m, "looked at 2 of 3 proxies: shop/api-002: its Pod is gone", 1)
		if len(s.Orphans) == 1 && s.Orphans[0].String() != "shop/api-000 runs stays" {
			t.Error(s.Orphans[0])
		}
	})
}

func TestALookThatIsCalledOffIsNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		m := mesh{3, func(ctx context.Context, _ plan.Pod) ([]plan.WasmFilter, error) {
			return nil, takes(ctx, 2*time.Second)
		}, nothing}
		if s, err := survey.Look(ctx, m, ""); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", s, err)
		}
	})
}

func TestOfAnAddressNothingIsToldThatCouldBeASecret(t *testing.T) {
	digest := strings.Repeat("a1", 32)
	remote := func(uri, sha string) *core.AsyncDataSource {
		return &core.AsyncDataSource{Specifier: &core.AsyncDataSource_Remote{Remote: &core.RemoteDataSource{HttpUri: &core.HttpUri{Uri: uri}, Sha256: sha}}}
	}
	file := func(name string) *core.AsyncDataSource {
		return &core.AsyncDataSource{Specifier: &core.AsyncDataSource_Local{Local: &core.DataSource{Specifier: &core.DataSource_Filename{Filename: name}}}}
	}
	for _, c := range []struct {
		code *core.AsyncDataSource
		want string
	}{
		{remote("https://me:pass@host.example/a.wasm?token=s3cret#x", digest), "p runs f (sha256 a1a1a1a1a1a1…, https://host.example/a.wasm)"},
		{remote("oci://host.example/a:v1", "nil"), "p runs f (oci://host.example/a:v1)"},
		{file("/var/lib/istio/data/0123/" + digest + ".wasm"), "p runs f (sha256 a1a1a1a1a1a1…, /var/lib/istio/data/0123/" + digest + ".wasm)"},
		{file("/filters/mine.wasm"), "p runs f (/filters/mine.wasm)"},
		{nil, "p runs f"},
	} {
		f := survey.FilterOf("f", &wasm.PluginConfig{Vm: &wasm.PluginConfig_VmConfig{VmConfig: &wasm.VmConfig{Code: c.code}}})
		if got := (plan.Orphan{Proxy: "p", WasmFilter: f}).String(); got != c.want {
			t.Errorf("%s, and not %s", got, c.want)
		}
	}
}
