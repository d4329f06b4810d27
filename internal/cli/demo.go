package cli

import (
	"errors"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/demo"
	"github.com/meshery/meshery-filters/internal/envoy"
)

func newDemo(a *app) *cobra.Command {
	o := demo.Options{Out: a.Out}
	var envoyPath string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the whole idea on this machine, and check every step of it",
		Long: `Demo starts an adapter with its embedded NATS and two real Envoys in front of Image Hub, applies filters to the
running Envoys, changes and removes them, and checks after each step that requests are answered as they should be.

It writes what it saw to a report, exits with 1 when a step does not hold, and stops everything that it started.
--break sabotages it on purpose, to show that it notices: digest (the module's digest is another one), nofilter (the
filter is never applied), nack (the Envoys cannot load the module).`,
		Example: `  meshery-filters demo
  meshery-filters demo --keep`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Break != "" && !slices.Contains(demo.Breaks, o.Break) {
				return usage("--break is %q; use digest, nofilter or nack", o.Break)
			}
			binary, err := envoy.Find(cmd.Context(), envoyPath)
			if err != nil {
				return err
			}
			if o.Program, err = os.Executable(); err != nil {
				return err
			}
			if err = demo.Run(cmd.Context(), &demo.PlainEnvoy{Binary: binary}, o); errors.Is(err, demo.ErrInterrupted) {
				return exitError{err, exitInterrupted}
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&envoyPath, "envoy", "", "path of an Envoy, 1.39 or later (default: $ENVOY, PATH, the cache)")
	f.StringVar(&o.Report, "report", "demo.json", "where the report goes")
	f.StringVar(&o.Break, "break", "", "sabotage: digest, nofilter or nack")
	_ = cmd.RegisterFlagCompletionFunc("break", cobra.FixedCompletions([]string{"digest", "nofilter", "nack"}, cobra.ShellCompDirectiveNoFileComp))
	f.BoolVar(&o.Keep, "keep", false, "stay up at the end and print the addresses, until Ctrl-C")
	return cmd
}
