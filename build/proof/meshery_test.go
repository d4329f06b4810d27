package proof

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protowire"
)

// message is a message as bytes on the wire. What replays Meshery's servers writes and reads it by field numbers, and
// not through the generated code that the adapter uses.
//
// In text a field is `2: "default"`, `5: 1`, or `1: {1: "custom", 3: 4}`; a string may be quoted by backquotes. The numbers
// of the two fixed sizes, which no message of Meshery's has, are `9: fixed32 7` and `9: fixed64 7`.
type message []byte

// messageCodec hands messages on untouched.
type messageCodec struct{}

func (messageCodec) Name() string                  { return "proto" }
func (messageCodec) Marshal(v any) ([]byte, error) { return *v.(*message), nil }
func (messageCodec) Unmarshal(data []byte, v any) error {
	*v.(*message) = slices.Clone(data)
	return nil
}

// parseMessage reads fields that commas separate.
func parseMessage(text string) (message, error) {
	var m message
	for text = strings.TrimSpace(text); text != ""; {
		digits, rest, ok := strings.Cut(text, ":")
		n, err := strconv.ParseUint(strings.TrimSpace(digits), 10, 29)
		if !ok || err != nil {
			return nil, fmt.Errorf("no field number in %q", text)
		}
		if m, rest, err = parseValue(m, protowire.Number(n), strings.TrimSpace(rest)); err != nil {
			return nil, err
		}
		rest = strings.TrimSpace(rest)
		if text = strings.TrimPrefix(rest, ","); text == rest && rest != "" {
			return nil, fmt.Errorf("no comma before %q", rest)
		}
		text = strings.TrimSpace(text)
	}
	return m, nil
}

// parseValue appends a field whose value the text begins with.
func parseValue(m message, n protowire.Number, text string) (_ message, rest string, err error) {
	if strings.HasPrefix(text, "{") {
		end, err := closing(text)
		if err != nil {
			return nil, "", err
		}
		inner, err := parseMessage(text[1:end])
		return protowire.AppendBytes(protowire.AppendTag(m, n, protowire.BytesType), inner), text[end+1:], err
	}
	if quoted, err := strconv.QuotedPrefix(text); err == nil {
		value, err := strconv.Unquote(quoted)
		return protowire.AppendString(protowire.AppendTag(m, n, protowire.BytesType), value), text[len(quoted):], err
	}
	digits, rest, more := strings.Cut(text, ",")
	if more {
		rest = "," + rest
	}
	kind, number, fixed := strings.Cut(strings.TrimSpace(digits), " ")
	if !fixed {
		kind, number = "varint", kind
	}
	v, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return nil, "", fmt.Errorf("no value in %q", text)
	}
	switch kind {
	case "varint":
		return protowire.AppendVarint(protowire.AppendTag(m, n, protowire.VarintType), v), rest, nil
	case "fixed32":
		return protowire.AppendFixed32(protowire.AppendTag(m, n, protowire.Fixed32Type), uint32(v)), rest, nil
	case "fixed64":
		return protowire.AppendFixed64(protowire.AppendTag(m, n, protowire.Fixed64Type), v), rest, nil
	}
	return nil, "", fmt.Errorf("no value in %q", text)
}

// closing is where the brace ends that the text begins with.
func closing(text string) (int, error) {
	for i, depth := 0, 0; i < len(text); i++ {
		switch text[i] {
		case '{':
			depth++
		case '}':
			if depth--; depth == 0 {
				return i, nil
			}
		case '"', '`':
			quoted, err := strconv.QuotedPrefix(text[i:])
			if err != nil {
				return 0, fmt.Errorf("%q: %w", text, err)
			}
			i += len(quoted) - 1
		}
	}
	return 0, fmt.Errorf("%q does not end", text)
}

// field is one field of a message.
type field struct {
	number protowire.Number
	bytes  []byte // of the type that has them
	varint uint64
	typ    protowire.Type
}

func (m message) fields() (all []field, err error) {
	for len(m) > 0 {
		n, typ, size := protowire.ConsumeTag(m)
		if size < 0 {
			return nil, protowire.ParseError(size)
		}
		m = m[size:]
		f := field{number: n, typ: typ}
		switch typ {
		case protowire.BytesType:
			f.bytes, size = protowire.ConsumeBytes(m)
		case protowire.VarintType:
			f.varint, size = protowire.ConsumeVarint(m)
		default:
			size = protowire.ConsumeFieldValue(n, typ, m)
		}
		if size < 0 {
			return nil, protowire.ParseError(size)
		}
		all, m = append(all, f), m[size:]
	}
	return all, nil
}

// text writes each field as parseMessage reads it, in the order of the wire. Those of the nested numbers are messages.
func (m message) text(nested ...protowire.Number) ([]string, error) {
	all, err := m.fields()
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, f := range all {
		value := strconv.FormatUint(f.varint, 10)
		switch {
		case f.typ == protowire.VarintType:
		case f.typ != protowire.BytesType:
			return nil, fmt.Errorf("field %d has the wire type %d, which Meshery's messages do not have", f.number, f.typ)
		case slices.Contains(nested, f.number):
			inner, err := message(f.bytes).text()
			if err != nil {
				return nil, err
			}
			value = "{" + strings.Join(inner, ", ") + "}"
		default:
			value = strconv.Quote(string(f.bytes))
		}
		lines = append(lines, fmt.Sprintf("%d: %s", f.number, value))
	}
	return lines, nil
}

// get is the last string of that number.
func (m message) get(t *testing.T, n protowire.Number) (value string) {
	t.Helper()
	all, err := m.fields()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.number == n && f.typ == protowire.BytesType {
			value = string(f.bytes)
		}
	}
	return value
}

// dialAs connects as Meshery does: without a word before the first call.
func dialAs(t *testing.T, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(messageCodec{})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// callAs sends bytes to a method of Meshery's service and returns bytes.
func callAs(ctx context.Context, conn *grpc.ClientConn, method string, request message) (response message, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err = conn.Invoke(ctx, "/meshes.MeshService/"+method, &request, &response)
	return response, err
}

// streamAs opens StreamEvents and waits until it misses nothing.
func streamAs(ctx context.Context, conn *grpc.ClientConn) (grpc.ClientStream, error) {
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/meshes.MeshService/StreamEvents")
	if err != nil {
		return nil, err
	}
	if err := errors.Join(s.SendMsg(&message{}), s.CloseSend()); err != nil {
		return nil, err
	}
	// A stream that is refused has no headers, and no error until it is read.
	_, err = s.Header()
	return s, err
}

// cable is a TCP listener through which clients reach the adapter, and whose connections can fail.
type cable struct {
	addr string

	mu     sync.Mutex
	frozen bool
	ends   []*net.TCPConn // in pairs: the client's side, the adapter's side
}

func newCable(t *testing.T, to string) *cable {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &cable{addr: l.Addr().String()}
	var all sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		w.reset()
		all.Wait()
	})
	all.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", to)
			if err != nil { // the adapter is away
				client.Close()
				continue
			}
			a, b := client.(*net.TCPConn), server.(*net.TCPConn)
			w.mu.Lock()
			w.ends = append(w.ends, a, b)
			w.mu.Unlock()
			all.Go(func() { w.copy(a, b) })
			all.Go(func() { w.copy(b, a) })
		}
	})
	return w
}

func (w *cable) copy(to, from *net.TCPConn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		w.mu.Lock()
		frozen := w.frozen
		w.mu.Unlock()
		if frozen && err != nil {
			return
		}
		if n > 0 && !frozen {
			if _, err := to.Write(buf[:n]); err != nil {
				from.Close()
				return
			}
		}
		if err != nil {
			_ = to.CloseWrite()
			return
		}
	}
}

// freeze loses everything that is sent from now on, and neither end learns of it.
func (w *cable) freeze() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.frozen = true
}

// reset breaks every connection as a machine does that has forgotten it.
func (w *cable) reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.ends {
		_ = c.SetLinger(0)
		c.Close()
	}
	w.ends = nil
}

// halfClose ends what clients say, and hears on.
func (w *cable) halfClose() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := 1; i < len(w.ends); i += 2 {
		_ = w.ends[i].CloseWrite()
	}
}
