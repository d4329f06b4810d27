package server_test

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

// raw is a message as bytes on the wire. The tests write and read them by field number, as clients of every generation
// do, and not through the generated code that the server uses.
type raw []byte

func text(n protowire.Number, s string) raw {
	return protowire.AppendString(protowire.AppendTag(nil, n, protowire.BytesType), s)
}

func number(n protowire.Number, v uint64) raw {
	return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), v)
}

func nested(n protowire.Number, fields ...raw) raw { return text(n, string(join(fields...))) }

func join(fields ...raw) raw {
	out := raw{}
	for _, f := range fields {
		out = append(out, f...)
	}
	return out
}

// rawCodec hands messages on untouched.
type rawCodec struct{}

func (rawCodec) Name() string                       { return "proto" }
func (rawCodec) Marshal(v any) ([]byte, error)      { return *v.(*raw), nil }
func (rawCodec) Unmarshal(data []byte, v any) error { *v.(*raw) = append(raw{}, data...); return nil }

// fields is a decoded message: each number's values in their order, a string for bytes and a uint64 for a varint.
type fields map[protowire.Number][]any

func decode(t *testing.T, data raw) fields {
	t.Helper()
	out := fields{}
	for len(data) > 0 {
		n, typ, size := protowire.ConsumeTag(data)
		if size < 0 {
			t.Fatalf("bad tag in %x", data)
		}
		data = data[size:]
		switch typ {
		case protowire.BytesType:
			v, size := protowire.ConsumeBytes(data)
			if size < 0 {
				t.Fatalf("bad bytes in %x", data)
			}
			out[n], data = append(out[n], string(v)), data[size:]
		case protowire.VarintType:
			v, size := protowire.ConsumeVarint(data)
			if size < 0 {
				t.Fatalf("bad number in %x", data)
			}
			out[n], data = append(out[n], v), data[size:]
		default:
			t.Fatalf("field %d has wire type %d", n, typ)
		}
	}
	return out
}

func (f fields) text(n protowire.Number) string {
	if len(f[n]) == 0 {
		return ""
	}
	return f[n][0].(string)
}

func (f fields) number(n protowire.Number) uint64 {
	if len(f[n]) == 0 {
		return 0
	}
	return f[n][0].(uint64)
}

func (f fields) messages(t *testing.T, n protowire.Number) []fields {
	t.Helper()
	var out []fields
	for _, v := range f[n] {
		out = append(out, decode(t, raw(v.(string))))
	}
	return out
}

// String shows a message for comparisons: `1="edge" 3=2`.
func (f fields) String() string {
	var parts []string
	for n := protowire.Number(1); n < 64; n++ {
		for _, v := range f[n] {
			if s, ok := v.(string); ok {
				v = fmt.Sprintf("%q", s)
			}
			parts = append(parts, fmt.Sprintf("%d=%v", n, v))
		}
	}
	return strings.Join(parts, " ")
}
