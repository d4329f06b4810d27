package main

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAQuickRunFillsEveryCellOfEveryTable(t *testing.T) {
	if testing.Short() {
		t.Skip("it builds the adapter and starts Envoys")
	}
	file := filepath.Join(t.TempDir(), "bench.json")
	var text strings.Builder
	if err := run(t.Context(), []string{"-quick", "-json", file}, &text, t.Output()); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var r report
	if err := json.Unmarshal(data, &r); err != nil {
		t.Fatal(err)
	}
	lines := map[int]int{} // lines by number of columns
	for _, s := range r.Sections {
		lines[len(s.Columns)] += len(s.Lines)
		for _, l := range s.Lines {
			if len(l.Cells) != len(s.Columns)-1 {
				t.Errorf("%s: %s has %d cells for %d columns", s.Title, l.Name, len(l.Cells), len(s.Columns))
			}
			for i, c := range l.Cells {
				// Only a difference may be nothing or less, and little CPU less than can be measured.
				positive := s.Columns[i+1] == "difference" || s.Columns[i+1] == "CPU of the adapter" || c.Median > 0
				if c.N == 0 || c.Unit == "" || math.IsNaN(c.Median) || math.IsInf(c.Median, 0) || !positive || c.Min > c.Median || c.Median > c.Max {
					t.Errorf("%s: %s, %s: %+v", s.Title, l.Name, s.Columns[i+1], c)
				}
			}
			if !strings.Contains(text.String(), l.Name) {
				t.Errorf("the text does not show %q", l.Name)
			}
		}
	}
	// Three changes of two sizes of group. Two kinds of start. Six kinds of Envoy that answer in two ways, eight audiences,
	// goroutines, two changes of many targets and three of a large group. The program's size, operations of two kinds in two ways, and
	// memory: twice of an adapter, and of an Envoy. On Istio three changes of two kinds, those as they are asked for by two
	// kubeconfigs, and of many targets in two ways. On Consul three changes.
	if lines[6] != 15 || lines[4] != 2 || lines[3] != 38 || lines[2] != 11 {
		t.Errorf("lines by columns are %v", lines)
	}
	if r.Machine.Cores == 0 || r.Machine.Envoy == "" || r.Machine.Go == "" {
		t.Errorf("the header lacks something: %+v", r.Machine)
	}
	if n := strings.Count(strings.Join(r.Notes, "\n"), ": the bar "); n != 9 {
		t.Errorf("%d notes say whether a bar holds: %q", n, r.Notes)
	}
}

func TestAFigureIsTheMedianAndTheRange(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   figure
	}{
		{[]float64{3, 1, 2}, figure{"ms", 2, 1, 3, 3}},
		{[]float64{4, 1, 3, 2}, figure{"ms", 2.5, 1, 4, 4}},
		{nil, figure{Unit: "ms"}},
	} {
		if got := figureOf("ms", c.values); got != c.want {
			t.Errorf("of %v: %+v, want %+v", c.values, got, c.want)
		}
	}
}
