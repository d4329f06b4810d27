package proof

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	natsserver "github.com/nats-io/nats-server/v2/server"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// scrape reads the adapter's metrics: every value by its name and labels, sorted, and the text. Of a histogram it is the
// count of what was observed.
func (a *adapter) scrape() (values map[string]float64, text string) {
	a.t.Helper()
	client := http.Client{Timeout: patience}
	defer client.CloseIdleConnections()
	r, err := client.Get("http://" + a.addresses.HTTP + "/metrics")
	if err != nil {
		a.t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(io.LimitReader(r.Body, 16<<20))
	if err != nil || r.StatusCode != http.StatusOK {
		a.t.Fatalf("a scrape is answered with %s, %v", r.Status, err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(body))
	if err != nil {
		a.t.Fatal(err)
	}
	values = map[string]float64{}
	for name, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			slices.Sort(labels)
			key := strings.TrimPrefix(name, "meshery_filters_") + "{" + strings.Join(labels, ",") + "}"
			switch f.GetType() {
			case dto.MetricType_COUNTER:
				values[key] = m.GetCounter().GetValue()
			case dto.MetricType_GAUGE:
				values[key] = m.GetGauge().GetValue()
			case dto.MetricType_HISTOGRAM:
				values[key] = float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return values, string(body)
}

// shows waits until a scrape has these values.
func (a *adapter) shows(want map[string]float64) {
	a.t.Helper()
	eventually(a.t, "the metrics are what happened", func() error {
		values, _ := a.scrape()
		var wrong []error
		for _, key := range slices.Sorted(maps.Keys(want)) {
			if got, ok := values[key]; !ok || got != want[key] {
				wrong = append(wrong, fmt.Errorf("%s is %v (%v), want %v", key, got, ok, want[key]))
			}
		}
		return errors.Join(wrong...)
	})
}

func TestMetricsTellWhatHappened(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	const group = "edge"
	natsAddr := fixedPorts(t)[1] // where nobody listens yet
	a := newAdapter(t, "--nats-url", "nats://"+natsAddr, "--meshery-server", "http://127.0.0.1:1", "--meshery-events")
	proxies := a.startProxies(2, group, upstream(t), 1)

	// What succeeds, what proxies refuse, what cannot be done, what is no operation.
	var stories []*filterspb.Event
	operate := func(key, body, code string) {
		t.Helper()
		id, err := a.submit(key, body, false)
		if err != nil {
			t.Fatal(err)
		}
		events, err := a.story(id)
		if err != nil {
			t.Fatal(err)
		}
		stories = append(stories, events...)
		if last := events[len(events)-1]; last.GetErrorCode() != code {
			t.Fatalf("%s ended with %v", key, last)
		}
	}
	operate("custom", probe(t, "mark", group, stamp("one"), nil), "")
	nowhere := map[string]any{"delivery": map[string]any{"mode": "local", "localPath": filepath.Join(t.TempDir(), "nowhere")}}
	operate("custom", probe(t, "mark", group, stamp("two"), nowhere), "meshery-filters-1016")
	operate("custom", probe(t, "mark", group, map[string]any{"refuse": "no"}, nil), "meshery-filters-1014")
	operate("remove_filter", document("nobody", nil), "meshery-filters-1010")
	if _, err := a.submit("no_such_operation", "", false); err == nil {
		t.Fatal("an operation that does not exist is accepted")
	}
	// What clients make up is no label.
	made := "MadeUp" + rand.Text()
	if err := a.conn.Invoke(t.Context(), "/meshes.MeshService/"+made, &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) != codes.Unimplemented {
		t.Fatalf("a call that does not exist: %v", err)
	}
	a.allRun(group, 2)
	byType := map[string]float64{}
	for _, e := range stories {
		byType[strings.ToLower(e.GetType().String())]++
	}
	module, err := os.Stat(filepath.Join("..", "testfilters", "probe.wasm"))
	if err != nil {
		t.Fatal(err)
	}
	inline := 3.0 // one of each request that carries a module
	a.shows(map[string]float64{
		"operations_accepted_total{operation=custom}":                                      3,
		"operations_total{operation=custom,result=done}":                                   1,
		"operations_total{operation=custom,result=failed}":                                 2,
		"operations_total{operation=custom,result=poisoned}":                               0,
		"operations_total{operation=remove_filter,result=failed}":                          1,
		"operation_failures_total{code=meshery-filters-1010}":                              1,
		"operation_failures_total{code=meshery-filters-1014}":                              1,
		"operation_failures_total{code=meshery-filters-1016}":                              1,
		"operation_duration_seconds{operation=custom,result=done}":                         1,
		"operation_wait_seconds{}":                                                         4,
		"queue_operations{state=waiting}":                                                  0,
		"queue_operations{state=running}":                                                  0,
		"queue_limit_operations{}":                                                         1000,
		"proxies{group=edge,state=running}":                                                2,
		"proxy_rejections_total{group=edge}":                                               float64(proxies[0].stat("update_rejected") + proxies[1].stat("update_rejected")),
		"module_fetches_total{result=done,source=inline}":                                  inline,
		"module_fetches_total{result=failed,source=inline}":                                0,
		"module_fetched_bytes_total{source=inline}":                                        inline * float64(module.Size()),
		"module_fetches_total{result=done,source=store}":                                   inline + 1, // by the worker, and once more for what runs beside it
		"dry_runs_total{result=done}":                                                      3,
		"dry_runs_total{result=failed}":                                                    1,
		"dry_run_duration_seconds{}":                                                       4,
		"events_total{type=info}":                                                          byType["info"],
		"events_total{type=warn}":                                                          byType["warn"],
		"events_total{type=error}":                                                         3,
		"events_backlog{broker=nats}":                                                      float64(len(stories)),
		"events_delivered_total{broker=nats}":                                              0,
		"nats_connected{broker=nats}":                                                      0,
		"events_backlog{broker=meshery}":                                                   float64(len(stories)),
		"events_delivered_total{broker=meshery}":                                           0,
		"meshery_connected{}":                                                              0,
		"meshery_registered{}":                                                             0,
		"events_missed_total{}":                                                            0,
		"event_subscribers{kind=Watch}":                                                    0,
		"grpc_calls_total{code=OK,method=/meshes.MeshService/ApplyOperation}":              4,
		"grpc_calls_total{code=InvalidArgument,method=/meshes.MeshService/ApplyOperation}": 1,
		"grpc_call_duration_seconds{method=/meshes.MeshService/ApplyOperation}":            5,
		"grpc_calls{method=/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources}": 2,
		"grpc_calls_total{code=OK,method=/meshery.filters.v1.FilterService/Watch}":                            4,
	})
	if got := proxies[0].stat("update_rejected") + proxies[1].stat("update_rejected"); got != 1 {
		t.Errorf("the Envoys refused %d updates, want 1", got)
	}
	values, text := a.scrape()
	if got := values["store_bytes{kind=modules}"]; got < float64(module.Size()) || got > 2*float64(module.Size()) {
		t.Errorf("the store has %v bytes of modules, which has one of %d", got, module.Size())
	}
	for _, kind := range []string{"events", "operations", "records", "cursors"} {
		if values["store_bytes{kind="+kind+"}"] <= 0 {
			t.Errorf("the store has no bytes of %s", kind)
		}
	}
	if values["process_resident_memory_bytes{}"] <= 0 || values["go_goroutines{}"] <= 0 {
		t.Error("the process and the runtime are not measured")
	}
	if strings.Contains(text, made) {
		t.Error("a client has made up a label")
	}
	if !strings.Contains(text, "\nmeshery_filters_build_info{") {
		t.Error("the build is not named")
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}

	// Everything is documented, and everything that is documented is there.
	docs, err := os.ReadFile(filepath.Join("..", "..", "docs", "observability.md"))
	if err != nil {
		t.Fatal(err)
	}
	names := func(text, form string) []string {
		var all []string
		for _, m := range regexp.MustCompile(form).FindAllStringSubmatch(text, -1) {
			all = append(all, m[1])
		}
		slices.Sort(all)
		return slices.Compact(all)
	}
	documented, scraped := names(string(docs), "(?m)^\\| `(meshery_filters_[a-z_]+)`"), names(text, `(?m)^# TYPE (meshery_filters_[a-z_]+) `)
	if !slices.Equal(documented, scraped) {
		t.Errorf("documented: %v\nscraped: %v", documented, scraped)
	}

	// NATS comes up and gets what waited.
	host, port, err := net.SplitHostPort(natsAddr)
	if err != nil {
		t.Fatal(err)
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	broker, err := natsserver.NewServer(&natsserver.Options{Host: host, Port: number, NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	broker.Start()
	t.Cleanup(func() { broker.Shutdown(); broker.WaitForShutdown() })
	a.shows(map[string]float64{
		"nats_connected{broker=nats}":         1,
		"events_backlog{broker=nats}":         0,
		"events_delivered_total{broker=nats}": float64(len(stories)),
	})
}

func TestMetricsTellWhatRunsAndWhatWaits(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	const group = "edge"
	a := newAdapter(t)
	p := a.startProxies(1, group, upstream(t), 1)[0]
	watching, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := a.filters.Watch(watching, &filterspb.WatchRequest{FromNow: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(p.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	awake := func() { _ = syscall.Kill(p.PID(), syscall.SIGCONT) }
	defer awake()
	patient := map[string]any{"wait": map[string]any{"timeout": "2m"}}
	var ids []string
	for _, value := range []string{"one", "two", "three"} {
		id, err := a.submit("custom", probe(t, "mark", group, stamp(value), patient), false)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	a.shows(map[string]float64{
		"queue_operations{state=running}":   1,
		"queue_operations{state=waiting}":   2,
		"proxies{group=edge,state=waiting}": 1,
		"event_subscribers{kind=Watch}":     1,
	})
	awake()
	for _, id := range ids {
		if _, err := a.story(id); err != nil {
			t.Fatal(err)
		}
	}
	a.shows(map[string]float64{
		"queue_operations{state=running}":                0,
		"queue_operations{state=waiting}":                0,
		"operations_total{operation=custom,result=done}": 3,
		"proxies{group=edge,state=running}":              1,
	})
	cancel()
	for err == nil {
		_, err = stream.Recv()
	}
	a.shows(map[string]float64{"event_subscribers{kind=Watch}": 0})
}

func TestMetricsTellWhatIsRefusedAtTheDoor(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	const most = 3
	a := newAdapter(t, "--limits-connections-per-address", strconv.Itoa(most), "--limits-call-rate", "1")
	const list = "/meshery.filters.v1.FilterService/List"
	refused, answered := 0.0, 0.0
	eventually(t, "a call is refused", func() error {
		_, err := a.filters.List(t.Context(), &filterspb.ListRequest{})
		switch status.Code(err) {
		case codes.OK:
			answered++
			return errors.New("it is answered")
		case codes.ResourceExhausted:
			refused++
			return nil
		}
		t.Fatal(err)
		return nil
	})
	a.shows(map[string]float64{
		"grpc_calls_total{code=OK,method=" + list + "}":                answered,
		"grpc_calls_total{code=ResourceExhausted,method=" + list + "}": refused,
	})

	// One connection is the one above.
	for range most + 4 {
		c, err := net.Dial("tcp", a.addresses.GRPC)
		if errors.Is(err, syscall.ECONNRESET) { // it was closed as soon as it was there
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	a.shows(map[string]float64{"connections_refused_total{listener=grpcAddr}": 5, "connections_refused_total{listener=xdsAddr}": 0})
}
