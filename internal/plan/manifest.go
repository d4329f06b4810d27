package plan

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// digestForm is text that YAML may take for a number: 64 digits, or digits around an e.
var digestForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Manifest writes objects as YAML for kubectl, one document each. Text stays text for every reader: what older YAML takes
// for true, false or a number is in quotes, and so is every digest.
func Manifest(objects []Object) ([]byte, error) {
	var out bytes.Buffer
	for _, o := range objects {
		out.WriteString("---\n")
		enc := yaml.NewEncoder(&out)
		enc.SetIndent(2)
		if err := enc.Encode(quoted(o.Content)); err != nil {
			return nil, fmt.Errorf("write %s: %w", o, err)
		}
		if err := enc.Close(); err != nil {
			return nil, fmt.Errorf("write %s: %w", o, err)
		}
	}
	return out.Bytes(), nil
}

// quoted copies a value with nodes in the place of text that must have quotes.
func quoted(v any) any {
	switch t := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(t))
		for k, e := range t {
			out[k] = quoted(e)
		}
		return out
	case []any:
		out := make([]any, len(t))
		for i, e := range t {
			out[i] = quoted(e)
		}
		return out
	case string:
		if digestForm.MatchString(t) || strings.ContainsAny(t, "\n\r\t\u0085\u2028\u2029") {
			return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: t, Style: yaml.DoubleQuotedStyle}
		}
	}
	return v
}
