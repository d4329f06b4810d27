package wasm

import (
	"encoding/binary"
	"strings"
)

// function is a function of a hand-made module; its exports are the words of export.
type function struct {
	export    string
	signature string // as external.signature
	locals    int    // 32-bit local variables
	code      []byte // without the end
}

// source is a module written by hand.
type source struct {
	imports   []external
	functions []function
	memory    uint32 // pages; none is exported if hidden
	hidden    bool
	data      string // at address 1024
	custom    map[string]string
}

// fit has what every acceptable module needs besides what it does.
func fit(functions ...function) source {
	return source{memory: 2, functions: append([]function{
		{export: "proxy_abi_version_0_2_1", signature: ":"},
		{export: "malloc", signature: "i:i", code: i32(8192)},
	}, functions...)}
}

func uvarint(n int) []byte { return binary.AppendUvarint(nil, uint64(n)) }

func i32(n int32) []byte {
	b := []byte{0x41}
	for {
		low := byte(n & 0x7f)
		n >>= 7
		if n == 0 && low&0x40 == 0 || n == -1 && low&0x40 != 0 {
			return append(b, low)
		}
		b = append(b, low|0x80)
	}
}

func call(index int) []byte { return append([]byte{0x10}, uvarint(index)...) }

func join(parts ...[]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

var drop = []byte{0x1a}

func text(s string) []byte { return append(uvarint(len(s)), s...) }

func section(id byte, entries int, body []byte) []byte {
	body = append(uvarint(entries), body...)
	return join([]byte{id}, uvarint(len(body)), body)
}

func (s source) bytes() []byte {
	var types, imports, functions, exports, code []byte
	count, exported := 0, 0
	typ := func(signature string) []byte {
		values := map[rune]byte{'i': 0x7f, 'I': 0x7e, 'f': 0x7d, 'F': 0x7c}
		params, results, _ := strings.Cut(signature, ":")
		types = append(types, 0x60)
		for _, letters := range []string{params, results} {
			types = append(types, uvarint(len(letters))...)
			for _, c := range letters {
				types = append(types, values[c])
			}
		}
		count++
		return uvarint(count - 1)
	}
	for _, e := range s.imports {
		imports = join(imports, text(e.module), text(e.name), []byte{e.kind})
		if e.kind == kindFunction {
			imports = append(imports, typ(e.signature)...)
		} else { // a global
			imports = append(imports, 0x7f, 0)
		}
	}
	index := count
	for _, f := range s.functions {
		functions = append(functions, typ(f.signature)...)
		body := []byte{0}
		if f.locals > 0 {
			body = join([]byte{1}, uvarint(f.locals), []byte{0x7f})
		}
		body = join(body, f.code, []byte{0x0b})
		code = join(code, uvarint(len(body)), body)
		for name := range strings.FieldsSeq(f.export) {
			exports = join(exports, text(name), []byte{kindFunction}, uvarint(index))
			exported++
		}
		index++
	}
	m := join([]byte("\x00asm\x01\x00\x00\x00"), section(1, count, types))
	if len(s.imports) > 0 {
		m = append(m, section(2, len(s.imports), imports)...)
	}
	m = append(m, section(3, len(s.functions), functions)...)
	if s.memory > 0 {
		m = append(m, section(5, 1, append([]byte{0}, uvarint(int(s.memory))...))...)
		if !s.hidden {
			exports = join(exports, text("memory"), []byte{kindMemory, 0})
			exported++
		}
	}
	m = append(m, section(7, exported, exports)...)
	m = append(m, section(10, len(s.functions), code)...)
	if s.data != "" {
		m = append(m, section(11, 1, join([]byte{0}, i32(1024), []byte{0x0b}, text(s.data)))...)
	}
	for name, body := range s.custom {
		body = string(text(name)) + body
		m = join(m, []byte{0}, text(body))
	}
	return m
}
