package survey

import (
	"crypto/sha256"
	"encoding/hex"
	"net/url"
	"path"
	"regexp"
	"strings"
	"unicode"

	wasm "github.com/envoyproxy/go-control-plane/envoy/extensions/wasm/v3"

	"github.com/meshery/meshery-filters/internal/plan"
)

var digest = regexp.MustCompile(`^[0-9a-f]{64}`)

// FilterOf is a filter with what its configuration tells of the module. Of an address only what is no secret is kept.
func FilterOf(name string, c *wasm.PluginConfig) plan.WasmFilter {
	f := plan.WasmFilter{Name: name}
	code := c.GetVmConfig().GetCode()
	local, remote := code.GetLocal(), code.GetRemote()
	switch {
	case local.GetFilename() != "": // which Istio's agent, for one, names by the digest
		f.Source, f.SHA256 = local.GetFilename(), digest.FindString(path.Base(local.GetFilename()))
	case local.GetInlineBytes() != nil:
		sum := sha256.Sum256(local.GetInlineBytes())
		f.Source, f.SHA256 = "inline", hex.EncodeToString(sum[:])
	case remote != nil:
		f.SHA256 = digest.FindString(remote.GetSha256())
		if u, err := url.Parse(remote.GetHttpUri().GetUri()); err == nil {
			u.User, u.RawQuery, u.Fragment = nil, "", ""
			f.Source = u.String()
		}
	}
	return f
}

// Builtin says whether the plugin is a part of Envoy, and no module.
func Builtin(c *wasm.PluginConfig) bool {
	return c.GetVmConfig().GetRuntime() == "envoy.wasm.runtime.null"
}

// clean makes a proxy's text fit for a line of ours.
func clean(s string) string {
	if len(s) > maxText {
		s = s[:maxText] + "…"
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
