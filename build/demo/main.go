// Command demo is `meshery-filters demo` on Istio or on Consul: the same story, on a real Kubernetes API server and istiod or
// on a real Consul, and two Envoys that it configures. `make controlplanes` has built what it runs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/meshery/meshery-filters/internal/demo"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
	case errors.Is(err, demo.ErrInterrupted):
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(130)
	default:
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	o := demo.Options{Out: os.Stdout}
	stages := map[string]demo.Stage{"istio": &istio{}, "consul": &consul{}}
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.StringVar(&o.Program, "program", "bin/meshery-filters", "`path` of meshery-filters")
	flags.StringVar(&o.Report, "report", "demo.json", "`file` that gets the report")
	flags.StringVar(&o.Break, "break", "", "sabotage: digest, nofilter or nack")
	flags.BoolVar(&o.Keep, "keep", false, "stay up at the end and print the addresses, until Ctrl-C")
	mesh := flags.String("mesh", "istio", "istio or consul")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if stages[*mesh] == nil {
		return fmt.Errorf("--mesh is %q; use istio or consul", *mesh)
	}
	if o.Break != "" && !slices.Contains(demo.Breaks, o.Break) {
		return fmt.Errorf("--break is %q; use digest, nofilter or nack", o.Break)
	}
	var err error
	if o.Program, err = filepath.Abs(o.Program); err != nil { // it is printed for use in other folders
		return err
	}
	return demo.Run(ctx, stages[*mesh], o)
}
