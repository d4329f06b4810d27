package filter

import (
	"encoding/json"
	"reflect"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/internal/problem"
)

// KindUndo heads a document that brings a filter back to what it was.
const KindUndo = "Undo"

const maxUndo = 64 << 10 // bytes of a body that may be one

// Undo is such a document.
type Undo struct {
	// Version of the schema: filters.meshery.io/v1alpha1.
	APIVersion string `json:"apiVersion" schema:"required"`
	// Kind of the document: Undo.
	Kind string `json:"kind" schema:"required"`
	// Name of the filter.
	Metadata Metadata `json:"metadata" schema:"required"`
	// What it is brought back to.
	Spec UndoSpec `json:"spec,omitzero"`
}

// UndoSpec says what a filter is brought back to.
type UndoSpec struct {
	// Revision as the filter's history names it. Default: the one before the last.
	Revision int `json:"revision,omitempty"`
}

// Key is the filter's. namespace is the one where the document names none; empty means "default".
func (u Undo) Key(namespace string) Key {
	return Key{Namespace: firstOf(u.Metadata.Namespace, namespace, "default"), Name: u.Metadata.Name}
}

// Body is the document as text.
func (u Undo) Body() (string, error) {
	u.APIVersion, u.Kind = APIVersion, KindUndo
	data, err := json.Marshal(u) // JSON is YAML
	return string(data), err
}

// ReadUndo reads the one Undo of a body. A body whose first document is of another kind is none, and no error.
func ReadUndo(body []byte, namespace string) (u Undo, found bool, err error) {
	if len(body) > maxUndo { // a module is in it, which need not be parsed twice
		return u, false, nil
	}
	d := newDecoder()
	roots := d.roots(body)
	if len(roots) == 0 || kindOf(roots[0]) != KindUndo {
		return u, false, nil
	}
	d.into(roots[0], reflect.ValueOf(&u).Elem(), nil, "", 0)
	fail := failures(&d.mistakes)
	if len(roots) > 1 {
		d.fail(nil, roots[1], "an Undo stands alone, and there are more documents", "send one at a time")
	}
	if u.APIVersion != APIVersion {
		fail("apiVersion", "write "+APIVersion, "it is not a version of this schema")
	}
	if k := u.Key(namespace); !IsDNSLabel(k.Name) || !IsDNSLabel(k.Namespace) {
		fail("metadata", "write the name and the namespace of one, in lower-case letters, digits and dashes", "it does not name a filter")
	}
	if u.Spec.Revision < 0 {
		fail("spec.revision", "write one that the filter's history has", "it is not a revision")
	}
	return u, true, problem.InvalidDocument.WithFields("", d.mistakes)
}

func kindOf(n *yaml.Node) string {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == "kind" {
			return n.Content[i+1].Value
		}
	}
	return ""
}
