package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// conn is a client's connection, with little more than reading and writing, so that the client takes little CPU.
type conn struct {
	net.Conn
	r *bufio.Reader
}

func dial(addr string) (conn, error) {
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	return conn{c, bufio.NewReader(c)}, err
}

// roundTrip sends a request and reads the answer, whose length must be said.
func (c conn) roundTrip(request []byte) (status int, err error) {
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return 0, err
	}
	if _, err := c.Write(request); err != nil {
		return 0, err
	}
	length := 0
	for first := true; ; first = false {
		l, err := c.r.ReadSlice('\n')
		if err != nil {
			return 0, err
		}
		text := strings.TrimRight(string(l), "\r\n")
		switch name, value, _ := strings.Cut(text, ":"); {
		case first:
			if _, err := fmt.Sscanf(text, "HTTP/1.1 %d", &status); err != nil {
				return 0, fmt.Errorf("%q is no status line: %w", text, err)
			}
		case text == "":
			_, err := io.CopyN(io.Discard, c.r, int64(length))
			return status, err
		case strings.EqualFold(name, "content-length"):
			if length, err = strconv.Atoi(strings.TrimSpace(value)); err != nil {
				return 0, err
			}
		}
	}
}

// get asks over a connection of its own.
func get(addr, path string) (status int, err error) {
	c, err := dial(addr)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	return c.roundTrip([]byte("GET " + path + " HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"))
}
