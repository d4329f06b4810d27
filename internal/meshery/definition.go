package meshery

import "encoding/json"

// Definition is a component of the adapter's as the registries of Meshery's servers take it.
type Definition struct {
	Kind    string // WASMFilter
	Version string // of what the adapter manages, which the model has
	// Entity has the fields of a meshmodel ComponentDefinition in all of its versions, each of which ignores the others'.
	Entity json.RawMessage
	// Trait is an OAM TraitDefinition, of one that is no component.
	Trait json.RawMessage
	// Workload is an OAM WorkloadDefinition, and Schema the JSON Schema that goes with it. Servers that take these have one
	// for each kind; it is empty for the other versions.
	Workload json.RawMessage
	Schema   string
}
