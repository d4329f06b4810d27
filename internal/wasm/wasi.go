package wasm

import (
	"bytes"
	"crypto/rand"
	"maps"
	"slices"
	"time"
)

// Answers of WASI functions.
const (
	errnoOK             = 0
	errnoBadDescriptor  = 8
	errnoFault          = 21
	errnoInvalid        = 28
	errnoNoEntry        = 44
	errnoNotImplemented = 52
	errnoNotDirectory   = 20
	errnoNotSupported   = 58
)

// onOutput is a WASI function that does nothing, successfully, to stdout and stderr.
func onOutput(_ *host, a args) uint32 {
	if fd := a.u32(0); fd != 1 && fd != 2 {
		return errnoBadDescriptor
	}
	return errnoOK
}

// fault gives the answer for having written to the module's memory.
func fault(ok bool) uint32 {
	if !ok {
		return errnoFault
	}
	return errnoOK
}

// write logs what goes to stdout or stderr. Writes that do not end a line, as those of Go's runtime when it
// panics, are joined; Envoy logs each of them.
func (h *host) write(fd, vectors, count, writtenAt uint32) uint32 {
	level, ok := map[uint32]uint32{1: 2, 2: 4}[fd]
	if !ok {
		return errnoBadDescriptor
	}
	var text []byte
	var last byte
	var written uint32
	keep := maxLine + h.redactor.overhang
	for i := range uint64(count) {
		at := uint64(vectors) + 8*i
		if at > 0xffffffff {
			return errnoFault
		}
		head, ok := h.module.Memory().ReadUint64Le(uint32(at))
		if !ok {
			return errnoFault
		}
		b, ok := h.module.Memory().Read(uint32(head), uint32(head>>32))
		if !ok {
			return errnoFault
		}
		if len(b) > 0 {
			last = b[len(b)-1]
		}
		written += uint32(len(b))
		text = append(text, b[:min(len(b), keep-len(text))]...)
	}
	text = bytes.TrimSuffix(text, []byte("\n"))
	switch n := len(h.logs); {
	case h.open == fd:
		line := h.logs[n-1].Text
		h.logs[n-1].Text = line + string(text[:min(len(text), keep-len(line))])
	case len(text) > 0:
		h.line(level, text)
	}
	h.open = 0
	if last != '\n' && len(h.logs) > 0 && written > 0 {
		h.open = fd
	}
	return fault(h.put32(writtenAt, written))
}

// environment lists the variables as WASI gives them.
func (h *host) environment() (entries []string, size int) {
	for _, name := range slices.Sorted(maps.Keys(h.options.Environment)) {
		entry := name + "=" + h.options.Environment[name] + "\x00"
		entries = append(entries, entry)
		size += len(entry)
	}
	return entries, size
}

func clockKnown(id uint32) bool { return id <= 1 } // real time and monotonic

var wasiFunctions = map[string]hostFunction{
	"fd_write": {signature: "iiii:i", early: true, inMalloc: true, call: func(h *host, a args) uint32 {
		return h.write(a.u32(0), a.u32(1), a.u32(2), a.u32(3))
	}},
	"fd_pwrite": {signature: "iiiIi:i", early: true, call: func(h *host, a args) uint32 {
		return h.write(a.u32(0), a.u32(1), a.u32(2), a.u32(4))
	}},
	"fd_read":             {signature: "iiii:i", call: answer(errnoNotImplemented)},
	"fd_pread":            {signature: "iiiIi:i", early: true, call: answer(errnoNotImplemented)},
	"fd_seek":             {signature: "iIii:i", call: answer(errnoOK)},
	"fd_close":            {signature: "i:i", call: answer(errnoOK)},
	"fd_advise":           {signature: "iIIi:i", early: true, call: answer(errnoOK)},
	"fd_allocate":         {signature: "iII:i", early: true, call: onOutput},
	"fd_datasync":         {signature: "i:i", early: true, call: onOutput},
	"fd_sync":             {signature: "i:i", early: true, call: onOutput},
	"fd_fdstat_set_flags": {signature: "ii:i", early: true, call: answer(errnoNotImplemented)},
	"fd_fdstat_get": {signature: "ii:i", early: true, call: func(h *host, a args) uint32 {
		if onOutput(h, a) != errnoOK {
			return errnoBadDescriptor
		}
		var stat [24]byte
		stat[8] = 64 // the right to write
		h.module.Memory().Write(a.u32(1), stat[:])
		return errnoOK
	}},
	"fd_fdstat_set_rights":  {signature: "iII:i", early: true, call: onOutput},
	"fd_filestat_get":       {signature: "ii:i", early: true, call: answer(errnoBadDescriptor)},
	"fd_filestat_set_size":  {signature: "iI:i", early: true, call: onOutput},
	"fd_filestat_set_times": {signature: "iIIi:i", early: true, call: onOutput},
	"fd_prestat_get":        {signature: "ii:i", early: true, call: answer(errnoBadDescriptor)},
	"fd_prestat_dir_name":   {signature: "iii:i", early: true, call: answer(errnoNotImplemented)},
	"fd_readdir": {signature: "iiiIi:i", early: true, call: func(h *host, a args) uint32 {
		return max(fault(h.put32(a.u32(4), 0)), errnoNotDirectory)
	}},
	"fd_renumber": {signature: "ii:i", early: true, call: func(h *host, a args) uint32 {
		if onOutput(h, a) != errnoOK || onOutput(h, a[1:]) != errnoOK {
			return errnoBadDescriptor
		}
		return errnoNotSupported
	}},
	"fd_tell": {signature: "ii:i", early: true, call: func(h *host, a args) uint32 {
		if onOutput(h, a) != errnoOK {
			return errnoBadDescriptor
		}
		return fault(h.module.Memory().WriteUint64Le(a.u32(1), 0))
	}},

	"path_open":               {signature: "iiiiiIIii:i", call: answer(errnoNoEntry)},
	"path_create_directory":   {signature: "iii:i", early: true, call: answer(errnoNotSupported)},
	"path_filestat_get":       {signature: "iiiii:i", early: true, call: answer(errnoNotSupported)},
	"path_filestat_set_times": {signature: "iiiiIIi:i", early: true, call: answer(errnoNotSupported)},
	"path_link":               {signature: "iiiiii:i", early: true, call: answer(errnoNotSupported)},
	"path_readlink":           {signature: "iiiiii:i", early: true, call: answer(errnoNotSupported)},
	"path_remove_directory":   {signature: "iii:i", early: true, call: answer(errnoNotSupported)},
	"path_rename":             {signature: "iiiiii:i", early: true, call: answer(errnoNotSupported)},
	"path_symlink":            {signature: "iiii:i", early: true, call: answer(errnoNotSupported)},
	"path_unlink_file":        {signature: "iii:i", early: true, call: answer(errnoNotSupported)},
	"sock_accept":             {signature: "iii:i", early: true, call: answer(errnoNotSupported)},
	"sock_recv":               {signature: "iiiiii:i", early: true, call: answer(errnoNotSupported)},
	"sock_send":               {signature: "iiiii:i", early: true, call: answer(errnoNotSupported)},
	"sock_shutdown":           {signature: "ii:i", early: true, call: answer(errnoNotSupported)},

	"environ_sizes_get": {signature: "ii:i", early: true, call: func(h *host, a args) uint32 {
		entries, size := h.environment()
		return fault(h.put32(a.u32(0), uint32(len(entries))) && h.put32(a.u32(1), uint32(size)))
	}},
	"environ_get": {signature: "ii:i", early: true, call: func(h *host, a args) uint32 {
		at, buffer := a.u32(0), a.u32(1)
		entries, _ := h.environment()
		for _, entry := range entries {
			if !h.put32(at, buffer) || !h.module.Memory().WriteString(buffer, entry) {
				return errnoFault
			}
			at += 4
			buffer += uint32(len(entry))
		}
		return errnoOK
	}},
	"args_get": {signature: "ii:i", early: true, call: answer(errnoOK)},
	"args_sizes_get": {signature: "ii:i", early: true, call: func(h *host, a args) uint32 {
		return fault(h.put32(a.u32(0), 0) && h.put32(a.u32(1), 0))
	}},

	"clock_time_get": {signature: "iIi:i", early: true, inMalloc: true, call: func(h *host, a args) uint32 {
		if !clockKnown(a.u32(0)) {
			return errnoNotSupported
		}
		now := time.Now().UnixNano()
		if a.u32(0) == 1 {
			now = int64(time.Since(h.start))
		}
		return fault(h.module.Memory().WriteUint64Le(a.u32(2), uint64(now)))
	}},
	"clock_res_get": {signature: "ii:i", early: true, call: func(h *host, a args) uint32 {
		if !clockKnown(a.u32(0)) {
			return errnoNotSupported
		}
		return fault(h.module.Memory().WriteUint64Le(a.u32(1), 1))
	}},
	"random_get": {signature: "ii:i", early: true, call: func(h *host, a args) uint32 {
		if a.u32(1) > 64<<10 {
			return errnoInvalid
		}
		b := make([]byte, a.u32(1))
		_, _ = rand.Read(b) // never fails
		return fault(h.module.Memory().Write(a.u32(0), b))
	}},
	"sched_yield": {signature: ":i", call: answer(errnoOK)},
	"poll_oneoff": {signature: "iiii:i", early: true, inMalloc: true, call: func(h *host, a args) uint32 {
		return fault(h.put32(a.u32(3), 0)) // the Go runtime insists on success
	}},
	// Envoy goes on after it, too; what follows in a module is an unreachable instruction.
	"proc_exit": {signature: "i:", call: answer(0)},
}
