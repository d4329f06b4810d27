package cli

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestHelpIsGolden(t *testing.T) {
	want := map[string]string{}
	var visit func(cmd *cobra.Command)
	visit = func(cmd *cobra.Command) {
		name := strings.ReplaceAll(cmd.CommandPath(), " ", "-")
		args := append(strings.Fields(cmd.CommandPath())[1:], "--help")
		text := run(t, args...).want(t, exitOK).out
		if cmd.Name() == "serve" { // its flags are the configuration's keys, whose texts are compared where they are written
			text, _, _ = strings.Cut(text, "\nFlags:")
		}
		want[name+".txt"] = text
		for _, sub := range cmd.Commands() {
			visit(sub)
		}
	}
	visit(newRoot(&app{}))
	golden(t, "help", want)
}

func TestEveryCommandSaysWhatItIsForWithAnExample(t *testing.T) {
	var visit func(cmd *cobra.Command)
	visit = func(cmd *cobra.Command) {
		if cmd.Short == "" || cmd.Long == "" || !strings.Contains(cmd.Example, "meshery-filters") {
			t.Errorf("%s lacks a short text, a long one or an example", cmd.CommandPath())
		}
		for line := range strings.Lines(cmd.Long) {
			if len(line) > 121 {
				t.Errorf("%s has a line of %d characters in its help", cmd.CommandPath(), len(line))
			}
		}
		for _, sub := range cmd.Commands() {
			visit(sub)
		}
	}
	visit(newRoot(&app{}))
}

func TestCompletionIsThereForTheUsualShells(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		run(t, "completion", shell).want(t, exitOK, "meshery-filters")
	}
}

func TestWordsAreCompleted(t *testing.T) {
	a := newAdapter(t)
	a.cli("run", "imagehub_rate_limit").want(t, exitOK)
	server := []string{"--server", a.at.GRPC}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"remove"}, "default/imagehub-rate-limit\n"},
		{[]string{"history"}, "default/imagehub-rate-limit\n"},
		{[]string{"undo"}, "default/imagehub-rate-limit\n"},
		{[]string{"run"}, "filters_status\n"},
	} {
		run(t, slices.Concat([]string{"__complete"}, c.args, server, []string{""})...).want(t, exitOK, c.want)
	}
	run(t, "__complete", "explain", "spec.mod").want(t, exitOK, "spec.module.builtin\n")
	run(t, "__complete", "remove", "--server", "127.0.0.1:1", "").want(t, exitOK, ":4\n") // nothing, and no files
}

func TestFlagsOfTheAdapterMayStandWithoutACommand(t *testing.T) {
	var out bytes.Buffer
	root := newRoot(&app{IO: IO{Out: &out, Err: &out}})
	if root.Flags().Lookup("grpc-addr") == nil || root.Flags().Lookup("state-dir") == nil {
		t.Error("the root has not got the flags of serve")
	}
	// A value that serve refuses shows that serve was what ran.
	run(t, "--grpc-addr", "nonsense", "--state-dir", t.TempDir()).want(t, exitUsage, "grpcAddr", "meshery-filters-1030")
}
