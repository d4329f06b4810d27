package problem

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	meshkit "github.com/meshery/meshkit/errors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var update = flag.Bool("update", false, "rewrite docs/errors.md")

const page = "../../docs/errors.md"

func TestTheErrorsPageListsTheTable(t *testing.T) {
	var b strings.Builder
	b.WriteString("# Problems\n\nWhat events and the command line report, by code. This page is generated from the adapter's own table.\n")
	for _, k := range All() {
		fmt.Fprintf(&b, "\n## %s\n\n**%s%s** (gRPC %s)\n\nProbable cause: %s\n\nRemedy: %s\n", k.Code,
			strings.ToUpper(k.Summary[:1]), k.Summary[1:], k.Status, k.Cause, k.Remedy)
	}
	if *update {
		if err := os.WriteFile(page, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(page)
	if err != nil || string(got) != b.String() {
		t.Errorf("docs/errors.md is not the table; run: go test ./internal/problem -update (%v)", err)
	}
}

func TestTheTableIsComplete(t *testing.T) {
	last := "meshery-filters-1000"
	for i, k := range All() {
		if k.Code <= last || len(k.Code) != len(last) || !strings.HasPrefix(k.Code, "meshery-filters-") {
			t.Errorf("row %d has code %s after %s: codes are never reused, and the table is in their order", i, k.Code, last)
		}
		last = k.Code
		if k.Summary == "" || k.Cause == "" || k.Remedy == "" {
			t.Errorf("%s is not complete", k.Code)
		}
		if k.Status == codes.OK && strings.Contains(strings.ToLower(k.Summary), "error") {
			t.Errorf("%s is a warning, and mesheryctl takes the word error for a failure", k.Code)
		}
	}
}

func TestAProblemIsFoundUnderWhateverWrapsIt(t *testing.T) {
	cause := errors.New("disk on fire")
	err := fmt.Errorf("keep chain: %w", StoreFailed.New("chains/a: %w", cause))
	if !errors.Is(err, StoreFailed) || errors.Is(err, QueueFull) || !errors.Is(err, cause) {
		t.Error("errors.Is does not see the kind and the cause")
	}
	var m *meshkit.Error
	if !errors.As(err, &m) || meshkit.GetCode(m) != StoreFailed.Code || meshkit.GetRemedy(m) != StoreFailed.Remedy {
		t.Errorf("as a meshkit error: %v", m)
	}
	if s, ok := status.FromError(err); !ok || s.Code() != codes.Unavailable || !strings.Contains(s.Message(), "disk on fire") {
		t.Errorf("as a gRPC status: %v", s)
	}
	if p := Of(cause); p.Kind != Internal || !errors.Is(p, cause) {
		t.Errorf("a plain error: %v", p)
	}
	if Of(nil) != nil || InvalidDocument.WithFields("x", nil) != nil {
		t.Error("nothing wrong is nil")
	}
}
