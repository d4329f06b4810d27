package wasm

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/tetratelabs/wazero"
)

func TestNest(t *testing.T) {
	for _, kind := range []string{"straight", "blocks", "loops", "nested", "nestedloops", "manylocals","nestmanylocals"} {
	for _, n := range []int{800_000} {
		l, err := scan(big(kind, n))
		if err != nil { t.Fatal(err) }
		s := time.Now()
		_, done, err := compile(context.Background(), wazero.NewRuntimeConfigInterpreter(), l)
		fmt.Println(kind, n, time.Since(s), err)
		done()
	}
	}
}
func TestGo(t *testing.T) {
	b, _ := os.ReadFile("/tmp/wasmhelp/gosdk/hello.wasm")
	l, err := scan(b)
	fmt.Println("largest", l.largestBody, err)
	s := time.Now()
	r, err := Inspect(context.Background(), b)
	r.Exports = nil
	fmt.Println(time.Since(s), r, err)
	for _, e := range []wazero.RuntimeConfig{wazero.NewRuntimeConfigInterpreter(), wazero.NewRuntimeConfigCompiler()} {
	for _, c := range []string{"good", "bad", "panic"} {
		h := newHost(Options{Configuration: []byte(c), Timeout: 10*time.Second, MemoryLimit: 2048}, "0.2.0")
		s := time.Now()
		err := h.runWith(context.Background(), l, e)
		fmt.Println(c, time.Since(s), h.lines(), err)
	}
	}
}
