package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// Groups of subcommands, in the order that help shows them.
const (
	groupUse   = "use"
	groupBuild = "build"
	groupRun   = "run"
)

// newRoot makes the command tree.
func newRoot(a *app) *cobra.Command {
	serve := newServe(a)
	root := &cobra.Command{
		Use:   "meshery-filters",
		Short: "Load WebAssembly filters into running proxies, and take them out again",
		Long: `Load WebAssembly filters into running proxies, and take them out again, without a restart or a failed request.

"serve" runs the adapter, to which the proxies connect; it is what happens without a command. The other commands talk to
a running adapter, or help to write a filter.

Exit codes:
` + exitCodes(),
		Example: `  meshery-filters serve                       # the adapter, on 127.0.0.1:10014
  meshery-filters envoy bootstrap > edge.yaml # an Envoy that connects to it
  meshery-filters apply -f filter.yaml        # a filter for that Envoy
  meshery-filters status`,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRun: func(*cobra.Command, []string) {
			a.began = true
		},
		RunE: func(cmd *cobra.Command, args []string) error { return serve.RunE(cmd, args) },
	}
	root.AddGroup(
		&cobra.Group{ID: groupUse, Title: "Filters on proxies:"},
		&cobra.Group{ID: groupBuild, Title: "Writing filters:"},
		&cobra.Group{ID: groupRun, Title: "The adapter and its proxies:"},
	)
	for _, g := range []struct {
		group    string
		commands []*cobra.Command
	}{
		{groupUse, []*cobra.Command{newApply(a), newRemove(a), newUndo(a), newHistory(a), newList(a), newStatus(a), newEvents(a), newOperations(a), newRun(a), newRender(a), newDiff(a)}},
		{groupBuild, []*cobra.Command{newExplain(a), newInspect(a), newTry(a), newMeshery(a)}},
		{groupRun, []*cobra.Command{serve, newManifests(a), newEnvoy(a), newImageHub(a), newDemo(a), newVersion(a)}},
	} {
		for _, c := range g.commands {
			c.GroupID = g.group
			root.AddCommand(c)
		}
	}
	root.SetHelpCommandGroupID(groupRun)
	root.SetCompletionCommandGroupID(groupRun)
	// The root takes serve's flags and its help does not repeat them.
	root.Flags().AddFlagSet(serve.Flags())
	root.SetUsageTemplate(usageTemplate)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		if flag, parsing, ok := strings.Cut(err.Error(), ": strconv."); ok { // of which the user knows nothing
			want := "write a whole number"
			if strings.HasPrefix(parsing, "ParseBool") {
				want = "write true or false"
			}
			err = fmt.Errorf("%s: %s", flag, want)
		}
		return usageError{err}
	})
	return root
}

// oneArg takes exactly one argument, and says what it is for when it is not there.
func oneArg(missing string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch len(args) {
		case 0:
			return usage("%s", missing)
		case 1:
			return nil
		}
		return usage("there is one argument too many: %q", args[1])
	}
}

// noArgs takes no argument. The one that is given is most likely a document, so it says how that is named.
func noArgs(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case cmd.Flags().Lookup("filename") != nil:
		return usage("%q is no argument of %q; a file is named with -f", args[0], cmd.CommandPath())
	}
	return usage("%q takes no arguments, and there is %q", cmd.CommandPath(), args[0])
}

// parent makes a command of which only those below it can be run: alone, or with another word, it says which they are.
func parent(cmd *cobra.Command, below ...*cobra.Command) *cobra.Command {
	cmd.AddCommand(below...)
	names := make([]string, len(below))
	for i, c := range below {
		names[i] = c.Name()
	}
	which := strings.Join(names, ", ")
	if i := strings.LastIndex(which, ", "); i >= 0 {
		which = which[:i] + " or " + which[i+2:]
	}
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usage("unknown command %q for %q; say which: %s", args[0], cmd.CommandPath(), which)
		}
		return usage("say which: %s", which)
	}
	return cmd
}

// usageTemplate is cobra's, less the root's own flags and with the example before lists.
const usageTemplate = `Usage:{{if or (not .HasParent) (not .HasAvailableSubCommands)}}
  {{.UseLine}}{{end}}{{if .HasAvailableSubCommands}}
  {{.CommandPath}} [command]{{end}}{{if .HasExample}}

Examples:
{{.Example}}{{end}}{{if .HasAvailableSubCommands}}{{$cmds := .Commands}}{{if eq (len .Groups) 0}}

Commands:{{range $cmds}}{{if .IsAvailableCommand}}
  {{rpad .Name .NamePadding }} {{.Short}}{{end}}{{end}}{{else}}{{range $group := .Groups}}

{{.Title}}{{range $cmds}}{{if (and (eq .GroupID $group.ID) (or .IsAvailableCommand (eq .Name "help")))}}
  {{rpad .Name .NamePadding }} {{.Short}}{{end}}{{end}}{{end}}{{end}}{{end}}{{if .HasParent}}{{if .HasAvailableLocalFlags}}

Flags:
{{.LocalFlags.FlagUsages | trimTrailingWhitespaces}}{{end}}{{end}}{{if .HasAvailableSubCommands}}

"{{.CommandPath}} [command] --help" tells more about a command.{{end}}
`
