package cli

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/imagehub"
)

const maxKeyFile = 64 << 10 // bytes

// newImageHub makes `imagehub`.
func newImageHub(a *app) *cobra.Command {
	var addr, keyEnv, keyFile string
	var unsigned bool
	cmd := &cobra.Command{
		Use:   "imagehub",
		Short: "Run the sample application that the rate limit is for",
		Long: `Run Image Hub, the sample application that the rate limit is for: users sign up, get a token and pull images. It limits
nothing itself; the filter in front of it does.

Tokens are signed with a key of at least 32 bytes that the filter must know too. --unsigned issues the tokens of the
public images instead, which anybody can forge. Users are kept in memory. It runs until interrupted.`,
		Example: `  IMAGEHUB_KEY=$(openssl rand -hex 32) meshery-filters imagehub --key-env IMAGEHUB_KEY
  meshery-filters imagehub --addr 127.0.0.1:10017 --unsigned`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			key, err := a.readKey(keyEnv, keyFile, unsigned)
			if err != nil {
				return err
			}
			log := slog.New(slog.NewTextHandler(a.Err, nil))
			app, err := imagehub.New(imagehub.Options{Key: key, Unsigned: unsigned, Log: log})
			if err != nil {
				return usageError{err}
			}
			var lc net.ListenConfig
			l, err := lc.Listen(cmd.Context(), "tcp", addr)
			if err != nil {
				return fmt.Errorf("--addr: %w", err)
			}
			if _, err := fmt.Fprintf(a.Out, "Image Hub answers at http://%s\n", l.Addr()); err != nil {
				l.Close()
				return err
			}
			return app.Run(cmd.Context(), l)
		},
	}
	f := cmd.Flags()
	f.StringVar(&addr, "addr", "127.0.0.1:10017", "`address` to answer at")
	f.StringVar(&keyEnv, "key-env", "", "`name` of the environment variable with the key")
	f.StringVar(&keyFile, "key-file", "", "`file` with the key; white space around it does not count")
	f.BoolVar(&unsigned, "unsigned", false, "issue tokens that anybody can forge")
	return cmd
}

// readKey finds the key where exactly one of the flags says.
func (a *app) readKey(env, file string, unsigned bool) ([]byte, error) {
	given := 0
	for _, g := range []bool{env != "", file != "", unsigned} {
		if g {
			given++
		}
	}
	if given != 1 {
		return nil, usage("set one of --key-env, --key-file and --unsigned")
	}
	switch {
	case env != "":
		key := a.env(env)
		if key == "" {
			return nil, usage("--key-env: the variable %s is not set", env)
		}
		return []byte(key), nil
	case file != "":
		key, err := readFile(file, maxKeyFile)
		if err != nil {
			return nil, usage("--key-file: %w", err)
		}
		return bytes.TrimSpace(key), nil
	}
	return nil, nil
}
