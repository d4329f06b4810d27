package server_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server"
)

func TestAProblemCrossesWithItsTextCodeAndFields(t *testing.T) {
	f := start(t)
	f.ops.submit = func(context.Context, operation.Request) (string, error) {
		err := problem.InvalidDocument.WithFields("document 1", []problem.Field{
			{Path: "spec.module.sha256", Cause: "it is not a digest", Remedy: "write 64 hexadecimal digits"},
			{Path: "spec.phase", Cause: "bad byte \xff"}})
		return "", fmt.Errorf("decode the body: %w", err)
	}
	_, err := call(t, f.conn, meshService+"ApplyOperation", text(1, "apply_filter"))
	st := status.Convert(err)
	if st.Code() != codes.InvalidArgument {
		t.Errorf("code %v, want InvalidArgument", st.Code())
	}
	for _, part := range []string{problem.InvalidDocument.Summary, "spec.module.sha256: it is not a digest", problem.InvalidDocument.Code, problem.InvalidDocument.Remedy} {
		if !strings.Contains(st.Message(), part) {
			t.Errorf("the text lacks %q: %s", part, st.Message())
		}
	}
	var info *errdetails.ErrorInfo
	var bad *errdetails.BadRequest
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			info = d
		case *errdetails.BadRequest:
			bad = d
		}
	}
	if info.GetReason() != problem.InvalidDocument.Code || info.GetDomain() == "" || info.GetMetadata()["remedy"] != problem.InvalidDocument.Remedy {
		t.Errorf("ErrorInfo is %v", info)
	}
	v := bad.GetFieldViolations()
	if len(v) != 2 || v[0].Field != "spec.module.sha256" || v[0].Description != "it is not a digest; write 64 hexadecimal digits" ||
		v[1].Field != "spec.phase" || v[1].Description != "bad byte \uFFFD" {
		t.Errorf("BadRequest is %v", bad)
	}
}

func TestAnErrorOfAThousandMistakesStaysSmall(t *testing.T) {
	f := start(t)
	f.ops.submit = func(context.Context, operation.Request) (string, error) {
		fields := make([]problem.Field, 10_000)
		for i := range fields {
			fields[i] = problem.Field{Path: numbered("spec.x", i), Cause: strings.Repeat("é", 2000)}
		}
		return "", problem.InvalidDocument.WithFields("", fields)
	}
	_, err := call(t, f.conn, meshService+"ApplyOperation")
	st := status.Convert(err)
	if st.Code() != codes.InvalidArgument || len(st.Message()) > 20<<10 || !strings.Contains(st.Message(), problem.InvalidDocument.Code) {
		t.Errorf("%v with a text of %d bytes", st.Code(), len(st.Message()))
	}
	if len(st.Details()) != 2 {
		t.Errorf("details %v", st.Details())
	}
}

var idForm = regexp.MustCompile(`\bid ([A-Z2-7]{26})\b`)

// hidden checks that a failure shows an id and nothing else, and that the log has the rest under that id.
func hidden(t *testing.T, f *fixture, err error, secret string) {
	t.Helper()
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), secret) {
		t.Errorf("%v, want Internal without the cause", err)
	}
	id := idForm.FindStringSubmatch(err.Error())
	if id == nil {
		t.Fatalf("no id in %v", err)
	}
	for line := range strings.Lines(f.log.String()) {
		if strings.Contains(line, id[1]) && strings.Contains(line, secret) {
			return
		}
	}
	t.Errorf("the log has no line with id %s and the cause:\n%s", id[1], f.log)
}

func TestAPanicIsAnInternalErrorWithAnIDAndTheServerGoesOn(t *testing.T) {
	const secret = "what the panic said"
	f := start(t, func(o *server.Options) { o.Events = nil })
	f.ops.rows = func() []operation.Row { panic(secret) }
	f.ops.submit = func(context.Context, operation.Request) (string, error) { panic(secret) }
	f.ops.list = func(context.Context) ([]operation.Status, error) { panic(secret) }
	f.ops.plan = func(context.Context, operation.Request) ([]operation.Preview, error) { panic(errors.New(secret)) }
	for _, method := range []string{meshService + "SupportedOperations", meshService + "ApplyOperation", filterService + "List", filterService + "Plan"} {
		_, err := call(t, f.conn, method)
		hidden(t, f, err, secret)
	}
	for _, method := range []string{meshService + "StreamEvents", filterService + "Watch"} {
		hidden(t, f, open(t, f.conn, method).fails(t), "nil pointer dereference")
	}
	if !strings.Contains(f.log.String(), "errors_test.go") {
		t.Error("the log has no stack that leads to the panic")
	}
	if got := mustCall(t, f.conn, meshService+"MeshName"); got.text(1) != "Envoy Filters" {
		t.Errorf("afterwards MeshName answered %v", got)
	}
}

func TestAnErrorThatIsNoProblemIsHidden(t *testing.T) {
	f := start(t)
	f.ops.list = func(context.Context) ([]operation.Status, error) { return nil, errors.New("open /secret/path: denied") }
	_, err := call(t, f.conn, filterService+"List")
	hidden(t, f, err, "/secret/path")
}

func TestACallerThatGivesUpIsNoFaultOfTheAdapter(t *testing.T) {
	f := start(t)
	ctx, cancel := context.WithCancel(limited(t))
	f.ops.list = func(ctx context.Context) ([]operation.Status, error) {
		cancel()
		<-ctx.Done()
		return nil, ctx.Err()
	}
	var req, resp raw
	if err := f.conn.Invoke(ctx, filterService+"List", &req, &resp); status.Code(err) != codes.Canceled {
		t.Errorf("%v, want Canceled", err)
	}
	until(t, "the call is logged", func() bool { return strings.Contains(f.log.String(), "code=Canceled") })
	if strings.Contains(f.log.String(), "level=ERROR") {
		t.Errorf("logged as a fault:\n%s", f.log)
	}
}

func TestBadInputIsRefusedByEveryCallAndTheServerGoesOn(t *testing.T) {
	f := start(t)
	big := func(n int) string { return strings.Repeat("k", n) }
	tooLarge := text(1, big(32<<20))
	type bad struct {
		reason, method string
		request        raw
		want           codes.Code
		says           string
	}
	cases := []bad{
		{"there is no such call", meshService + "Nope", nil, codes.Unimplemented, "unknown method"},
		{"there is no such service", "/meshes.Nope/X", nil, codes.Unimplemented, "unknown service"},
		{"17 kubeconfigs", meshService + "ApplyOperation", join(text(1, "apply_filter"), bytes.Repeat(text(7, "c"), 17)), codes.InvalidArgument, "kube_configs: there are 17"},
		{"a kubeconfig over 1 MiB", meshService + "ApplyOperation", join(text(1, "apply_filter"), text(7, "c"), text(7, big(1<<20+1))), codes.InvalidArgument, "kube_configs[1]"},
		{"a kubeconfig over 1 MiB", meshService + "CreateMeshInstance", text(1, big(1<<20+1)), codes.InvalidArgument, "k8sConfig"},
		{"a context's name without end", meshService + "CreateMeshInstance", text(2, big(1<<10+1)), codes.InvalidArgument, "contextName"},
		{"not UTF-8", meshService + "CreateMeshInstance", text(2, "\xff"), codes.Internal, "UTF-8"},
		{"not an operation id", filterService + "Watch", text(1, "a b"), codes.InvalidArgument, "operation_id"},
		{"not a cursor", filterService + "Watch", text(2, "yesterday"), codes.InvalidArgument, "cursor"},
		{"a negative cursor", filterService + "Watch", text(2, "x.-1"), codes.InvalidArgument, "cursor"},
		{"from_now and until_now", filterService + "Watch", join(number(3, 1), number(4, 1)), codes.InvalidArgument, "until_now"},
		{"a cursor and from_now", filterService + "Watch", join(text(2, "x.1"), number(3, 1)), codes.InvalidArgument, "from_now"},
	}
	for _, m := range []string{meshService + "ApplyOperation", meshService + "ProcessOAM", meshService + "Provision", filterService + "Plan", filterService + "Watch"} {
		cases = append(cases, bad{"not UTF-8", m, text(1, "\xff\xfe"), codes.Internal, "UTF-8"})
	}
	for _, m := range everyCall {
		cases = append(cases,
			bad{"cut off in a field", m, raw{0x0a, 0xff, 0x01, 'x'}, codes.Internal, "unmarshal"},
			bad{"a field number of 0", m, raw{0x00, 0x01}, codes.Internal, "unmarshal"},
			bad{"larger than 32 MiB", m, tooLarge, codes.ResourceExhausted, "larger than max"})
	}
	for _, c := range cases {
		var err error
		if streams[c.method] {
			err = open(t, f.conn, c.method, c.request).fails(t)
		} else {
			_, err = call(t, f.conn, c.method, c.request)
		}
		if st := status.Convert(err); st.Code() != c.want || !strings.Contains(st.Message(), c.says) {
			t.Errorf("%s, %s: %v, want %v with %q", c.method, c.reason, err, c.want, c.says)
		}
	}
	if got := mustCall(t, f.conn, meshService+"MeshName"); got.text(1) != "Envoy Filters" {
		t.Errorf("afterwards MeshName answered %v", got)
	}
	if len(f.ops.seen) != 0 {
		t.Errorf("%d bad requests came through", len(f.ops.seen))
	}
	if strings.Contains(f.log.String(), big(100)) {
		t.Error("the log has a request's content")
	}
}

func TestFieldsOfNewerProtocolsAreIgnored(t *testing.T) {
	f := start(t)
	for _, m := range everyCall {
		if streams[m] || strings.HasSuffix(m, "ProcessOAM") || strings.HasSuffix(m, "Provision") {
			continue
		}
		if _, err := call(t, f.conn, m, text(1, "apply_filter"), text(99, "new")); err != nil {
			t.Errorf("%s: %v", m, err)
		}
	}
}

func TestWhatTheEdgeBoundsStillFits(t *testing.T) {
	f := start(t)
	body := strings.Repeat("b", 27<<20) // a module of 20 MiB in base64
	mustCall(t, f.conn, meshService+"ApplyOperation", text(1, "apply_filter"), text(4, body))
	if got := f.ops.last(t); got.Body != body {
		t.Errorf("a body of %d bytes came through with %d", len(body), len(got.Body))
	}
	kubeconfig := strings.Repeat("k", 1<<20)
	mustCall(t, f.conn, meshService+"ApplyOperation", text(1, "apply_filter"), bytes.Repeat(text(7, kubeconfig), 16))
	if got := f.ops.last(t); len(got.Kubeconfigs) != 16 || got.Kubeconfigs[15] != kubeconfig {
		t.Error("16 kubeconfigs of 1 MiB did not come through")
	}
	mustCall(t, f.conn, meshService+"CreateMeshInstance", text(1, kubeconfig))
	if strings.Contains(f.log.String(), "kkkk") || strings.Contains(f.log.String(), "bbbb") {
		t.Error("the log has a request's content")
	}
	if !strings.Contains(f.log.String(), "method=/meshes.MeshService/ApplyOperation code=OK") {
		t.Errorf("the log lacks the call:\n%s", f.log)
	}
}

var everyCall = []string{
	meshService + "MeshName", meshService + "MeshVersions", meshService + "ComponentInfo", meshService + "SupportedOperations",
	meshService + "ApplyOperation", meshService + "StreamEvents", meshService + "ProcessOAM", meshService + "Provision",
	meshService + "CreateMeshInstance", filterService + "History", filterService + "List", filterService + "Plan", filterService + "Survey", filterService + "Watch",
}

var streams = map[string]bool{meshService + "StreamEvents": true, filterService + "Watch": true}
