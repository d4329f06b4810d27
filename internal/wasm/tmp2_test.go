package wasm

import (
	"context"
	"encoding/binary"
	"fmt"
	"testing"
	"time"
	"runtime"

	"github.com/tetratelabs/wazero"
)

func sec(id byte, body []byte) []byte {
	return append(append([]byte{id}, binary.AppendUvarint(nil, uint64(len(body)))...), body...)
}

func big(kind string, n int) []byte {
	var code []byte
	locals := []byte{0}
	switch kind {
	case "straight": // locals add
		locals = []byte{1, 50, 0x7f}
		for i := 0; len(code) < n; i++ {
			code = append(code, 0x20, byte(i%50), 0x20, byte((i*7)%50), 0x6a, 0x21, byte((i*3)%50))
		}
	case "blocks":
		locals = []byte{1, 50, 0x7f}
		for i := 0; len(code) < n; i++ {
			code = append(code, 0x02, 0x40, 0x20, byte(i%50), 0x0d, 0, 0x20, 1, 0x41, 3, 0x6a, 0x21, byte(i%50), 0x0b)
		}
	case "loops":
		locals = []byte{1, 50, 0x7f}
		for i := 0; len(code) < n; i++ {
			code = append(code, 0x03, 0x40, 0x20, byte(i%50), 0x0d, 0, 0x20, 1, 0x41, 3, 0x6a, 0x21, byte(i%50), 0x0b)
		}
	case "nested":
		k := n/3
		for range k { code = append(code, 0x02, 0x40) }
		for range k { code = append(code, 0x0b) }
	case "nestedloops":
		locals = []byte{1, 50, 0x7f}
		k := n/7
		for i := range k { code = append(code, 0x03, 0x40, 0x20, byte(i%50), 0x0d, 0) }
		for range k { code = append(code, 0x0b) }
	case "manylocals":
		locals = append([]byte{1}, append(binary.AppendUvarint(nil, 49000), 0x7f)...)
		for i := 0; len(code) < n; i++ {
			l := binary.AppendUvarint(nil, uint64(20000+(i*7919)%29000))
			m := binary.AppendUvarint(nil, uint64(20000+(i*104729)%29000))
			code = append(code, 0x03, 0x40, 0x20)
			code = append(code, l...)
			code = append(code, 0x21)
			code = append(code, m...)
			code = append(code, 0x20)
			code = append(code, l...)
			code = append(code, 0x0d, 0, 0x0b)
		}
	case "nestmanylocals":
		locals = append([]byte{1}, append(binary.AppendUvarint(nil, 49000), 0x7f)...)
		for i := 0; len(code) < n; i++ {
			l := binary.AppendUvarint(nil, uint64((i*7919)%49000))
			m := binary.AppendUvarint(nil, uint64((i*104729)%49000))
			code = append(code, 0x03, 0x40, 0x20)
			code = append(code, l...)
			code = append(code, 0x21)
			code = append(code, m...)
			code = append(code, 0x20)
			code = append(code, l...)
			code = append(code, 0x0d, 0)
		}
		for range len(code)/12 { code = append(code, 0x0b) }
	}
	body := append(append([]byte(nil), locals...), code...)
	body = append(body, 0x0b)
	m := []byte("\x00asm\x01\x00\x00\x00")
	m = append(m, sec(1, []byte{1, 0x60, 0, 0})...)
	m = append(m, sec(3, []byte{1, 0})...)
	b := append([]byte{1}, binary.AppendUvarint(nil, uint64(len(body)))...)
	m = append(m, sec(10, append(b, body...))...)
	return m
}

func TestBig(t *testing.T) {
	for _, kind := range []string{"straight", "blocks", "loops", "nested", "nestedloops", "manylocals"} {
		for _, n := range []int{50_000, 200_000, 400_000} {
			for _, e := range []string{"int", "comp"} {
				if e == "comp" && n > 250000 && kind == "manylocals" { continue }
				cfg := wazero.NewRuntimeConfigInterpreter()
				if e == "comp" { cfg = wazero.NewRuntimeConfigCompiler() }
				l, err := scan(big(kind, n))
				if err != nil { fmt.Println(kind, n, err); continue }
				var m0, m1 runtime.MemStats
				runtime.ReadMemStats(&m0)
				s := time.Now()
				_, done, err := compile(context.Background(), cfg, l)
				el := time.Since(s)
				runtime.ReadMemStats(&m1)
				done()
				fmt.Println(kind, n, e, el, (m1.TotalAlloc-m0.TotalAlloc)>>20, "MiB alloc", m1.HeapSys>>20, err)
			}
		}
	}
}
