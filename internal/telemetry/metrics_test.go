package telemetry

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.uber.org/goleak"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
	"github.com/meshery/meshery-filters/internal/xds"
)

var update = flag.Bool("update", false, "rewrite what is generated")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// measured are Metrics of parts that exist, and do nothing.
func measured(t *testing.T) *Metrics {
	t.Helper()
	kept, err := store.Open(t.Context(), store.Options{StateDir: t.TempDir(), SyncInterval: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := kept.Close(); err != nil {
			t.Error(err)
		}
	})
	hub := event.NewHub(0, 0)
	events, err := event.NewLog(t.Context(), kept.Log(), hub)
	if err != nil {
		t.Fatal(err)
	}
	broker, err := event.NewNATS(t.Context(), event.Options{URL: "nats://127.0.0.1:1", Log: kept.Log(), Cursor: kept.Cursor("a")})
	if err != nil {
		t.Fatal(err)
	}
	envoys, err := xds.New(t.Context(), xds.Options{Records: kept.Records(), Modules: kept.Blobs(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	m := New(Build{"v1", "abc"})
	m.Operations([]string{"custom", "imagehub"})
	m.Ask(Sources{Queue: kept.Queue().Depth, QueueLimit: 7, Groups: envoys.Stats, Events: events, Hub: hub,
		Brokers: map[string]*event.NATS{"nats": broker}, Pages: func() int { return 0 }, Store: kept.Sizes})
	return m
}

func TestMetricsFollowPrometheusConventions(t *testing.T) {
	m := measured(t)
	m.Ended("custom", problem.ProxyRejected.Code, time.Second)
	m.Fetched(module.Fetch{Source: module.HTTPS, Bytes: 3})
	m.calls.WithLabelValues("a", "OK")
	m.callTook.WithLabelValues("a").Observe(1)
	problems, err := testutil.GatherAndLint(m.registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestOperationsAreCountedByWhatBecameOfThem(t *testing.T) {
	m := measured(t)
	for i := range 3 {
		m.Accepted("custom")
		m.Begun("custom", time.Duration(i)*time.Second)
	}
	m.Ended("custom", "", 20*time.Millisecond)
	m.Ended("custom", problem.ProxyRejected.Code, time.Second)
	m.Ended("imagehub", problem.Poisoned.Code, time.Second)
	m.Ended("of another configuration", "", time.Second)
	m.DryRun(errors.New("no"), time.Second)
	for want, got := range map[string]float64{
		"3 custom accepted":    testutil.ToFloat64(m.accepted.WithLabelValues("custom")),
		"1 custom done":        testutil.ToFloat64(m.ended.WithLabelValues("custom", done)),
		"1 custom failed":      testutil.ToFloat64(m.ended.WithLabelValues("custom", failed)),
		"0 custom poisoned":    testutil.ToFloat64(m.ended.WithLabelValues("custom", poisoned)),
		"1 imagehub poisoned":  testutil.ToFloat64(m.ended.WithLabelValues("imagehub", poisoned)),
		"1 others done":        testutil.ToFloat64(m.ended.WithLabelValues(rest, done)),
		"1 failed by its code": testutil.ToFloat64(m.failures.WithLabelValues(problem.ProxyRejected.Code)),
		"1 dry run failed":     testutil.ToFloat64(m.dryRuns.WithLabelValues(failed)),
	} {
		if !strings.HasPrefix(want, fmt.Sprint(got, " ")) {
			t.Errorf("want %s: %v", want, got)
		}
	}
}

func TestMoreOperationsThanThereIsPlaceForShareALabel(t *testing.T) {
	m := New(Build{})
	var keys []string
	for i := range maxKeys + 10 {
		keys = append(keys, fmt.Sprint("key-", i))
	}
	m.Operations(keys)
	for _, k := range keys {
		m.Accepted(k)
	}
	if n := testutil.CollectAndCount(m.accepted); n != maxKeys+1 {
		t.Errorf("%d series", n)
	}
	if n := testutil.ToFloat64(m.accepted.WithLabelValues(rest)); n != 10 {
		t.Errorf("%v others", n)
	}
}

func TestAScrapeIsInEitherOfPrometheusFormats(t *testing.T) {
	m := measured(t)
	for accept, kind := range map[string]string{
		"":                             "text/plain; version=0.0.4; charset=utf-8",
		"application/openmetrics-text": "application/openmetrics-text; version=0.0.1; charset=utf-8",
	} {
		r := httptest.NewRequest("GET", "/metrics", nil)
		r.Header.Set("Accept", accept)
		w := httptest.NewRecorder()
		m.Handler().ServeHTTP(w, r)
		if got := w.Header().Get("Content-Type"); w.Code != 200 || !strings.HasPrefix(got, strings.Split(kind, ";")[0]) {
			t.Errorf("%q is answered with %d, %s", accept, w.Code, got)
		}
		if strings.HasPrefix(kind, "text/plain") {
			parser := expfmt.NewTextParser(model.UTF8Validation)
			if _, err := parser.TextToMetricFamilies(w.Body); err != nil {
				t.Error(err)
			}
		} else if !strings.HasSuffix(w.Body.String(), "# EOF\n") {
			t.Error("it is not OpenMetrics")
		}
	}
}

var descText = regexp.MustCompile(`^Desc\{fqName: "([^"]*)", .*, variableLabels: \{(.*)\}\}$`)

// TestTheDocumentationListsEveryMetric compares docs/observability.md with what the registry has.
func TestTheDocumentationListsEveryMetric(t *testing.T) {
	const file, command = "../../docs/observability.md", "go test ./internal/telemetry -run Documentation -update"
	m := measured(t)
	registered := map[string]string{} // labels by name
	out := make(chan *prometheus.Desc, 1000)
	m.registry.Describe(out)
	close(out)
	for d := range out {
		match := descText.FindStringSubmatch(d.String())
		if match == nil {
			t.Fatalf("the client describes metrics in another way now: %s", d)
		}
		if strings.HasPrefix(match[1], prefix) {
			registered[match[1]] = match[2]
		}
	}
	table := "| metric | type | labels | what it is |\n|---|---|---|---|\n"
	slices.SortFunc(m.rows, func(a, b row) int { return strings.Compare(a.name, b.name) })
	for _, r := range m.rows {
		labels, ok := registered[r.name]
		if !ok || labels != strings.Join(r.labels, ",") {
			t.Errorf("%s is described with %v and registered with %s", r.name, r.labels, labels)
		}
		delete(registered, r.name)
		cell := ""
		if len(r.labels) > 0 {
			cell = "`" + strings.Join(r.labels, "` `") + "`"
		}
		table += fmt.Sprintf("| `%s` | %s | %s | %s |\n", r.name, r.kind, cell, strings.ReplaceAll(r.help, "|", `\|`))
	}
	for name := range registered {
		t.Errorf("%s is registered and not described", name)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	const begin, end = "<!-- metrics: " + command + " -->\n", "<!-- end -->\n"
	head, tail, ok := strings.Cut(string(text), begin)
	_, tail, ok2 := strings.Cut(tail, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no %q and %q", file, begin, end)
	}
	want := head + begin + table + end + tail
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if string(text) != want {
		t.Errorf("%s is not what the registry has; write it with: %s", file, command)
	}
}
