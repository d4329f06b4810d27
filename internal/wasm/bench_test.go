package wasm

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"
)

func TestTmp(t *testing.T) {
	for _, f := range []string{"../../filters/headers.wasm", "../../filters/ratelimit.wasm", "../../build/testfilters/probe.wasm"} {
		b, _ := os.ReadFile(f)
		s := time.Now()
		r, err := Inspect(context.Background(), b)
		fmt.Println(f, time.Since(s), r.ABI, r.Language, r.MemoryPages, r.Sections, r.Missing, err)
		for _, c := range []string{"", "{}", `{"refuse":"no sir hunter2 x"}`, `{"grow":true}`, `{"spin":true}`} {
			o, err := DryRun(context.Background(), b, Options{Configuration: []byte(c), Redact: []string{"hunter2"}, Timeout: 2 * time.Second})
			fmt.Println("  ", c, o, err)
		}
	}
}
