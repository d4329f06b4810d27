package wasm

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/experimental"
)

// Answers of proxy-wasm host functions.
const (
	statusOK = iota
	statusNotFound
	statusBadArgument
	_
	_
	_
	statusInvalidMemoryAccess
	statusEmpty
	statusCasMismatch
	_
	statusInternalFailure
	_
	statusUnimplemented
)

// Bounds of what a module can make the host keep.
const (
	maxKept        = 16 << 20 // bytes, shared data and queues together
	maxKeptEntries = 10_000   // of each kind
)

// connectionContext is the id of a connection's context. Root contexts have 1, 2 and so on; 0 is the VM's own.
const connectionContext = 1000

type phase int

const (
	initializing phase = iota
	running
	connecting // a connection is opened
)

var levels = []string{"trace", "debug", "info", "warn", "error", "critical"}

// host is Envoy's side of one run: what a module finds when it starts, without any request.
type host struct {
	options  Options
	redactor redactor
	abi      string
	start    time.Time

	phase     phase
	roots     int  // root contexts in the sandbox, the last of which runs
	allocates bool // the module's own allocator is running
	asked     bool // while connecting, for what only a real connection has
	plugin    bool // a callback runs that may see the plugin's configuration

	ctx    context.Context // of the call that runs now, for calls back into the module
	module api.Module      // the module that made it

	logs   []Log
	open   uint32 // the file descriptor whose last line has not ended yet; 0 for none
	wanted uint64 // bytes of memory that were refused

	shared    map[string]sharedValue
	cas       uint32
	queues    map[uint32][]string
	queueIDs  map[string]uint32
	kept      int // bytes in shared and queues
	metrics   map[uint32]uint64
	metricIDs [3]uint32
	tokens    uint32
}

type sharedValue struct {
	value string
	cas   uint32
}

func newHost(o Options, abi string) *host {
	return &host{
		options: o, redactor: newRedactor(o.Redact), abi: abi, start: time.Now(),
		shared: map[string]sharedValue{}, queues: map[uint32][]string{}, queueIDs: map[string]uint32{},
		metrics: map[uint32]uint64{},
	}
}

// args are a host function's arguments.
type args []uint64

// u32 masks the argument: the upper half of a 32-bit one is undefined.
func (a args) u32(i int) uint32 { return uint32(a[i]) }

// guard makes a host function callable, under the conditions under which Envoy lets it be called.
func (h *host) guard(name string, f hostFunction) api.GoModuleFunc {
	result := !strings.HasSuffix(f.signature, ":")
	return func(ctx context.Context, m api.Module, stack []uint64) {
		if h.allocates && !f.inMalloc {
			panic(fmt.Errorf("it called %s from its memory allocator, which Envoy does not allow", name))
		}
		if h.phase == initializing && !f.early {
			panic(fmt.Errorf("it called %s before its start was over, which Envoy does not allow", name))
		}
		if h.phase == connecting && !f.early {
			h.asked = true
		}
		h.ctx, h.module = ctx, m
		answer := f.call(h, stack)
		if result {
			stack[0] = uint64(answer)
		}
	}
}

// Allocate implements experimental.MemoryAllocator, to see refused growth.
func (h *host) Allocate(_, _ uint64) experimental.LinearMemory { return &memory{host: h} }

type memory struct {
	host *host
	b    []byte
}

func (m *memory) Reallocate(size uint64) []byte {
	limit := uint64(m.host.options.MemoryLimit) << 16
	if size > limit {
		m.host.wanted = size
		return nil
	}
	if size > uint64(cap(m.b)) {
		grown := make([]byte, size, min(limit, max(size, 2*uint64(cap(m.b)))))
		copy(grown, m.b)
		m.b = grown
	}
	m.b = m.b[:size]
	return m.b
}

func (m *memory) Free() { m.b = nil }

// read copies from the module's memory, at most maxKept bytes.
func (h *host) read(pointer, size uint32) (string, bool) {
	if size > maxKept {
		return "", false
	}
	b, ok := h.module.Memory().Read(pointer, size)
	return string(b), ok
}

func (h *host) put32(pointer, value uint32) bool {
	return h.module.Memory().WriteUint32Le(pointer, value)
}

// put32s writes pairs of pointer and value and gives the answer for it.
func (h *host) put32s(pairs ...uint32) uint32 {
	for i := 0; i < len(pairs); i += 2 {
		if !h.put32(pairs[i], pairs[i+1]) {
			return statusInvalidMemoryAccess
		}
	}
	return statusOK
}

// allocate has the module make room for size bytes.
func (h *host) allocate(size uint32) (uint32, bool) {
	f := h.module.ExportedFunction("malloc")
	if f == nil {
		f = h.module.ExportedFunction("proxy_on_memory_allocate")
	}
	h.allocates = true
	result, err := f.Call(h.ctx, uint64(size))
	if err != nil {
		panic(err) // a trap in the allocator is a trap of the whole call
	}
	h.allocates = false
	return uint32(result[0]), uint32(result[0]) != 0
}

// give hands bytes to the module: a copy in its memory, pointer and size where it asked for them.
func (h *host) give(data string, pointerAt, sizeAt uint32) uint32 {
	var pointer uint32
	if len(data) > 0 {
		var ok bool
		if pointer, ok = h.allocate(uint32(len(data))); !ok || !h.module.Memory().WriteString(pointer, data) {
			return statusInvalidMemoryAccess
		}
	}
	return h.put32s(pointerAt, pointer, sizeAt, uint32(len(data)))
}

// log keeps a line. One more than is shown is kept, so that a secret that begins in it is seen.
func (h *host) log(level uint32, pointer, size uint32) bool {
	b, ok := h.module.Memory().Read(pointer, size)
	if ok {
		h.line(level, b)
	}
	return ok
}

func (h *host) line(level uint32, text []byte) {
	text = text[:min(len(text), maxLine+h.redactor.overhang)]
	h.open = 0
	h.logs = append(h.logs, Log{Level: levels[level], Text: string(text)})
	if len(h.logs) >= 2*(maxLines+1) {
		h.logs = append([]Log(nil), h.logs[len(h.logs)-maxLines-1:]...)
	}
}

// lines gives the last lines, redacted and fit to be shown.
func (h *host) lines() []Log {
	logs := h.logs[max(0, len(h.logs)-maxLines-1):]
	texts := make([]string, len(logs))
	for i, l := range logs {
		texts[i] = l.Text
	}
	out := []Log{}
	for i, text := range h.redactor.texts(texts) {
		out = append(out, Log{Level: logs[i].Level, Text: clip(strings.TrimRight(text, "\n"), maxLine)})
	}
	return out[max(0, len(out)-maxLines):]
}

func (h *host) configuration() string {
	if h.plugin {
		return string(h.options.Configuration)
	}
	return string(h.options.VMConfiguration)
}

// buffer finds one of Envoy's buffers. Without a request all but the configurations are empty.
func (h *host) buffer(kind uint32) (data string, status uint32) {
	switch kind {
	case 0, 1, 2, 3, 5, 8: // bodies, network data, gRPC message, call data
		return "", statusOK
	case 6:
		return string(h.options.VMConfiguration), statusOK
	case 7:
		if h.plugin {
			return string(h.options.Configuration), statusOK
		}
		return "", statusNotFound
	case 4: // the body of a response to an HTTP call
		return "", statusNotFound
	}
	return "", statusBadArgument
}

// property answers what is known before any request. What only a running proxy knows is there and empty.
func (h *host) property(path string) (value string, status uint32) {
	root, _, _ := strings.Cut(path, "\x00")
	switch root {
	case "plugin_root_id":
		return h.options.RootID, statusOK
	case "request", "response", "connection", "connection_id", "upstream", "source", "destination", "filter_state",
		"upstream_filter_state", "metadata", "route_name", "route_metadata", "upstream_host_metadata":
		return "", statusNotFound
	}
	return "", statusOK
}

// token numbers calls to other services as Envoy does.
func (h *host) token(kind uint32) uint32 {
	h.tokens += 4
	return h.tokens | kind
}

// accept answers a call to another service, whose arguments are pairs of pointer and size up to the token's.
func (h *host) accept(a args, pairs int, tokenAt int, kind uint32) uint32 {
	for i := range pairs {
		if _, ok := h.module.Memory().Read(a.u32(2*i), a.u32(2*i+1)); !ok {
			return statusInvalidMemoryAccess
		}
	}
	return h.put32s(a.u32(tokenAt), h.token(kind))
}

func (h *host) setShared(key, value string, cas uint32) uint32 {
	old, ok := h.shared[key]
	if ok && cas != 0 && cas != old.cas {
		return statusCasMismatch
	}
	size := h.kept - len(old.value) + len(value)
	if !ok {
		size += len(key)
	}
	if size > maxKept || len(h.shared) >= maxKeptEntries && !ok {
		return statusInternalFailure
	}
	h.kept = size
	h.cas++
	h.shared[key] = sharedValue{value, h.cas}
	return statusOK
}

func (h *host) enqueue(token uint32, data string) uint32 {
	queue, ok := h.queues[token]
	switch {
	case !ok:
		return statusNotFound
	case h.kept+len(data) > maxKept || len(queue) >= maxKeptEntries:
		return statusInternalFailure
	}
	h.kept += len(data)
	h.queues[token] = append(queue, data)
	return statusOK
}

// The kinds of metrics are the lowest two bits of their ids.
const (
	counter = iota
	gauge
	histogram
	metricMask = 3
)

func (h *host) defineMetric(kind uint32) (id, status uint32) {
	if kind > histogram {
		return 0, statusBadArgument
	}
	if len(h.metrics) >= maxKeptEntries {
		return 0, statusInternalFailure
	}
	h.metricIDs[kind] += 4
	id = h.metricIDs[kind] | kind
	h.metrics[id] = 0
	return id, statusOK
}

func (h *host) changeMetric(id uint32, set bool, value uint64) uint32 {
	old, ok := h.metrics[id]
	kind := id & metricMask
	switch {
	case kind > histogram || kind == histogram && !set:
		return statusBadArgument
	case !ok:
		return statusNotFound
	case kind == counter && !set && int64(value) <= 0:
		return statusBadArgument
	case kind == gauge && set:
		h.metrics[id] = value
	default:
		h.metrics[id] = old + value
	}
	return statusOK
}

// foreign answers calls to Envoy's own extensions.
func (h *host) foreign(name string) (result string, status uint32) {
	switch name {
	case "declare_property", "set_envoy_filter_state", "clear_route_cache", "expr_delete":
		return "", statusOK
	case "expr_create":
		token := h.token(0)
		return string([]byte{byte(token), byte(token >> 8), byte(token >> 16), byte(token >> 24)}), statusOK
	case "expr_evaluate", "sign", "verify_signature", "compress", "uncompress":
		return "", statusUnimplemented
	}
	return "", statusNotFound
}

// answer is a host function that always says the same.
func answer(status uint32) func(*host, args) uint32 {
	return func(*host, args) uint32 { return status }
}

// onMap is a host function on headers or trailers, of which there are none without a request.
func onMap(*host, args) uint32 { return statusBadArgument }

var envFunctions = map[string]hostFunction{
	"pthread_equal": {signature: "ii:i", call: func(_ *host, a args) uint32 {
		if a.u32(0) == a.u32(1) {
			return 1
		}
		return 0
	}},
	// Envoy does not allow it in malloc, where growth happens; whether a module grows just then is chance.
	"emscripten_notify_memory_growth": {signature: "i:", early: true, inMalloc: true, call: answer(0)},

	"proxy_log": {signature: "iii:i", early: true, inMalloc: true, call: func(h *host, a args) uint32 {
		if a.u32(0) >= uint32(len(levels)) {
			return statusBadArgument
		}
		if !h.log(a.u32(0), a.u32(1), a.u32(2)) {
			return statusInvalidMemoryAccess
		}
		return statusOK
	}},
	"proxy_get_log_level": {signature: "i:i", abi: "0.2.1", call: func(h *host, a args) uint32 {
		return h.put32s(a.u32(0), 2) // info, Envoy's default
	}},
	"proxy_get_status": {signature: "iii:i", call: func(h *host, a args) uint32 {
		if !h.put32(a.u32(0), 0) {
			return statusInvalidMemoryAccess
		}
		return h.give("", a.u32(1), a.u32(2))
	}},
	"proxy_get_configuration": {signature: "ii:i", abi: "0.1.0", call: func(h *host, a args) uint32 {
		return h.give(h.configuration(), a.u32(0), a.u32(1))
	}},
	"proxy_get_property": {signature: "iiii:i", call: func(h *host, a args) uint32 {
		path, ok := h.read(a.u32(0), a.u32(1))
		if !ok {
			return statusInvalidMemoryAccess
		}
		value, status := h.property(path)
		if status != statusOK {
			return status
		}
		return h.give(value, a.u32(2), a.u32(3))
	}},
	"proxy_set_property": {signature: "iiii:i", call: answer(statusNotFound)}, // properties belong to a request

	"proxy_continue_request":    {signature: ":i", abi: "0.1.0", call: answer(statusOK)},
	"proxy_continue_response":   {signature: ":i", abi: "0.1.0", call: answer(statusOK)},
	"proxy_clear_route_cache":   {signature: ":i", abi: "0.1.0", call: answer(statusOK)},
	"proxy_continue_stream":     {signature: "i:i", abi: "0.2.0 0.2.1", call: answer(statusOK)},
	"proxy_close_stream":        {signature: "i:i", abi: "0.2.0 0.2.1", call: answer(statusOK)},
	"proxy_send_local_response": {signature: "iiiiiiii:i", call: answer(statusOK)},

	"proxy_get_header_map_value":     {signature: "iiiii:i", call: onMap},
	"proxy_add_header_map_value":     {signature: "iiiii:i", call: onMap},
	"proxy_replace_header_map_value": {signature: "iiiii:i", call: onMap},
	"proxy_remove_header_map_value":  {signature: "iii:i", call: onMap},
	"proxy_set_header_map_pairs":     {signature: "iii:i", call: onMap},
	"proxy_get_header_map_size":      {signature: "ii:i", call: onMap},
	"proxy_get_header_map_pairs": {signature: "iii:i", call: func(h *host, a args) uint32 {
		return h.give("", a.u32(1), a.u32(2))
	}},

	"proxy_get_buffer_bytes": {signature: "iiiii:i", call: func(h *host, a args) uint32 {
		data, status := h.buffer(a.u32(0))
		if status != statusOK {
			return status
		}
		size := uint64(len(data))
		start := min(uint64(a.u32(1)), size)
		end := min(start+uint64(a.u32(2)), size)
		return h.give(data[start:end], a.u32(3), a.u32(4))
	}},
	"proxy_get_buffer_status": {signature: "iii:i", call: func(h *host, a args) uint32 {
		data, status := h.buffer(a.u32(0))
		if status != statusOK {
			return status
		}
		return h.put32s(a.u32(1), uint32(len(data)), a.u32(2), 0)
	}},
	"proxy_set_buffer_bytes": {signature: "iiiii:i", call: answer(statusBadArgument)},

	"proxy_get_shared_data": {signature: "iiiii:i", call: func(h *host, a args) uint32 {
		key, ok := h.read(a.u32(0), a.u32(1))
		if !ok {
			return statusInvalidMemoryAccess
		}
		v, ok := h.shared[key]
		if !ok {
			return statusNotFound
		}
		if status := h.give(v.value, a.u32(2), a.u32(3)); status != statusOK {
			return status
		}
		return h.put32s(a.u32(4), v.cas)
	}},
	"proxy_set_shared_data": {signature: "iiiii:i", call: func(h *host, a args) uint32 {
		key, ok1 := h.read(a.u32(0), a.u32(1))
		value, ok2 := h.read(a.u32(2), a.u32(3))
		if !ok1 || !ok2 {
			return statusInvalidMemoryAccess
		}
		return h.setShared(key, value, a.u32(4))
	}},
	"proxy_register_shared_queue": {signature: "iii:i", call: func(h *host, a args) uint32 {
		name, ok := h.read(a.u32(0), a.u32(1))
		if !ok {
			return statusInvalidMemoryAccess
		}
		id, ok := h.queueIDs[name]
		if !ok {
			if len(h.queueIDs) >= maxKeptEntries || h.kept+len(name) > maxKept {
				return statusInternalFailure
			}
			h.kept += len(name)
			id = uint32(len(h.queueIDs) + 1)
			h.queueIDs[name], h.queues[id] = id, []string{}
		}
		return h.put32s(a.u32(2), id)
	}},
	"proxy_resolve_shared_queue": {signature: "iiiii:i", call: func(h *host, a args) uint32 {
		name, ok := h.read(a.u32(2), a.u32(3))
		if !ok {
			return statusInvalidMemoryAccess
		}
		id, ok := h.queueIDs[name]
		if !ok {
			return statusNotFound
		}
		return h.put32s(a.u32(4), id)
	}},
	"proxy_enqueue_shared_queue": {signature: "iii:i", call: func(h *host, a args) uint32 {
		data, ok := h.read(a.u32(1), a.u32(2))
		if !ok {
			return statusInvalidMemoryAccess
		}
		return h.enqueue(a.u32(0), data)
	}},
	"proxy_dequeue_shared_queue": {signature: "iii:i", call: func(h *host, a args) uint32 {
		queue, ok := h.queues[a.u32(0)]
		switch {
		case !ok:
			return statusNotFound
		case len(queue) == 0:
			return statusEmpty
		}
		h.kept -= len(queue[0])
		h.queues[a.u32(0)] = queue[1:]
		return h.give(queue[0], a.u32(1), a.u32(2))
	}},

	"proxy_http_call": {signature: "iiiiiiiiii:i", call: func(h *host, a args) uint32 {
		return h.accept(a, 4, 9, 0)
	}},
	"proxy_grpc_call": {signature: "iiiiiiiiiiii:i", call: func(h *host, a args) uint32 {
		return h.accept(a, 5, 11, 1)
	}},
	"proxy_grpc_stream": {signature: "iiiiiiiii:i", call: func(h *host, a args) uint32 {
		return h.accept(a, 4, 8, 2)
	}},
	"proxy_grpc_cancel": {signature: "i:i", call: answer(statusOK)},
	"proxy_grpc_close":  {signature: "i:i", call: answer(statusOK)},
	"proxy_grpc_send":   {signature: "iiii:i", call: answer(statusOK)},

	"proxy_define_metric": {signature: "iiii:i", call: func(h *host, a args) uint32 {
		if _, ok := h.module.Memory().Read(a.u32(1), a.u32(2)); !ok {
			return statusInvalidMemoryAccess
		}
		id, status := h.defineMetric(a.u32(0))
		if status != statusOK {
			return status
		}
		return h.put32s(a.u32(3), id)
	}},
	"proxy_increment_metric": {signature: "iI:i", call: func(h *host, a args) uint32 {
		return h.changeMetric(a.u32(0), false, a[1])
	}},
	"proxy_record_metric": {signature: "iI:i", call: func(h *host, a args) uint32 {
		return h.changeMetric(a.u32(0), true, a[1])
	}},
	"proxy_get_metric": {signature: "ii:i", call: func(h *host, a args) uint32 {
		value, ok := h.metrics[a.u32(0)]
		switch {
		case a.u32(0)&metricMask >= histogram:
			return statusBadArgument
		case !ok:
			return statusNotFound
		case !h.module.Memory().WriteUint64Le(a.u32(1), value):
			return statusInvalidMemoryAccess
		}
		return statusOK
	}},

	"proxy_set_tick_period_milliseconds": {signature: "i:i", call: answer(statusOK)},
	"proxy_get_current_time_nanoseconds": {signature: "i:i", call: func(h *host, a args) uint32 {
		if !h.module.Memory().WriteUint64Le(a.u32(0), uint64(time.Now().UnixNano())) {
			return statusInvalidMemoryAccess
		}
		return statusOK
	}},
	"proxy_set_effective_context": {signature: "i:i", call: func(h *host, a args) uint32 {
		if int(a.u32(0)) > h.roots {
			return statusBadArgument
		}
		return statusOK
	}},
	"proxy_done": {signature: ":i", call: answer(statusNotFound)}, // nothing is ending
	"proxy_call_foreign_function": {signature: "iiiiii:i", call: func(h *host, a args) uint32 {
		name, ok := h.read(a.u32(0), a.u32(1))
		if _, ok2 := h.module.Memory().Read(a.u32(2), a.u32(3)); !ok || !ok2 {
			return statusInvalidMemoryAccess
		}
		result, status := h.foreign(name)
		var pointer uint32
		if a.u32(4) != 0 && result != "" {
			if pointer, ok = h.allocate(uint32(len(result))); !ok || !h.module.Memory().WriteString(pointer, result) {
				return statusInvalidMemoryAccess
			}
		}
		if a.u32(4) != 0 && !h.put32(a.u32(4), pointer) || a.u32(5) != 0 && !h.put32(a.u32(5), uint32(len(result))) {
			return statusInvalidMemoryAccess
		}
		return status
	}},
}
