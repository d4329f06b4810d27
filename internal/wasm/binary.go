package wasm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf8"
)

// Limits of what is read. The first group is V8's own, so that nothing above it runs in Envoy either. The
// second is there because the engine of the dry run makes room for what a module announces before it has
// seen it; no real module of at most maxModule bytes comes near.
const (
	maxModule       = 20 << 20  // bytes
	maxFunctionBody = 7_654_321 // bytes
	maxParameters   = 1_000

	maxEntries      = 250_000 // of any one vector, and of all element segments together
	maxLocals       = 10_000  // of one function; V8 accepts 50,000
	maxLocalsTotal  = 2_000_000
	maxResults      = 100       // V8 accepts 1,000
	maxTypesTotal   = 1_000_000 // bytes of the type section
	maxTables       = 100
	maxTableEntries = 1_000_000 // of all tables together, growth included
)

// What kind of thing an import or export is, in the binary format's numbers.
const (
	kindFunction = iota
	kindTable
	kindMemory
	kindGlobal
	kindTag
)

// external is one import or export.
type external struct {
	module, name string // module is empty for an export
	kind         byte
	signature    string // of a function: "ii:i"; letters i and I for 32 and 64 bits, f and F for floats
}

func (e external) String() string { return e.module + "." + e.name }

// layout is what the sections of a module say, without its code.
type layout struct {
	imports, exports []external
	sections         []string // in the module's order; custom sections by their own name
	producers        []byte
	memoryMin        uint32 // pages
	memoryMax        uint32 // pages, 0 for none

	importedFunctions int
	frames            []int // of every function that is not imported: the most it can have on the stack, in slots of 8 bytes

	// code is the module as the dry run takes it: without custom sections except function names, and with
	// every table's growth bounded.
	code []byte
}

func (l *layout) export(name string) (external, bool) {
	for _, e := range l.exports {
		if e.name == name && e.kind == kindFunction {
			return e, true
		}
	}
	return external{}, false
}

// reader walks over bytes. After the first mistake it returns zeros, and err says what it was.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format, args...)
	}
	r.b = nil
}

func (r *reader) take(n int) []byte {
	if n < 0 || n > len(r.b) {
		r.fail("it ends too early")
		return nil
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) byte() byte {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) u32() uint32 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 || n > 5 || v > 0xffffffff {
		r.fail("a number is cut short or too large")
		return 0
	}
	r.b = r.b[n:]
	return uint32(v)
}

// skipSigned passes over a signed number of at most the given count of bytes.
func (r *reader) skipSigned(bytes int) {
	for range bytes {
		if r.byte()&0x80 == 0 {
			return
		}
	}
	r.fail("a number is too long")
}

// count reads the length of a vector whose entries take at least one byte each.
func (r *reader) count(limit int) int {
	n := r.u32()
	if uint64(n) > uint64(len(r.b)) {
		r.fail("it announces %d entries, more than it has bytes", n)
		return 0
	}
	if int(n) > limit {
		r.fail("%d entries are more than the %d that are accepted", n, limit)
		return 0
	}
	return int(n)
}

func (r *reader) name() string {
	b := r.take(int(r.u32()))
	if !utf8.Valid(b) {
		r.fail("a name is not UTF-8")
	}
	return string(b)
}

func (r *reader) valueType() byte {
	switch t := r.byte(); t {
	case 0x7f:
		return 'i'
	case 0x7e:
		return 'I'
	case 0x7d:
		return 'f'
	case 0x7c:
		return 'F'
	case 0x63, 0x64: // a reference to a type of the module
		r.skipSigned(5)
	case 0x7b, 0x70, 0x6f, 0x69: // v128, funcref, externref, exnref
	default:
		if r.err == nil {
			r.fail("value type %#x is not known", t)
		}
	}
	return '?'
}

func (r *reader) limits() (flags byte, minimum, maximum uint32) {
	flags = r.byte()
	if flags > 3 {
		r.fail("64-bit memories and tables cannot run in Envoy's 32-bit host")
		return
	}
	minimum = r.u32()
	if flags&1 != 0 {
		maximum = r.u32()
	}
	return
}

func (r *reader) memory() (minimum, maximum uint32) {
	flags, minimum, maximum := r.limits()
	if flags > 1 {
		// Its wait instruction could block the dry run for good.
		r.fail("a memory is shared between threads, which a filter does not have")
	}
	return minimum, maximum
}

// constant passes over a constant expression.
func (r *reader) constant() {
	for r.err == nil {
		switch op := r.byte(); op {
		case 0x0b:
			return
		case 0x23, 0xd2: // global.get, ref.func
			r.u32()
		case 0x41: // i32.const
			r.skipSigned(5)
		case 0x42: // i64.const
			r.skipSigned(10)
		case 0x43:
			r.take(4)
		case 0x44:
			r.take(8)
		case 0xd0: // ref.null
			r.skipSigned(5)
		case 0x6a, 0x6b, 0x6c, 0x7c, 0x7d, 0x7e: // sums and products
		case 0xfd:
			if r.u32() != 12 { // v128.const
				r.fail("a constant expression has an instruction that is not constant")
			}
			r.take(16)
		default:
			if r.err == nil {
				r.fail("a constant expression has instruction %#x, which is not constant", op)
			}
		}
	}
}

var sectionNames = []string{"custom", "type", "import", "function", "table", "memory", "global", "export",
	"start", "element", "code", "data", "data count", "tag"}

var errNotWasm = errors.New("it does not begin with the four bytes that every WebAssembly file begins with")

// scan reads a module's sections. It checks their shape and every announced size, and leaves to the engine
// whether the code is valid.
func scan(module []byte) (*layout, error) {
	if len(module) > maxModule {
		return nil, fmt.Errorf("it has %d bytes, more than the %d MiB that are accepted", len(module), maxModule>>20)
	}
	if !bytes.HasPrefix(module, []byte("\x00asm")) {
		return nil, errNotWasm
	}
	if len(module) < 8 {
		return nil, errors.New("it is cut off within its first eight bytes")
	}
	switch version := binary.LittleEndian.Uint32(module[4:]); {
	case version == 0x1000d:
		return nil, errors.New("it is a WebAssembly component; Envoy runs core modules only (for Rust build for wasm32-unknown-unknown or wasm32-wasip1)")
	case version != 1:
		return nil, fmt.Errorf("it is of WebAssembly version %#x; Envoy runs version 1", version)
	}
	s := scanner{layout: &layout{code: append([]byte(nil), module[:8]...)}}
	r := &reader{b: module[8:]}
	for len(r.b) > 0 && r.err == nil {
		whole := r.b
		id := r.byte()
		body := r.take(int(r.u32()))
		if r.err != nil {
			return nil, fmt.Errorf("it is cut off: %w", r.err)
		}
		if int(id) >= len(sectionNames) {
			return nil, fmt.Errorf("it is malformed: there is no section of number %d", id)
		}
		if len(s.sections) == maxEntries {
			return nil, fmt.Errorf("it has more than %d sections", maxEntries)
		}
		section := &reader{b: body}
		if err := s.section(id, section, whole[:len(whole)-len(r.b)]); err != nil {
			return nil, fmt.Errorf("it is malformed: section %s: %w", sectionNames[id], err)
		}
	}
	s.resolve()
	return s.layout, nil
}

type scanner struct {
	*layout
	types     []string
	functions []uint32 // type of every function, imports first
	exported  []uint32 // index of every export
	locals    int
	results   int // the most that any type has
	elements  int
	tableSum  uint32
}

// section reads one section; raw is all of it, head included.
func (s *scanner) section(id byte, r *reader, raw []byte) error {
	switch id {
	case 0:
		return s.custom(r)
	case 1:
		if len(r.b) > maxTypesTotal {
			return fmt.Errorf("%d bytes are more than the %d that are accepted", len(r.b), maxTypesTotal)
		}
		for range r.count(maxEntries) {
			if form := r.byte(); form != 0x60 && r.err == nil {
				r.fail("type form %#x belongs to the garbage collection proposal, which the dry run cannot run", form)
			}
			var sig []byte
			for range r.count(maxParameters) {
				sig = append(sig, r.valueType())
			}
			sig = append(sig, ':')
			results := r.count(maxResults)
			s.results = max(s.results, results)
			for range results {
				sig = append(sig, r.valueType())
			}
			s.types = append(s.types, string(sig))
			if r.err != nil {
				break
			}
		}
	case 2:
		s.importSection(r)
	case 3:
		for range r.count(maxEntries) {
			s.functions = append(s.functions, r.u32())
		}
	case 4:
		s.code = append(s.code, 4)
		table := s.tableSection(r)
		s.code = binary.AppendUvarint(s.code, uint64(len(table)))
		raw = table
	case 5:
		for range r.count(maxEntries) {
			s.memoryMin, s.memoryMax = r.memory()
		}
	case 6:
		for range r.count(maxEntries) {
			r.valueType()
			r.byte()
			r.constant()
		}
	case 7:
		for range r.count(maxEntries) {
			s.exports = append(s.exports, external{name: r.name(), kind: r.byte()})
			s.exported = append(s.exported, r.u32())
		}
	case 8:
		r.u32()
	case 9:
		s.elementSection(r)
	case 10:
		s.codeSection(r)
	case 11:
		for range r.count(maxEntries) {
			switch flag := r.u32(); flag {
			case 2:
				r.u32()
				r.constant()
			case 0:
				r.constant()
			case 1:
			default:
				r.fail("data segment flag %d is not known", flag)
			}
			r.take(int(r.u32()))
		}
	case 12:
		r.u32()
	case 13:
		for range r.count(maxEntries) {
			r.byte()
			r.u32()
		}
	}
	if r.err == nil && len(r.b) > 0 {
		r.fail("%d bytes are left over at its end", len(r.b))
	}
	s.sections = append(s.sections, sectionNames[id])
	s.code = append(s.code, raw...)
	return r.err
}

// custom keeps what a custom section is good for: the language, and function names for traps.
func (s *scanner) custom(r *reader) error {
	name := r.name()
	if r.err != nil {
		return r.err
	}
	s.sections = append(s.sections, name)
	switch name {
	case "producers":
		s.producers = r.b
	case "name":
		functions, err := functionNames(r)
		if err != nil {
			return fmt.Errorf("names: %w", err) // Envoy, too, refuses a module for this.
		}
		if functions != nil {
			body := append([]byte("\x04name\x01"), binary.AppendUvarint(nil, uint64(len(functions)))...)
			body = append(body, functions...)
			s.code = append(s.code, 0)
			s.code = binary.AppendUvarint(s.code, uint64(len(body)))
			s.code = append(s.code, body...)
		}
	}
	return nil
}

// functionNames finds the part of a name section that holds the functions' names. It gives nil where there
// is none and where it is too large or not UTF-8.
func functionNames(r *reader) ([]byte, error) {
	var found []byte
	for len(r.b) > 0 && r.err == nil {
		id := r.byte()
		body := r.take(int(r.u32()))
		if id != 1 || found != nil {
			continue
		}
		names := &reader{b: body}
		usable := true
		n := names.u32()
		if uint64(n) > uint64(len(names.b)) {
			return nil, errors.New("more are announced than there are bytes")
		}
		for range n {
			names.u32()
			usable = utf8.Valid(names.take(int(names.u32()))) && usable
			if names.err != nil {
				return nil, names.err
			}
		}
		if len(names.b) > 0 {
			return nil, errors.New("bytes are left over")
		}
		if usable && n <= maxEntries {
			found = body
		}
	}
	return found, r.err
}

func (s *scanner) importSection(r *reader) {
	for range r.count(maxEntries) {
		e := external{module: r.name(), name: r.name(), kind: r.byte()}
		switch e.kind {
		case kindFunction:
			typ := r.u32()
			s.functions = append(s.functions, typ)
			s.importedFunctions++
			e.signature = s.typeOf(typ)
		case kindTable:
			r.valueType()
			r.limits()
		case kindMemory:
			r.memory()
		case kindGlobal:
			r.valueType()
			r.byte()
		case kindTag:
			r.byte()
			r.u32()
		default:
			r.fail("import kind %d is not known", e.kind)
		}
		if r.err != nil {
			return
		}
		s.imports = append(s.imports, e)
	}
}

// tableSection returns the section with a maximum for every table, so that a module cannot grow one out of
// all bounds.
func (s *scanner) tableSection(r *reader) []byte {
	n := r.count(maxTables)
	out := binary.AppendUvarint(nil, uint64(n))
	for range n {
		head := r.b
		if len(r.b) > 0 && r.b[0] == 0x40 { // a table with an initial value
			r.take(2)
			r.valueType()
			out = append(out, head[:len(head)-len(r.b)]...)
			minimum, maximum := s.tableLimits(r)
			out = appendLimits(out, minimum, maximum)
			head = r.b
			r.constant()
			out = append(out, head[:len(head)-len(r.b)]...)
		} else {
			r.valueType()
			out = append(out, head[:len(head)-len(r.b)]...)
			minimum, maximum := s.tableLimits(r)
			out = appendLimits(out, minimum, maximum)
		}
		if r.err != nil {
			return nil
		}
	}
	return out
}

func (s *scanner) tableLimits(r *reader) (minimum, maximum uint32) {
	flags, minimum, maximum := r.limits()
	if flags > 1 {
		r.fail("a table cannot be shared")
	}
	if flags == 1 && maximum < minimum {
		r.fail("a table's maximum is below its minimum")
	}
	if minimum > maxTableEntries-s.tableSum {
		r.fail("the tables have more than %d entries", maxTableEntries)
		return 0, 0
	}
	s.tableSum += minimum
	if bound := max(minimum, maxTableEntries/maxTables); flags == 0 || maximum > bound {
		maximum = bound
	}
	return minimum, maximum
}

func appendLimits(b []byte, minimum, maximum uint32) []byte {
	return binary.AppendUvarint(binary.AppendUvarint(append(b, 1), uint64(minimum)), uint64(maximum))
}

func (s *scanner) elementSection(r *reader) {
	for range r.count(maxEntries) {
		flag := r.u32()
		if flag > 7 {
			r.fail("element segment flag %d is not known", flag)
		}
		if flag&1 == 0 { // active
			if flag&2 != 0 {
				r.u32()
			}
			r.constant()
		}
		expressions := flag&4 != 0
		if flag&3 != 0 {
			if expressions {
				r.valueType()
			} else {
				r.byte()
			}
		}
		n := r.count(maxEntries - s.elements)
		s.elements += n
		for range n {
			if expressions {
				r.constant()
			} else {
				r.u32()
			}
		}
		if r.err != nil {
			return
		}
	}
}

func (s *scanner) codeSection(r *reader) {
	for range r.count(maxEntries) {
		body := &reader{b: r.take(int(r.u32()))}
		if r.err != nil {
			return
		}
		size := len(body.b)
		if size > maxFunctionBody {
			r.fail("a function of %d bytes is larger than V8 accepts", size)
			return
		}
		var sum uint64
		for range body.count(maxLocals) {
			sum += uint64(body.u32())
			body.valueType()
		}
		if sum > maxLocals {
			r.fail("a function has %d local variables, more than the %d that are accepted", sum, maxLocals)
			return
		}
		if s.locals += int(sum); s.locals > maxLocalsTotal {
			r.fail("the functions have more than %d local variables", maxLocalsTotal)
			return
		}
		if body.err != nil {
			r.fail("a function's local variables: %w", body.err)
			return
		}
		// An instruction of two bytes or more puts one call's results on the stack, each in at most two slots.
		s.frames = append(s.frames, 2*int(sum)+size*max(1, s.results))
	}
}

func (s *scanner) typeOf(index uint32) string {
	if int(index) < len(s.types) {
		return s.types[index]
	}
	return "?"
}

// resolve gives the exported functions their signatures.
func (s *scanner) resolve() {
	for i, index := range s.exported {
		if s.exports[i].kind == kindFunction {
			s.exports[i].signature = "?"
			if int(index) < len(s.functions) {
				s.exports[i].signature = s.typeOf(s.functions[index])
			}
		}
	}
}
