package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// report is what a run found.
type report struct {
	Machine  machine   `json:"machine"`
	Sections []section `json:"sections"`
	Notes    []string  `json:"notes"`
}

// machine is where it ran. The loads are averages over 1, 5 and 15 minutes, before and after.
type machine struct {
	Cores     int    `json:"cores"`
	System    string `json:"system"`
	Envoy     string `json:"envoy"`
	Go        string `json:"go"`
	Load      string `json:"load"`
	LoadAfter string `json:"loadAfter"`
}

// section is one table.
type section struct {
	Title   string   `json:"title"`
	Columns []string `json:"columns"` // the first one is the lines' names
	Lines   []line   `json:"lines"`
}

type line struct {
	Name  string   `json:"name"`
	Cells []figure `json:"cells"`
}

// figure is a median with the range of its values.
type figure struct {
	Unit   string  `json:"unit"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	N      int     `json:"n"`
}

func figureOf(unit string, values []float64) figure {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	if n == 0 {
		return figure{Unit: unit}
	}
	return figure{Unit: unit, Median: (sorted[(n-1)/2] + sorted[n/2]) / 2, Min: sorted[0], Max: sorted[n-1], N: n}
}

func (f figure) String() string {
	format := "%.1f"
	if f.Unit == "×" {
		format = "%.2f"
	}
	text := fmt.Sprintf(format+" %s", f.Median, f.Unit)
	if f.N > 1 {
		text += fmt.Sprintf(" ("+format+"–"+format+")", f.Min, f.Max)
	}
	return text
}

// combine makes one series of two, value by value, so that what disturbed both at once does not count.
func combine(a, b []float64, f func(a, b float64) float64) []float64 {
	out := make([]float64, len(a))
	for i := range a {
		out[i] = f(a[i], b[i])
	}
	return out
}

func minus(a, b float64) float64 { return a - b }
func over(a, b float64) float64  { return a / b }

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func (s *section) add(name string, cells ...figure) {
	s.Lines = append(s.Lines, line{name, cells})
}

func (r report) print(w io.Writer) error {
	m := r.Machine
	fmt.Fprintf(w, "%d cores, %s; Envoy %s, %s; load averages %s before, %s after.\n", m.Cores, m.System, m.Envoy, m.Go, m.Load, m.LoadAfter)
	fmt.Fprintln(w, "Each figure is a median, with the lowest and the highest value in parentheses.")
	for _, s := range r.Sections {
		fmt.Fprintf(w, "\n%s\n", s.Title)
		t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		if len(s.Columns) > 2 {
			fmt.Fprintf(t, "  %s\n", strings.Join(s.Columns, "\t"))
		}
		for _, l := range s.Lines {
			fmt.Fprintf(t, "  %s", l.Name)
			for _, c := range l.Cells {
				fmt.Fprintf(t, "\t%s", c)
			}
			fmt.Fprintln(t)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	fmt.Fprintln(w)
	for _, n := range r.Notes {
		fmt.Fprintf(w, "- %s\n", n)
	}
	return nil
}
