package problem

import "google.golang.org/grpc/codes"

// The table. A code is never reused or renumbered; a new row takes the next free number.
var (
	InvalidDocument = &Kind{"meshery-filters-1001", codes.InvalidArgument, "the document is not valid",
		"A field is missing, misspelled, of the wrong type or contradicts another.",
		"Correct each field that is named; `meshery-filters explain` prints the whole schema."}
	UnknownOperation = &Kind{"meshery-filters-1002", codes.InvalidArgument, "no such operation",
		"The operation key is not in this adapter's catalogue; it may be misspelled or belong to another adapter.",
		"Use a key that `meshery-filters operations` lists."}
	BodyMissing = &Kind{"meshery-filters-1003", codes.InvalidArgument, "the operation needs a body",
		"The request came without a Filter document.",
		"Send one Filter document, several, or a YAML list of them as the body; `meshery-filters explain` shows what one looks like."}
	DeleteRefused = &Kind{"meshery-filters-1004", codes.InvalidArgument, "this operation has nothing to delete",
		"The request had delete set, and the operation does not make anything that could be taken away.",
		"Send it without delete; to take filters away use remove_filter, or apply_filter with delete."}
	InvalidRequest = &Kind{"meshery-filters-1005", codes.InvalidArgument, "the request is not valid",
		"A field of the request has a value that the adapter does not accept.",
		"Correct the field that is named."}
	OperationExists = &Kind{"meshery-filters-1006", codes.AlreadyExists, "the operation id is taken",
		"Another request with the same operation id but different content was accepted before.",
		"Send a new operation id, or none to have one made up."}
	MeshNotSupported = &Kind{"meshery-filters-1007", codes.FailedPrecondition, "the mesh is not supported by this version",
		"The document names a mesh, or carries a kubeconfig for one, that this version of the adapter cannot drive.",
		"Use a mesh that `meshery-filters version` lists, or upgrade the adapter."}
	MeshAmbiguous = &Kind{"meshery-filters-1008", codes.FailedPrecondition, "the mesh cannot be told",
		"spec.mesh is auto and more than one mesh was found.",
		"Set spec.mesh to one of the meshes that are listed."}
	NotSupported = &Kind{"meshery-filters-1009", codes.InvalidArgument, "the mesh cannot do what the document asks",
		"The field has no equivalent in the mesh that the filter is for.",
		"Leave the field out or choose another mesh; docs/envoy.md, docs/istio.md and docs/consul.md say what each can do."}
	FilterNotFound = &Kind{"meshery-filters-1010", codes.NotFound, "no such filter",
		"No chain holds a filter of this namespace and name; it may have been removed already.",
		"`meshery-filters list` shows what is there."}
	ModuleUnavailable = &Kind{"meshery-filters-1011", codes.FailedPrecondition, "the module cannot be had",
		"The address does not answer, is not allowed, or gives more than the limit.",
		"Check the address from the adapter's machine; module.inline needs no network."}
	DigestMismatch = &Kind{"meshery-filters-1012", codes.FailedPrecondition, "the module's digest is not the one that was asked for",
		"The bytes at the source changed, or module.sha256 is of another file.",
		"Compare with `sha256sum FILE.wasm`, and correct module.sha256 if the new bytes are the ones you want."}
	ModuleInvalid = &Kind{"meshery-filters-1013", codes.InvalidArgument, "the module is not one that Envoy can run",
		"It is not WebAssembly, has no proxy-wasm ABI, or imports functions that Envoy does not offer.",
		"`meshery-filters inspect FILE.wasm` says what is wrong; build it with a proxy-wasm SDK."}
	ConfigRefused = &Kind{"meshery-filters-1014", codes.InvalidArgument, "the filter refused its configuration",
		"The module ran in a sandbox with spec.config before anything was deployed, and refused it.",
		"Correct spec.config as the filter's log line says; `meshery-filters try` gives quick answers."}
	ModuleMisbehaved = &Kind{"meshery-filters-1015", codes.FailedPrecondition, "the module failed in its dry run",
		"It crashed, did not come to an end or took too much memory while it was configured in the sandbox.",
		"`meshery-filters inspect FILE.wasm` and `meshery-filters try` reproduce it on your machine."}
	ProxyRejected = &Kind{"meshery-filters-1016", codes.FailedPrecondition, "a proxy rejected the configuration",
		"Envoy checked the new chain and did not accept it.",
		"Read Envoy's own text in the details; it names the filter and the field. The details also say what the proxies run now."}
	ProxyTimeout = &Kind{"meshery-filters-1017", codes.DeadlineExceeded, "not every proxy answered in time",
		"The proxies that are named are connected but have neither accepted nor rejected the chain.",
		"Look at those proxies' logs; the chain stays offered, so they take it when they answer. Raise spec.wait.timeout for slow ones."}
	ProxyTooOld = &Kind{"meshery-filters-1018", codes.FailedPrecondition, "a proxy's Envoy is too old",
		"Chains need Envoy's filter_chain extension, which came with 1.39.",
		"Upgrade the proxy that is named to Envoy 1.39 or later, or move it to another group."}
	NoProxy = &Kind{"meshery-filters-1019", codes.OK, "no proxy is connected yet",
		"There is no proxy of this target: no Envoy of the group is connected to the adapter's xDS address, or no Pod or sidecar of the mesh is there.",
		"Start one, a plain Envoy with the bootstrap of `meshery-filters envoy bootstrap`: it gets the chain before it serves its first request. Where there should be one already, look whether the document's target names what it has."}
	LateRejection = &Kind{"meshery-filters-1020", codes.FailedPrecondition, "a proxy rejected its chain after the operation had ended",
		"A proxy that connected or restarted later did not accept the chain that others run.",
		"Compare that proxy's version and modules with the others'; its text is in the details."}
	FieldLost = &Kind{"meshery-filters-1021", codes.OK, "a field has no effect on this mesh",
		"The mesh has no equivalent for a field that the document sets; the filter runs without it.",
		"Leave the field out to make this warning go away, or choose a mesh that has it."}
	UnsignedTokens = &Kind{"meshery-filters-1022", codes.OK, "the limiter accepts unsigned tokens",
		"spec.config.auth.mode is unsigned: anybody can claim any user and any plan.",
		"Use auth.mode jwt with a key from {$secret: …} outside of demonstrations."}
	SecretMissing = &Kind{"meshery-filters-1023", codes.FailedPrecondition, "a secret cannot be resolved",
		"The document refers to a secret that the adapter's configuration does not have.",
		"Add it under `secrets:` in the adapter's configuration (from an environment variable or a file)."}
	StoreFailed = &Kind{"meshery-filters-1024", codes.Unavailable, "the adapter's state could not be read or written",
		"The disk is full or read-only, or a file in the state directory is damaged.",
		"Free space or mend the file that is named, then send the operation again."}
	ShuttingDown = &Kind{"meshery-filters-1025", codes.Unavailable, "the adapter is shutting down",
		"It was told to stop.",
		"Send the request again when the adapter is back. What it has accepted it finishes by itself."}
	QueueFull = &Kind{"meshery-filters-1026", codes.ResourceExhausted, "too many operations are waiting",
		"Operations arrive faster than proxies acknowledge them.",
		"Wait for some to end and send it again."}
	ImageHubFailed = &Kind{"meshery-filters-1027", codes.Unavailable, "Image Hub could not be started or stopped",
		"Its address may be taken by another program.",
		"Free the address, or set imagehub.addr in the adapter's configuration."}
	EventsMissed = &Kind{"meshery-filters-1029", codes.ResourceExhausted, "events were skipped",
		"The reader was slower than the events for so long that the adapter no longer holds them.",
		"Read faster, or follow one operation only; filters_status tells how things stand now."}
	InvalidConfiguration = &Kind{"meshery-filters-1030", codes.InvalidArgument, "the adapter's configuration is not valid",
		"A key of the configuration file, an environment variable or a flag has a value that is not accepted.",
		"Correct what is named; config/adapter.yaml in the repository shows every key."}
	Internal = &Kind{"meshery-filters-1031", codes.Internal, "something went wrong inside the adapter",
		"This is a fault of the adapter and not of the request.",
		"Look for the id in the adapter's log, and report it with the lines around it."}
	EnvoyUnavailable = &Kind{"meshery-filters-1032", codes.FailedPrecondition, "no usable Envoy on this machine",
		"Neither --envoy, $ENVOY, PATH nor the cache has an Envoy of version 1.39 or later.",
		"Set ENVOY to an Envoy's path, or run `make envoy` in the project, which installs one into the cache."}
	WaitNotMet = &Kind{"meshery-filters-1033", codes.OK, "the filter is not everywhere yet",
		"spec.wait.for is some or none, so the operation ended before every proxy had acknowledged.",
		"`meshery-filters status` shows the proxies that are still missing."}
	Drift = &Kind{"meshery-filters-1034", codes.OK, "proxies differ from what was applied",
		"A proxy rejected the chain, has not answered yet or runs an older version of it.",
		"Look at the proxies that are named; applying the filter again offers the chain once more."}
	Poisoned = &Kind{"meshery-filters-1035", codes.Internal, "the operation was set aside",
		"The adapter ended three times while it ran the operation, which may be what ended it.",
		"Look for the operation's id in the adapter's log, before each of its starts. Sending it again, with a new id, tries it again."}
	RevisionNotFound = &Kind{"meshery-filters-1036", codes.NotFound, "no such revision",
		"Nothing is kept of the filter at that revision: the last 10 changes of each target are.",
		"`meshery-filters history NAME` shows the revisions there are."}
	Sealed = &Kind{"meshery-filters-1037", codes.FailedPrecondition, "what the operation carries cannot be opened",
		"It was sealed with another key: sealKey was changed while the operation waited, or differs between adapters that share a store.",
		"Give every adapter that shares a store the same sealKey, and send the operation again."}
	StateInUse = &Kind{"meshery-filters-1038", codes.FailedPrecondition, "the state directory is in use",
		"Another adapter runs with the same state directory, and only one may write to it.",
		"Stop the other adapter, or give this one a directory of its own with --state-dir."}
	CanarySilent = &Kind{"meshery-filters-1039", codes.DeadlineExceeded, "the proxy that was to try the chain first did not answer",
		"It is connected but has neither accepted nor rejected the chain. The others were not asked, and the offer was taken back.",
		"Look at that proxy's log, then apply the filter again; spec.rollout all asks every proxy at once."}
	ProxyLeft = &Kind{"meshery-filters-1040", codes.Aborted, "a proxy left while it was to run the chain",
		"It crashed, was stopped or lost its connection. A filter can do that to a proxy only by using up its memory or a thread.",
		"Look at that proxy's log and wait until it is back, then apply the filter again."}
	RoleMissing = &Kind{"meshery-filters-1041", codes.PermissionDenied, "the client certificate may not do this",
		"Certificates are bound to roles: read sees what there is, operate may change it too.",
		"Use a certificate with the URI name meshery-filters://role/operate, or meshery-filters://role/read to look only, or add the certificate's name to grpcRoles in the adapter's configuration; docs/security.md has an example."}
	CallerUnknown = &Kind{"meshery-filters-1042", codes.Unauthenticated, "the operation needs to know who asks",
		"It uses the adapter's own rights, and came from another host without a client certificate.",
		"Give grpcTLS a clientCAFile and connect with a client certificate of the role operate, ask from the adapter's own host, or set allowUnauthenticated in the adapter's configuration to let everybody who can connect do everything."}
	TargetTooWide = &Kind{"meshery-filters-1043", codes.PermissionDenied, "the target is wider than this adapter allows",
		"The document's target is a whole mesh, or is in another namespace than the request's.",
		"Name a narrower target, or set allowWideTargets in the adapter's configuration."}
	TooMuch = &Kind{"meshery-filters-1044", codes.ResourceExhausted, "the adapter has too much to do",
		"A client, or all of them together, have more calls or streams than the adapter takes on.",
		"Try it again in a second or later, with fewer at once; limits in the adapter's configuration say how many it takes."}
	StoreAway = &Kind{"meshery-filters-1052", codes.Unavailable, "the store does not answer",
		"The JetStream that storeURL names is away, cannot be reached, or has no leader at the moment.",
		"Look at the NATS servers; the adapter goes on by itself when they answer. Send the operation again then, with the same id."}
	StateDamaged = &Kind{"meshery-filters-1053", codes.DataLoss, "the adapter's state is damaged or incomplete",
		"A file that the adapter wrote has changed since, or is gone: a disk that fails, a copy that was not whole, or somebody who edited it.",
		"Restore what is named from a copy, or do without what it held: docs/durability.md says how."}
	KubeconfigRefused = &Kind{"meshery-filters-1060", codes.InvalidArgument, "the kubeconfig is refused",
		"It cannot be read, or has something that would let its writer use what is the adapter's: a program, a file, a proxy, an address of the adapter's own network.",
		"Send one with certificates and a token in it, as `kubectl config view --raw --flatten --minify` writes it."}
	ClusterUnreachable = &Kind{"meshery-filters-1061", codes.Unavailable, "the cluster cannot be reached",
		"Its API server is down, cannot be reached from the adapter's machine, or has another certificate than the kubeconfig says.",
		"Check the server's address from where the adapter runs, then send the operation again."}
	ClusterUnauthenticated = &Kind{"meshery-filters-1062", codes.Unauthenticated, "the cluster does not accept the credentials",
		"The token or the client certificate has expired, was withdrawn or belongs to another cluster.",
		"Get a new kubeconfig, and send it with the operation."}
	RightMissing = &Kind{"meshery-filters-1063", codes.PermissionDenied, "a right is missing in the cluster",
		"The user of the kubeconfig, or the adapter's ServiceAccount, may not do what is named.",
		"Grant the verb on the resource; templates/rbac in the repository has all that the adapter needs."}
	NamespaceUnavailable = &Kind{"meshery-filters-1064", codes.FailedPrecondition, "the namespace is missing or being deleted",
		"The namespace that is named is not there, or is on its way out and takes nothing new.",
		"Create the namespace, or wait until its deletion has ended, then send the operation again."}
	KindNotServed = &Kind{"meshery-filters-1065", codes.FailedPrecondition, "the cluster does not have this kind of resource",
		"The mesh is not installed in the cluster, or in a version with other kinds.",
		"Install the mesh with its custom resource definitions, or choose another mesh."}
	FieldConflict = &Kind{"meshery-filters-1066", codes.FailedPrecondition, "another field manager has a field",
		"Somebody else, who is named, has set a field of the object to another value, and would set it back.",
		"Leave the field to the one who is named, or take it over with spec.force: true."}
	ObjectRefused = &Kind{"meshery-filters-1067", codes.FailedPrecondition, "the cluster refuses an object",
		"The API server, a quota or an admission webhook does not accept the object; nothing was written.",
		"Read the cluster's own text in the details; it names the field or the policy."}
	ChainChanged = &Kind{"meshery-filters-1068", codes.Aborted, "somebody else changed it at the same time",
		"Another adapter or a person has changed the target, or an object that belongs to it, since it was read.",
		"Send the operation again; it then builds on what is there now."}
	ClusterBusy = &Kind{"meshery-filters-1069", codes.Unavailable, "the cluster asks for patience",
		"Its API server put a request off until the adapter gave up: it is overloaded, or limits this user.",
		"Wait and send the operation again."}
	RenderOnly = &Kind{"meshery-filters-1070", codes.FailedPrecondition, "the adapter shows no plan for this mesh",
		"What would hold depends on the cluster, which a request for a plan does not bring.",
		"`meshery-filters render -f FILE --kubeconfig FILE` prints the objects, and `meshery-filters diff` what they would change; both ask the cluster by themselves."}
	TargetNotFound = &Kind{"meshery-filters-1071", codes.FailedPrecondition, "the target's proxies cannot be told",
		"The cluster has nothing of the target's kind and name, or what it has does not say which pods it means.",
		"Correct spec.target, or choose the pods by target.labels. `meshery-filters render` knows of a cluster what --cluster gives it."}
	NoDelivery = &Kind{"meshery-filters-1072", codes.FailedPrecondition, "proxies have no way to get the module",
		"None of the ways of spec.delivery holds for this module on this mesh.",
		"Give module.url an https address with sha256 that proxies reach, set modulesAddr and modulesURL in the adapter's configuration, make the module smaller, or put it on the proxies' machines and set delivery {mode: local, localPath: FOLDER}. Consul's proxies fetch through the upstream that delivery.service names; Pods that lack it get it, and are restarted, where delivery.upstreamPort asks for that."}
	KindMissing = &Kind{"meshery-filters-1073", codes.FailedPrecondition, "the cluster serves no kind that can carry a filter",
		"Istio's CustomResourceDefinitions are not installed, or the adapter may not read them.",
		"Install Istio with its CustomResourceDefinitions; `kubectl api-resources --api-group extensions.istio.io` shows what is served."}
	ClusterAnswer = &Kind{"meshery-filters-1074", codes.Unavailable, "the server does not answer as a Kubernetes API does",
		"The address may be of something else, such as a proxy's page, or the API server has failed.",
		"Check the server's address in the kubeconfig with `kubectl version`."}
	InventoryDamaged = &Kind{"meshery-filters-1075", codes.DataLoss, "the inventory of a target cannot be read",
		"The ConfigMap in which the adapter keeps what it made was changed by somebody else.",
		"Restore the ConfigMap that is named, or delete it together with the objects that it lists."}
	NotReady = &Kind{"meshery-filters-1076", codes.DeadlineExceeded, "an object did not get ready in time",
		"It was applied, and its controller has not brought it up.",
		"The details say what it waits for; it stays applied."}
	ClusterMissing = &Kind{"meshery-filters-1080", codes.FailedPrecondition, "the request names no cluster",
		"The filter is for a mesh of a Kubernetes cluster, and neither the request nor the adapter's configuration says which cluster.",
		"Send the cluster's kubeconfig with the request, as Meshery does for the contexts that are chosen and the command line with --kubeconfig; or set clusters: own, where the adapter runs in the cluster. For a Consul off Kubernetes set consul.addr."}
	ClustersFailed = &Kind{"meshery-filters-1081", codes.FailedPrecondition, "the operation is not done everywhere",
		"The operation went on in each cluster by itself. It failed in those that are named, and is done in the others.",
		"Mend what the details say of each, then send the operation again; where it is done already nothing is changed."}
	NotVerified = &Kind{"meshery-filters-1082", codes.OK, "nothing proves that proxies run it",
		"The cluster has taken the objects, and what its proxies made of them was not seen.",
		"Look at live responses. On Istio `istioctl proxy-status` and `istioctl proxy-config` show what the proxies have; of Consul's proxies off Kubernetes those are looked at whose admin addresses consul.admin has. docs/istio.md and docs/consul.md say what can go wrong."}
	SourceUnproved = &Kind{"meshery-filters-1090", codes.FailedPrecondition, "proxies would not get the module",
		"The address that proxies are to fetch it from did not give the adapter the module's bytes. A proxy without its module serves errors, so nothing was changed.",
		"Check the address from where proxies run: it is modulesURL of the adapter's configuration, or the document's module.url with delivery {mode: direct}."}
	HubGateway = &Kind{"meshery-filters-1095", codes.FailedPrecondition, "Image Hub finds no gateway in the cluster",
		"The cluster serves neither Istio's Gateway and VirtualService nor the Gateway API's Gateway and HTTPRoute, which Consul's gateway needs, or not those that imagehub.gateway of the adapter's configuration asks for.",
		"Install Istio with its gateway, or the Gateway API's kinds; or set imagehub.gateway to auto."}
	ConsulUnreachable = &Kind{"meshery-filters-1100", codes.Unavailable, "Consul cannot be reached",
		"The agent at consul.addr is down, has no leader, or cannot be reached from the adapter's machine.",
		"Check the address with `curl ADDRESS/v1/status/leader` from where the adapter runs, then send the operation again."}
	ConsulDenied = &Kind{"meshery-filters-1101", codes.PermissionDenied, "Consul does not allow it",
		"The token of consul.token has expired, is unknown, or its policies lack what is named.",
		"Give the token of consul.token the policy that docs/consul.md shows: `consul acl policy update`. Where the details speak of the anonymous token, set consul.token."}
	ConsulRefused = &Kind{"meshery-filters-1102", codes.FailedPrecondition, "Consul refuses a request",
		"Consul does not accept the entry, or what answers at consul.addr is no Consul.",
		"Read its own text in the details; it names the field. `curl ADDRESS/v1/agent/self` shows what answers there."}
	ConsulKubernetes = &Kind{"meshery-filters-1103", codes.FailedPrecondition, "the entry is kept by Kubernetes",
		"consul-k8s has made the entry from a resource of a cluster, and would undo every change of it.",
		"Send the cluster's kubeconfig with the request: the filters then go into that resource."}
	ModuleNotWritten = &Kind{"meshery-filters-1104", codes.FailedPrecondition, "a module cannot be put where proxies read it",
		"The folder of consul.localPath is missing, full, or not the adapter's to write.",
		"Make the folder and let the adapter's user write there, and the proxies' read."}
	ServiceTaken = &Kind{"meshery-filters-1105", codes.FailedPrecondition, "a service of that name is somebody else's",
		"The agent at consul.addr has a service with a name that Image Hub's services have, and the adapter did not register it.",
		"Deregister it if nobody needs it: `consul services deregister -id ID`."}
	ProtocolDiffers = &Kind{"meshery-filters-1110", codes.FailedPrecondition, "the service speaks another protocol than the filter",
		"Consul gives a filter to the proxies of a service only if the service has the very protocol that the filter is for, and is silent about the others.",
		"Set the service's protocol in its ServiceDefaults, or spec.protocol of the document, as the details say. `meshery-filters render` knows of a cluster what --cluster gives it."}
	EntryRefused = &Kind{"meshery-filters-1111", codes.FailedPrecondition, "Consul does not take the entry",
		"The cluster has the object, and Consul's controller cannot write it to Consul, whose servers refuse it or do not answer.",
		"Read the controller's own text in the details; `kubectl describe` of the object that is named shows it too."}
	MesheryUnreachable = &Kind{"meshery-filters-1120", codes.Unavailable, "Meshery Server does not answer",
		"Nothing listens at mesheryServer of the adapter's configuration, or the network between is broken.",
		"Start Meshery with `mesheryctl system start`, or correct the address: it is the one that the adapter reaches, not the browser's."}
	MesheryUnauthorized = &Kind{"meshery-filters-1121", codes.Unauthenticated, "Meshery Server wants somebody who is signed in",
		"The token is missing or has expired, or it is of another provider than meshery.provider of the adapter's configuration.",
		"Sign in with `mesheryctl system login`, and set meshery.tokenFile to the file that it writes, ~/.meshery/auth.json."}
	MesheryRefused = &Kind{"meshery-filters-1122", codes.FailedPrecondition, "Meshery Server refuses",
		"It does not take what was sent, or it has failed.",
		"Read its answer in the details, and its log with `mesheryctl system logs`."}
	MesheryToken = &Kind{"meshery-filters-1123", codes.FailedPrecondition, "the token for Meshery Server cannot be read",
		"meshery.tokenFile of the adapter's configuration is missing, too large, or neither a token nor the file that mesheryctl writes.",
		"Write it anew with `mesheryctl system login`, and let the adapter's user read it."}
	InvalidDesign = &Kind{"meshery-filters-1130", codes.InvalidArgument, "the design has mistakes",
		"The settings of a component do not make a Filter document, or the request is not what Meshery Server sends.",
		"Correct the settings that are named; `meshery-filters explain` prints every one of them. Nothing of the design was done."}
	ForeignComponent = &Kind{"meshery-filters-1131", codes.InvalidArgument, "the design has a component that is not this adapter's",
		"The adapter deploys the components WASMFilter and ImageHub, and EnvoyFilters that carry a Wasm filter.",
		"Leave the other components to the adapters or models that define them. Nothing of the design was done."}
	DesignFailed = &Kind{"meshery-filters-1132", codes.FailedPrecondition, "the design is not done",
		"One of its components failed.",
		"Mend what the details say of the component, then send the design again; what is done already is not changed by that."}
	DesignGoesOn = &Kind{"meshery-filters-1133", codes.DeadlineExceeded, "the design is not done yet",
		"Its components were accepted and go on, and the answer does not wait any longer for them.",
		"Follow the events of the operations that are named: `meshery-filters events ID`. Do not send the design again before."}
	ClusterSecret = &Kind{"meshery-filters-1145", codes.FailedPrecondition, "a Secret of the cluster cannot be used",
		"A reference of a filter in a cluster stands for a Secret of the filter's own namespace there. That Secret, or its key, is not there, or is not what it is taken for.",
		"`kubectl -n NAMESPACE create secret generic NAME --from-literal KEY=VALUE` makes one, and `kubectl -n NAMESPACE create secret docker-registry NAME …` one for pulling images."}
	StoredFilterMissing = &Kind{"meshery-filters-1134", codes.NotFound, "Meshery has no such filter",
		"Nobody has stored a filter of this name or id there, or it is another user's, who has not published it.",
		"`meshery-filters meshery filters list` shows those of the user whose token is used."}
	MesheryUnset = &Kind{"meshery-filters-1135", codes.FailedPrecondition, "the adapter knows no Meshery Server",
		"The document's module is a filter that is stored in Meshery, and mesheryServer of the adapter's configuration is empty.",
		"Set mesheryServer, and meshery.tokenFile to the file that `mesheryctl system login` writes; or give the module in another way."}
	UpstreamMissing = &Kind{"meshery-filters-1157", codes.FailedPrecondition, "proxies lack the upstream that leads to the module",
		"Consul's proxies fetch a module only through one of their upstreams. Where one lacks it, Consul would stop configuring that proxy, so nothing was changed.",
		"Set delivery.upstreamPort to a port that is free in the Pods: the upstream is then added to their annotation consul.hashicorp.com/connect-service-upstreams, which restarts them. Or add it by yourself, or use delivery {mode: local, localPath: FOLDER}."}
	UpstreamRefused = &Kind{"meshery-filters-1158", codes.FailedPrecondition, "Pods cannot be given the upstream",
		"The document asks by delivery.upstreamPort for an upstream in the annotation of the target's Pods, and what makes those Pods cannot have it. Nothing was changed.",
		"Mend what the details say, or add the upstream by yourself and leave delivery.upstreamPort out."}
	UpstreamNeeded = &Kind{"meshery-filters-1175", codes.FailedPrecondition, "a filter needs the upstream that no filter asks for any more",
		"The target's Pods have an upstream since a filter asked for it by delivery.upstreamPort, and it goes when none asks for it any more. A filter of the new chain fetches its module through it. Nothing was changed.",
		"Set delivery.upstreamPort in the document of that filter: where the Pods have the upstream from you, that changes nothing. Or remove the filters of the target first, and apply them with an upstream of your own."}
	UpstreamStays = &Kind{"meshery-filters-1176", codes.OK, "Pods keep an upstream that no filter needs any more",
		"The filters run, and the upstream that only the chain before needed could not be taken from the annotation of their Pods, for what the details say. It does no harm.",
		"Apply the filter again, which takes it away; removing the target's last filter does, too."}
	RolloutFailed = &Kind{"meshery-filters-1159", codes.DeadlineExceeded, "Pods did not restart with their upstream",
		"Their annotation was changed, and what makes them did not bring up new Pods. The chain that needs the upstream did not go out.",
		"Read in the details what they wait for: `kubectl describe` of the object that is named shows more. Then send the operation again."}
	UndoAmbiguous = &Kind{"meshery-filters-1146", codes.FailedPrecondition, "the undo comes to different things",
		"The filter has a history in several of the places that the request is for, and was not the same there.",
		"Send the undo with the kubeconfig of one cluster, or apply the filter as you want it."}
	OrphanFilters = &Kind{"meshery-filters-1147", codes.OK, "proxies run Wasm filters that nothing explains",
		"Neither a chain nor any other resource of the cluster has these filters. Their proxies have lost their control plane, or hold on to a configuration that it has replaced.",
		"See whether the proxy still hears from its control plane: `istioctl proxy-status`, or the log of its container. `kubectl -n NAMESPACE delete pod POD` has another Pod begin with what is meant to be there; off Kubernetes start the sidecar's Envoy anew."}
	RevisionAstray = &Kind{"meshery-filters-1148", codes.DataLoss, "a revision belongs elsewhere",
		"What is kept of a target's past has a filter that is for another mesh or target. The adapter writes none such, so somebody else has changed it, and nothing was done.",
		"Apply the filter as you want it. In a cluster `kubectl -n meshery-filters get configmaps -l filters.meshery.io/inventory` has the inventories; without its revisions one is as good, apart from undo."}
	ComponentTaken = &Kind{"meshery-filters-1167", codes.AlreadyExists, "the filter is another component's",
		"Filters are named after a design's components, in lower case and with dashes. Components whose names come to the same, such as \"My Filter\" and \"my-filter\", would be one filter.",
		"Give the component another name, or undeploy the other one first."}
	ConsulTLS = &Kind{"meshery-filters-1162", codes.Unavailable, "the adapter and Consul do not trust each other",
		"Consul's certificate has another authority than consul.caFile or another name than consul.addr, or Consul does not take the certificate of consul.certFile, or consul.addr says http where Consul speaks TLS, or the other way round.",
		"Correct the setting that the details name and start the adapter again. `curl --cacert CAFILE --cert CERTFILE --key KEYFILE ADDRESS/v1/status/leader` tries the same three files."}
	ConsulDamaged = &Kind{"meshery-filters-1163", codes.DataLoss, "what the adapter keeps in Consul of a target cannot be read",
		"The key that is named was changed by somebody else. Operations on its target are refused; those on others go on.",
		"`consul kv get KEY` shows it. Bring it back from a snapshot; or delete it with `consul kv delete KEY` and apply the target's filters again, which takes over what stands in the entry under their names. What is not applied again is taken out of the entry by hand: extensions with the plugins meshery.filters/NAMESPACE.NAME."}
	HubLeft = &Kind{"meshery-filters-1164", codes.OK, "Image Hub is elsewhere, too",
		"imagehub.mesh or clusters of the adapter's configuration was changed while Image Hub was there, or another adapter has deployed it.",
		"`meshery-filters run imagehub --delete` takes it away here and there; then deploy it again."}
	LimiterLeft = &Kind{"meshery-filters-1180", codes.OK, "Image Hub's limiter is on another mesh, too",
		"imagehub.mesh or clusters of the adapter's configuration was changed while the limiter was applied, or another adapter has applied it there. It stays in front of whatever its proxies serve.",
		"`meshery-filters run imagehub_rate_limit --delete` takes it away here and there; then apply it again."}
	SecretShown = &Kind{"meshery-filters-1190", codes.FailedPrecondition, "a secret would be printed",
		"What is rendered is what the cluster gets, which has a secret's value in the place of the reference to it.",
		"`meshery-filters diff --kubeconfig FILE` tells what applying would change, and `meshery-filters apply` gives the value to the cluster alone."}
	SandboxSpoiled = &Kind{"meshery-filters-1185", codes.FailedPrecondition, "the module cannot be configured as often as Envoy does it",
		"Envoy judges a configuration by a sandbox that it throws away. Then each of its threads has one of its own with the same shared data, and one that runs already gets the next configuration, too. The module fails there: Envoy would have accepted it, and would let requests pass the filter by, whatever its failure policy.",
		"Mend the module: it has to accept its configuration with shared data that is there already, and more than once in a sandbox. Where the details speak of a sandbox that runs another configuration, another spec.vmID gives the filter a sandbox of its own; for a TrafficExtension or WasmPlugin, which do not name sandboxes, remove the filter and apply it again."}
)

// All lists the table in the order of its codes.
func All() []*Kind {
	return []*Kind{InvalidDocument, UnknownOperation, BodyMissing, DeleteRefused, InvalidRequest, OperationExists,
		MeshNotSupported, MeshAmbiguous, NotSupported, FilterNotFound, ModuleUnavailable, DigestMismatch, ModuleInvalid,
		ConfigRefused, ModuleMisbehaved, ProxyRejected, ProxyTimeout, ProxyTooOld, NoProxy, LateRejection, FieldLost,
		UnsignedTokens, SecretMissing, StoreFailed, ShuttingDown, QueueFull, ImageHubFailed, EventsMissed,
		InvalidConfiguration, Internal, EnvoyUnavailable, WaitNotMet, Drift, Poisoned, RevisionNotFound, Sealed,
		StateInUse, CanarySilent, ProxyLeft, RoleMissing, CallerUnknown, TargetTooWide, TooMuch,
		StoreAway, StateDamaged, KubeconfigRefused, ClusterUnreachable, ClusterUnauthenticated, RightMissing,
		NamespaceUnavailable, KindNotServed, FieldConflict, ObjectRefused, ChainChanged, ClusterBusy,
		RenderOnly, TargetNotFound, NoDelivery, KindMissing, ClusterAnswer, InventoryDamaged, NotReady,
		ClusterMissing, ClustersFailed, NotVerified, SourceUnproved, HubGateway,
		ConsulUnreachable, ConsulDenied, ConsulRefused, ConsulKubernetes, ModuleNotWritten, ServiceTaken, ProtocolDiffers, EntryRefused,
		MesheryUnreachable, MesheryUnauthorized, MesheryRefused, MesheryToken,
		InvalidDesign, ForeignComponent, DesignFailed, DesignGoesOn, StoredFilterMissing, MesheryUnset, ClusterSecret, UndoAmbiguous,
		OrphanFilters, RevisionAstray, UpstreamMissing, UpstreamRefused, RolloutFailed, ConsulTLS, ConsulDamaged, HubLeft, ComponentTaken,
		UpstreamNeeded, UpstreamStays, LimiterLeft, SandboxSpoiled, SecretShown}
}
