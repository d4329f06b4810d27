package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
)

// outputForm is how results are printed.
type outputForm string

const (
	formTable outputForm = "table"
	formJSON  outputForm = "json"
	formYAML  outputForm = "yaml"
)

// String, Set and Type make it a flag.
func (o *outputForm) String() string { return string(*o) }

// Type names the values in help.
func (o *outputForm) Type() string { return "form" }

// Set takes table, json or yaml.
func (o *outputForm) Set(s string) error {
	switch f := outputForm(s); f {
	case formTable, formJSON, formYAML:
		*o = f
		return nil
	}
	return fmt.Errorf("write table, json or yaml")
}

func (a *app) outputFlag(cmd *cobra.Command) {
	a.output = formTable
	cmd.Flags().VarP(&a.output, "output", "o", "how to print: table, json or yaml")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
}

// print writes a result as the user wants it: v as JSON or YAML with the names of its json tags, or what table prints.
func (a *app) print(v any, table func(io.Writer) error) error {
	switch a.output {
	case formJSON:
		data, err := marshal(v)
		if err != nil {
			return err
		}
		var out bytes.Buffer
		if err := json.Indent(&out, data, "", "  "); err != nil {
			return fmt.Errorf("print: %w", err)
		}
		return write(a.Out, out.Bytes(), "\n")
	case formYAML:
		return a.printYAML(v)
	}
	return table(a.Out)
}

// printLine writes one of several results that come one after the other: a line of JSON, or a document of YAML.
func (a *app) printLine(v any) error {
	if a.output == formYAML {
		return a.printYAML(v)
	}
	data, err := marshal(v)
	if err != nil {
		return err
	}
	return write(a.Out, data, "\n")
}

func (a *app) printYAML(v any) error {
	data, err := marshal(v)
	if err != nil {
		return err
	}
	var n yaml.Node // keeps the order of fields
	if err := yaml.Unmarshal(data, &n); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	plain(&n)
	out := bytes.NewBufferString("---\n")
	enc := yaml.NewEncoder(out)
	enc.SetIndent(2)
	if err := enc.Encode(&n); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return write(a.Out, out.Bytes(), "")
}

// plain takes JSON's braces and quotes away where YAML can do without.
func plain(n *yaml.Node) {
	n.Style = 0
	if len(n.Content) == 0 && n.Kind != yaml.ScalarNode {
		n.Style = yaml.FlowStyle // an empty list or map
	}
	for _, c := range n.Content {
		plain(c)
	}
}

func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, fmt.Errorf("print: %w", err)
	}
	return yamlSafe(bytes.TrimSuffix(b.Bytes(), []byte("\n"))), nil
}

// yamlSafe escapes in JSON what YAML does not take as it is, or takes for the end of a line: both then read the same.
func yamlSafe(data []byte) []byte {
	unfit := func(r rune) bool {
		return r >= 0x7f && r < 0xa0 || r == 0xfeff || r == 0xfffe || r == 0xffff
	}
	if !bytes.ContainsFunc(data, unfit) {
		return data
	}
	var out bytes.Buffer
	for _, r := range string(data) {
		if unfit(r) {
			fmt.Fprintf(&out, `\u%04x`, r)
		} else {
			out.WriteRune(r)
		}
	}
	return out.Bytes()
}

func write(w io.Writer, data []byte, end string) error {
	if _, err := w.Write(append(data, end...)); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// table prints rows under a heading, in columns.
func table(w io.Writer, heading []string, rows [][]string) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range append([][]string{heading}, rows...) {
		cells := make([]string, len(row))
		for i, c := range row {
			// A tab or line break in a cell would be taken for the end of it.
			if cells[i] = strings.Join(strings.Fields(c), " "); cells[i] == "" {
				cells[i] = "-"
			}
		}
		fmt.Fprintln(tw, strings.Join(cells, "\t"))
	}
	if err := tw.Flush(); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}
