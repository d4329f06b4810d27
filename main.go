// Command meshery-filters manages WebAssembly filters in running Envoy proxies. See README.md.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/meshery/meshery-filters/internal/cli"
)

// The build sets these with -ldflags.
var version, commit = "dev", "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := cli.Run(ctx, os.Args[1:], cli.IO{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Env: os.Environ()}, cli.Build{Version: version, Commit: commit})
	stop()
	os.Exit(code)
}
