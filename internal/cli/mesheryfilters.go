package cli

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/meshery"
	"github.com/meshery/meshery-filters/internal/problem"
)

// defaultMeshery is where `mesheryctl system start` has Meshery Server answer.
const defaultMeshery = "http://localhost:9081"

// mesheryTimeout bounds one request to Meshery Server, with a module in it.
const mesheryTimeout = 2 * time.Minute

// newMeshery makes `meshery`.
func newMeshery(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "meshery",
		Short:   "Use what is kept in Meshery",
		Long:    `Use what is kept in Meshery: the commands below talk to Meshery Server and to no adapter.`,
		Example: `  meshery-filters meshery filters list`,
	}
	filters := &cobra.Command{
		Use:   "filters",
		Short: "The filters that users keep in Meshery",
		Long: `The filters that users keep in Meshery: a module's bytes, a name and a configuration.

A document applies one with module: {url: meshery://ID}. The adapter then fetches the bytes as the user that its own
configuration signs in.`,
		Example: `  meshery-filters meshery filters list
  meshery-filters meshery filters push target/wasm32-unknown-unknown/release/audit.wasm`,
	}
	return parent(cmd, parent(filters, newMesheryList(a), newMesheryPull(a), newMesheryPush(a)))
}

// mesheryFlags are where Meshery Server is, and who asks.
type mesheryFlags struct{ server, tokenFile, provider string }

func (m *mesheryFlags) flags(a *app, cmd *cobra.Command) {
	token := a.env("MESHERY_FILTERS_MESHERY_TOKEN_FILE")
	if home := a.env("HOME"); token == "" && home != "" {
		if name := filepath.Join(home, ".meshery", "auth.json"); exists(name) {
			token = name
		}
	}
	f := cmd.Flags()
	f.StringVar(&m.server, "meshery-server", cmp.Or(a.env("MESHERY_FILTERS_MESHERY_SERVER"), a.env("MESHERY_SERVER"), defaultMeshery),
		"`address` of Meshery Server; $MESHERY_FILTERS_MESHERY_SERVER or $MESHERY_SERVER sets the default")
	f.StringVar(&m.tokenFile, "meshery-token-file", token,
		"`file` with the token, as mesheryctl system login writes it; $MESHERY_FILTERS_MESHERY_TOKEN_FILE sets the default, else it is ~/.meshery/auth.json where that is there")
	f.StringVar(&m.provider, "meshery-provider", a.env("MESHERY_FILTERS_MESHERY_PROVIDER"),
		"`name` of the provider that the token is of; $MESHERY_FILTERS_MESHERY_PROVIDER sets the default, else it is the one in the token's file")
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

func (m *mesheryFlags) client() (*meshery.Client, error) {
	return meshery.New(meshery.Options{Server: m.server, TokenFile: m.tokenFile, Provider: m.provider, Timeout: mesheryTimeout})
}

func newMesheryList(a *app) *cobra.Command {
	var m mesheryFlags
	cmd := &cobra.Command{
		Use:   "list [TEXT]",
		Short: "List the filters in Meshery",
		Long:  `List the filters in Meshery that the user may see, or those whose names have TEXT in them. The newest come first.`,
		Example: `  meshery-filters meshery filters list
  meshery-filters meshery filters list limit -o json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := m.client()
			if err != nil {
				return err
			}
			defer c.Close()
			search := ""
			if len(args) > 0 {
				search = args[0]
			}
			all, err := c.Filters(cmd.Context(), search)
			if err != nil {
				return err
			}
			return a.print(append([]meshery.Filter{}, all...), func(w io.Writer) error { return storedTable(w, all) })
		},
	}
	m.flags(a, cmd)
	a.outputFlag(cmd)
	return cmd
}

func storedTable(w io.Writer, all []meshery.Filter) error {
	if len(all) == 0 {
		return write(w, []byte("no filter is kept in Meshery\n"), "")
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "ID\tNAME\tVISIBILITY\tBYTES\tUPDATED")
	for _, f := range all {
		size := ""
		if f.Size > 0 {
			size = strconv.Itoa(f.Size)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", f.ID, shown(f.Name), shown(f.Visibility), size, shown(f.Updated))
	}
	return tw.Flush()
}

// shown is a text of somebody else's as a terminal may have it.
func shown(s string) string {
	quoted := strconv.Quote(s)
	if quoted == `"`+s+`"` {
		return s
	}
	return quoted
}

func newMesheryPull(a *app) *cobra.Command {
	var m mesheryFlags
	cmd := &cobra.Command{
		Use:   "pull NAME|ID FILE.wasm",
		Short: "Write the module of a filter in Meshery into a file",
		Long: `Write the module of a filter in Meshery into a file, byte by byte; - is standard output. A name that several filters
have is refused, with their ids.`,
		Example: `  meshery-filters meshery filters pull audit.wasm ./audit.wasm
  meshery-filters meshery filters pull 1c9adbd4-c121-4fc0-9690-5bf88f477096 - | sha256sum`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usage("say which filter, by its name or id, and the file to write")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := m.client()
			if err != nil {
				return err
			}
			defer c.Close()
			f, err := c.Find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			data, err := c.Download(cmd.Context(), f.ID, filter.MaxModule)
			if err != nil {
				return err
			}
			if args[1] == "-" {
				return write(a.Out, data, "")
			}
			if err := os.WriteFile(args[1], data, 0o644); err != nil {
				return err
			}
			return a.stored(args[1], f.ID, data)
		},
	}
	m.flags(a, cmd)
	return cmd
}

func newMesheryPush(a *app) *cobra.Command {
	var m mesheryFlags
	var u meshery.Upload
	cmd := &cobra.Command{
		Use:   "push FILE.wasm",
		Short: "Keep a module in Meshery",
		Long: `Keep a module in Meshery as a filter of the user, and read it back: what Meshery keeps has to be the file, byte by byte.

Each push makes another filter, unless --id says which one it replaces.`,
		Example: `  meshery-filters meshery filters push audit.wasm
  meshery-filters meshery filters push audit.wasm --name audit --config '{"level": "info"}'`,
		Args: oneArg("say which module to keep: FILE.wasm"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if u.ID != "" && !meshery.IsFilterID(u.ID) {
				return usage("--id: %q is not the id of a filter in Meshery", u.ID)
			}
			var err error
			if u.Bytes, err = readFile(args[0], filter.MaxModule); err != nil {
				return usageError{err}
			}
			if len(u.Bytes) == 0 {
				return problem.ModuleInvalid.New("%s is empty", args[0])
			}
			u.Name = cmp.Or(u.Name, filepath.Base(args[0]))
			c, err := m.client()
			if err != nil {
				return err
			}
			defer c.Close()
			f, err := c.Save(cmd.Context(), u)
			if err != nil {
				return err
			}
			return a.stored(f.Name, f.ID, u.Bytes)
		},
	}
	cmd.Flags().StringVar(&u.Name, "name", "", "`name` of the filter (default: the file's)")
	cmd.Flags().StringVar(&u.Config, "config", "", "`configuration` to keep with it")
	cmd.Flags().StringVar(&u.ID, "id", "", "`id` of the filter that it replaces")
	m.flags(a, cmd)
	return cmd
}

// stored says what is the same in a file and in Meshery.
func (a *app) stored(name, id string, data []byte) error {
	sum := sha256.Sum256(data)
	return write(a.Out, []byte(fmt.Sprintf("%s: %d bytes, sha256 %s\n  module: {url: meshery://%s}\n", shown(name), len(data), hex.EncodeToString(sum[:]), id)), "")
}
