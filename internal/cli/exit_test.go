package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/problem"
)

func TestMisuseIsExitCode2AndSaysWhatToDo(t *testing.T) {
	for _, c := range []struct {
		args string
		says string
	}{
		{"bogus", "unknown command"},
		{"aply", "apply"}, // a suggestion
		{"list --server nowhere", "is not HOST:PORT"},
		{"list --bogus", "unknown flag"},
		{"list surplus", "takes no arguments"},
		{"apply filter.yaml", "named with -f"},
		{"envoy bogus", "bootstrap or slot"},
		{"meshery bogus", "say which: filters"},
		{"meshery filters bogus", "list, pull or push"},
		{"history", "which filter"},
		{"undo a --to last", "write a whole number"},
		{"undo a --timeout -2s", "--timeout"},
		{"list -o xml", "write table, json or yaml"},
		{"apply", "-f FILE"},
		{"apply -f", "needs an argument"},
		{"apply -f /does/not/exist.yaml", "/does/not/exist.yaml"},
		{"apply -f testdata", "is a folder"},
		{"remove", "a filter's name"},
		{"remove NOT/a/name", "is not a filter's name"},
		{"history a -n NOT", "is not a namespace's name"},
		{"render", "-f FILE"},
		{"run", "which operation"},
		{"run a b", "too many"},
		{"inspect", "FILE.wasm"},
		{"inspect /does/not/exist.wasm", "/does/not/exist.wasm"},
		{"inspect exit_test.go", "meshery-filters-1013"},
		{"try /does/not/exist.wasm", "/does/not/exist.wasm"},
		{"try exit_test.go --failure-policy maybe", "maybe"},
		{"try exit_test.go --config a --config-file b", "do not go together"},
		{"try exit_test.go --once --watch", "do not go together"},
		{"try exit_test.go --log-level loud", "--log-level"},
		{"try exit_test.go -H nothing", "name: value"},
		{"explain spec.bogus", "spec.bogus"},
		{"envoy", "bootstrap or slot"},
		{"envoy bootstrap --group a/b", "--group"},
		{"envoy bootstrap --listen 8080 --xds-tls-ca a", "--listen"},
		{"envoy bootstrap --xds-tls-ca a", "--xds-tls-cert: is missing"},
		{"envoy slot --group a/b", "--group"},
		{"imagehub", "--key-env"},
		{"imagehub --key-env NOT_SET", "NOT_SET"},
		{"imagehub --key-env A --unsigned", "one of"},
		{"list --tls-cert a.pem", "go together"},
		{"list --consul", "no Consul is configured"},
		{"list --consul --kubeconfig a", "no cluster"},
		{"history x --config a", "--config goes with --consul"},
		{"remove x --consul", "--no-adapter"},
		{"remove x --no-adapter", "--kubeconfig FILE, or with --consul"},
		{"list --tls-ca exit_test.go", "no certificate"},
	} {
		t.Run(c.args, func(t *testing.T) {
			r := run(t, strings.Fields(c.args)...).want(t, exitUsage, c.says)
			if strings.Contains(c.args, "inspect exit") {
				return // it prints what it could tell
			}
			if r.out != "" || !strings.HasPrefix(r.err, "Error: ") {
				t.Errorf("an error is not alone on standard error:\n%s%s", r.out, r.err)
			}
		})
	}
}

func TestAnAdapterThatIsNotThereIsExitCode3(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil { // nothing answers there now
		t.Fatal(err)
	}
	for _, args := range []string{"list", "status", "events", "events --follow", "operations", "run imagehub", "remove a/b"} {
		t.Run(args, func(t *testing.T) {
			runWith(t, "", []string{envServer + "=" + addr}, strings.Fields(args)...).want(t, exitUnreachable, addr, "meshery-filters serve")
		})
	}
}

func TestAProblemSurvivesTheWire(t *testing.T) {
	c := &client{server: "there"}
	for _, k := range problem.All() {
		if k.Status == codes.OK {
			continue
		}
		p := k.New("it happened to: shop/a [really]\nsecond line")
		st, err := p.GRPCStatus().WithDetails(&errdetails.ErrorInfo{Reason: k.Code, Metadata: map[string]string{"cause": k.Cause, "remedy": k.Remedy}})
		if err != nil {
			t.Fatal(err)
		}
		got := c.failed(t.Context(), st.Err())
		var back *problem.Problem
		if !errors.As(got, &back) || !errors.Is(got, k) || back.Details != p.Details {
			t.Errorf("%s came back as %#v", k.Code, got)
		}
	}
}

func TestAProblemOfANewerAdapterIsShownAsItCame(t *testing.T) {
	st, err := status.New(codes.FailedPrecondition, "the moon is full: tonight [meshery-filters-9999] Remedy: wait").
		WithDetails(&errdetails.ErrorInfo{Reason: "meshery-filters-9999", Metadata: map[string]string{"cause": "orbits", "remedy": "wait"}})
	if err != nil {
		t.Fatal(err)
	}
	f := explain((&client{}).failed(t.Context(), st.Err()), true)
	if f.summary != "the moon is full" || strings.Join(f.details, "") != "tonight" || f.cause != "orbits" || f.remedy != "wait" || f.code != "meshery-filters-9999" || f.exit != exitFailed {
		t.Errorf("%+v", f)
	}
}

func TestExitCodesFollowWhatHappened(t *testing.T) {
	c := &client{server: "there"}
	for _, k := range []struct {
		why  string
		err  error
		exit int
	}{
		{"an invalid document", problem.InvalidDocument.New("x"), exitUsage},
		{"an operation that is not known", problem.UnknownOperation.New("x"), exitUsage},
		{"a filter that is not there", problem.FilterNotFound.New("x"), exitFailed},
		{"a store that failed answers, so it is no adapter that does not", problem.StoreFailed.New("x"), exitFailed},
		{"an adapter that is shutting down", problem.ShuttingDown.New("x"), exitUnreachable},
		{"proxies that did not answer", eventView{Type: typeError, Code: problem.ProxyTimeout.Code}.outcome(), exitTimeout},
		{"a refused configuration found out while the operation ran", eventView{Type: typeError, Code: problem.ConfigRefused.Code}.outcome(), exitFailed},
		{"a call that took too long", c.failed(t.Context(), status.Error(codes.DeadlineExceeded, "x")), exitTimeout},
		{"another server", c.failed(t.Context(), status.Error(codes.Unimplemented, "x")), exitFailed},
		{"a dead line", c.failed(t.Context(), status.Error(codes.Unavailable, "x")), exitUnreachable},
		{"an interrupt", fmt.Errorf("wait: %w", context.Canceled), exitInterrupted},
		{"anything else", errors.New("x"), exitFailed},
	} {
		if got := explain(k.err, true).exit; got != k.exit {
			t.Errorf("%s: exit code %d, want %d", k.why, got, k.exit)
		}
	}
}
