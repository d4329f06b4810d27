// Package cli is the command line: one file per subcommand. It talks to an adapter over gRPC like any other client, and
// what it does without one (inspect, try, explain) it does with the packages that the adapter uses, so that an answer
// here is the adapter's answer.
//
// Results go to standard output and everything that is said about getting them to standard error. There are no colours.
package cli

import (
	"context"
	"io"
	"strings"
)

// IO is what a command has of the process it runs in.
type IO struct {
	In       io.Reader
	Out, Err io.Writer
	Env      []string // NAME=value, as os.Environ gives it
}

// Build tells which program this is.
type Build struct {
	Version string // v1.2.3, or dev
	Commit  string // git's SHA; may be empty
}

// Run executes one command line, without the program's name, and returns the exit code for it. It ends soon after ctx.
func Run(ctx context.Context, args []string, io IO, build Build) int {
	a := &app{IO: io, build: build}
	root := newRoot(a)
	root.SetIn(io.In)
	root.SetOut(io.Out)
	root.SetErr(io.Err)
	root.SetArgs(append([]string{}, args...)) // never nil, which would mean os.Args
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	f := explain(err, a.began)
	if f.exit == exitUsage && f.remedy == "" {
		f.remedy = "`" + cmd.CommandPath() + " --help` shows how it is used"
	}
	f.print(io.Err)
	return f.exit
}

// app is what the subcommands share: the process, the build, and the flags that several of them have.
type app struct {
	IO
	build Build
	// began is set once a command line was understood; an error before that is one of usage.
	began bool

	adapter   address
	output    outputForm
	namespace string
	servedAt  string // where an adapter serves modules to proxies
}

// env returns an environment variable, empty when it is not set.
func (a *app) env(name string) string {
	for i := len(a.Env) - 1; i >= 0; i-- { // the last one counts, as in os/exec
		if v, ok := strings.CutPrefix(a.Env[i], name+"="); ok {
			return v
		}
	}
	return ""
}
