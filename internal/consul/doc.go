// Package consul makes plans true in Consul through its HTTP API, and proves that proxies which Consul configures run them.
//
// The promise: entries are changed by compare-and-set, and only in the extensions that are ours; an entry that was not
// there is deleted when nothing is left in it, and one of the user's gets back what it had. What Consul keeps under
// meshery-filters/ in its key-value store tells any adapter and any person what was done. A proxy counts as running a plan
// only if its own configuration and statistics show that. The limits: Consul answers true to what proxies refuse, so that
// without a proxy's admin interface nothing is proved; and what a filter does within a proxy is not looked at.
package consul
