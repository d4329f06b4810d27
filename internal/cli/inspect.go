package cli

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/wasm"
)

// newInspect makes `inspect`.
func newInspect(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "inspect FILE.wasm",
		Short: "Tell what a module is and whether Envoy can run it",
		Long: `Tell what a module is and whether Envoy can run it: its digest for module.sha256, its proxy-wasm ABI, the language it
was written in where that can be told, and the functions that it imports and Envoy does not offer.

Nothing of the module is run, and no adapter is needed. The exit code is 2 when Envoy could not run it.`,
		Example: `  meshery-filters inspect target/wasm32-unknown-unknown/release/audit.wasm
  meshery-filters inspect audit.wasm -o json`,
		Args: oneArg("say which module to inspect: FILE.wasm"),
		RunE: func(cmd *cobra.Command, args []string) error {
			module, err := readFile(args[0], filter.MaxModule)
			if err != nil {
				return usageError{err}
			}
			report, invalid := wasm.Inspect(cmd.Context(), module)
			if err := a.printReport(report); err != nil {
				return err
			}
			return invalid
		},
	}
	a.outputFlag(cmd)
	return cmd
}

func (a *app) printReport(r wasm.Report) error {
	return a.print(r, func(w io.Writer) error { return reportTable(w, r) })
}

func reportTable(w io.Writer, r wasm.Report) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	memory := fmt.Sprintf("%d KiB at the start", r.MemoryPages*64)
	if r.MaxMemoryPages > 0 {
		memory += fmt.Sprintf(", at most %d KiB", r.MaxMemoryPages*64)
	}
	for _, l := range []struct{ label, text string }{
		{"SHA256", r.SHA256},
		{"Size", fmt.Sprintf("%d bytes", r.Size)},
		{"ABI", r.ABI},
		{"Language", r.Language},
		{"Memory", memory},
		{"Imports", fmt.Sprintf("%d functions", len(r.Imports))},
		{"Missing in Envoy", strings.Join(r.Missing, ", ")},
		{"Exports", fmt.Sprint(len(r.Exports))},
		{"Sections", strings.Join(r.Sections, ", ")},
	} {
		if l.text == "" {
			l.text = "-"
		}
		fmt.Fprintf(tw, "%s:\t%s\n", l.label, l.text)
	}
	return tw.Flush()
}
